"""Masks: padded sequences, weights as repetitions, nothing that counts, running statistics, refusals."""

import numpy as np
import pytest

import nbnorm
import oracle


def padded(rng, lengths=(9, 4, 7), channels=5, length=9):
    """Draw sequences (N, C, L) whose padding is NaN, their mask, and a gradient that is 0 there."""
    x = rng.standard_normal((len(lengths), channels, length)).astype(np.float32) * 1.5 + 0.7
    dy = rng.standard_normal(x.shape).astype(np.float32)
    mask = np.arange(length) < np.array(lengths)[:, np.newaxis]
    x = np.where(mask[:, np.newaxis], x, np.float32(np.nan))
    return x, np.where(mask[:, np.newaxis], dy, np.float32(0)), mask


def kept(x, mask):
    """Return the positions that count, one after the other: (positions, C)."""
    return np.ascontiguousarray(x.transpose(0, 2, 1)[mask])


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_padding_is_not_there(activation, channels_last, rng):
    """Outputs, statistics and gradients at kept positions are those of the sequences without their padding."""
    x, dy, mask = padded(rng)
    weight, bias = rng.uniform(0.5, 2, 5).astype(np.float32), rng.standard_normal(5).astype(np.float32)
    running = np.zeros(5), np.ones(5)
    order = (0, 2, 1) if channels_last else (0, 1, 2)
    y, saved = nbnorm.batch_norm_forward(
        np.ascontiguousarray(x.transpose(order)), weight, bias, *running, mask=mask,
        channel_axis=-1 if channels_last else 1, activation=activation,
    )  # fmt: skip
    dx, dweight, dbias = nbnorm.batch_norm_backward(np.ascontiguousarray(dy.transpose(order)), saved)
    y, dx = y.transpose(order), dx.transpose(order)

    plain_running = np.zeros(5), np.ones(5)
    plain_y, plain = nbnorm.batch_norm_forward(
        kept(x, mask), weight, bias, *plain_running, activation=activation
    )
    plain_dx, plain_dweight, plain_dbias = nbnorm.batch_norm_backward(kept(dy, mask), plain)
    assert saved.count == plain.count == mask.sum()
    np.testing.assert_allclose(saved.mean, plain.mean, rtol=1e-6)
    np.testing.assert_allclose(saved.rstd, plain.rstd, rtol=1e-6)
    for found, wanted in zip(running, plain_running, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_allclose(kept(y, mask), plain_y, atol=4e-6)
    np.testing.assert_allclose(kept(dx, mask), plain_dx, atol=2e-5)
    np.testing.assert_allclose(dweight, plain_dweight, atol=2e-5)
    np.testing.assert_allclose(dbias, plain_dbias, atol=2e-5)


@pytest.mark.parametrize("shape", [(5, 4, 9, 11), (12, 4)], ids=["planes", "columns"])
@pytest.mark.parametrize("weighted", [False, True], ids=["counts", "weights"])
def test_parts_of_a_masked_batch(shape, weighted, rng):
    """Merged moments and sums give each part the dx of the whole: its own mask does not know how many values count."""
    x, dy = rng.standard_normal((2, *shape), np.float32)
    mask = rng.integers(0, 4, (shape[0], *shape[2:]))
    mask[[0, -1]] = 2  # no part without any
    mask = mask.astype(np.float32) if weighted else mask > 0
    _, saved = nbnorm.batch_norm_forward(x, mask=mask)
    dx = nbnorm.batch_norm_backward(dy, saved)[0]
    parts = slice(0, 3), slice(3, None)
    first, second = (nbnorm.batch_moments(x[part], mask=mask[part]) for part in parts)
    m = first.merge(second)
    records = [nbnorm.batch_norm_apply(x[part], m, mask=mask[part])[1] for part in parts]
    first, second = (
        nbnorm.batch_norm_grad_sums(dy[part], own) for part, own in zip(parts, records, strict=True)
    )
    for part, own in zip(parts, records, strict=True):
        found = nbnorm.batch_norm_input_grad(dy[part], own, first.merge(second))
        np.testing.assert_allclose(found, dx[part], atol=16 * np.finfo(np.float32).eps * np.abs(dx).max())


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_integer_weights_are_repetitions(norm, rng):
    """A weight of k stands for k equal samples, whose dy and dx are parts of the weighted one's."""
    x = rng.standard_normal((6, 4) if norm == "batch" else (2, 4, 6)).astype(np.float32)
    dy = rng.standard_normal(x.shape).astype(np.float32)
    repeats = np.array([1, 3, 2, 1, 4, 2])
    axis = 0 if norm == "batch" else 2
    mask = repeats if norm == "batch" else np.broadcast_to(repeats, (2, 6))
    forward, backward = getattr(nbnorm, f"{norm}_norm_forward"), getattr(nbnorm, f"{norm}_norm_backward")
    y, saved = forward(x, mask=mask)
    dx = backward(dy, saved)[0]
    shape = [1, 1, 1][: x.ndim]
    shape[axis] = 6
    share = (dy / repeats.reshape(shape)).astype(np.float32)
    many_y, many = forward(np.repeat(x, repeats, axis))
    many_dx = backward(np.repeat(share, repeats, axis), many)[0]
    starts = np.cumsum(repeats) - repeats
    np.testing.assert_allclose(y, np.take(many_y, starts, axis), atol=2e-6)
    np.testing.assert_allclose(dx, np.add.reduceat(many_dx, starts, axis), atol=2e-5)
    assert np.all(saved.count == 13)


@pytest.mark.parametrize("shape", [(4, 3, 5), (6, 3)], ids=str)
def test_nothing_counts(shape, rng):
    """Without any value: statistics 0, output the bias, no gradient, no update; NaN leave no trace."""
    x = rng.standard_normal(shape).astype(np.float32)
    x[0] = np.nan
    bias = np.array([1, 2, 3], np.float32)
    running = np.full(3, 0.5), np.full(3, 2.0)
    mask = np.zeros((shape[0], *shape[2:]), bool)
    y, saved = nbnorm.batch_norm_forward(x, np.ones(3), bias, *running, mask=mask)
    dx, dweight, dbias = nbnorm.batch_norm_backward(np.ones_like(x), saved)
    np.testing.assert_array_equal(y, np.broadcast_to(bias.reshape(3, *[1] * (x.ndim - 2)), shape))
    np.testing.assert_array_equal((saved.mean, saved.rstd), 0)
    np.testing.assert_array_equal(dx, 0)
    np.testing.assert_array_equal(dweight, 0)
    np.testing.assert_array_equal(dbias, x.size / 3)
    np.testing.assert_array_equal(running, [[0.5] * 3, [2.0] * 3])


def test_one_sample_without_values(rng):
    """Instance norm: an empty sample gives the bias, the others are as ever."""
    x = rng.standard_normal((3, 2, 7)).astype(np.float32)
    x[1] = np.nan
    bias = np.array([1, -1], np.float32)
    mask = np.array([[1.0], [0.0], [1.0]])
    y, saved = nbnorm.instance_norm_forward(x, None, bias, mask=mask)
    clean, _ = nbnorm.instance_norm_forward(x[[0, 2]], None, bias, mask=mask[[0, 2]])
    np.testing.assert_array_equal(y[1], np.broadcast_to(bias[:, np.newaxis], (2, 7)))
    oracle.assert_same_bits(y[[0, 2]], clean)
    np.testing.assert_array_equal(saved.count.ravel(), [7, 0, 7])
    assert np.isfinite(nbnorm.instance_norm_backward(np.ones_like(x), saved)[0]).all()


def test_a_mask_of_ones_changes_nothing_but_bits(rng):
    """Full masks of every type and shape that broadcasts: the plain result."""
    x = rng.standard_normal((4, 3, 6)).astype(np.float32)
    plain, _ = nbnorm.batch_norm_forward(x)
    for mask in (np.ones((4, 6), bool), np.ones((4, 1)), np.ones(6, np.int64), True, [[1.0] * 6] * 4):
        y, saved = nbnorm.batch_norm_forward(x, mask=mask)
        np.testing.assert_allclose(y, plain, atol=2e-6)
        assert saved.count == 24


def test_fractional_count_and_the_running_variance(rng):
    """Weights that sum up to less than one update the running mean alone."""
    x = rng.standard_normal((5, 2))
    running = np.zeros(2), np.ones(2)
    weights = np.full(5, 0.1)
    _, saved = nbnorm.batch_norm_forward(x, None, None, *running, mask=weights)
    np.testing.assert_allclose(saved.mean, x.mean(axis=0))
    np.testing.assert_allclose(running[0], 0.1 * x.mean(axis=0))
    np.testing.assert_array_equal(running[1], 1.0)


def test_one_counted_value_is_a_small_batch(rng):
    """A mask that leaves one value per channel is refused like a batch of one."""
    x = rng.standard_normal((5, 2)).astype(np.float32)
    with pytest.raises(ValueError, match="expected more than 1 value per channel when training"):
        nbnorm.batch_norm_forward(x, mask=np.arange(5) == 2)
    y, _ = nbnorm.batch_norm_forward(x, bias=np.array([3.0, 4.0]), mask=np.arange(5) == 2, small_batch="zero")
    np.testing.assert_array_equal(y[2], [3, 4])


def test_masked_moments_merge(rng):
    """Moments of masked parts merge into those of the whole."""
    x = rng.standard_normal((9, 4))
    mask = rng.random(9) < 0.6
    parts = [nbnorm.batch_moments(x[i : i + 3], mask=mask[i : i + 3]) for i in (0, 3, 6)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    np.testing.assert_allclose(merged.mean, x[mask].mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(merged.var(), x[mask].var(axis=0), rtol=1e-13)


BAD = [
    (np.ones((3, 5)), ValueError, r"mask has shape \(3, 5\), expected \(4, 6\)"),
    (np.full((4, 6), -1.0), ValueError, r"mask must hold finite weights >= 0, got -1\.0"),
    (np.full((4, 6), np.nan), ValueError, "mask must hold finite weights >= 0, got nan"),
    (np.ones((4, 6), complex), TypeError, "mask must be boolean or floating, got dtype complex128"),
    ("yes", TypeError, "mask must be boolean or floating"),
]


@pytest.mark.parametrize(("mask", "error", "message"), BAD, ids=[message[:30] for *_, message in BAD])
def test_bad_masks(mask, error, message, rng):
    """What is no mask is refused before anything is written."""
    x, out = rng.standard_normal((4, 3, 6)), np.full((4, 3, 6), 7.0)
    running = np.zeros(3), np.ones(3)
    with pytest.raises(error, match=message):
        nbnorm.batch_norm_forward(x, None, None, *running, mask=mask, out=out)
    np.testing.assert_array_equal(out, 7)
    np.testing.assert_array_equal(running, [[0] * 3, [1] * 3])
