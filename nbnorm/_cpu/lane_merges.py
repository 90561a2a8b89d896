"""Merges of moments: of the chunks of a block, of lanes that folding has laid side by side, of the lanes of a slot.

Loops run across lanes and hold no branch and at most one division, so that all of them vectorize.
"""

from __future__ import annotations

import numpy as np

from nbnorm._cpu.halves import widen
from nbnorm._cpu.lanes import copy_row, fill, summed
from nbnorm._cpu.launch import called, reduction
from nbnorm._cpu.memory import row
from nbnorm._cpu.tiles import corrected
from nbnorm._math import add, settled


@called
def usable(base):
    """Replace what is not finite by 0: deviations from it would not say whether a mean is infinite."""
    for i in range(base.shape[0]):
        base[i] = base[i] if np.isfinite(base[i]) else 0.0


@called
def add_deviations(total, base, mean, n):
    """Add to the sums about a base those of ``n`` values for each mean."""
    for i in range(total.shape[0]):
        total[i] += n * (np.float64(widen(mean[i])) - base[i])


@called
def advance(base, total, n):
    """Turn a base into nearly the mean of ``n`` values whose sums about it are known."""
    for i in range(base.shape[0]):
        base[i] += total[i] / n


@called
def add_spread(total, m2, rest, center, mean, own_m2, n):
    """Add the sums and squares about a center of ``n`` values for each mean; without an m2 they are equal."""
    for i in range(m2.shape[0]):
        d = np.float64(widen(mean[i])) - center[i]
        total[i] += n * d
        spread = n * (d * d) if own_m2 is None else own_m2[i] + n * (d * d)
        m2[i], rest[i] = add(m2[i], rest[i], spread)


@called
def settle_moments(mean, m2, center, total, squares, rest, n):
    """Moments from the sums about a center, which is not quite the mean."""
    for i in range(center.shape[0]):
        mean[i], m2[i] = corrected(center[i], total[i], settled(squares[i], rest[i]), n)


@called
def merge_sets(moments, sets, down, across, counts, spare, n, pool):
    """Merge the moments of ``n`` lanes of some sets, and single values to spare, into those of the first set.

    Each set lies ``down`` blocks of moments and ``across`` lanes behind the one before; ``counts`` are the values in a
    lane of each. Returns how many there are in all of them.
    """
    total_count, base = np.float64(spare.shape[0] // n), 0
    for k in range(sets - 1, -1, -1):
        base = k if counts[k] > 0.0 else base
        total_count += counts[k]
    if total_count == 0.0 or (sets == 1 and spare.shape[0] == 0):
        return total_count
    center, total = row(pool, (0, 0), n), row(pool, (1, 0), n)
    squares, rest = row(pool, (2, 0), n), row(pool, (3, 0), n)
    copy_row(center, row(moments, (base * down, 0, base * across), n))
    usable(center)
    fill(total, 0.0)
    for k in range(sets):
        if counts[k] > 0.0:
            add_deviations(total, center, row(moments, (k * down, 0, k * across), n), counts[k])
    for at in range(0, spare.shape[0], n):
        add_deviations(total, center, row(spare, at, n), 1.0)
    advance(center, total, total_count)
    fill(total, 0.0)
    fill(squares, 0.0)
    fill(rest, 0.0)
    for k in range(sets):
        if counts[k] > 0.0:
            mean, m2 = row(moments, (k * down, 0, k * across), n), row(moments, (k * down, 1, k * across), n)
            add_spread(total, squares, rest, center, mean, m2, counts[k])
    for at in range(0, spare.shape[0], n):
        add_spread(total, squares, rest, center, row(spare, at, n), None, 1.0)
    mean, m2 = row(moments, (0, 0, 0), n), row(moments, (0, 1, 0), n)
    settle_moments(mean, m2, center, total, squares, rest, total_count)
    return total_count


@reduction
def spread(values, center):
    """Sum of (value - center) and of (value - center)**2."""
    total = 0.0
    squares = 0.0
    for i in range(values.shape[0]):
        d = values[i] - center
        total += d
        squares += d * d
    return total, squares


@called
def slot_moments(mean, m2, n):
    """Merge the lanes of a slot, ``n`` values each."""
    lanes = mean.shape[0]
    center = mean[0] + spread(mean, mean[0])[0] / lanes
    total, squares = spread(mean, center)
    return corrected(center, n * total, summed(m2) + n * squares, n * lanes)
