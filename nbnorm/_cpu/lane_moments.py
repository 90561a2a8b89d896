"""Moments of lanes: shifted sums down each lane of a block; `lane_merges` goes on from there.

Loops run across lanes and hold no branch and at most one division, so that all of them vectorize.

Tried and left out, all on Zen 4: strips of 64 lanes whose sums stay in registers (a fifth less for 64 columns, twice as
long past the caches from 256 on); asking for the next tile in advance (0.8 to 1.5); four rows at once instead of eight
(1024 lanes a tenth less, 2048 a seventh more), one or two (1.2 to 1.8).
"""

from __future__ import annotations

import numpy as np

from nbnorm._cpu.halves import widen
from nbnorm._cpu.lanes import TILE_ROWS, fill, odd, row_weight
from nbnorm._cpu.launch import called, contracted, helper
from nbnorm._cpu.memory import part, row
from nbnorm._cpu.tiles import about_mean, add_rows, corrected, settle_rows, trusted
from nbnorm._math import add, rounded

# Rows that are summed one by one, as those of a mask are, before float64 takes over: more would break the promise of
# the variance (tests/test_numerics.py, test_offset_under_a_mask).
COUNTED_ROWS = TILE_ROWS // 8


@helper
def guess(shift, a, b, c, d, e, f, g, h):
    """Mean of eight rows, lane by lane; exact where they are equal."""
    eighth = rounded(0.125, shift)
    for i in range(shift.shape[0]):
        s = widen(a[i])
        rest = ((widen(b[i]) - s) + (widen(c[i]) - s)) + ((widen(d[i]) - s) + (widen(e[i]) - s))
        rest += ((widen(f[i]) - s) + (widen(g[i]) - s)) + (widen(h[i]) - s)
        shift[i] = s + rest * eighth


@contracted
def push(total, squares, shift, a, w):
    """Add one row, ``w`` times, to the shifted sums."""
    for i in range(total.shape[0]):
        d = widen(a[i]) - shift[i]
        if w is None:
            total[i] += d
            squares[i] += d * d
        else:
            total[i] += w * d
            squares[i] += w * (d * d)


@contracted
def push_eight(total, squares, shift, a, b, c, d, e, f, g, h):
    """Add eight rows at once, so that the sums are read and written once for all of them.

    The squares are added one by one, each in the same instruction as its product.
    """
    for i in range(total.shape[0]):
        s = shift[i]
        da, db, dc, dd = widen(a[i]) - s, widen(b[i]) - s, widen(c[i]) - s, widen(d[i]) - s
        de, df, dg, dh = widen(e[i]) - s, widen(f[i]) - s, widen(g[i]) - s, widen(h[i]) - s
        total[i] += ((da + db) + (dc + dd)) + ((de + df) + (dg + dh))
        chain = da * da
        chain += db * db
        chain += dc * dc
        chain += dd * dd
        chain += de * de
        chain += df * df
        chain += dg * dg
        chain += dh * dh
        squares[i] += chain


@helper
def nth_counted(weights, rows, wanted):
    """Index of the row that counts and has ``wanted`` such rows before it."""
    if weights is None:
        return wanted
    for r in range(rows):
        if weights[r] > 0:
            if wanted == 0:
                return r
            wanted -= 1
    return 0


@helper
def counted_row(x, weights, first, stride, rows, wanted, n):
    """Row that counts and has ``wanted`` such rows before it."""
    return row(x, first + nth_counted(weights, rows, wanted) * stride, n)


@helper
def counted_rows(weights, rows):
    """How many rows count."""
    if weights is None:
        return rows
    found = 0
    for r in range(rows):
        found += weights[r] > 0
    return found


@helper
def total_weight(weights, first, end):
    """Sum of the weights of some rows."""
    if weights is None:
        return np.float64(end - first)
    total = 0.0
    for r in range(first, end):
        total += weights[r]
    return total


@called
def choose_shift(x, weights, first, stride, rows, shift):
    """Choose a value near the mean of each lane: that of eight rows spread over those that count."""
    n = shift.shape[0]
    found = counted_rows(weights, rows)
    guess(
        shift,
        counted_row(x, weights, first, stride, rows, found * 0 // 8, n),
        counted_row(x, weights, first, stride, rows, found * 1 // 8, n),
        counted_row(x, weights, first, stride, rows, found * 2 // 8, n),
        counted_row(x, weights, first, stride, rows, found * 3 // 8, n),
        counted_row(x, weights, first, stride, rows, found * 4 // 8, n),
        counted_row(x, weights, first, stride, rows, found * 5 // 8, n),
        counted_row(x, weights, first, stride, rows, found * 6 // 8, n),
        counted_row(x, weights, first, stride, rows, found * 7 // 8, n),
    )  # fmt: skip


@helper
def shifted_lane_sums(x, weights, first, stride, rows, total, squares, shift):
    """Sum a tile about the shifts; rows without weight are not looked at.

    Of the eight rows that are taken at once, each is the next of nearly an eighth of the tile: eight long walks along
    memory, which the processor reads ahead of, where eight neighbouring rows would be many short ones.
    """
    n = total.shape[0]
    fill(total, 0)
    fill(squares, 0)
    if weights is not None:
        for r in range(rows):
            if weights[r] > 0:
                push(total, squares, shift, row(x, first + r * stride, n), weights[r])
        return
    while rows >= 8:
        apart = odd(rows // 8)
        step = apart * stride
        for i in range(first, first + step, stride):
            push_eight(
                total, squares, shift,
                row(x, i, n), row(x, i + step, n), row(x, i + 2 * step, n), row(x, i + 3 * step, n),
                row(x, i + 4 * step, n), row(x, i + 5 * step, n), row(x, i + 6 * step, n), row(x, i + 7 * step, n),
            )  # fmt: skip
        first += 8 * step
        rows -= 8 * apart
    for r in range(rows):
        push(total, squares, shift, row(x, first + r * stride, n), None)


@helper
def add_wide(total, a, w):
    """Add one row, ``w`` times, in float64."""
    for i in range(total.shape[0]):
        total[i] += w * np.float64(widen(a[i]))


@helper
def add_central(total, squares, rest, mean, a, w):
    """Add one row's deviations and their squares, ``w`` times, in float64.

    Beside a wild value all squares are nearly equal, so that what rounding leaves out of their sum adds up.
    """
    for i in range(total.shape[0]):
        d = np.float64(widen(a[i])) - mean[i]
        total[i] += w * d
        squares[i], rest[i] = add(squares[i], rest[i], w * (d * d))


@called
def careful_lane_sums(x, weights, first, stride, rows, count, total, squares, rest, mean):
    """Approximate mean of each lane and the sums about it, in two float64 passes."""
    n = total.shape[0]
    fill(mean, 0.0)
    for r in range(rows):
        w = row_weight(weights, r)
        if w > 0.0:
            add_wide(mean, row(x, first + r * stride, n), w)
    for i in range(n):
        mean[i] /= count
    fill(total, 0.0)
    fill(squares, 0.0)
    fill(rest, 0.0)
    for r in range(rows):
        w = row_weight(weights, r)
        if w > 0.0:
            add_central(total, squares, rest, mean, row(x, first + r * stride, n), w)
    settle_rows(squares, rest)


@called
def conclude(total, squares, shift, n, mean, m2):
    """Moments of each lane from its shifted sums; a lane that lost digits gets m2 = -1. Returns how many did."""
    lost = 0
    for i in range(mean.shape[0]):
        own_m2 = about_mean(total[i], squares[i], n)
        good = trusted(squares[i], own_m2, shift.itemsize < 8)
        mean[i] = shift[i] + total[i] / n
        m2[i] = own_m2 if good else -1.0
        lost += not good
    return lost


@helper
def chunk_lane_moments(x, weights, first, stride, rows, sums, pool, moments):
    """Mean and m2 of each lane of a block over the rows of a chunk, about one shift per lane.

    A tile is summed in the array's own type, and the tiles of a chunk in float64, in the four rows of ``pool``.
    """
    lanes = sums.shape[1]
    narrow_total, narrow_squares, shift = sums[0], sums[1], sums[2]
    mean, m2 = row(moments, (0, 0), lanes), row(moments, (1, 0), lanes)
    total, squares = row(pool, (0, 0), lanes), row(pool, (1, 0), lanes)
    n = total_weight(weights, 0, rows)
    fill(mean, 0.0)
    fill(m2, 0.0)
    if n == 0.0:
        return
    choose_shift(x, weights, first, stride, rows, shift)
    # Until `conclude`, the rows of mean and m2 hold what rounding leaves out of the totals.
    fill(total, 0.0)
    fill(squares, 0.0)
    most = TILE_ROWS if weights is None else COUNTED_ROWS
    for r in range(0, rows, most):
        tile_rows = min(most, rows - r)
        own_weights = part(weights, r, tile_rows)
        shifted_lane_sums(
            x, own_weights, first + r * stride, stride, tile_rows, narrow_total, narrow_squares, shift
        )
        add_rows(total, mean, narrow_total)
        add_rows(squares, m2, narrow_squares)
    settle_rows(total, mean)
    settle_rows(squares, m2)
    if conclude(total, squares, shift, n, mean, m2) > 0:
        near, rest = row(pool, (2, 0), lanes), row(pool, (3, 0), lanes)
        careful_lane_sums(x, weights, first, stride, rows, n, total, squares, rest, near)
        for i in range(lanes):
            if m2[i] < 0.0:
                mean[i], m2[i] = corrected(near[i], total[i], squares[i], n)
