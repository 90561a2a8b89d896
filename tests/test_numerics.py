"""The numerical promises: offsets, constants, scales, outliers, values that are not finite."""

import numpy as np
import pytest

import nbnorm
import oracle
from cases import FLOATS, TRAVERSALS, Case

on_floats = pytest.mark.parametrize("dtype", FLOATS, ids=str)
on_traversals = pytest.mark.parametrize("case", TRAVERSALS, ids=lambda case: case.reason)
# The same values as planes and as columns: the two ways statistics are gathered.
KINDS = [Case((3, 4, 6007), 1, "planes"), Case((18021, 4), 1, "columns")]
on_both_kinds = pytest.mark.parametrize("case", KINDS, ids=lambda case: case.reason)


def check(x, dy, weight, bias, *, eps=1e-5, dx_floor=1.0):
    """Compare forward, statistics and gradients with the reference; return y and dx."""
    y, saved = nbnorm.batch_norm_forward(x, weight, bias, eps=eps)
    reference = oracle.batch_norm(x, weight, bias, eps=eps)
    oracle.assert_forward(y, saved, reference, eps)
    variance = saved.moments.var()
    oracle.assert_within(variance, reference.per_slot("var"), oracle.var_tolerance(reference), "variance")
    assert (variance >= 0).all()
    found = nbnorm.batch_norm_backward(dy, saved)
    gradients = oracle.differentiate(dy, reference)
    oracle.assert_gradients(*found, reference, gradients)
    bound = oracle.dx_tolerance(reference, gradients, floor=dx_floor)
    oracle.assert_within(found[0], gradients.dx, bound, "dx")
    assert np.isfinite(y).all()
    assert np.isfinite(found[0]).all()
    return y, found[0]


@on_traversals
@on_floats
@pytest.mark.parametrize("ratio", [0, 1, 1e3, 1e6, -1e6])
def test_offset(case, dtype, ratio, rng):
    """An offset many times the spread: E[x^2] - E[x]^2 and a mean kept in float32 both fail here."""
    x = (rng.standard_normal(case.shape) + ratio).astype(dtype)
    check(x, case.dy(rng, dtype), *case.parameters(rng, dtype))


@on_both_kinds
@on_floats
def test_offset_of_each_channel(case, dtype, rng):
    """Channels of very different offsets side by side, the spread not 1."""
    offsets = np.array([0, 1e3, -1e6, 1]).reshape([1, 4, 1][: len(case.shape)])
    x = ((rng.standard_normal(case.shape) + offsets) * 0.037).astype(dtype)
    check(x, case.dy(rng, dtype), *case.parameters(rng, dtype))


@on_both_kinds
@on_floats
def test_drift_along_the_batch(case, dtype, rng):
    """A ramp: tiles have different means, so that merging them carries most of the variance."""
    ramp = np.linspace(-1e3, 1e3, case.shape[0] * (case.shape[2] if len(case.shape) == 3 else 1))
    x = ramp.reshape(case.shape[0], 1, -1) if len(case.shape) == 3 else ramp[:, None]
    x = (x + rng.standard_normal(case.shape)).astype(dtype)
    check(x, case.dy(rng, dtype), *case.parameters(rng, dtype))


@on_traversals
@on_floats
@pytest.mark.parametrize("value", [0.1, 1e10, 2.0**24 + 1, -1e30, 0.0])
def test_constant_slots(case, dtype, value, rng):
    """Variance exactly 0 and output exactly bias at any magnitude, next to a slot that does vary."""
    x = np.full(case.shape, value, dtype)
    x[:, 1] = rng.standard_normal(x[:, 1].shape)
    weight, bias = case.parameters(rng, dtype)
    y, saved = nbnorm.batch_norm_forward(x, weight, bias)
    dx = nbnorm.batch_norm_backward(case.dy(rng, dtype), saved)[0]
    constant = np.arange(case.shape[1]) != 1
    expected = np.broadcast_to(bias.reshape([-1 if a == 1 else 1 for a in range(x.ndim)]), x.shape)
    oracle.assert_same_bits(y[:, constant], expected[:, constant], "y")
    np.testing.assert_array_equal(saved.moments.m2[constant], 0)
    np.testing.assert_array_equal(saved.mean[constant], np.float64(dtype.type(value)))
    assert np.isfinite(dx).all()
    assert saved.moments.m2[1] > 0


@on_traversals
@on_floats
def test_constant_in_backward(case, dtype, rng):
    """Constant slots: x_hat is 0, so dx is rstd (g - mean g), and dweight is exactly 0."""
    x = np.full(case.shape, 0.1, dtype)
    weight, bias = case.parameters(rng, dtype)
    dy = case.dy(rng, dtype)
    _, saved = nbnorm.batch_norm_forward(x, weight, bias)
    reference = oracle.batch_norm(x, weight, bias)
    found = nbnorm.batch_norm_backward(dy, saved)
    oracle.assert_gradients(*found, reference, oracle.differentiate(dy, reference))
    np.testing.assert_array_equal(found[1], 0)


SCALES = [1e-30, 1e-23, 1e-19, 1e-10, 1e10, 1e15, 1e17, 1e19, 1e25, 1e30]


@on_traversals
@on_floats
@pytest.mark.parametrize("scale", SCALES)
def test_scale(case, dtype, scale, rng):
    """Squares and their float32 sums vanish at the small end and overflow at the large one.

    Without eps the output does not depend on the scale; dx goes with its inverse: its bound has no floor.
    """
    x = (np.clip(rng.standard_normal(case.shape), -3, 3) / 3 * scale).astype(dtype)
    check(x, case.dy(rng, dtype), *case.parameters(rng, dtype), eps=0.0, dx_floor=0.0)


@on_traversals
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_running_statistics_at_extreme_scales(case, scale, rng):
    """float64 buffers hold the variance that float32 ones cannot."""
    x = (rng.standard_normal(case.shape) * scale / 8).astype(np.float32)
    old = case.running(rng, np.float64)
    running = [array.copy() for array in old]
    nbnorm.batch_norm_forward(x, None, None, *running, momentum=1)
    oracle.assert_running(running, old, oracle.batch_norm(x), momentum=1)


@on_both_kinds
@on_floats
@pytest.mark.parametrize("outlier", [30.0, 1e4, 1e6, 1e8, 1e19, 1e30])
@pytest.mark.parametrize("start", [0, 1, 1020])
def test_outlier(case, dtype, outlier, start, rng):
    """One wild value per channel, near the first place of a power-of-two tile: a bad shift for that tile."""
    x = rng.standard_normal(case.shape).astype(dtype)
    for channel, power in enumerate((1, 256, 1024, 4096)):
        position = start + power - 1
        x[(0, channel, position) if x.ndim == 3 else (position, channel)] = outlier
    x[:, 0].flat[0] = -outlier
    check(x, case.dy(rng, dtype), *case.parameters(rng, dtype))


@on_floats
def test_outlier_in_a_long_lane(dtype, rng):
    """Beside a wild value all other deviations are equal, and so are the roundings of their sum; masks do not fold."""
    x = rng.standard_normal((20000, 4)).astype(dtype)
    x[0, 0], x[5, 1] = -1e30, 1e8
    variance = nbnorm.batch_moments(x, mask=np.ones(len(x), bool)).var()
    reference = oracle.batch_norm(x)
    oracle.assert_within(variance, reference.per_slot("var"), oracle.var_tolerance(reference), "variance")


def test_what_whole_vectors_leave_over_costs_no_digits():
    """The last 63 of 319 values, added one by one to the sum of the others, broke the promise of one row of these."""
    x = np.random.default_rng(3).standard_normal((20000, 319), np.float32)
    _, saved = nbnorm.layer_norm_forward(x, eps=0.0)
    np.testing.assert_allclose(saved.rstd**-2.0, x.var(axis=1, dtype=np.float64), rtol=1e-6)


@pytest.mark.parametrize("inner", [47, 63, 254])
def test_what_is_left_over_of_four_segments_costs_few_digits(inner, rng):
    """Squares of two values round the same way: any other cut into steps, vectors and rest errs more than this."""
    slots = 1_000_000 // inner
    x = (rng.choice([-1.0, 1.0], (4, slots, inner)) * rng.uniform(0.5, 4, (slots, 1))).astype(np.float32)
    error = nbnorm.batch_moments(x).var() / x.var(axis=(0, 2), dtype=np.float64) - 1
    assert np.abs(error).max() < 1e-6
    assert np.sqrt(np.mean(error**2)) < 1.6e-7


@pytest.mark.parametrize("ratio", [1e3, 3e4, 5e4, 1e5])
def test_offset_under_a_mask(ratio, rng):
    """Rows of a mask enter their sums one by one: in float32 only a few at a time."""
    x = (rng.standard_normal((2303, 64)) + ratio).astype(np.float32)
    variance = nbnorm.batch_moments(x, mask=np.ones(len(x), bool)).var()
    reference = oracle.batch_norm(x)
    oracle.assert_within(variance, reference.per_slot("var"), oracle.var_tolerance(reference), "variance")


@on_traversals
@on_floats
@pytest.mark.parametrize("distance", [1.0, 3.0, 3.7, 4.3, 10.0, 100.0])
def test_beginnings_unlike_the_rest(case, dtype, distance, rng):
    """The first values of every block lie some spreads away from the rest.

    Sums about them lose bits, the more the further away; from somewhere the block has to be summed otherwise.
    """
    x = rng.standard_normal(case.shape)
    flat = np.moveaxis(x, 1, 0).reshape(case.shape[1], -1)
    for start in range(0, flat.shape[1], 256):
        flat[:, start : start + 8] += distance
    x = np.moveaxis(flat.reshape(case.shape[1], case.shape[0], *case.shape[2:]), 0, 1)
    check(np.ascontiguousarray(x, dtype), case.dy(rng, dtype), *case.parameters(rng, dtype))


@on_both_kinds
def test_first_value_far_from_a_quiet_rest(case, rng):
    """The first value is 1e6 spreads away: beside it the rest of that channel is all but constant."""
    x = (1e3 + rng.standard_normal(case.shape)).astype(np.float32)
    x[0, :2] = 1e6
    check(x, case.dy(rng, np.float32), *case.parameters(rng, np.float32))


POSITIONS = {"first": 0, "second": 1, "middle": 0.5, "last": -1}


@on_traversals
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", POSITIONS)
def test_one_bad_value_spoils_its_slot_only(case, bad, position, rng):
    """Every other slot has the bits of the clean run, in output, gradients and running statistics."""
    x, dy = case.x(rng, np.float32), case.dy(rng, np.float32)
    parameters, running = case.parameters(rng, np.float32), case.running(rng)
    results = {}
    for name in ("clean", "spoiled"):
        if name == "spoiled":
            slot = np.moveaxis(x, 1, 0)[1]
            place = POSITIONS[position]
            slot[
                np.unravel_index(int(place * slot.size) if place == 0.5 else place % slot.size, slot.shape)
            ] = bad
        buffers = [array.copy() for array in running]
        y, saved = nbnorm.batch_norm_forward(x, *parameters, *buffers)
        dx, dweight, dbias = nbnorm.batch_norm_backward(dy, saved)
        results[name] = (np.moveaxis(y, 1, 0), np.moveaxis(dx, 1, 0), dweight, *buffers)
        results[f"{name} dbias"] = dbias
    others = np.arange(case.shape[1]) != 1
    for clean, spoiled in zip(results["clean"], results["spoiled"], strict=True):
        oracle.assert_same_bits(spoiled[others], clean[others])
        assert not np.isfinite(spoiled[1]).any()
    oracle.assert_same_bits(results["spoiled dbias"], results["clean dbias"], "dbias, which x does not feed")


@on_traversals
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("position", ["first", "last"])
def test_one_bad_gradient_spoils_its_slot_only(case, bad, position, rng):
    """A bad value in dy: dx of its slot, dweight and dbias of its channel."""
    x, dy = case.x(rng, np.float32), case.dy(rng, np.float32)
    saved = nbnorm.batch_norm_forward(x, *case.parameters(rng, np.float32))[1]
    clean = nbnorm.batch_norm_backward(dy, saved)
    slot = np.moveaxis(dy, 1, 0)[1]
    slot[np.unravel_index(POSITIONS[position] % slot.size, slot.shape)] = bad
    spoiled = nbnorm.batch_norm_backward(dy, saved)
    others = np.arange(case.shape[1]) != 1
    for one, other in (
        (np.moveaxis(clean[0], 1, 0), np.moveaxis(spoiled[0], 1, 0)),
        *zip(clean[1:], spoiled[1:], strict=True),
    ):
        oracle.assert_same_bits(other[others], one[others])
        assert not np.isfinite(other[1]).any()


@on_traversals
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_value_in_eval(case, bad, rng):
    """Given statistics know nothing of x: a bad value spoils itself and the dweight of its channel."""
    x, dy = case.x(rng, np.float32), case.dy(rng, np.float32)
    parameters, running = case.parameters(rng, np.float32), case.running(rng)
    results = []
    for _ in ("clean", "spoiled"):
        y, saved = nbnorm.batch_norm_forward(x, *parameters, *running, training=False)
        inferred = nbnorm.batch_norm_inference(x, *running, *parameters)
        results.append((y, inferred, *nbnorm.batch_norm_backward(dy, saved)))
        x.flat[0] = bad
    for index, (clean, spoiled) in enumerate(zip(*results, strict=True)):
        if index in (0, 1, 3):
            assert not np.isfinite(spoiled.flat[0])
            spoiled.flat[0] = clean.flat[0]
        oracle.assert_same_bits(spoiled, clean)


@on_traversals
@on_floats
@pytest.mark.parametrize("value", [0.1, 1e4])
def test_constant_gradient(case, dtype, value, rng):
    """The true dx is 0: what remains is rounding, which must not add up along the slot."""
    check(case.x(rng, dtype), np.full(case.shape, value, dtype), *case.parameters(rng, dtype))


@on_floats
@pytest.mark.parametrize("masked", [False, True])
def test_constant_gradient_of_tiny_planes(dtype, masked, rng):
    """Where planes fill no vector, each is a chain of additions by itself, not four of them one after the other."""
    x, value = rng.standard_normal((4, 200, 15)).astype(dtype), rng.uniform(0.1, 10, 200).astype(dtype)
    dy = np.broadcast_to(value[:, np.newaxis], x.shape).astype(dtype)
    mask = np.ones((4, 15), bool) if masked else None
    _, saved = nbnorm.batch_norm_forward(x, *np.ones((2, 200), dtype), mask=mask)
    assert saved.view.traversal == "planes"
    _, _, dbias = nbnorm.batch_norm_backward(dy, saved)
    np.testing.assert_allclose(dbias, 60 * value.astype(np.float64), rtol=4 * np.finfo(dtype).eps)


@on_both_kinds
@on_floats
def test_gradient_along_x_hat(case, dtype, rng):
    """The other direction in which dx vanishes."""
    x, (weight, bias) = case.x(rng, dtype), case.parameters(rng, dtype)
    dy = oracle.batch_norm(x).x_hat.astype(dtype)
    check(x, dy, weight, bias)
