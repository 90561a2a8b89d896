"""Statistics and gradients in parts: a split batch, merged, is the whole batch."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import nbnorm
import oracle
from cases import COLUMNS, FLOATS, PLANES, Case

KINDS = [Case((16, 6, 5, 3), 1, "planes"), Case((16, 5), 1, "columns"), Case((16, 4, 3), -1, "channels last")]
on_kinds = pytest.mark.parametrize("case", KINDS, ids=lambda case: case.reason)
on_floats = pytest.mark.parametrize("dtype", FLOATS, ids=str)
# Uneven parts: an empty one first, one in the middle, and one of a single sample.
PARTS = [slice(0, 0), slice(0, 5), slice(5, 5), slice(5, 6), slice(6, 16)]


def merged(parts):
    """Merge from left to right."""
    first, *rest = parts
    for part in rest:
        first = first.merge(part)
    return first


def draw_moments(rng, channels=3, count=7.0):
    """Draw moments that no batch needs to have."""
    return nbnorm.Moments(np.float64(count), rng.standard_normal(channels), rng.uniform(1, 9, channels))


@on_kinds
@on_floats
def test_split_batch_is_the_whole_batch(case, dtype, rng):
    """Uneven micro-batches, empty ones too: to 1e-12 in float64, within the usual bounds in float32."""
    x, dy = case.x(rng, dtype), case.dy(rng, dtype)
    weight, bias = case.parameters(rng, dtype)
    axis = {"channel_axis": case.channel_axis}
    moments = merged([nbnorm.batch_moments(x[part], **axis) for part in PARTS])
    passes = [nbnorm.batch_norm_apply(x[part], moments, weight, bias, **axis) for part in PARTS]
    sums = merged(
        [nbnorm.batch_norm_grad_sums(dy[part], saved) for part, (_, saved) in zip(PARTS, passes, strict=True)]
    )
    y = np.concatenate([y for y, _ in passes])
    dx = np.concatenate(
        [
            nbnorm.batch_norm_input_grad(dy[part], saved, sums)
            for part, (_, saved) in zip(PARTS, passes, strict=True)
        ]
    )

    reference = oracle.batch_norm(x, weight, bias, **axis)
    gradients = oracle.differentiate(dy, reference)
    assert moments.count == reference.count
    oracle.assert_forward(y, passes[1][1], reference)
    oracle.assert_gradients(
        dx, sums.sum_dz_x_hat.astype(dtype), sums.sum_dz.astype(dtype), reference, gradients
    )

    whole_y, whole = nbnorm.batch_norm_forward(x, weight, bias, **axis)
    whole_gradients = nbnorm.batch_norm_backward(dy, whole)
    tolerance = 1e-12 if dtype == np.float64 else 32 * np.finfo(np.float32).eps
    found = [y, dx, sums.sum_dz_x_hat, sums.sum_dz]
    for one, two in zip(found, [whole_y, *whole_gradients], strict=True):
        np.testing.assert_allclose(one, two, rtol=tolerance, atol=tolerance * oracle.largest(two))


@on_kinds
def test_running_statistics_of_a_split_batch(case, rng):
    """One update with the merged moments is the update of the whole batch."""
    x, old = case.x(rng, np.float64), case.running(rng, np.float64)
    axis = {"channel_axis": case.channel_axis}
    running = [array.copy() for array in old]
    moments = merged([nbnorm.batch_moments(x[part], **axis) for part in PARTS])
    assert nbnorm.update_running_stats(*running, moments, momentum=0.2, ddof=0) is None
    oracle.assert_running(running, old, oracle.batch_norm(x, **axis), momentum=0.2, ddof=0)


def test_gradients_without_the_other_parts_are_wrong(rng):
    """Merging is not a formality: the sums of one part alone give another dx."""
    x, dy = PLANES.x(rng, np.float64), PLANES.dy(rng, np.float64)
    saved = nbnorm.batch_norm_apply(x[:2], nbnorm.batch_moments(x))[1]
    parts = [nbnorm.batch_norm_grad_sums(dy[:2], saved)]
    alone = nbnorm.batch_norm_input_grad(dy[:2], saved, parts[0])
    rest = nbnorm.batch_norm_apply(x[2:], nbnorm.batch_moments(x))[1]
    both = nbnorm.batch_norm_input_grad(
        dy[:2], saved, parts[0].merge(nbnorm.batch_norm_grad_sums(dy[2:], rest))
    )
    assert np.abs(alone - both).max() > 1e-3
    reference = oracle.batch_norm(x)
    expected = oracle.differentiate(dy, reference)
    oracle.assert_within(both, expected.dx[:2], oracle.dx_tolerance(reference, expected), "dx")


@pytest.mark.parametrize("case", [PLANES, COLUMNS], ids=lambda case: case.reason)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_apply_with_constant_moments(case, dtype, rng):
    """constant=True is eval mode with the statistics of the moments."""
    x, dy = case.x(rng, dtype), case.dy(rng, dtype)
    weight, bias = case.parameters(rng, dtype)
    moments = nbnorm.batch_moments((case.x(rng, dtype) * 2).astype(dtype))
    y, saved = nbnorm.batch_norm_apply(x, moments, weight, bias, constant=True)
    reference = oracle.batch_norm(x, weight, bias, running=(moments.mean, moments.var()))
    oracle.assert_within(y, reference.y, oracle.y_tolerance(reference), "y")
    oracle.assert_gradients(
        *nbnorm.batch_norm_backward(dy, saved), reference, oracle.differentiate(dy, reference)
    )


@on_floats
def test_moments_of_a_batch(dtype, rng):
    """Types and values; var, std and rstd are functions of them."""
    x = PLANES.x(rng, dtype)
    moments = nbnorm.batch_moments(x)
    reference = oracle.batch_norm(x)
    assert isinstance(moments.count, np.float64)
    assert moments.mean.dtype == moments.m2.dtype == np.float64
    oracle.assert_within(moments.mean, reference.per_slot("mean"), oracle.mean_tolerance(reference), "mean")
    oracle.assert_within(moments.var(), reference.per_slot("var"), oracle.var_tolerance(reference), "var")
    for ddof in (0, 1):
        np.testing.assert_allclose(moments.var(ddof), moments.m2 / (60 - ddof), rtol=1e-15)
    np.testing.assert_allclose(moments.std(), np.sqrt(moments.var()), rtol=1e-15)
    np.testing.assert_allclose(moments.rstd(1e-3), 1 / np.sqrt(moments.var() + 1e-3), rtol=1e-15)


def test_moments_of_one_value():
    """A single sample per channel is a part like any other: its spread is 0."""
    moments = nbnorm.batch_moments(np.array([[3.0, 1e10]]))
    assert moments.count == 1
    np.testing.assert_array_equal(moments.mean, [3, 1e10])
    np.testing.assert_array_equal(moments.m2, [0, 0])


def test_merge_by_hand():
    """Three values of mean 1 and one value 5: mean 2, m2 grows by 16 * 3 / 4."""
    one = nbnorm.Moments(np.float64(3), np.array([1.0]), np.array([2.0]))
    other = nbnorm.Moments(np.float64(1), np.array([5.0]), np.array([0.0]))
    both = one.merge(other)
    assert (both.count, both.mean.item(), both.m2.item()) == (4, 2, 14)
    sums = nbnorm.GradSums(np.array([1.0]), np.array([10.0])).merge(
        nbnorm.GradSums(np.array([2.0]), np.array([20.0]))
    )
    assert (sums.sum_dz.item(), sums.sum_dz_x_hat.item()) == (3, 30)


def test_merge_is_symmetric(rng):
    """Both orders give the same bits, so two processes that exchange parts agree."""
    one, other = draw_moments(rng, 200, 7), draw_moments(rng, 200, 1234567)
    sums = [nbnorm.GradSums(*rng.standard_normal((2, 200))) for _ in range(2)]
    for a, b, names in ((one, other, ("count", "mean", "m2")), (*sums, ("sum_dz", "sum_dz_x_hat"))):
        for name in names:
            oracle.assert_same_bits(getattr(a.merge(b), name), getattr(b.merge(a), name), name)


def test_merge_of_equal_means_keeps_the_mean(rng):
    """Where the means agree the merged mean is that mean exactly: constant channels stay constant."""
    part = nbnorm.batch_moments(np.full((7, 2), 0.1))
    whole = merged([part, part, nbnorm.batch_moments(np.full((1, 2), 0.1)), part])
    np.testing.assert_array_equal(whole.mean, 0.1)
    np.testing.assert_array_equal(whole.m2, 0)


def test_empty_is_the_identity(rng):
    """Merging nothing changes no bit, also not of a channel that is not finite."""
    mean, m2 = np.array([np.inf, np.nan, 0.1, -0.0, 3e200]), np.array([np.nan, np.nan, 0.3, 0.0, 7.0])
    moments = nbnorm.Moments(np.float64(3), mean, m2)
    empty = nbnorm.Moments.empty(5)
    assert empty.count == 0
    assert empty.mean.shape == empty.m2.shape == (5,)
    for found in (
        moments.merge(empty),
        empty.merge(moments),
        moments.merge(nbnorm.batch_moments(np.empty((0, 5)))),
    ):
        for name in ("count", "mean", "m2"):
            oracle.assert_same_bits(getattr(found, name), getattr(moments, name), name)
    assert empty.merge(empty).count == 0
    np.testing.assert_array_equal(empty.merge(empty).mean, empty.mean)


def test_inputs_of_merge_stay_as_they_were(rng):
    """A merge makes new moments."""
    one, other = draw_moments(rng), draw_moments(rng)
    before = [one.mean.copy(), one.m2.copy(), other.mean.copy(), other.m2.copy()]
    both = one.merge(other)
    assert not any(
        np.shares_memory(both.mean, part.mean) or np.shares_memory(both.m2, part.m2) for part in (one, other)
    )
    for array, expected in zip((one.mean, one.m2, other.mean, other.m2), before, strict=True):
        oracle.assert_same_bits(array, expected)


def test_dictionary_round_trip(rng):
    """Through a dictionary and back, bit for bit."""
    moments = draw_moments(rng, 5, 41)
    as_dict = moments.to_dict()
    assert set(as_dict) == {"count", "mean", "m2"}
    again = nbnorm.Moments.from_dict(as_dict)
    for name in ("count", "mean", "m2"):
        oracle.assert_same_bits(getattr(again, name), getattr(moments, name), name)


def test_gradient_accumulation(rng):
    """A step over uneven micro-batches, parameter gradients added up, is the step over the whole batch."""
    x, dy = KINDS[0].x(rng, np.float64), KINDS[0].dy(rng, np.float64)
    weight, bias = KINDS[0].parameters(rng, np.float64)
    saved = nbnorm.batch_norm_forward(x, weight, bias)[1]
    expected = nbnorm.batch_norm_backward(dy, saved)

    moments = merged([nbnorm.batch_moments(x[part]) for part in PARTS])
    kept = [nbnorm.batch_norm_apply(x[part], moments, weight, bias)[1] for part in PARTS]
    sums = merged(
        [nbnorm.batch_norm_grad_sums(dy[part], saved) for part, saved in zip(PARTS, kept, strict=True)]
    )
    dweight, dbias = np.zeros(6), np.zeros(6)
    for part, one in zip(PARTS, kept, strict=True):
        own = nbnorm.batch_norm_grad_sums(dy[part], one)
        dweight += own.sum_dz_x_hat
        dbias += own.sum_dz
        dx = nbnorm.batch_norm_input_grad(dy[part], one, sums)
        np.testing.assert_allclose(dx, expected[0][part], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(dweight, expected[1], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(dbias, expected[2], rtol=1e-12, atol=1e-12)


def test_shards_in_threads(rng):
    """Shards of different sizes, an empty one too, one thread each: what the caller merges is the whole batch."""
    x, dy = KINDS[0].x(rng, np.float64), KINDS[0].dy(rng, np.float64)
    weight, bias = KINDS[0].parameters(rng, np.float64)
    expected = nbnorm.batch_norm_backward(dy, nbnorm.batch_norm_forward(x, weight, bias)[1])
    parts = [*PARTS, slice(0, 0)]
    with ThreadPoolExecutor(len(parts)) as pool:
        moments = merged(pool.map(lambda part: nbnorm.batch_moments(x[part]), parts))
        kept = list(pool.map(lambda p: nbnorm.batch_norm_apply(x[p], moments, weight, bias)[1], parts))
        sums = merged(pool.map(lambda p, s: nbnorm.batch_norm_grad_sums(dy[p], s), parts, kept))
        dx = pool.map(lambda p, s: nbnorm.batch_norm_input_grad(dy[p], s, sums), parts, kept)
        np.testing.assert_allclose(np.concatenate(list(dx)), expected[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(sums.sum_dz_x_hat, expected[1], rtol=1e-12, atol=1e-12)
