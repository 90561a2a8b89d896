"""Unusual but legal input: containers, byte orders, nothing at all, one value, values that are no numbers."""

import numba
import numpy as np
import pytest
from numba.core import event

import nbnorm
import oracle
from cases import arrange

ROWS = [[1.0, 2.0], [3.0, 7.0], [4.0, -1.0]]
WEIGHT, BIAS = np.array([1.5, -2.0]), np.array([0.25, 4.0])


@pytest.fixture
def memmap(tmp_path):
    """Map a small file."""
    mapped = np.memmap(tmp_path / "x.bin", dtype=np.float64, mode="w+", shape=(3, 2))
    mapped[:] = ROWS
    return mapped


class Tagged(np.ndarray):
    """A subclass."""


@pytest.mark.parametrize(
    "convert",
    [
        lambda rows: rows,
        lambda rows: tuple(map(tuple, rows)),
        lambda rows: [np.array(row) for row in rows],
        lambda rows: [[int(v) for v in row] for row in rows],
        lambda rows: np.array(rows).view(Tagged),
        lambda rows: np.array(rows).astype(">f8"),
    ],
    ids=["list", "tuple", "list of arrays", "list of int", "subclass", "big endian"],
)
def test_containers(convert):
    """Lists are float64 as in NumPy, subclasses are their base class; the result is a plain native array."""
    x = convert(ROWS)
    expected, _ = nbnorm.batch_norm_forward(np.array(ROWS), WEIGHT, BIAS)
    y, saved = nbnorm.batch_norm_forward(x, WEIGHT, BIAS)
    dx = nbnorm.batch_norm_backward(x, saved)[0]
    assert type(y) is type(dx) is np.ndarray
    assert y.dtype == dx.dtype == np.dtype("=f8")
    oracle.assert_same_bits(y, expected)
    oracle.assert_same_bits(
        nbnorm.BatchNorm(2, dtype=np.float64)(x), nbnorm.batch_norm_forward(np.array(ROWS))[0]
    )


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_matrix_and_memmap(memmap):
    """A matrix would keep two dimensions and multiply otherwise; a map would keep its file open."""
    expected, _ = nbnorm.batch_norm_forward(np.array(ROWS), WEIGHT, BIAS)
    for x in (memmap, np.matrix(ROWS)):
        y, saved = nbnorm.batch_norm_forward(x, WEIGHT, BIAS)
        assert type(y) is type(nbnorm.batch_norm_backward(x, saved)[0]) is np.ndarray
        oracle.assert_same_bits(y, expected)
    weight, bias = np.matrix(WEIGHT).view(np.ndarray)[0].view(Tagged), BIAS.astype(">f8")
    oracle.assert_same_bits(nbnorm.batch_norm_forward(np.array(ROWS), weight, bias)[0], expected)


def test_scalars_of_any_type():
    """eps, momentum and axis may be NumPy scalars or integers."""
    x = np.array(ROWS)
    expected = nbnorm.batch_norm_forward(x, eps=1.0, channel_axis=1, momentum=1.0)[0]
    with event.install_recorder("numba:compile") as recorder:
        for eps, axis, momentum in ((1, np.int64(1), True), (np.float32(1), np.uint8(1), np.float32(1))):
            y = nbnorm.batch_norm_forward(x, eps=eps, channel_axis=axis, momentum=momentum)[0]
            oracle.assert_same_bits(y, expected)
    assert not recorder.buffer


@pytest.mark.parametrize("shape", [(0, 2), (0, 2, 5), (3, 2, 0), (3, 0), (0, 0), (3, 0, 5)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_nothing(shape, training):
    """No values: empty results, gradients of parameters 0, running statistics untouched."""
    x, channels = np.empty(shape, np.float32), shape[1]
    weight, bias = np.ones(channels, np.float32), np.ones(channels, np.float32)
    running = [np.full(channels, 0.1, np.float32), np.full(channels, 0.3, np.float32)]
    old = [array.copy() for array in running]
    y, saved = nbnorm.batch_norm_forward(x, weight, bias, *running, training=training)
    dx, dweight, dbias = nbnorm.batch_norm_backward(x, saved)
    assert (y.shape, y.dtype, dx.shape, dx.dtype) == (shape, np.float32, shape, np.float32)
    for gradient in (dweight, dbias):
        oracle.assert_same_bits(gradient, np.zeros(channels, np.float32))
    for now, before in zip(running, old, strict=True):
        oracle.assert_same_bits(now, before)
    assert nbnorm.batch_norm_inference(x, *running, weight, bias).shape == shape


def test_nothing_through_a_layer():
    """An empty batch counts for nothing."""
    layer = nbnorm.BatchNorm(2)
    layer.grads["bias"][:] = 5
    assert layer(np.empty((0, 2), np.float32)).shape == (0, 2)
    assert layer.backward(np.empty((0, 2), np.float32)).shape == (0, 2)
    np.testing.assert_array_equal(layer.grads["bias"], 0)
    state = layer.state_dict()
    assert int(state["num_batches_tracked"]) == 0
    np.testing.assert_array_equal(state["running_var"], 1)


def test_one_value_is_zero_on_request():
    """small_batch="zero": output is bias, dx is 0, the running statistics stay."""
    x, running = np.array([[3.0, 1e10]]), [np.array([0.1, 0.2]), np.array([0.3, 0.4])]
    y, saved = nbnorm.batch_norm_forward(x, WEIGHT, BIAS, *running, small_batch="zero")
    dx, dweight, dbias = nbnorm.batch_norm_backward(np.array([[5.0, 7.0]]), saved)
    for found, expected in (
        (y[0], BIAS),
        (dx[0], [0, 0]),
        (dweight, [0, 0]),
        (dbias, [5, 7]),
        (running[0], [0.1, 0.2]),
        (running[1], [0.3, 0.4]),
    ):
        np.testing.assert_array_equal(found, expected)


def test_one_value_with_a_warning():
    """small_batch="warn" is "zero" and says so; two values are no reason to warn."""
    with pytest.warns(RuntimeWarning, match=r"more than 1 value per channel.*\(1, 2\)"):
        y, saved = nbnorm.batch_norm_forward(np.array([[3.0, 1e10]]), WEIGHT, BIAS, small_batch="warn")
    np.testing.assert_array_equal(y[0], BIAS)
    np.testing.assert_array_equal(nbnorm.batch_norm_backward(np.array([[5.0, 7.0]]), saved)[0], 0)
    nbnorm.batch_norm_forward(np.array(ROWS), WEIGHT, BIAS, small_batch="warn")


def test_one_value_against_the_running_statistics():
    """small_batch="running": eval statistics, constant in backward; the variance learns the deviation."""
    x, dy = np.array([[3.0, -1.0]]), np.array([[5.0, 7.0]])
    mean, var = np.array([0.5, 0.25]), np.array([2.0, 4.0])
    reference = oracle.batch_norm(x, WEIGHT, BIAS, running=(mean, var))
    running = [mean.copy(), var.copy()]
    y, saved = nbnorm.batch_norm_forward(x, WEIGHT, BIAS, *running, small_batch="running")
    oracle.assert_within(y, reference.y, oracle.y_tolerance(reference), "y")
    oracle.assert_gradients(
        *nbnorm.batch_norm_backward(dy, saved), reference, oracle.differentiate(dy, reference)
    )
    np.testing.assert_allclose(running[0], 0.9 * mean + 0.1 * x[0], rtol=1e-15)
    np.testing.assert_allclose(running[1], 0.9 * (var + 0.1 * (x[0] - mean) ** 2), rtol=1e-15)


BAD = np.array([[1.0, np.nan, 1e30, 1.0], [2.0, 3.0, -1e30, 4.0]], np.float32)


def test_nonfinite_statistics_propagate_or_are_skipped():
    """Per channel: one with NaN, one whose variance float32 cannot hold; the others are updated anyway."""
    old = np.full(4, 0.5, np.float32), np.full(4, 2, np.float32)
    found = {}
    for policy in ("propagate", "skip"):
        found[policy] = [array.copy() for array in old]
        nbnorm.batch_norm_forward(BAD, None, None, *found[policy], nonfinite=policy)
    skipped = np.array([False, True, True, False])
    for index in range(2):
        oracle.assert_same_bits(found["skip"][index][skipped], old[index][skipped])
        oracle.assert_same_bits(found["skip"][index][~skipped], found["propagate"][index][~skipped])
        assert np.isnan(found["propagate"][index][1])
    assert found["propagate"][1][2] == np.inf
    np.testing.assert_allclose(found["skip"][0][[0, 3]], [0.9 * 0.5 + 0.15, 0.9 * 0.5 + 0.25], rtol=1e-6)


def test_layer_counts_skipped_updates():
    """A layer keeps the number of updates that were left out."""
    layer = nbnorm.BatchNorm(4, nonfinite="skip", dtype=np.float64)
    assert layer.skipped_updates == 0
    x = np.array(BAD, np.float64)
    layer(x)
    assert layer.skipped_updates == 1
    assert np.isfinite(layer.state_dict()["running_mean"]).all()


@pytest.mark.parametrize(
    ("momentum", "batch"), [(0, [[np.nan, 1.0], [2.0, 3.0]]), (1, [[4.0, 1.0], [2.0, 3.0]])]
)
def test_momentum_at_its_ends_next_to_nan(momentum, batch):
    """0 takes nothing from a NaN batch, 1 keeps nothing of a NaN buffer: no product of 0 and NaN."""
    start = [0.5, np.nan]
    running = [np.array(start), np.array(start)]
    nbnorm.batch_norm_forward(np.array(batch), None, None, *running, momentum=momentum)
    expected = (start, start) if momentum == 0 else ([3, 2], [2, 2])
    np.testing.assert_array_equal(running, expected)


def test_no_eps_and_no_spread():
    """0 / 0 is NaN with NumPy's warning, in that channel only."""
    x = np.array([[1.0, 2.0], [1.0, 7.0]], np.float32)
    with pytest.warns(RuntimeWarning, match="invalid value"):
        y = nbnorm.batch_norm_forward(x, eps=0)[0]
    np.testing.assert_array_equal(y, [[np.nan, -1], [np.nan, 1]])
    np.testing.assert_array_equal(nbnorm.batch_norm_inference(x, np.ones(2), np.ones(2), eps=0), x - 1)


@pytest.mark.parametrize("var", [-1.0, np.nan])
def test_eval_with_an_impossible_variance(var):
    """In the functions a variance below 0 or NaN gives NaN in that channel."""
    y = nbnorm.batch_norm_inference(np.ones((3, 2), np.float32), np.zeros(2), np.array([1.0, var]), eps=0.0)
    np.testing.assert_array_equal(y, [[1, np.nan]] * 3)


def test_call_from_compiled_code():
    """Not callable from a user's own kernel: an ordinary error of Numba's, which names the function."""

    @numba.njit
    def step(x):
        return nbnorm.batch_norm_forward(x)

    with pytest.raises(numba.TypingError, match="batch_norm_forward"):
        step(np.ones((3, 2)))


def test_moments_of_a_broadcast_view():
    """Four values repeated by a stride of 0 count as often as the shape says."""
    few = np.array([[[1.0], [5.0]], [[3.0], [5.0]]], np.float32)
    moments = nbnorm.batch_moments(np.broadcast_to(few, (2, 2, 2**20 + 1)))
    assert moments.count == 2 * (2**20 + 1)
    np.testing.assert_array_equal(moments.mean, [2, 5])
    np.testing.assert_array_equal(moments.var(), [1, 0])


def test_strides_compile_nothing(rng):
    """Kernels are compiled for types, not for strides, flags or byte orders of any argument."""
    x, dy = rng.standard_normal((2, 6, 4, 5)).astype(np.float32)
    per_channel = rng.uniform(1, 2, (4, 4)).astype(np.float32)

    def step(x, dy, weight, bias, mean, var):
        saved = nbnorm.batch_norm_forward(x, weight, bias, mean, var)[1]
        nbnorm.batch_norm_inference(x, mean, var, weight, bias)
        return nbnorm.batch_norm_backward(dy, saved)

    expected = step(x, dy, *(values.copy() for values in per_channel))
    with event.install_recorder("numba:compile") as recorder:
        for layout in ("gaps inside", "inner reversed", "unaligned", "big endian", "read-only"):
            inputs = [arrange(values, layout) for values in (x, dy, *per_channel[:2])]
            running = [arrange(values, "all reversed") for values in per_channel[2:]]
            for found, value in zip(step(*inputs, *running), expected, strict=True):
                oracle.assert_same_bits(found.astype(np.float32), value)
    assert [str(found.data["dispatcher"]) for _, found in recorder.buffer] == []
