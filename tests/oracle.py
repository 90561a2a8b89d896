"""The reference: normalization by axes, in a wider type than the input, with the promised error bounds.

A norm is told by two sets of axes: ``reduced`` (statistics are taken over them) and ``param`` (weight and
bias vary along them). Batch norm reduces all axes but one and has parameters along that one; the other norms
differ in these two sets only, at most after a reshape of the channel axis into groups. Nothing here knows of
nbnorm.
"""

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

# The type a result is judged in, by the bytes of an input.
WIDER = MappingProxyType({2: np.float64, 4: np.float64, 8: np.longdouble})
ATOL = 4
ATOL_DX = 16


def widen(array):
    """Convert an array to the type of the reference, values unchanged."""
    array = np.asarray(array)
    return array.astype(WIDER[array.dtype.itemsize])


def eps(dtype):
    """Return the machine epsilon, that of bfloat16 too."""
    dtype = np.dtype(dtype)
    return 2.0**-7 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)


@dataclass(frozen=True)
class Forward:
    """A forward pass; statistics and parameters keep the rank of ``x`` to broadcast against it."""

    y: np.ndarray
    x_hat: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    rstd: np.ndarray
    count: float
    weight: np.ndarray
    bias: np.ndarray
    dtype: np.dtype
    reduced: tuple
    param: tuple
    constant: bool
    centered: bool = True

    def per_slot(self, name):
        """Return a statistic without its reduced axes."""
        return np.squeeze(getattr(self, name), axis=self.reduced)


@dataclass(frozen=True)
class Backward:
    """Gradients, and for the parameters the sums of the magnitudes of their terms."""

    dx: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray
    dweight_terms: np.ndarray
    dbias_terms: np.ndarray
    g: np.ndarray


def axes_but(ndim, kept):
    """Return every axis but the kept one, and the kept one as a tuple."""
    kept %= ndim
    return tuple(axis for axis in range(ndim) if axis != kept), (kept,)


def along(values, x, param, neutral):
    """Shape parameters (ordered like the axes ``param``) to broadcast against x; None becomes ``neutral``."""
    shape = [x.shape[axis] if axis in param else 1 for axis in range(x.ndim)]
    if values is None:
        return np.full(shape, neutral, dtype=x.dtype)
    return np.asarray(values).astype(x.dtype).reshape(shape)


def moments(x, reduced):
    """Return count, mean and biased variance by two corrected passes (a constant has variance 0)."""
    count = float(np.prod([x.shape[axis] for axis in reduced]))
    mean = x.mean(axis=reduced, keepdims=True)
    mean = mean + (x - mean).mean(axis=reduced, keepdims=True)
    return count, mean, np.square(x - mean).mean(axis=reduced, keepdims=True)


def normalize(x, weight=None, bias=None, *, reduced, param, eps, statistics=None, centered=True):
    """Normalize x by its own statistics, or by constant ones: (mean, var) along the axes ``param``.

    Without centering the mean is 0 and the variance the mean square.
    """
    dtype = np.asarray(x).dtype
    dtype = dtype if dtype.name == "bfloat16" else dtype.newbyteorder("=")
    x = widen(x)
    with np.errstate(all="ignore"):
        if statistics is None:
            count, mean, var = moments(x, reduced)
            if not centered:
                mean, var = np.zeros_like(mean), np.square(x).mean(axis=reduced, keepdims=True)
        else:
            count = float(np.prod([x.shape[axis] for axis in reduced]))
            mean, var = (along(values, x, param, 0) for values in statistics)
        rstd = 1 / np.sqrt(var + x.dtype.type(eps))
        x_hat = (x - mean) * rstd
        weight, bias = along(weight, x, param, 1), along(bias, x, param, 0)
        y = x_hat * weight + bias
    return Forward(
        y,
        x_hat,
        mean,
        var,
        rstd,
        count,
        weight,
        bias,
        dtype,
        reduced,
        param,
        statistics is not None,
        centered,
    )


def differentiate(dy, forward):
    """Return the gradients of sum(dy * y): dx = rstd (g - mean(g) - x_hat mean(g x_hat)), g = dy weight."""
    f = forward
    dz = np.asarray(dy).astype(f.x_hat.dtype)
    others = tuple(axis for axis in range(dz.ndim) if axis not in f.param)
    with np.errstate(all="ignore"):
        g = dz * f.weight
        centred = g
        if not f.constant:
            c1 = g.mean(axis=f.reduced, keepdims=True) if f.centered else 0
            c2 = (g * f.x_hat).mean(axis=f.reduced, keepdims=True)
            centred = g - c1 - f.x_hat * c2
        terms = dz * f.x_hat
        sums = [np.sum(t, axis=others) for t in (terms, dz, np.abs(terms), np.abs(dz))]
        return Backward(f.rstd * centred, *sums, g)


def batch_norm(x, weight=None, bias=None, *, channel_axis=1, eps=1e-5, running=None):
    """Batch norm; with ``running`` = (mean, var) in eval mode."""
    reduced, param = axes_but(np.ndim(x), channel_axis)
    return normalize(x, weight, bias, reduced=reduced, param=param, eps=eps, statistics=running)


def layer_norm(x, weight=None, bias=None, *, axis=(-1,), eps=1e-5, centered=True):
    """Layer norm over the axes ``axis``; RMS norm without centering."""
    reduced = tuple(sorted(i % np.ndim(x) for i in axis))
    return normalize(x, weight, bias, reduced=reduced, param=reduced, eps=eps, centered=centered)


def grouped(x, num_groups, channel_axis):
    """Split the channel axis into (groups, channels of a group)."""
    x = np.asarray(x)
    axis = channel_axis % x.ndim
    return x.reshape(*x.shape[:axis], num_groups, x.shape[axis] // num_groups, *x.shape[axis + 1 :])


def group_norm(x, num_groups, weight=None, bias=None, *, channel_axis=1, eps=1e-5):
    """Group norm of x with its channel axis split in two: all results have that shape, see `grouped`."""
    axis = channel_axis % np.ndim(x)
    sample = 1 + 1 if axis == 0 else 0  # the first other axis, behind both parts of a leading channel axis
    x = grouped(x, num_groups, channel_axis)
    reduced = tuple(i for i in range(x.ndim) if i not in (axis, sample))
    return normalize(x, weight, bias, reduced=reduced, param=(axis, axis + 1), eps=eps)


def updated_running(running, forward, *, momentum=0.1, ddof=1):
    """Return (mean, var) after one update; momentum weighs the new value."""
    mean, var = forward.per_slot("mean"), forward.per_slot("var")
    batch = mean, var * (forward.count / (forward.count - ddof))
    return tuple(
        (1 - momentum) * widen(old) + momentum * new for old, new in zip(running, batch, strict=True)
    )


# ---- the promises about accuracy ----


def largest(*arrays, floor=1.0):
    """Return the largest magnitude, at least ``floor``."""
    return max([floor, *(np.max(np.abs(a)) for a in arrays if a.size)])


def spread_factor(forward):
    """Return the factor on bounds for float64 inputs, max(1, abs(mean) / std) per slot; 1 for narrower types.

    A slot without spread is exact by a promise of its own, so it gets no allowance here.
    """
    one = np.ones_like(forward.mean)
    if forward.dtype != np.float64:
        return one
    std = np.sqrt(forward.var)
    return np.maximum(1, np.divide(np.abs(forward.mean), std, out=one, where=std > 0))


def y_tolerance(forward):
    """Bound of y, one value per slot: 4 eps max(1, max|y|, max|x_hat weight|, max|bias|)."""
    f = forward
    size = largest(f.y, f.x_hat * f.weight, f.bias)
    return ATOL * eps(f.dtype) * size * spread_factor(f)


def dx_tolerance(forward, backward, *, floor=1.0):
    """Bound of dx, one value per slot: 16 eps max(1, max|dx|, max over slots of rstd max|g|)."""
    f = forward
    size = largest(backward.dx, f.rstd * backward.g, floor=floor)
    return ATOL_DX * eps(f.dtype) * size * spread_factor(f)


def sum_tolerance(terms, forward, dtype):
    """Bound of a parameter gradient of type ``dtype``: 4 eps sum|terms|, eps of the coarser of it and what computes."""
    computing = np.float64 if forward.dtype == np.float64 else np.float32
    coarser = max(eps(computing), eps(dtype))
    factor = spread_factor(forward)
    others = tuple(axis for axis in range(factor.ndim) if axis not in forward.param)
    return ATOL * coarser * terms * factor.max(axis=others)


def mean_tolerance(forward):
    """Bound of the mean that the bound of y leaves with weight 1 and bias 0: 4 eps std max(1, max|x_hat|)."""
    f = forward
    size = ATOL * eps(f.dtype) * largest(f.x_hat)
    return np.squeeze(size * np.sqrt(f.var) * spread_factor(f), axis=f.reduced)


def var_tolerance(forward):
    """Bound of the variance: 1e-6 relative, for float64 inputs 16 eps max(1, abs(mean) / std) relative."""
    relative = 1e-6
    if forward.dtype == np.float64:
        relative = 16 * np.finfo(np.float64).eps * spread_factor(forward)
    return np.squeeze(relative * forward.var, axis=forward.reduced)


def rstd_tolerance(forward, eps):
    """Bound of rstd that the bound of the variance leaves (by the derivative), and its own rounding."""
    var, rstd = forward.per_slot("var"), forward.per_slot("rstd")
    return rstd * (0.5 * var_tolerance(forward) / (var + eps) + 2 * np.finfo(np.float64).eps)


# ---- comparing ----


def assert_within(actual, reference, tolerance, what="result"):
    """Fail where abs(actual - reference) exceeds the tolerance; a NaN on one side only always does."""
    reference = np.asarray(reference)
    assert actual.shape == reference.shape, f"{what} has shape {actual.shape}, expected {reference.shape}"
    error = np.array(np.abs(np.asarray(actual).astype(reference.dtype) - reference))
    error[np.isnan(actual) & np.isnan(reference)] = 0
    tolerance = np.broadcast_to(tolerance, error.shape)
    wrong = ~(error <= tolerance)
    if wrong.any():
        where = np.unravel_index(
            np.argmax(np.where(wrong, error / np.maximum(tolerance, 1e-300), -1)), error.shape
        )
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.size} values are off, the worst at {tuple(map(int, where))}: "
            f"{actual[where]!r} against {reference[where]!r}, allowed {float(tolerance[where]):.3g}"
        )


def assert_same_bits(actual, expected, what="result"):
    """Fail unless two arrays have the same type, shape and bits (0.0 is not -0.0), whatever their strides."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    bits = np.dtype(f"u{actual.dtype.itemsize}")
    differ = np.ascontiguousarray(actual).view(bits) != np.ascontiguousarray(expected).view(bits)
    assert not differ.any(), f"{what}: {differ.sum()} of {differ.size} values differ in their bits"


def assert_forward(y, saved, reference, eps=1e-5):
    """Fail unless output and statistics are within their bounds."""
    assert_within(y, reference.y, y_tolerance(reference), "y")
    assert (saved.mean.dtype, saved.rstd.dtype) == (np.float64, np.float64)
    assert_within(saved.mean, reference.per_slot("mean"), mean_tolerance(reference), "mean")
    assert_within(saved.rstd, reference.per_slot("rstd"), rstd_tolerance(reference, eps), "rstd")


def assert_gradients(dx, dweight, dbias, reference, gradients):
    """Fail unless all three gradients are within their bounds."""
    assert_within(dx, gradients.dx, dx_tolerance(reference, gradients), "dx")
    for name, found in (("dweight", dweight), ("dbias", dbias)):
        bound = sum_tolerance(getattr(gradients, f"{name}_terms"), reference, found.dtype)
        assert_within(found, getattr(gradients, name), bound, name)


def assert_running(running, old, reference, **options):
    """Fail unless running statistics are within the bounds of the batch statistics, and one rounding."""
    updated = updated_running(old, reference, **options)
    bounds = mean_tolerance(reference), var_tolerance(reference) * 2
    for name, found, expected, bound in zip(("mean", "var"), running, updated, bounds, strict=True):
        rounding = 2 * np.finfo(found.dtype).eps * np.maximum(np.abs(expected), np.finfo(found.dtype).tiny)
        assert_within(found, expected, bound + rounding, f"running_{name}")
