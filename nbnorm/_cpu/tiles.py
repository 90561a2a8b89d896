"""Moments and sums of small pieces of memory, and the grid of chunks that fixes their order.

The type of the array carries short sums, float64 everything else. The grid depends on shapes alone, so
the bits of a result depend neither on the number of threads nor on the schedule.
"""

from __future__ import annotations

from math import isnan

import numpy as np

from nbnorm._cpu.launch import helper, reduction
from nbnorm._math import accumulate, add, settled

# Values summed in the array's own type before float64 takes over: with 32 or more SIMD accumulators no chain
# is longer than 32 additions, which keeps a float32 sum within about one part in ten million.
PIECE = 1024
WIDE_PIECE = 256  # of float64, whose accumulators are fewer and whose promise is tighter
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
def nearby(x):
    """Return the mean of eight values spread over x, a good shift; it is exact where they are equal."""
    first = x[0]
    rest = x.dtype.type(0)
    for i in range(1, 8):
        rest += x[i * x.shape[0] // 8] - first
    return first + rest * x.dtype.type(0.125)


@reduction
def shifted_sums(x, shift):
    """Sum of (x - shift) and of (x - shift)**2 over one piece, in the type of x."""
    total = x.dtype.type(0)
    squares = x.dtype.type(0)
    for i in range(x.shape[0]):
        d = x[i] - shift
        total += d
        squares += d * d
    return total, squares


@reduction
def plain_sum(x):
    """Sum over one piece in float64."""
    total = 0.0
    for i in range(x.shape[0]):
        total += np.float64(x[i])
    return total


@reduction
def central_sums(x, mean):
    """Sum of (x - mean) and of (x - mean)**2 over one piece in float64."""
    total = 0.0
    squares = 0.0
    for i in range(x.shape[0]):
        d = np.float64(x[i]) - mean
        total += d
        squares += d * d
    return total, squares


@helper
def corrected(mean, total, squares, n):
    """Moments from the sums about an approximate mean; what rounding left in the mean is put back."""
    correction = total / n
    m2 = squares - total * correction
    return mean if isnan(correction) else mean + correction, 0.0 if m2 < 0.0 else m2


@helper
def tile_moments(x, first, stride, rows, n):
    """Mean and m2 of ``rows`` segments of ``n`` neighbours, ``stride`` apart, in one pass of shifted sums."""
    shift = nearby(x[first : first + n])
    total = 0.0
    squares = 0.0
    for r in range(rows):
        start = first + r * stride
        segment = x[start : start + n]
        for i in range(0, n, piece(x)):
            a, b = shifted_sums(segment[i : min(i + piece(x), n)], shift)
            total += a
            squares += b
    count = np.float64(rows * n)
    m2 = squares - total * (total / count)
    if trusted(squares, m2, x.itemsize < 8):
        return shift + total / count, m2
    return careful_tile_moments(x, first, stride, rows, n)


@helper
def line_moments(x, centered):
    """Count, mean and m2 of neighbours: their tiles merged in order; about zero if not centered."""
    n = mean = m2 = rest = 0.0
    for i in range(0, x.shape[0], TILE):
        tile_n = min(TILE, x.shape[0] - i)
        tile_mean, tile_m2 = 0.0, 0.0
        if centered:
            tile_mean, tile_m2 = tile_moments(x, i, 0, 1, tile_n)
        else:
            tile_m2 = tile_squares(x[i : i + tile_n])
        n, mean, m2, rest = accumulate(n, mean, m2, rest, np.float64(tile_n), tile_mean, tile_m2)
    return n, mean, settled(m2, rest)


@helper
def tile_squares(x):
    """Sum of squares of a tile."""
    total = 0.0
    for i in range(0, x.shape[0], piece(x)):
        total += shifted_sums(x[i : min(i + piece(x), x.shape[0])], x.dtype.type(0))[1]
    if trusted(total, total, x.itemsize < 8):
        return total
    return central_sums(x, 0.0)[1]


@helper
def careful_tile_moments(x, first, stride, rows, n):
    """Mean and m2 of a tile in two float64 passes: any finite float32, NaN and Inf."""
    total = 0.0
    for r in range(rows):
        start = first + r * stride
        total += plain_sum(x[start : start + n])
    count = np.float64(rows * n)
    mean = total / count
    total = squares = rest = 0.0
    for r in range(rows):
        start = first + r * stride
        for i in range(start, start + n, WIDE_PIECE):
            a, b = central_sums(x[i : min(i + WIDE_PIECE, start + n)], mean)
            total += a
            squares, rest = add(squares, rest, b)
    return corrected(mean, total, settled(squares, rest), count)


@helper
def parameter(values, i, default):
    """Element of an optional weight or bias, in float64."""
    return default if values is None else np.float64(values[i])


@helper
def add_rows(total, rest, a):
    """Add one row of sums to another, and what rounding leaves out to a third."""
    for i in range(total.shape[0]):
        total[i], rest[i] = add(total[i], rest[i], np.float64(a[i]))


@helper
def settle_rows(total, rest):
    """Put back what rounding has left out."""
    for i in range(total.shape[0]):
        total[i] = settled(total[i], rest[i])


@helper
def weighted(weight, first, sums):
    """Sum of the sums of a slot's runs, each times its weight, which starts at ``first``."""
    total = 0.0
    for j in range(sums.shape[0]):
        total += parameter(weight, first + j, 1.0) * sums[j]
    return total
