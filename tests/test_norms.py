"""Layer, RMS, group and instance norm against the reference, and the equations that hold between them."""

import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest

import nbnorm
import oracle
from cases import FLOATS, arrange

pytestmark = pytest.mark.usefixtures("kernels_keep_nothing")
on_floats = pytest.mark.parametrize("dtype", FLOATS, ids=str)


@dataclass(frozen=True)
class Trailing:
    """A shape whose last ``normalized`` axes are normalized, and its strides."""

    shape: tuple
    normalized: int
    reason: str
    layout: str = "C"

    def __str__(self):
        """Name the test."""
        return f"{'x'.join(map(str, self.shape))} last {self.normalized} {self.layout}"


TRAILING = [
    Trailing((4, 10), 1, "the smallest that is not trivial"),
    Trailing((7,), 1, "a single row without a leading axis"),
    Trailing((5, 1), 1, "rows of one element: output is the bias, dx is 0"),
    Trailing((3, 4, 5), 2, "two normalized axes"),
    Trailing((2, 3, 4, 5), 3, "three normalized axes, two rows"),
    Trailing((2, 3, 4), 3, "everything is one row"),
    Trailing((67, 33), 1, "odd sizes, a ragged last band"),
    Trailing((300, 768), 1, "several bands, the width of a transformer"),
    Trailing((3, 70001), 1, "rows longer than a chunk"),
    Trailing((1, 200000), 1, "one long row, split among threads"),
    Trailing((33, 4097), 1, "one element past a tile"),
    Trailing((6, 5, 8), 1, "gaps between rows", "gaps outside"),
    Trailing((6, 5, 8), 1, "gaps inside rows", "gaps inside"),
    Trailing((6, 5, 8), 2, "another order of axes is packed", "F"),
    Trailing((6, 5, 8), 1, "the leading axes swapped", "axis 1 slowest"),
    Trailing((6, 5, 8), 1, "backwards", "inner reversed"),
]


@dataclass(frozen=True)
class Grouped:
    """A shape, its channel axis and number of groups, and its strides."""

    shape: tuple
    channel_axis: int
    num_groups: int
    reason: str
    layout: str = "C"

    def __str__(self):
        """Name the test."""
        return f"{'x'.join(map(str, self.shape))} axis {self.channel_axis} G{self.num_groups} {self.layout}"


GROUPED = [
    Grouped((3, 6, 5, 5), 1, 2, "channels first"),
    Grouped((3, 6, 5, 5), 1, 6, "a group per channel"),
    Grouped((3, 6, 5, 5), 1, 1, "one group"),
    Grouped((3, 6, 5, 5), 1, 3, "channels last in memory", "axis 1 fastest"),
    Grouped((3, 5, 7, 6), -1, 3, "channels last"),
    Grouped((3, 5, 7, 6), -1, 6, "channels last, a group per channel"),
    Grouped((2, 8, 7), 1, 4, "three axes"),
    Grouped((5, 6), 1, 3, "no positions at all"),
    Grouped((5, 6), 1, 6, "slots of one value: output is the bias, dx is 0"),
    Grouped((6, 4, 9), 0, 2, "the channel axis leads, so samples lie on axis 1: packed once"),
    Grouped((1, 4, 300, 301), 1, 2, "slots past several chunks, one sample"),
    Grouped((1, 2100, 5, 7), 1, 1, "short runs, one of which a chunk cuts"),
    Grouped((3, 64, 5, 5), 1, 2, "many short runs"),
    Grouped((2, 300, 301, 4), -1, 2, "columns past several chunks"),
    Grouped((3, 64, 10, 10), 1, 32, "many groups of two channels"),
    Grouped((3, 6, 5, 4), 1, 2, "an order of axes without a view", "F"),
    Grouped((3, 6, 5, 4), 1, 2, "gaps", "gaps inside"),
    Grouped((3, 6, 5, 4), 1, 3, "positions swapped", "last two swapped"),
    Grouped((3, 6, 2, 3, 4), 1, 3, "volumes"),
]


def data(case, rng, dtype, param_shape):
    """Draw x, dy (never constant), weight and bias."""
    x = arrange((rng.standard_normal(case.shape) * 1.5 + 0.7).astype(dtype), case.layout)
    dy = arrange(rng.standard_normal(case.shape).astype(dtype), case.layout)
    weight = (rng.uniform(0.5, 2, param_shape) * rng.choice([-1, 1], param_shape)).astype(dtype)
    return x, dy, weight, rng.standard_normal(param_shape).astype(dtype)


def assert_like(result, x):
    """Fail unless the result has the memory order of x."""
    twin = np.empty_like(x)
    assert (result.shape, result.dtype) == (x.shape, x.dtype)
    order = [[step for step, n in zip(a.strides, a.shape, strict=True) if n > 1] for a in (result, twin)]
    assert order[0] == order[1]


@on_floats
@pytest.mark.parametrize("case", TRAILING, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_trailing(norm, case, dtype, rng, device):
    """Output, statistics and gradients of layer and RMS norm."""
    param_shape = case.shape[len(case.shape) - case.normalized :]
    x, dy, weight, bias = data(case, rng, dtype, param_shape)
    axes = tuple(range(-case.normalized, 0))
    if norm == "layer":
        y, saved = nbnorm.layer_norm_forward(device.put(x), weight, bias, axis=axes)
        found = nbnorm.layer_norm_backward(device.put(dy), saved)
        reference = oracle.layer_norm(x, weight, bias, axis=axes)
    else:
        y, saved = nbnorm.rms_norm_forward(device.put(x), weight, axis=axes)
        found = (*nbnorm.rms_norm_backward(device.put(dy), saved), None)
        reference = oracle.layer_norm(x, weight, axis=axes, eps=1e-6, centered=False)
    assert saved.rstd.shape == case.shape[: len(case.shape) - case.normalized]
    assert_like(y, x)
    assert_like(found[0], x)
    check(y, saved, found, dy, reference)


@on_floats
@pytest.mark.parametrize("case", GROUPED, ids=str)
def test_grouped(case, dtype, rng, device):
    """Output, statistics and gradients of group norm."""
    x, dy, weight, bias = data(case, rng, dtype, case.shape[case.channel_axis])
    y, saved = nbnorm.group_norm_forward(
        device.put(x), case.num_groups, weight, bias, channel_axis=case.channel_axis
    )
    found = nbnorm.group_norm_backward(device.put(dy), saved)
    reference = oracle.group_norm(x, case.num_groups, weight, bias, channel_axis=case.channel_axis)
    samples = case.shape[1 if case.channel_axis == 0 else 0]
    assert saved.mean.shape == saved.rstd.shape == (samples, case.num_groups)
    assert_like(y, x)
    assert_like(found[0], x)
    check(y, saved, found, dy, reference)


def check(y, saved, found, dy, reference):
    """Compare with the reference, whose arrays have a shape of their own for group norm."""
    shape = reference.y.shape
    oracle.assert_within(y.reshape(shape), reference.y, oracle.y_tolerance(reference), "y")
    statistics = np.moveaxis(reference.per_slot("rstd"), 0, -1) if swapped(saved, reference) else None
    expected = reference.per_slot("rstd") if statistics is None else statistics
    oracle.assert_within(saved.rstd, expected, np.abs(expected) * 1e-6, "rstd")
    gradients = oracle.differentiate(np.asarray(dy).reshape(shape), reference)
    dx, *parameters = found
    oracle.assert_within(dx.reshape(shape), gradients.dx, oracle.dx_tolerance(reference, gradients), "dx")
    for name, gradient in zip(("dweight", "dbias"), parameters, strict=True):
        if gradient is not None:
            terms = getattr(gradients, f"{name}_terms")
            if name == "dweight":
                # A sum over one or two rows may have nothing but values next to the mean, whose x_hat is as
                # small as the rounding of the mean itself: its error counts beside 1, not beside x_hat.
                terms = terms + gradients.dbias_terms
            eps = np.finfo(gradient.dtype).eps
            bound = oracle.ATOL * eps * terms * np.max(oracle.spread_factor(reference))
            oracle.assert_within(gradient.reshape(terms.shape), getattr(gradients, name), bound, name)


def swapped(saved, reference):
    """Whether the reference has groups before samples, as a leading channel axis puts them."""
    return saved.rstd.shape != reference.per_slot("rstd").shape


@on_floats
def test_a_group_per_channel_is_instance_norm(dtype, rng):
    """The same bits forward and backward, channels first and last."""
    x, dy = (rng.standard_normal((3, 6, 9, 8)).astype(dtype) for _ in range(2))
    weight, bias = (rng.standard_normal(6).astype(dtype) for _ in range(2))
    for axis in (1, -1):
        moved, dmoved = (np.ascontiguousarray(np.moveaxis(a, 1, axis)) for a in (x, dy))
        y, saved = nbnorm.instance_norm_forward(moved, weight, bias, channel_axis=axis)
        z, kept = nbnorm.group_norm_forward(moved, 6, weight, bias, channel_axis=axis)
        oracle.assert_same_bits(y, z)
        results = nbnorm.instance_norm_backward(dmoved, saved), nbnorm.group_norm_backward(dmoved, kept)
        for one, other in zip(*results, strict=True):
            oracle.assert_same_bits(one, other)


@on_floats
def test_one_group_is_layer_norm_over_a_sample(dtype, rng):
    """Without parameters, which run along channels in one and along elements in the other."""
    x, dy = (rng.standard_normal((3, 6, 9, 8)).astype(dtype) for _ in range(2))
    y, saved = nbnorm.group_norm_forward(x, 1)
    z, kept = nbnorm.layer_norm_forward(x, axis=(1, 2, 3))
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(y, z, rtol=0, atol=8 * eps * np.abs(z).max())
    dx, dz = nbnorm.group_norm_backward(dy, saved)[0], nbnorm.layer_norm_backward(dy, kept)[0]
    np.testing.assert_allclose(dx, dz, rtol=0, atol=32 * eps * np.abs(dz).max())


@on_floats
def test_rms_norm_of_centered_rows_is_layer_norm(dtype, rng):
    """Rows that come in pairs x, -x have mean 0, so that both norms agree."""
    half = rng.standard_normal((5, 20)).astype(dtype)
    x = np.concatenate([half, -half], axis=1)
    y = nbnorm.rms_norm_forward(x, eps=1e-5)[0]
    z = nbnorm.layer_norm_forward(x, eps=1e-5)[0]
    np.testing.assert_allclose(y, z, rtol=0, atol=8 * np.finfo(dtype).eps * np.abs(z).max())


@pytest.mark.parametrize("value", [0.1, 1e10, 2.0**24 + 1])
@on_floats
def test_constant_slots_give_exactly_the_bias(value, dtype, rng):
    """Centered norms: variance 0, so the bias to the last bit, and a finite dx."""
    bias = rng.standard_normal(6).astype(dtype)
    x, dy = np.full((2, 6, 9), value, dtype), rng.standard_normal((2, 6, 9)).astype(dtype)
    y, saved = nbnorm.group_norm_forward(x, 3, None, bias)
    oracle.assert_same_bits(y, np.broadcast_to(bias[:, None], x.shape).copy())
    assert np.isfinite(nbnorm.group_norm_backward(dy, saved)[0]).all()
    x, dy = np.full((4, 6), value, dtype), rng.standard_normal((4, 6)).astype(dtype)
    y, saved = nbnorm.layer_norm_forward(x, None, bias)
    oracle.assert_same_bits(y, np.broadcast_to(bias, x.shape).copy())
    assert np.isfinite(nbnorm.layer_norm_backward(dy, saved)[0]).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_rms_norm_of_extreme_rows(scale, rng):
    """Squares under- or overflow float32; the result does not."""
    x = (rng.standard_normal((4, 300)) * scale).astype(np.float32)
    reference = oracle.layer_norm(x, eps=0, centered=False)
    y, saved = nbnorm.rms_norm_forward(x, eps=0)
    oracle.assert_within(y, reference.y, oracle.y_tolerance(reference), "y")
    dy = rng.standard_normal(x.shape).astype(np.float32)
    gradients = oracle.differentiate(dy, reference)
    dx = nbnorm.rms_norm_backward(dy, saved)[0]
    oracle.assert_within(dx, gradients.dx, oracle.dx_tolerance(reference, gradients), "dx")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_value_spoils_its_own_slot_only(bad, rng):
    """Every other slot has the bits of the clean run."""
    x = rng.standard_normal((3, 6, 9)).astype(np.float32)
    spoiled = x.copy()
    spoiled[1, 2, 4] = bad
    for forward, slot in (
        (lambda a: nbnorm.group_norm_forward(a, 3)[0], np.s_[1, 2:4]),
        (lambda a: nbnorm.instance_norm_forward(a)[0], np.s_[1, 2]),
        (lambda a: nbnorm.layer_norm_forward(a)[0], np.s_[1, 2]),
        (lambda a: nbnorm.rms_norm_forward(a)[0], np.s_[1, 2]),
    ):
        clean, result = forward(x), forward(spoiled)
        assert not np.isfinite(result[slot]).all()
        result[slot] = clean[slot]
        oracle.assert_same_bits(result, clean)


def test_need_and_out(rng):
    """Only what is needed is computed, into the buffers that are given; dx may go into dy."""
    x, dy = (rng.standard_normal((40, 30)).astype(np.float32) for _ in range(2))
    weight, bias = (rng.standard_normal(30).astype(np.float32) for _ in range(2))
    y, saved = nbnorm.layer_norm_forward(x, weight, bias)
    whole = nbnorm.layer_norm_backward(dy, saved)
    for i, name in enumerate(("dx", "dweight", "dbias")):
        part = nbnorm.layer_norm_backward(dy, saved, need=(name,))
        oracle.assert_same_bits(part[i], whole[i])
        assert [p is None for p in part] == [i != k for k in range(3)]
    out = np.full((30, 40), np.nan, np.float32).T
    assert nbnorm.layer_norm_forward(x, weight, bias, out=out)[0] is out
    oracle.assert_same_bits(out, y)
    into = dy.copy()
    assert nbnorm.layer_norm_backward(into, saved, out=(into, None, None))[0] is into
    oracle.assert_same_bits(into, whole[0])


def test_empty_arrays():
    """No rows, no elements of a row, no channels: nothing to do, and zeros for the parameters."""
    for shape in ((0, 4), (3, 0)):
        x, weight = np.zeros(shape, np.float32), np.ones(shape[1], np.float32)
        y, saved = nbnorm.layer_norm_forward(x, weight, weight)
        dx, dweight, dbias = nbnorm.layer_norm_backward(x, saved)
        assert (y.shape, dx.shape) == (shape, shape)
        assert not dweight.any()
        assert not dbias.any()
    for shape in ((0, 4, 5), (3, 4, 0)):
        x, weight = np.zeros(shape, np.float32), np.ones(4, np.float32)
        y, saved = nbnorm.group_norm_forward(x, 2, weight, weight)
        dx, dweight, dbias = nbnorm.group_norm_backward(x, saved)
        assert (y.shape, dx.shape) == (shape, shape)
        assert not dweight.any()
        assert not dbias.any()


FAULTS = {
    "weight of another shape": (
        lambda x: nbnorm.layer_norm_forward(x, np.ones(3)),
        ValueError,
        r"weight has shape \(3,\), expected \(4,\) = normalized axes of x with shape \(6, 4\)",
    ),
    "an axis that does not trail": (
        lambda x: nbnorm.layer_norm_forward(x, axis=0),
        ValueError,
        r"axis must be the last axis or a tuple of trailing axes, got 0",
    ),
    "no axis": (lambda x: nbnorm.rms_norm_forward(x, axis=()), ValueError, r"axis must be .* got \(\)"),
    "repeated axis": (lambda x: nbnorm.layer_norm_forward(x, axis=(-1, 1)), ValueError, "repeated axis"),
    "axis out of range": (
        lambda x: nbnorm.layer_norm_forward(x, axis=4),
        np.exceptions.AxisError,
        "axis 4 is out of bounds for array of dimension 2",
    ),
    "no groups": (
        lambda x: nbnorm.group_norm_forward(x, 0),
        ValueError,
        "num_groups must be a positive integer, got 0",
    ),
    "fewer than no groups": (
        lambda x: nbnorm.group_norm_forward(x, -2),
        ValueError,
        "num_groups must be a positive integer, got -2",
    ),
    "true groups": (
        lambda x: nbnorm.group_norm_forward(x, True),
        ValueError,
        "num_groups must be a positive integer, got True",
    ),
    "half a group": (
        lambda x: nbnorm.group_norm_forward(x, 1.5),
        ValueError,
        "num_groups must be a positive integer, got 1.5",
    ),
    "groups do not divide": (
        lambda x: nbnorm.group_norm_forward(x, 3),
        ValueError,
        "number of channels 4 is not divisible by num_groups 3",
    ),
    "one axis": (
        lambda x: nbnorm.instance_norm_forward(x[0]),
        ValueError,
        r"expects at least 2 dimensions \(N, C, ...\), got 1",
    ),
    "saved of another norm": (
        lambda x: nbnorm.layer_norm_backward(x, nbnorm.rms_norm_forward(x)[1]),
        ValueError,
        "saved comes from rms_norm_forward, expected layer_norm_forward",
    ),
    "a gradient it does not have": (
        lambda x: nbnorm.rms_norm_backward(x, nbnorm.rms_norm_forward(x)[1], need=("dbias",)),
        ValueError,
        "need must be one of 'dx', 'dweight', got 'dbias'",
    ),
    "out is x": (
        lambda x: nbnorm.layer_norm_forward(x, out=x),
        ValueError,
        "out shares memory with x, which backward needs",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault):
    """Type and message, and x is as it was."""
    call, error, message = FAULTS[fault]
    x = np.arange(24.0).reshape(6, 4)
    with pytest.raises(error, match=message):
        call(x)
    np.testing.assert_array_equal(x, np.arange(24.0).reshape(6, 4))


def test_num_groups_of_an_unsigned_type(rng):
    """np.uint8(200) counts as 200."""
    x = rng.standard_normal((2, 400, 3))
    one = nbnorm.group_norm_forward(x, np.uint8(200))[0]
    oracle.assert_same_bits(one, nbnorm.group_norm_forward(x, 200)[0])


@pytest.mark.parametrize("shape", [(64, 300), (3, 70001)], ids=str)
def test_dx_into_dy_with_parameter_gradients(shape, rng):
    """The parameters' gradients read dy before dx takes its place, in whole rows and in split ones."""
    x, dy = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    weight, bias = (rng.standard_normal(shape[1]).astype(np.float32) for _ in range(2))
    saved = nbnorm.layer_norm_forward(x, weight, bias)[1]
    expected = nbnorm.layer_norm_backward(dy, saved)
    into = dy.copy()
    for found, wanted in zip(
        nbnorm.layer_norm_backward(into, saved, out=(into, None, None)), expected, strict=True
    ):
        oracle.assert_same_bits(found, wanted)


def test_out_in_the_memory_of_a_parameter_is_refused(rng):
    """A result would change the weight while it is read."""
    block = np.zeros(120, np.float32)
    weight, x = block[3:8], rng.standard_normal((4, 6, 5)).astype(np.float32)
    weight[:] = 2
    with pytest.raises(ValueError, match="out shares memory with weight"):
        nbnorm.layer_norm_forward(x, weight, out=block.reshape(4, 6, 5))
    saved = nbnorm.layer_norm_forward(x, weight)[1]
    with pytest.raises(ValueError, match=r"out\[0\] shares memory with weight"):
        nbnorm.layer_norm_backward(x, saved, out=(block.reshape(4, 6, 5), None, None))
    gradient = np.zeros((4, 6, 5), np.float32)
    with pytest.raises(ValueError, match=r"out\[1\] shares memory with out\[0\]"):
        nbnorm.layer_norm_backward(x, saved, out=(gradient, gradient[0, 0], None))
    np.testing.assert_array_equal(weight, np.full(5, 2, np.float32))


def test_no_channels():
    """An array without channels has nothing to normalize."""
    x, none = np.zeros((4, 0, 5), np.float32), np.zeros(0, np.float32)
    y, saved = nbnorm.instance_norm_forward(x, none, none)
    dx, dweight, dbias = nbnorm.instance_norm_backward(x, saved)
    assert (y.shape, dx.shape, dweight.shape, dbias.shape) == (x.shape, x.shape, (0,), (0,))


@pytest.mark.parametrize("groups", [1, 2, 16])
@pytest.mark.parametrize("samples", [127, 512])
def test_sums_over_many_samples(groups, samples, rng):
    """Terms that all round one way: chains of float32 additions must be short, whatever the number of groups."""
    x = rng.standard_normal((samples, 64), np.float32)
    dy = np.broadcast_to(1 + rng.random(64, np.float32), x.shape).copy()
    _, saved = nbnorm.group_norm_forward(x, groups, np.ones(64, np.float32), np.zeros(64, np.float32))
    dbias = nbnorm.group_norm_backward(dy, saved)[2]
    wanted = dy.astype(np.float64).sum(axis=0)
    assert (np.abs(dbias - wanted) <= 4 * oracle.eps(np.float32) * wanted).all()


def test_sums_of_many_groups_take_little_memory(rng):
    """Group norm of (N, C): what the parameters' gradients need stays below x, however many rows there are."""
    x = rng.standard_normal((512, 1024), np.float32)
    out = np.empty_like(x), *np.empty((2, 1024), np.float32)
    _, saved = nbnorm.group_norm_forward(x, 512, *np.ones((2, 1024), np.float32))
    nbnorm.group_norm_backward(x, saved, out=out)
    tracemalloc.start()
    nbnorm.group_norm_backward(x, saved, out=out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < x.nbytes / 4
