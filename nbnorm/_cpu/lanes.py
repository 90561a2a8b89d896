"""Rows of lanes, which are summed, scaled or merged side by side.

Every loop runs across neighbouring lanes, which vectorizes without reordering a single sum.
"""

from __future__ import annotations

import numpy as np

from nbnorm._activation import activate
from nbnorm._cpu.halves import narrow, widen
from nbnorm._cpu.launch import called, helper, inlined, reduction
from nbnorm._cpu.tiles import before_activation, below_activation
from nbnorm._math import input_gradient, standardize

# Rows summed in the array's own type before float64 takes over.
TILE_ROWS = 128


@called
def fill(values, value):
    """Set all entries of a row; Numba compiles this sooner than ``values[:] = value``."""
    for i in range(values.shape[0]):
        values[i] = value


@helper
def odd(n):
    """Largest odd number up to ``n``.

    Rows that are taken at once lie so many apart: by a power of two, all would claim the same places of a cache.
    """
    return n - 1 + n % 2


@called
def copy_row(target, source):
    """Copy a row, compiled as fast as `fill`."""
    for i in range(target.shape[0]):
        target[i] = source[i]


@called
def add_row(total, values):
    """Add one row to another."""
    for i in range(total.shape[0]):
        total[i] += values[i]


@reduction
def summed(values):
    """Sum of a row of lanes."""
    total = 0.0
    for i in range(values.shape[0]):
        total += values[i]
    return total


@helper
def row_weight(weights, r):
    """Weight of a row."""
    return 1.0 if weights is None else np.float64(weights[r])


@inlined
def apply_row(x, y, residual, mean_hi, scale, shift, activation):
    """Normalize one row of lanes."""
    for i in range(x.shape[0]):
        z = before_activation(widen(x[i]), residual, i, mean_hi[i], scale[i], shift[i])
        y[i] = narrow(activate(z, activation), y)


@inlined
def input_grad_row(
    x, dy, dx, dresidual, residual, w, mean_hi, rstd, slope, offset, gain, scale, shift, activation
):  # fmt: skip
    """Dx, and dz where it is wanted, of one row of lanes; no slope: constant statistics, or a row that does not count.

    Such a row may hold NaN where dy is 0: then dz is 0.
    """
    for i in range(x.shape[0]):
        value, d = widen(x[i]), widen(dy[i])
        absent = w is not None and slope is None and d == 0
        d = below_activation(d, value, residual, i, mean_hi[i], scale[i], shift[i], activation, absent)
        if dresidual is not None:
            dresidual[i] = narrow(d, dresidual)
        if slope is None:
            dx[i] = narrow(d * gain[i], dx)
        else:
            x_hat = standardize(value, mean_hi[i], rstd[i])
            if w is None:
                dx[i] = narrow(input_gradient(d, x_hat, slope[i], offset[i], gain[i]), dx)
            else:
                dx[i] = narrow(input_gradient(d, x_hat, w * slope[i], w * offset[i], gain[i]), dx)
