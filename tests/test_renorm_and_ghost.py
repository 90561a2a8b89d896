"""Batch renormalization and virtual batches: compositions of what is already there."""

import numpy as np
import pytest

import nbnorm
import oracle
import reference


def limits(x, running, r_max, d_max, eps=1e-5):
    """Return r and d by their definition."""
    axes = tuple(i for i in range(x.ndim) if i != 1)
    wide = x.astype(np.float64)
    std, running_std = np.sqrt(wide.var(axes) + eps), np.sqrt(running[1] + eps)
    r = np.clip(std / running_std, 1 / r_max, r_max)
    return r, np.clip((wide.mean(axes) - running[0]) / running_std, -d_max, d_max)


@pytest.mark.parametrize("shape", [(6, 4, 5), (9, 4)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bounds", [(1.5, 0.3), (1.0, 0.0), (100.0, 100.0)], ids=str)
def test_renorm(bounds, affine, shape, rng):
    """Output and gradients against the formula, r and d being constants; the update is that of plain batch norm."""
    x, dy = (rng.standard_normal(shape).astype(np.float32) * 1.7 + 0.4 for _ in range(2))
    weight = bias = None
    if affine:
        weight, bias = (rng.standard_normal(4).astype(np.float32) for _ in range(2))
    running = rng.standard_normal(4) * 0.3, rng.uniform(0.5, 4, 4)
    before = running[0].copy(), running[1].copy()
    y, saved = nbnorm.batch_norm_forward(x, weight, bias, *running, renorm=bounds)
    dx, dweight, dbias = nbnorm.batch_norm_backward(dy, saved)
    reduced, param = oracle.axes_but(len(shape), 1)
    wanted = reference.forward(
        x, weight, bias, reduced=reduced, param=param, eps=1e-5, renorm=limits(x, before, *bounds)
    )
    gradients, _ = reference.backward(dy, wanted)
    oracle.assert_within(y, wanted.y, oracle.y_tolerance(wanted.plain), "y")
    oracle.assert_within(dx, gradients.dx, oracle.dx_tolerance(wanted.plain, gradients), "dx")
    if affine:
        np.testing.assert_allclose(dweight, gradients.dweight, atol=1e-4)
        np.testing.assert_allclose(dbias, gradients.dbias, atol=1e-4)
    plain = before[0].copy(), before[1].copy()
    nbnorm.batch_norm_forward(x, weight, bias, *plain)
    for a, b in zip(running, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_renorm_without_limits_is_inference(rng):
    """With r and d free the output is that of the running statistics."""
    x = rng.standard_normal((7, 3, 4))
    running = np.array([0.5, -1, 2]), np.array([2.0, 0.5, 1.0])
    wanted = nbnorm.batch_norm_inference(x, *running)
    y, _ = nbnorm.batch_norm_forward(x, None, None, *(s.copy() for s in running), renorm=(1e9, 1e9))
    np.testing.assert_allclose(y, wanted, atol=1e-12)
    evaluated, _ = nbnorm.batch_norm_forward(x, None, None, *running, training=False, renorm=(1.0, 0.0))
    np.testing.assert_allclose(evaluated, wanted, atol=1e-12)


@pytest.mark.parametrize("bad", [(0.5, 1), (2, -1), 3, (1, 2, 3), ("a", "b"), (np.nan, 1)], ids=str)
def test_bad_renorm(bad, rng):
    """Limits below 1 and 0, and what is no pair."""
    with pytest.raises(ValueError, match=r"renorm must be \(r_max, d_max\)"):
        nbnorm.batch_norm_forward(
            rng.standard_normal((4, 3)), None, None, np.zeros(3), np.ones(3), renorm=bad
        )


def test_renorm_needs_running_statistics(rng):
    """Without running statistics there is nothing to come near to."""
    with pytest.raises(ValueError, match="running_mean and running_var are required with renorm"):
        nbnorm.batch_norm_forward(rng.standard_normal((4, 3)), renorm=(2, 1))


GHOSTS = [
    ((8, 3, 5), 1, 4, "C"), ((7, 3, 5), 1, 3, "C"), ((6, 4), 1, 2, "C"), ((6, 4, 3), -1, 4, "C"),
    ((3, 8, 5), 0, 4, "C"), ((6, 3, 4), 1, 2, "F"), ((5, 3, 4), 1, 9, "C"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "axis", "size", "order"), GHOSTS, ids=str)
@pytest.mark.parametrize("options", [{}, {"activation": "relu", "residual": True}], ids=["plain", "fused"])
def test_virtual_batches(shape, axis, size, order, options, rng):
    """Each virtual batch by itself; the running statistics see the whole batch."""
    x = np.asarray(rng.standard_normal(shape).astype(np.float32), order=order)
    dy = rng.standard_normal(shape).astype(np.float32)
    channels = shape[axis]
    weight, bias = (rng.standard_normal(channels).astype(np.float32) for _ in range(2))
    if options:
        options = options | {"residual": rng.standard_normal(shape).astype(np.float32)}
    running, whole = (np.zeros(channels), np.ones(channels)), (np.zeros(channels), np.ones(channels))
    y, saved = nbnorm.batch_norm_forward(
        x, weight, bias, *running, channel_axis=axis, virtual_batch_size=size, **options
    )
    dx, dweight, dbias, *dresidual = nbnorm.batch_norm_backward(dy, saved)
    samples = 1 if axis == 0 else 0
    assert saved.mean.shape == (-(-shape[samples] // size), channels)
    sums = 0
    for k, start in enumerate(range(0, shape[samples], size)):
        where = (slice(None),) * samples + (slice(start, start + size),)
        own = {n: v[where] if n == "residual" else v for n, v in options.items()}
        part_y, part = nbnorm.batch_norm_forward(x[where], weight, bias, channel_axis=axis, **own)
        part_dx, *rest = nbnorm.batch_norm_backward(dy[where], part)
        np.testing.assert_allclose(y[where], part_y, atol=2e-6)
        np.testing.assert_allclose(dx[where], part_dx, atol=2e-5)
        np.testing.assert_allclose(saved.mean[k], part.mean, rtol=1e-6, atol=1e-7)
        if options:
            np.testing.assert_allclose(dresidual[0][where], rest[2], atol=1e-6)
        sums = sums + np.array(rest[:2], np.float64)
    np.testing.assert_allclose((dweight, dbias), sums, atol=2e-5)
    nbnorm.batch_norm_forward(x, weight, bias, *whole, channel_axis=axis)
    np.testing.assert_allclose(running, whole, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(saved.moments.mean, 10 * running[0], rtol=1e-6, atol=1e-7)


def test_virtual_batches_into_given_arrays(rng):
    """Results in ``out``, dx in the memory of dy."""
    x, dy = rng.standard_normal((7, 3, 4)), rng.standard_normal((7, 3, 4))
    y, saved = nbnorm.batch_norm_forward(x, virtual_batch_size=3)
    out = np.full_like(x, np.nan)
    again, _ = nbnorm.batch_norm_forward(x, virtual_batch_size=3, out=out)
    assert again is out
    np.testing.assert_array_equal(out, y)
    wanted = nbnorm.batch_norm_backward(dy, saved)[0]
    dx = nbnorm.batch_norm_backward(dy, saved, out=(dy, None, None))[0]
    assert dx is dy
    np.testing.assert_array_equal(dx, wanted)


def test_a_virtual_batch_of_one_value(rng):
    """The ragged last virtual batch may have one value per channel; small_batch says what then, before any write."""
    x, out = rng.standard_normal((5, 3)), np.full((5, 3), 9.0)
    running = np.zeros(3), np.ones(3)
    with pytest.raises(ValueError, match="expected more than 1 value per channel"):
        nbnorm.batch_norm_forward(x, None, None, *running, virtual_batch_size=2, out=out)
    np.testing.assert_array_equal(out, 9)
    y, _ = nbnorm.batch_norm_forward(x, None, np.ones(3), virtual_batch_size=2, small_batch="zero")
    np.testing.assert_array_equal(y[4], 1)
    before = running[0].copy(), running[1].copy()
    y, saved = nbnorm.batch_norm_forward(x, None, None, *running, virtual_batch_size=2, small_batch="running")
    np.testing.assert_allclose(y[4:], nbnorm.batch_norm_inference(x[4:], *before))
    np.testing.assert_allclose(saved.moments.mean, x.mean(axis=0))
    np.testing.assert_allclose(running[1], 0.9 + 0.1 * x.var(axis=0, ddof=1))


def test_virtual_batches_and_two_phases(rng):
    """Sums of virtual batches are not those of one batch: the two-phase calls say so."""
    x = rng.standard_normal((6, 3))
    _, saved = nbnorm.batch_norm_forward(x, virtual_batch_size=3)
    with pytest.raises(ValueError, match="virtual_batch_size; use batch_norm_backward"):
        nbnorm.batch_norm_grad_sums(x, saved)
    with pytest.raises(ValueError, match="virtual_batch_size must be a positive integer, got 0"):
        nbnorm.batch_norm_forward(x, virtual_batch_size=0)
    evaluated, _ = nbnorm.batch_norm_forward(
        x, None, None, np.zeros(3), np.ones(3), training=False, virtual_batch_size=2
    )
    np.testing.assert_allclose(evaluated, x / np.sqrt(1 + 1e-5))
