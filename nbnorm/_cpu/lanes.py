"""Loops over lanes: rows of equal length whose columns are summed, scaled or merged side by side.

Every loop runs across neighbouring lanes, which vectorizes without reordering a single sum.
"""

from __future__ import annotations

import numpy as np

from nbnorm._cpu.launch import helper, reduction
from nbnorm._cpu.tiles import add_rows, corrected, settle_rows, trusted
from nbnorm._math import accumulate, add, input_gradient, normalize, settled

# Rows summed in the array's own type before float64 takes over.
TILE_ROWS = 128


@helper
def row(x, first, n):
    """One row of lanes: loops over a slice from zero vectorize, loops over ``x[first + i]`` do not."""
    return x[first : first + n]


@helper
def guess(shift, a, b, c, d, e, f, g, h):
    """Mean of eight rows, lane by lane; exact where they are equal."""
    eighth = shift.dtype.type(0.125)
    for i in range(shift.shape[0]):
        s = a[i]
        rest = ((b[i] - s) + (c[i] - s)) + ((d[i] - s) + (e[i] - s)) + ((f[i] - s) + (g[i] - s)) + (h[i] - s)
        shift[i] = s + rest * eighth


@helper
def push(total, squares, shift, a):
    """Add one row to the shifted sums."""
    for i in range(total.shape[0]):
        d = a[i] - shift[i]
        total[i] += d
        squares[i] += d * d


@helper
def push_eight(total, squares, shift, a, b, c, d, e, f, g, h):
    """Add eight rows at once, so that the sums are read and written once for all of them."""
    for i in range(total.shape[0]):
        s = shift[i]
        da, db, dc, dd = a[i] - s, b[i] - s, c[i] - s, d[i] - s
        de, df, dg, dh = e[i] - s, f[i] - s, g[i] - s, h[i] - s
        total[i] += ((da + db) + (dc + dd)) + ((de + df) + (dg + dh))
        squares[i] += ((da * da + db * db) + (dc * dc + dd * dd)) + (
            (de * de + df * df) + (dg * dg + dh * dh)
        )


@helper
def shifted_lane_sums(x, first, stride, rows, total, squares, shift):
    """Choose a shift for each lane and sum a tile about it, in the type of x."""
    n = total.shape[0]
    guess(
        shift,
        row(x, first, n), row(x, first + rows // 8 * stride, n),
        row(x, first + rows * 2 // 8 * stride, n), row(x, first + rows * 3 // 8 * stride, n),
        row(x, first + rows * 4 // 8 * stride, n), row(x, first + rows * 5 // 8 * stride, n),
        row(x, first + rows * 6 // 8 * stride, n), row(x, first + rows * 7 // 8 * stride, n),
    )  # fmt: skip
    total[:] = 0
    squares[:] = 0
    end = first + rows * stride
    while first + 8 * stride <= end:
        push_eight(
            total, squares, shift,
            row(x, first, n), row(x, first + stride, n),
            row(x, first + 2 * stride, n), row(x, first + 3 * stride, n),
            row(x, first + 4 * stride, n), row(x, first + 5 * stride, n),
            row(x, first + 6 * stride, n), row(x, first + 7 * stride, n),
        )  # fmt: skip
        first += 8 * stride
    while first < end:
        push(total, squares, shift, row(x, first, n))
        first += stride


@helper
def any_untrusted(total, squares, n):
    """Whether a lane's shifted sums lost digits."""
    bad = 0
    for i in range(total.shape[0]):
        s = np.float64(total[i])
        q = np.float64(squares[i])
        bad += not trusted(q, q - s * (s / n), total.itemsize < 8)
    return bad > 0


@helper
def add_wide(total, a):
    for i in range(total.shape[0]):
        total[i] += np.float64(a[i])


@helper
def add_central(total, squares, mean, a):
    for i in range(total.shape[0]):
        d = np.float64(a[i]) - mean[i]
        total[i] += d
        squares[i] += d * d


@helper
def careful_lane_sums(x, first, stride, rows, total, squares, mean):
    """Approximate mean of each lane and the sums about it, in two float64 passes."""
    n = total.shape[0]
    mean[:] = 0.0
    for r in range(rows):
        add_wide(mean, row(x, first + r * stride, n))
    for i in range(n):
        mean[i] /= rows
    total[:] = 0.0
    squares[:] = 0.0
    for r in range(rows):
        add_central(total, squares, mean, row(x, first + r * stride, n))


@helper
def merge_tile(mean, m2, rest, n, total, squares, shift, tile_n, wide_total, wide_squares, wide_mean):
    """Merge a tile into the lanes' moments; the wide sums stand in for the lanes that lost digits."""
    for i in range(mean.shape[0]):
        s = np.float64(total[i])
        q = np.float64(squares[i])
        tile_mean = shift[i] + s / tile_n
        tile_m2 = q - s * (s / tile_n)
        if not trusted(q, tile_m2, total.itemsize < 8):
            tile_mean, tile_m2 = corrected(wide_mean[i], wide_total[i], wide_squares[i], tile_n)
        _, mean[i], m2[i], rest[i] = accumulate(n, mean[i], m2[i], rest[i], tile_n, tile_mean, tile_m2)


@helper
def chunk_lane_moments(x, first, stride, rows, sums, wide_sums, mean, m2, rest):
    """Mean and m2 of each lane of a block over the rows of a chunk: its tiles merged in order."""
    lanes = mean.shape[0]
    total, squares, shift = sums[0, :lanes], sums[1, :lanes], sums[2, :lanes]
    wide_total, wide_squares, wide_mean = wide_sums[0, :lanes], wide_sums[1, :lanes], wide_sums[2, :lanes]
    m2[:] = 0.0
    rest[:] = 0.0
    for r in range(0, rows, TILE_ROWS):
        start = first + r * stride
        tile_rows = min(TILE_ROWS, rows - r)
        tile_n = np.float64(tile_rows)
        shifted_lane_sums(x, start, stride, tile_rows, total, squares, shift)
        if any_untrusted(total, squares, tile_n):
            careful_lane_sums(x, start, stride, tile_rows, wide_total, wide_squares, wide_mean)
        merge_tile(
            mean, m2, rest, np.float64(r), total, squares, shift, tile_n, wide_total, wide_squares, wide_mean
        )
    settle_rows(m2, rest)


@helper
def merge_rows(mean, m2, rest, n, other_mean, other_m2, other_n):
    """Merge moments lane by lane; single values have no m2."""
    for i in range(mean.shape[0]):
        single_m2 = 0.0 if other_m2 is None else other_m2[i]
        _, mean[i], m2[i], rest[i] = accumulate(
            n, mean[i], m2[i], rest[i], other_n, np.float64(other_mean[i]), single_m2
        )


@reduction
def total_spread(values, center):
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
    if lanes == 1:
        return mean[0], m2[0]
    slot_mean = mean[0] + total_spread(mean, mean[0])[0] / lanes
    return slot_mean, total_spread(m2, 0.0)[0] + n * total_spread(mean, slot_mean)[1]


@helper
def apply_row(x, y, mean_hi, scale, shift):
    """Normalize one row of lanes."""
    for i in range(x.shape[0]):
        y[i] = normalize(x[i], mean_hi[i], scale[i], shift[i])


@helper
def push_grads(sum_dz, sum_dz_x_hat, mean_hi, rstd, x, dy):
    """Add one row to the sums of dz and dz * x_hat; x_hat relative to the rounded mean."""
    for i in range(x.shape[0]):
        sum_dz[i] += dy[i]
        sum_dz_x_hat[i] += dy[i] * ((x[i] - mean_hi[i]) * rstd[i])


@helper
def push_four_grads(sum_dz, sum_dz_x_hat, mean_hi, rstd, xa, xb, xc, xd, a, b, c, d):
    """Add four rows at once, so that the sums are read and written once for all of them."""
    for i in range(xa.shape[0]):
        m, r = mean_hi[i], rstd[i]
        sum_dz[i] += (a[i] + b[i]) + (c[i] + d[i])
        sum_dz_x_hat[i] += (a[i] * ((xa[i] - m) * r) + b[i] * ((xb[i] - m) * r)) + (
            c[i] * ((xc[i] - m) * r) + d[i] * ((xd[i] - m) * r)
        )


@helper
def chunk_lane_grad_sums(x, dy, first, stride, rows, spare, mean_hi, rstd, sums, lane_sums):
    """Sums of dz and dz * x_hat of each lane of a block over whole rows and one spare row of fewer lanes.

    ``lane_sums`` takes both totals, each followed by what rounding leaves out of it.
    """
    n = mean_hi.shape[0]
    narrow_dz, narrow_dz_x_hat = row(sums[0], 0, n), row(sums[1], 0, n)
    lane_sums[:, :] = 0.0
    last = first + rows * stride
    for start in range(first, last, TILE_ROWS * stride):
        narrow_dz[:] = 0
        narrow_dz_x_hat[:] = 0
        i, end = start, min(start + TILE_ROWS * stride, last)
        while i + 4 * stride <= end:
            push_four_grads(
                narrow_dz, narrow_dz_x_hat, mean_hi, rstd,
                row(x, i, n), row(x, i + stride, n), row(x, i + 2 * stride, n), row(x, i + 3 * stride, n),
                row(dy, i, n), row(dy, i + stride, n), row(dy, i + 2 * stride, n), row(dy, i + 3 * stride, n),
            )  # fmt: skip
            i += 4 * stride
        while i < end:
            push_grads(narrow_dz, narrow_dz_x_hat, mean_hi, rstd, row(x, i, n), row(dy, i, n))
            i += stride
        if end == last:
            push_grads(narrow_dz, narrow_dz_x_hat, mean_hi, rstd, row(x, last, spare), row(dy, last, spare))
        add_rows(lane_sums[0], lane_sums[1], narrow_dz)
        add_rows(lane_sums[2], lane_sums[3], narrow_dz_x_hat)


@helper
def line_sum(values, rests, first, end):
    """Sum of neighbouring lanes and of their rests."""
    total = rest = 0.0
    for i in range(first, end):
        total, rest = add(total, rest, values[i])
        rest += rests[i]
    return settled(total, rest)


@helper
def input_grad_row(x, dy, dx, mean_hi, rstd, slope, offset, gain):
    """Dx of one row of lanes."""
    for i in range(x.shape[0]):
        dx[i] = input_gradient(dy[i], (x[i] - mean_hi[i]) * rstd[i], slope[i], offset[i], gain[i])


@helper
def constant_grad_row(dy, dx, gain):
    """Dx of one row of lanes whose statistics are constants."""
    for i in range(dy.shape[0]):
        dx[i] = dy[i] * gain[i]
