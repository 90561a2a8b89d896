"""Each formula once: scalar functions without fastmath, compiled for whichever device calls them.

Statistics and sums are float64; what meets an element has the type of the array (``like`` stands for it).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

# Called by kernels alone: without wrappers for Python and C a function compiles in two thirds of the time.
INNER: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
formula = njit(**INNER)


@formula
def merge(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """Count, mean and m2 of two disjoint sets of values together (Chan, Golub & LeVeque 1979); symmetric."""
    if n_b == 0.0:
        return n_a, mean_a, m2_a
    if n_a == 0.0:
        return n_b, mean_b, m2_b
    n = n_a + n_b
    delta = mean_b - mean_a
    mean = mean_a if delta == 0.0 else (n_a * mean_a + n_b * mean_b) / n
    return n, mean, m2_a + m2_b + delta * delta * (n_a * n_b / n)


@formula
def add(total, rest, term):
    """Sum and what its rounding has left out so far (Knuth's TwoSum, summed as by Neumaier)."""
    new = total + term
    other = new - total
    return new, rest + ((total - (new - other)) + (term - other))


@formula
def accumulate(n_a, mean_a, m2_a, rest, n_b, mean_b, m2_b):
    """`merge` into long sums: the last result is what rounding has left out of m2 so far."""
    n, mean, m2 = merge(n_a, mean_a, 0.0, n_b, mean_b, m2_b)
    m2, rest = add(m2_a, rest, m2)
    return n, mean, m2, rest


@formula
def settled(total, rest):
    """Sum with its rest; the rest of a sum that is not finite means nothing."""
    return total + rest if np.isfinite(rest) else total


@formula
def reciprocal_std(m2, n, eps):
    """1 / sqrt(var + eps) with the biased variance, the one that normalizes; 0 without values."""
    return 0.0 if n == 0.0 else 1.0 / np.sqrt(m2 / n + eps)


@formula
def affine(mean, rstd, weight, bias, like):
    """Coefficients (mean_hi, scale, shift) of `normalize` in the type of ``like``.

    ``mean_hi`` is the mean rounded to that type; the bits it lacks go into the shift, so that nothing is
    lost where the mean is much larger than the standard deviation.
    """
    mean_hi = like.dtype.type(mean)
    scale = rstd * weight
    shift = bias - (mean - mean_hi) * scale
    return mean_hi, like.dtype.type(scale), like.dtype.type(shift)


@formula
def normalize(x, mean_hi, scale, shift):
    """(x - mean) * scale + bias, by the coefficients of `affine`."""
    return (x - mean_hi) * scale + shift


@formula
def gradient_terms(mean, rstd, sum_g, sum_g_x_hat, n, centered, constant, like):
    """Coefficients (slope, offset) of `input_gradient` in the type of ``like``, and the factor of its gain.

    dx = rstd * (g - c1 - x_hat * c2), where g = dz * weight, and c1 and c2 are the means of g and g * x_hat.
    Constant statistics have neither c1 nor c2, and without centering there is no c1. A centered slot of one
    value has dx = 0, exactly.
    """
    factor = rstd
    slope = offset = 0.0
    if centered and not constant and n == 1.0:
        factor = 0.0
    elif not constant:
        slope = -rstd * (sum_g_x_hat / n)
        if centered:
            offset = -rstd * (sum_g / n) - (mean - like.dtype.type(mean)) * rstd * slope
    return like.dtype.type(slope), like.dtype.type(offset), factor


@formula
def input_gradient(dz, x_hat, slope, offset, gain):
    """Dx of one element; ``x_hat`` = (x - mean_hi) * rstd, relative to the rounded mean."""
    return dz * gain + (x_hat * slope + offset)


@formula
def blend(old, new, momentum):
    """Exponential moving average whose momentum weighs the new value; 1 assigns even next to NaN."""
    return new if momentum == 1.0 else (1.0 - momentum) * old + momentum * new
