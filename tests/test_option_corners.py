"""Options on the rare ways through batch norm: no counted value, one value, errors halfway, shared memory."""

import numpy as np
import pytest

import nbnorm

C = 3


@pytest.fixture
def x(rng):
    """Draw an input."""
    return rng.standard_normal((5, C)).astype(np.float32)


@pytest.fixture
def residual(rng):
    """Draw a residual."""
    return rng.standard_normal((5, C)).astype(np.float32)


def fresh():
    """Return new running statistics."""
    return np.zeros(C), np.full(C, 2.0)


@pytest.mark.parametrize("options", [{"nonfinite": "raise"}, {"renorm": (1.0, 0.0)}], ids=str)
def test_a_residual_survives_the_long_way(options, x, residual):
    """Moments first, then the output: the residual is in it."""
    wanted, _ = nbnorm.batch_norm_forward(x, residual=residual)
    y, _ = nbnorm.batch_norm_forward(x, None, None, *fresh(), residual=residual, **options)
    np.testing.assert_allclose(y, wanted, atol=1e-6)


def test_a_mask_of_nothing_where_statistics_are_given(x):
    """Eval mode, and a part of a batch: what does not count is normalized as ever."""
    nothing = np.zeros(5, bool)
    running = np.array([1.0, 2.0, 3.0]), np.full(C, 4.0)
    y, _ = nbnorm.batch_norm_forward(x, None, None, *running, training=False, mask=nothing)
    np.testing.assert_array_equal(y, nbnorm.batch_norm_inference(x, *running))
    m = nbnorm.batch_moments(x)
    y, _ = nbnorm.batch_norm_apply(x, m, mask=nothing)
    np.testing.assert_array_equal(y, nbnorm.batch_norm_apply(x, m)[0])


def test_virtual_batches_over_their_residual(rng):
    """``out`` overlaps the residual: as if it did not."""
    block, x = rng.standard_normal((7, C)), rng.standard_normal((6, C))
    wanted, _ = nbnorm.batch_norm_forward(x, residual=block[:6].copy(), virtual_batch_size=2)
    y, _ = nbnorm.batch_norm_forward(x, residual=block[:6], virtual_batch_size=2, out=block[1:])
    assert y.base is block
    np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("small_batch", ["zero", "running"])
def test_a_whole_batch_of_one_value_in_virtual_batches(small_batch, x):
    """The rules for one value per channel do not depend on virtual batches."""
    plain, ghost = fresh(), fresh()
    options = {"small_batch": small_batch, "momentum": 0.5}
    wanted, _ = nbnorm.batch_norm_forward(x[:1], None, None, *plain, **options)
    y, saved = nbnorm.batch_norm_forward(x[:1], None, None, *ghost, virtual_batch_size=4, **options)
    np.testing.assert_array_equal(y, wanted)
    np.testing.assert_array_equal(ghost, plain)
    assert saved.mean.shape == (1, C)
    assert np.isfinite(nbnorm.batch_norm_backward(x[:1], saved)[0]).all()


def test_a_mask_is_copied(rng):
    """What becomes of its memory after the call does not matter."""
    x, dy = rng.standard_normal((4, 1)).astype(np.float32), rng.standard_normal((4, 1)).astype(np.float32)
    weights = np.array([1, 2, 1, 0], np.float32)
    _, saved = nbnorm.batch_norm_forward(x, mask=weights)
    wanted = nbnorm.batch_norm_backward(dy, saved)[0]
    out = weights.reshape(4, 1).copy()
    _, saved = nbnorm.batch_norm_forward(x, mask=out[:, 0], out=out)
    np.testing.assert_array_equal(nbnorm.batch_norm_backward(dy, saved)[0], wanted)


def test_renorm_of_one_value(x):
    """The output is the bias; nothing is updated."""
    running = fresh()
    bias = np.array([1.0, 2.0, 3.0])
    y, _ = nbnorm.batch_norm_forward(x[:1], None, bias, *running, renorm=(3.0, 5.0), small_batch="zero")
    np.testing.assert_array_equal(y[0], bias)
    np.testing.assert_array_equal(running, fresh())


def test_nothing_is_written_before_all_parts_pass(x):
    """The last virtual batch asks for running statistics that are not there."""
    out = np.full_like(x, 7)
    with pytest.raises(ValueError, match="required when small_batch='running'"):
        nbnorm.batch_norm_forward(x, virtual_batch_size=2, small_batch="running", out=out)
    np.testing.assert_array_equal(out, 7)


@pytest.mark.parametrize("shape", [(6, 9, 0), (6, 0, 4), (0, 3, 4)], ids=str)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_empty_arrays_with_masks(shape, axis):
    """Empty in, empty out."""
    x = np.zeros(shape, np.float32)
    mask = np.ones(tuple(n for i, n in enumerate(shape) if i != axis % 3), bool)
    for forward in (nbnorm.batch_norm_forward, nbnorm.instance_norm_forward):
        for given in (None, mask):
            y, _ = forward(x, channel_axis=axis, mask=given)
            assert y.shape == shape
    y, _ = nbnorm.group_norm_forward(np.zeros((6, 9, 0), np.float32), 2, channel_axis=0)
    assert y.shape == (6, 9, 0)


@pytest.mark.parametrize("weight", [1e-46, 1e39])
def test_weights_that_float32_cannot_hold(weight, x):
    """They would lose their meaning on the way to the kernels."""
    with pytest.raises(ValueError, match="mask must hold weights of 0 or from 1e-30 to 1e30"):
        nbnorm.batch_moments(x, mask=np.full(5, weight))


def test_inference_into_the_residual(x, residual):
    """Without a backward pass the residual may be overwritten, activation or not."""
    wanted = nbnorm.batch_norm_inference(x, *fresh(), residual=residual.copy(), activation="relu")
    y = nbnorm.batch_norm_inference(x, *fresh(), residual=residual, activation="relu", out=residual)
    assert y is residual
    np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"activation": np.array([1, 2])}, "activation"),
        ({"activation": (np.array([1, 2]), 0.1)}, "activation"),
        ({"ddof": np.array([0, 1])}, "ddof"),
        ({"momentum": 10**400}, "momentum"),
        ({"eps": 10**400}, "eps"),
        ({"mask": [[1], [1, 2]]}, "mask must be an array of numbers"),
        ({"weight": [[1], [1, 2]]}, "weight must be an array of numbers"),
        ({"residual": (np.ones(2), "saved")}, "residual must be an array of numbers"),
    ],
    ids=str,
)
def test_odd_values_are_named(options, name, x):
    """Arrays for a choice, numbers past float64, ragged lists: a ValueError that names the argument."""
    with pytest.raises(ValueError, match=name):
        nbnorm.batch_norm_forward(x, **options)
