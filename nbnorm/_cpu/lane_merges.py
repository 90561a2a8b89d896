"""Merges of moments: of the chunks of a block, of lanes that folding has laid side by side, of the lanes of a slot.

Loops run across lanes and hold no branch and at most one division, so that all of them vectorize.
"""

from __future__ import annotations

import numpy as np

from nbnorm._cpu.halves import widen
from nbnorm._cpu.lanes import copy_row, fill, summed
from nbnorm._cpu.launch import helper, reduction
from nbnorm._cpu.memory import row
from nbnorm._cpu.tiles import corrected
from nbnorm._math import add, settled


@helper
def usable(base):
    """Replace what is not finite by 0: deviations from it would not say whether a mean is infinite."""
    for i in range(base.shape[0]):
        base[i] = base[i] if np.isfinite(base[i]) else 0.0


@helper
def add_deviations(total, base, mean, n):
    """Add to the sums about a base those of ``n`` values for each mean."""
    for i in range(total.shape[0]):
        total[i] += n * (np.float64(widen(mean[i])) - base[i])


@helper
def advance(base, total, n):
    """Turn a base into nearly the mean of ``n`` values whose sums about it are known."""
    for i in range(base.shape[0]):
        base[i] += total[i] / n


@helper
def add_spread(total, m2, rest, center, mean, own_m2, n):
    """Add the sums and squares about a center of ``n`` values for each mean; without an m2 they are equal."""
    for i in range(m2.shape[0]):
        d = np.float64(widen(mean[i])) - center[i]
        total[i] += n * d
        spread = n * (d * d) if own_m2 is None else own_m2[i] + n * (d * d)
        m2[i], rest[i] = add(m2[i], rest[i], spread)


@helper
def settle_moments(mean, m2, center, total, squares, rest, n):
    """Moments from the sums about a center, which is not quite the mean."""
    for i in range(center.shape[0]):
        mean[i], m2[i] = corrected(center[i], total[i], settled(squares[i], rest[i]), n)


@helper
def pooling_rows(pool, n):
    """Rows that `merge_chunks` and `merge_folds` compute in: center, total, squares and their rest; all but 0."""
    center, total = row(pool[0], 0, n), row(pool[1], 0, n)
    squares, rest = row(pool[2], 0, n), row(pool[3], 0, n)
    fill(total, 0.0)
    fill(squares, 0.0)
    fill(rest, 0.0)
    return center, total, squares, rest


@helper
def merge_chunks(moments, counts, lanes, pool):
    """Merge the moments of chunks into those of the first one, lane by lane, and return the number of their values."""
    n, first = 0.0, 0
    for chunk in range(counts.shape[0]):
        first = chunk if n == 0.0 else first
        n += counts[chunk]
    if counts.shape[0] == 1 or n == 0.0:
        return n
    center, total, squares, rest = pooling_rows(pool, lanes)
    copy_row(center, row(moments[first, 0], 0, lanes))
    usable(center)
    for chunk in range(counts.shape[0]):
        if counts[chunk] > 0.0:
            add_deviations(total, center, row(moments[chunk, 0], 0, lanes), counts[chunk])
    advance(center, total, n)
    fill(total, 0.0)
    for chunk in range(counts.shape[0]):
        if counts[chunk] > 0.0:
            mean, m2 = row(moments[chunk, 0], 0, lanes), row(moments[chunk, 1], 0, lanes)
            add_spread(total, squares, rest, center, mean, m2, counts[chunk])
    mean, m2 = row(moments[0, 0], 0, lanes), row(moments[0, 1], 0, lanes)
    settle_moments(mean, m2, center, total, squares, rest, n)
    return n


@helper
def merge_folds(moments, fold, width, rows, x, first, spare, pool):
    """Merge the lanes that folding has laid side by side, ``rows`` values each, and single values left over.

    Returns the number of all of them.
    """
    n = rows * fold + spare // width
    if fold == 1:
        return n
    means, own_m2 = moments[0], moments[1]
    center, total, squares, rest = pooling_rows(pool, width)
    copy_row(center, row(means, 0, width))
    usable(center)
    for f in range(fold):
        add_deviations(total, center, row(means, f * width, width), rows)
    for at in range(0, spare, width):
        add_deviations(total, center, row(x, first + at, width), 1.0)
    advance(center, total, n)
    fill(total, 0.0)
    for f in range(fold):
        mean, m2 = row(means, f * width, width), row(own_m2, f * width, width)
        add_spread(total, squares, rest, center, mean, m2, rows)
    for at in range(0, spare, width):
        add_spread(total, squares, rest, center, row(x, first + at, width), None, 1.0)
    settle_moments(row(means, 0, width), row(own_m2, 0, width), center, total, squares, rest, n)
    return n


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


@helper
def slot_moments(mean, m2, n):
    """Merge the lanes of a slot, ``n`` values each."""
    lanes = mean.shape[0]
    center = mean[0] + spread(mean, mean[0])[0] / lanes
    total, squares = spread(mean, center)
    return corrected(center, n * total, summed(m2) + n * squares, n * lanes)
