"""Moments and sums of small pieces of memory, and the grid of chunks that fixes their order.

The type of the array carries short sums, float64 everything else. The grid depends on shapes alone, so
the bits of a result depend neither on the number of threads nor on the schedule.
"""

from __future__ import annotations

from math import isnan

import numpy as np

from nbnorm._activation import activation_gradient
from nbnorm._cpu.halves import widen
from nbnorm._cpu.launch import (
    called,
    four_vector_reduction,
    helper,
    inlined,
    narrow_reduction,
    reduction,
)
from nbnorm._cpu.memory import part, row
from nbnorm._cpu.vector_sums import vector_sums
from nbnorm._math import (
    accumulate,
    add,
    normalize,
    reciprocal_std,
    rounded,
    settled,
    standardize,
)

# Values summed in the array's own type before float64 takes over: with 32 or more SIMD accumulators no chain
# is longer than 32 additions, which keeps a float32 sum within about one part in ten million.
PIECE = 1024
WIDE_PIECE = 256  # of float64, whose accumulators are fewer and whose promise is tighter
# Short segments, or samples, that are gone through at once: what is done once, as putting accumulators together or
# reading and writing sums, is done for all of them. Segments of 81 to 196 took 0.7 to 0.9 of the time then, with sums
# that were not put together side by side (benchmarks/bench_batch_norm.py, ShortSegments, before and after; Zen 4).
FOUR = 4
# Values that share a shift and one Chan merge (16 KB of float32, half a first-level cache).
TILE = 4096
# Values that one task reads where a slot is split among threads.
CHUNK = 65536
# Squares below this sum may have lost bits to float32's underflow. float64 is taken at its word: what
# underflows there is smaller than 1e-150.
TINY_SQUARES = 1e-25
# A sum of squares about the shift this much larger than m2 has cancelled too many bits. Shifts are means of
# eight values, so that ordinary data comes near this limit once in a million tiles.
CANCELLATION = 4.0


@helper
def trusted(squares, m2, single):
    """Whether a tile's shifted sum of squares kept its digits: it is finite, not tiny, not cancelled."""
    return squares < np.inf and (not single or squares >= TINY_SQUARES) and CANCELLATION * m2 >= squares


@helper
def piece(x):
    """Size of the pieces of an array."""
    return PIECE if x.itemsize < 8 else WIDE_PIECE


@helper
def in_fours(n, x):
    """How many of some segments of ``n`` values are summed at once: four, if they fit a piece, else one."""
    return FOUR if FOUR * n <= piece(x) else 1


@helper
def nearby(x):
    """Return the mean of eight values spread over x, a good shift; it is exact where they are equal."""
    first = widen(x[0])
    rest = rounded(0.0, x)
    for i in range(1, 8):
        rest += widen(x[i * x.shape[0] // 8]) - first
    return first + rest * rounded(0.125, x)


@helper
def nearby_counted(x, weights):
    """Return `nearby` of the values that count: eighths of x stand in for its elements."""
    first = rest = rounded(0.0, x)
    found = 0
    for k in range(8):
        for i in range(k * x.shape[0] // 8, (k + 1) * x.shape[0] // 8):
            if weights[i] > 0:
                first = first if found else widen(x[i])
                rest += widen(x[i]) - first
                found += 1
                break
    return first + rest / rounded(max(found, 1), x)


@reduction
def counted_sums(x, weights, shift):
    """Count, `vector_sums` of one piece by weights; what has none is not looked at."""
    count = total = squares = rounded(0.0, x)
    for i in range(x.shape[0]):
        w = weights[i]
        d = widen(x[i]) - shift if w > 0 else rounded(0.0, x)
        count += w
        total += w * d
        squares += w * (d * d)
    return np.float64(count), np.float64(total), np.float64(squares)


@reduction
def plain_sums(x, weights):
    """Count and sum over one piece in float64."""
    count = np.float64(x.shape[0])
    total = 0.0
    if weights is None:
        for i in range(x.shape[0]):
            total += np.float64(widen(x[i]))
    else:
        count = 0.0
        for i in range(x.shape[0]):
            w = np.float64(weights[i])
            count += w
            total += w * np.float64(widen(x[i])) if w > 0 else 0.0
    return count, total


@reduction
def central_sums(x, weights, mean):
    """Sum of (x - mean) and of (x - mean)**2 over one piece in float64."""
    total = squares = 0.0
    if weights is None:
        for i in range(x.shape[0]):
            d = np.float64(widen(x[i])) - mean
            total += d
            squares += d * d
    else:
        for i in range(x.shape[0]):
            w = np.float64(weights[i])
            d = np.float64(widen(x[i])) - mean if w > 0 else 0.0
            total += w * d
            squares += w * (d * d)
    return total, squares


def _grad_sums(x, dy, weight, mean_hi, rstd, scale=None, shift=None, activation=None, residual=None):
    """Sums of g = dz * weight, or dz, and of g * x_hat over one piece; x_hat relative to the rounded mean."""
    sum_g = rounded(0.0, x)
    sum_g_x_hat = rounded(0.0, x)
    for i in range(x.shape[0]):
        value = widen(x[i])
        g = below_activation(widen(dy[i]), value, residual, i, mean_hi, scale, shift, activation)
        if weight is not None:
            g = rounded(g * weight[i], x)
        sum_g += g
        sum_g_x_hat += g * standardize(value, mean_hi, rstd)
    return sum_g, sum_g_x_hat


# As many vectors as LLVM takes by itself where it has 32 registers for them: with 16, it took fewer where dz is
# computed than where it is given, so that sums had other bits (tests/test_options.py).
piece_grad_sums = four_vector_reduction(_grad_sums)
# The same over a short row.
short_grad_sums = narrow_reduction(_grad_sums)


@helper
def about_mean(total, squares, n):
    """Sum of squares about the mean, from the sums about a value near it."""
    return squares - total * (total / n)


@helper
def corrected(mean, total, squares, n):
    """Moments from the sums about an approximate mean; what rounding left in the mean is put back."""
    correction = total / n
    m2 = about_mean(total, squares, n)
    return mean if isnan(correction) else mean + correction, 0.0 if m2 < 0.0 else m2


@inlined
def sums_about(x, weights, shift):
    """Count, and `vector_sums` of neighbours, piece after piece."""
    count = total = squares = 0.0
    for i in range(0, x.shape[0], piece(x)):
        size = min(piece(x), x.shape[0] - i)
        if weights is None:
            c = np.float64(size)
            a, b = vector_sums(row(x, i, size), shift)
        else:
            c, a, b = counted_sums(row(x, i, size), row(weights, i, size), shift)
        count += c
        total += a
        squares += b
    return count, total, squares


@inlined
def tile_moments(x, weights):
    """Count, mean and m2 of neighbours in one pass of shifted sums."""
    shift = nearby(x) if weights is None else nearby_counted(x, weights)
    count, total, squares = sums_about(x, weights, shift)
    if count == 0.0:
        return 0.0, 0.0, 0.0
    m2 = about_mean(total, squares, count)
    if trusted(squares, m2, x.itemsize < 8):
        return count, shift + total / count, m2
    return careful_tile_moments(x, weights, 0, 0, 1, x.shape[0])


@inlined
def line_moments(x, weights, centered):
    """Count, mean and m2 of neighbours: their tiles merged in order; about zero if not centered."""
    n = mean = m2 = rest = 0.0
    for i in range(0, x.shape[0], TILE):
        size = min(TILE, x.shape[0] - i)
        tile_n, tile_mean, tile_m2 = np.float64(size), 0.0, 0.0
        if centered:
            tile_n, tile_mean, tile_m2 = tile_moments(row(x, i, size), part(weights, i, size))
        else:
            tile_m2 = tile_squares(row(x, i, size))
        if i == 0:  # as `accumulate` would have it, but short lines notice its call
            n, mean, m2 = tile_n, tile_mean, tile_m2
        else:
            n, mean, m2, rest = accumulate(n, mean, m2, rest, tile_n, tile_mean, tile_m2)
    return n, mean, settled(m2, rest)


@helper
def tile_squares(x):
    """Sum of squares of a tile."""
    total = sums_about(x, None, rounded(0.0, x))[2]
    if trusted(total, total, x.itemsize < 8):
        return total
    return central_sums(x, None, 0.0)[1]


@called
def careful_tile_moments(x, weights, first, stride, rows, n):
    """Count, mean and m2 of a tile in two float64 passes: any finite float32, NaN and Inf."""
    count = total = 0.0
    for r in range(rows):
        start = first + r * stride
        c, a = plain_sums(row(x, start, n), weights)
        count += c
        total += a
    mean = total / count
    total = squares = rest = 0.0
    for r in range(rows):
        start = first + r * stride
        for i in range(0, n, WIDE_PIECE):
            size = min(WIDE_PIECE, n - i)
            a, b = central_sums(row(x, start + i, size), part(weights, i, size), mean)
            total += a
            squares, rest = add(squares, rest, b)
    mean, m2 = corrected(mean, total, settled(squares, rest), count)
    return count, mean, m2


@called
def reciprocal_stds(m2, n, eps, rstd):
    """`reciprocal_std` of neighbouring slots with as many values each, side by side."""
    for i in range(m2.shape[0]):
        rstd[i] = reciprocal_std(m2[i], n, eps)


@helper
def before_activation(value, residual, i, mean_hi, scale, shift):
    """z of one element: normalized, and the residual added if there is one."""
    z = normalize(value, mean_hi, scale, shift)
    if residual is not None:
        z += widen(residual[i])
    return z


@helper
def below_activation(dy, value, residual, i, mean_hi, scale, shift, activation, absent=False):
    """Dz of one element: dy, or what an activation makes of it.

    One that is ``absent``, of no weight and with a dy of 0, may be NaN: its dz is 0, too.
    """
    if activation is None:
        return dy
    dz = activation_gradient(dy, before_activation(value, residual, i, mean_hi, scale, shift), activation)
    return type(dz)(0) if absent else dz


@helper
def slot_count(count, counts, slot, period):
    """Number of values that count in a slot: the same in all, or one for each row of the mask."""
    return count if counts is None else counts[slot // period]


@helper
def within(i, period):
    """Remainder of ``i`` by a period; short rows and segments notice the division, which most can do without."""
    k = np.int64(i)  # indices of parallel loops are unsigned
    if k < period:
        return k
    return k % period if period > 1 else 0


@helper
def parameter(values, i, default):
    """Element of an optional weight or bias, in float64."""
    return default if values is None else np.float64(values[i])


@called
def add_rows(total, rest, a):
    """Add one row of sums to another, and what rounding leaves out to a third."""
    for i in range(total.shape[0]):
        total[i], rest[i] = add(total[i], rest[i], np.float64(a[i]))


@called
def settle_rows(total, rest):
    """Put back what rounding has left out."""
    for i in range(total.shape[0]):
        total[i] = settled(total[i], rest[i])
