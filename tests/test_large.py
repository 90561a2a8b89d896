"""More than 2**31 and 2**32 elements: indexes that are kept in 32 bits somewhere come out wrong or write elsewhere.

The inputs are files without contents, which cost address space and time, but neither memory nor disk.
"""

import numpy as np
import pytest

import nbnorm
import oracle
from cases import arrange

pytestmark = pytest.mark.large
# One dtype and one kernel each; elements past 2**31, and past 2**32 for what only reads.
SHAPES = {
    "planes": ((1, 2, 2**31 + 7), 1),
    "short planes": ((2**26 + 3, 2, 33), 1),
    "columns": ((2**29 + 3, 8), 1),
    "narrow columns": ((2**31 + 5, 2), 1),
}


def sparse(path, shape, values, dtype=np.float32):
    """Map a file of zeros whose last elements are the values."""
    x = np.memmap(path, dtype, "w+", shape=shape).view(np.ndarray)
    x.reshape(-1)[-values.size :] = values
    return x


@pytest.mark.parametrize("name", SHAPES)
def test_moments(name, tmp_path, rng):
    """What lies past the last 32-bit index counts in its own channel."""
    shape, axis = SHAPES[name]
    values = rng.standard_normal(66).astype(np.float32)
    x = sparse(tmp_path / "x", shape, values)
    moments = nbnorm.batch_moments(x, channel_axis=axis)
    channel = np.arange(x.size - 66, x.size) // (shape[2] if len(shape) == 3 else 1) % shape[1]
    count = x.size // shape[1]
    for k in range(shape[1]):
        own = values[channel == k].astype(np.float64)
        mean = own.sum() / count
        m2 = np.square(own).sum() - count * mean * mean
        np.testing.assert_allclose(moments.mean[k], mean, rtol=1e-6, atol=1e-18)
        np.testing.assert_allclose(moments.m2[k], m2, rtol=1e-6)
    assert moments.count == count


@pytest.mark.parametrize("name", ["planes", "columns"])
def test_output(name, tmp_path, rng):
    """The last elements of the output are where the last elements of the input are, and nothing else is written."""
    shape = {"planes": (1, 2, 2**30 + 7), "columns": (2**28 + 3, 8)}[name]
    values = rng.standard_normal(66).astype(np.float32)
    x, y = sparse(tmp_path / "x", shape, values), np.memmap(tmp_path / "y", np.float32, "w+", shape=shape)
    zeros = np.zeros(shape[1])
    nbnorm.batch_norm_inference(x, zeros, zeros + 0.25, eps=0, out=y.view(np.ndarray))
    oracle.assert_same_bits(y.reshape(-1)[-66:].view(np.ndarray), 2 * values)
    assert not y.reshape(-1)[:-66].any()


def test_training_in_half_precision(tmp_path, rng):
    """Forward and backward over more than 2**31 elements: 4 GB each of x, y, dy and dx."""
    shape = (2, 1, 2**30 + 7)
    x = sparse(tmp_path / "x", shape, rng.standard_normal(66).astype(np.float16), np.float16)
    dy = sparse(tmp_path / "dy", shape, rng.standard_normal(66).astype(np.float16), np.float16)
    y, dx = (
        np.memmap(tmp_path / name, np.float16, "w+", shape=shape).view(np.ndarray) for name in ("y", "dx")
    )
    _, saved = nbnorm.batch_norm_forward(x, out=y)
    nbnorm.batch_norm_backward(dy, saved, out=(dx, None, None))
    values, gradients = (a.reshape(-1)[-66:].astype(np.float64) for a in (x, dy))
    mean = values.sum() / x.size
    rstd = 1 / np.sqrt(np.square(values).sum() / x.size - mean * mean + 1e-5)
    np.testing.assert_allclose(saved.mean, mean, rtol=1e-6, atol=1e-16)
    np.testing.assert_allclose(saved.rstd, rstd, rtol=1e-6)
    x_hat = (values - mean) * rstd
    np.testing.assert_allclose(y.reshape(-1)[-66:], x_hat, rtol=2e-3)
    c1, c2 = gradients.sum() / x.size, (gradients * x_hat).sum() / x.size
    np.testing.assert_allclose(
        dx.reshape(-1)[-66:], rstd * (gradients - c1 - x_hat * c2), rtol=2e-3, atol=1e-3
    )
    for result in (y, dx):  # all others are equal
        others = result.reshape(-1)[:-66]
        assert others[0] == others.min() == others.max()


def test_broadcast_view(rng):
    """Four values, as often as a stride of 0 says: more elements than there is memory for on small machines."""
    few = arrange(np.array([[[1.0], [5.0]], [[3.0], [5.0]]], np.float32), "C")
    moments = nbnorm.batch_moments(np.broadcast_to(few, (2, 2, 2**29 + 1)))
    assert moments.count == 2 * (2**29 + 1)
    np.testing.assert_array_equal(moments.mean, [2, 5])
    np.testing.assert_allclose(moments.var(), [1, 0], rtol=1e-14)
