"""Loops over lanes: rows of equal length whose columns are summed, scaled or merged side by side.

Every loop runs across neighbouring lanes, which vectorizes without reordering a single sum.
"""

from __future__ import annotations

import numpy as np

from nbnorm._activation import activate, activation_gradient
from nbnorm._cpu.halves import narrow, widen
from nbnorm._cpu.launch import contracted, helper, reduction
from nbnorm._cpu.tiles import about_mean, add_rows, before_activation, corrected, part, settle_rows, trusted
from nbnorm._math import (
    accumulate,
    add,
    by_type,
    input_gradient,
    is_none,
    rounded,
    settled,
    standardize,
)

# Rows summed in the array's own type before float64 takes over.
TILE_ROWS = 128


@helper
def row(x, first, n):
    """One row of lanes: loops over a slice from zero vectorize, loops over ``x[first + i]`` do not."""
    return x[first : first + n]


@helper
def fill(values, value):
    """Set all entries of a row; Numba compiles this sooner than ``values[:] = value``."""
    for i in range(values.shape[0]):
        values[i] = value


@helper
def copy_row(target, source):
    """Copy a row, compiled as fast as `fill`."""
    for i in range(target.shape[0]):
        target[i] = source[i]


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
    """Add eight rows at once, so that the sums are read and written once for all of them."""
    for i in range(total.shape[0]):
        s = shift[i]
        da, db, dc, dd = widen(a[i]) - s, widen(b[i]) - s, widen(c[i]) - s, widen(d[i]) - s
        de, df, dg, dh = widen(e[i]) - s, widen(f[i]) - s, widen(g[i]) - s, widen(h[i]) - s
        total[i] += ((da + db) + (dc + dd)) + ((de + df) + (dg + dh))
        squares[i] += ((da * da + db * db) + (dc * dc + dd * dd)) + (
            (de * de + df * df) + (dg * dg + dh * dh)
        )


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
    """Row of a tile that counts and has ``wanted`` such rows before it."""
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


@helper
def shifted_lane_sums(x, weights, first, stride, rows, total, squares, shift):
    """Choose a shift for each lane and sum a tile about it; rows without weight are not looked at."""
    n = total.shape[0]
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
    fill(total, 0)
    fill(squares, 0)
    if weights is not None:
        for r in range(rows):
            if weights[r] > 0:
                push(total, squares, shift, row(x, first + r * stride, n), weights[r])
        return
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
        push(total, squares, shift, row(x, first, n), None)
        first += stride


@helper
def any_untrusted(total, squares, n):
    """Whether a lane's shifted sums lost digits."""
    bad = 0
    for i in range(total.shape[0]):
        s = np.float64(total[i])
        q = np.float64(squares[i])
        bad += not trusted(q, about_mean(s, q, n), total.itemsize < 8)
    return bad > 0


@helper
def add_wide(total, a, w):
    """Add one row, ``w`` times, in float64."""
    for i in range(total.shape[0]):
        total[i] += w * np.float64(widen(a[i]))


@helper
def add_central(total, squares, mean, a, w):
    """Add one row's deviations and their squares, ``w`` times, in float64."""
    for i in range(total.shape[0]):
        d = np.float64(widen(a[i])) - mean[i]
        total[i] += w * d
        squares[i] += w * (d * d)


@helper
def row_weight(weights, r):
    """Weight of a row."""
    return 1.0 if weights is None else np.float64(weights[r])


@helper
def careful_lane_sums(x, weights, first, stride, rows, count, total, squares, mean):
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
    for r in range(rows):
        w = row_weight(weights, r)
        if w > 0.0:
            add_central(total, squares, mean, row(x, first + r * stride, n), w)


@helper
def lane_tile(total, squares, shift, i, n, wide_total, wide_squares, wide_mean):
    """Mean and m2 of one lane of a tile; the wide sums stand in for a lane that lost digits."""
    s = np.float64(total[i])
    q = np.float64(squares[i])
    m2 = about_mean(s, q, n)
    if trusted(q, m2, total.itemsize < 8):
        return shift[i] + s / n, m2
    return corrected(wide_mean[i], wide_total[i], wide_squares[i], n)


@helper
def merge_tile(mean, m2, rest, n, total, squares, shift, tile_n, wide_total, wide_squares, wide_mean):
    """Merge a tile into the lanes' moments; the first one is taken as it is."""
    for i in range(mean.shape[0]):
        tile_mean, tile_m2 = lane_tile(total, squares, shift, i, tile_n, wide_total, wide_squares, wide_mean)
        if n == 0.0:
            mean[i], m2[i] = tile_mean, tile_m2
        else:
            _, mean[i], m2[i], rest[i] = accumulate(n, mean[i], m2[i], rest[i], tile_n, tile_mean, tile_m2)


@helper
def chunk_lane_moments(x, weights, first, stride, rows, sums, wide_sums, mean, m2, rest):
    """Mean and m2 of each lane of a block over the rows of a chunk: its tiles merged in order."""
    lanes = mean.shape[0]
    total, squares, shift = sums[0, :lanes], sums[1, :lanes], sums[2, :lanes]
    wide_total, wide_squares, wide_mean = wide_sums[0, :lanes], wide_sums[1, :lanes], wide_sums[2, :lanes]
    fill(mean, 0.0)
    fill(m2, 0.0)
    fill(rest, 0.0)
    n = 0.0
    for r in range(0, rows, TILE_ROWS):
        start = first + r * stride
        tile_rows = min(TILE_ROWS, rows - r)
        own_weights = part(weights, r, r + tile_rows)
        tile_n = total_weight(own_weights, 0, tile_rows)
        if tile_n == 0.0:
            continue
        shifted_lane_sums(x, own_weights, start, stride, tile_rows, total, squares, shift)
        if any_untrusted(total, squares, tile_n):
            careful_lane_sums(
                x, own_weights, start, stride, tile_rows, tile_n, wide_total, wide_squares, wide_mean
            )
        merge_tile(mean, m2, rest, n, total, squares, shift, tile_n, wide_total, wide_squares, wide_mean)
        n += tile_n
    settle_rows(m2, rest)


@helper
def merge_rows(mean, m2, rest, n, other_mean, other_m2, other_n):
    """Merge moments lane by lane; single values have no m2."""
    for i in range(mean.shape[0]):
        single_m2 = 0.0 if other_m2 is None else other_m2[i]
        _, mean[i], m2[i], rest[i] = accumulate(
            n, mean[i], m2[i], rest[i], other_n, np.float64(widen(other_mean[i])), single_m2
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
def apply_row(x, y, residual, mean_hi, scale, shift, activation):
    """Normalize one row of lanes."""
    for i in range(x.shape[0]):
        z = before_activation(widen(x[i]), residual, i, mean_hi[i], scale[i], shift[i])
        y[i] = narrow(activate(z, activation), y)


@contracted
def push_grads(sum_dz, sum_dz_x_hat, mean_hi, rstd, x, dz):
    """Add one row to the sums of dz and dz * x_hat; x_hat relative to the rounded mean."""
    for i in range(x.shape[0]):
        d = widen(dz[i])
        sum_dz[i] += d
        sum_dz_x_hat[i] += d * standardize(widen(x[i]), mean_hi[i], rstd[i])


@contracted
def push_four_grads(sum_dz, sum_dz_x_hat, mean_hi, rstd, xa, xb, xc, xd, a, b, c, d):
    """Add four rows at once, so that the sums are read and written once for all of them."""
    for i in range(xa.shape[0]):
        m, r = mean_hi[i], rstd[i]
        da, db, dc, dd = widen(a[i]), widen(b[i]), widen(c[i]), widen(d[i])
        sum_dz[i] += (da + db) + (dc + dd)
        sum_dz_x_hat[i] += (da * standardize(widen(xa[i]), m, r) + db * standardize(widen(xb[i]), m, r)) + (
            dc * standardize(widen(xc[i]), m, r) + dd * standardize(widen(xd[i]), m, r)
        )


def summands(x, dy, residual, weights, mean_hi, scale, shift, activation, room, first, n, r, at):
    """Lanes of x and dz of row ``r``: as they are, or computed into room ``at``, as `planes.summands` does."""
    given = (x, dy, residual, weights, mean_hi, scale, shift, activation, room, first, n, r, at)
    return _summands(*given)(*given)


@by_type(summands)
def _summands(x, dy, residual, weights, mean_hi, scale, shift, activation, room, first, n, r, at):
    if is_none(room):
        return lambda x, dy, residual, weights, mean_hi, scale, shift, activation, room, first, n, r, at: (
            row(x, first, n),
            row(dy, first, n),
        )
    return lambda x, dy, residual, weights, mean_hi, scale, shift, activation, room, first, n, r, at: (
        computed_summands(x, dy, residual, weights, mean_hi, scale, shift, activation, room, first, n, r, at)
    )


@helper
def computed_summands(x, dy, residual, weights, mean_hi, scale, shift, activation, room, first, n, r, at):
    """Write x and dz of one row out."""
    x_room, dz_room = room[at, 0, :n], room[at, 1, :n]
    fill_summands(
        row(x, first, n), row(dy, first, n), part(residual, first, first + n), mean_hi, scale, shift, activation,
        row_weight(weights, r) == 0.0, x_room, dz_room,
    )  # fmt: skip
    return x_room, dz_room


@helper
def fill_summands(x, dy, residual, mean_hi, scale, shift, activation, masked, x_room, dz_room):
    """Compute one row of x and dz."""
    for i in range(x.shape[0]):
        value, d = widen(x[i]), widen(dy[i])
        absent = masked and d == 0
        if activation is not None:
            z = before_activation(value, residual, i, mean_hi[i], scale[i], shift[i])
            d = activation_gradient(d, z, activation)
        x_room[i] = mean_hi[i] if absent else value
        dz_room[i] = rounded(0.0, x) if absent else d


@helper
def chunk_lane_grad_sums(
    x, dy, residual, weights, activation, first, stride, rows, spare, mean_hi, rstd, scale, shift, sums, room,
    lane_sums,
):  # fmt: skip
    """Sums of dz and dz * x_hat of each lane of a block over whole rows and one spare row of fewer lanes.

    ``lane_sums`` takes both totals, each followed by what rounding leaves out of it.
    """
    n = mean_hi.shape[0]
    narrow_dz, narrow_dz_x_hat = row(sums[0], 0, n), row(sums[1], 0, n)
    for k in range(4):
        fill(lane_sums[k], 0.0)
    for start in range(0, max(rows, 1), TILE_ROWS):
        fill(narrow_dz, 0)
        fill(narrow_dz_x_hat, 0)
        r, end = start, min(start + TILE_ROWS, rows)
        while r + 4 <= end:
            i = first + r * stride
            xa, a = summands(x, dy, residual, weights, mean_hi, scale, shift, activation, room, i, n, r, 0)
            xb, b = summands(
                x, dy, residual, weights, mean_hi, scale, shift, activation, room, i + stride, n, r + 1, 1
            )
            xc, c = summands(
                x, dy, residual, weights, mean_hi, scale, shift, activation, room, i + 2 * stride, n, r + 2, 2
            )
            xd, d = summands(
                x, dy, residual, weights, mean_hi, scale, shift, activation, room, i + 3 * stride, n, r + 3, 3
            )
            push_four_grads(narrow_dz, narrow_dz_x_hat, mean_hi, rstd, xa, xb, xc, xd, a, b, c, d)
            r += 4
        while r < end:
            xa, a = summands(
                x, dy, residual, weights, mean_hi, scale, shift, activation, room, first + r * stride, n, r, 0
            )
            push_grads(narrow_dz, narrow_dz_x_hat, mean_hi, rstd, xa, a)
            r += 1
        if end == rows and spare:
            xa, a = summands(
                x,
                dy,
                residual,
                weights,
                mean_hi,
                scale,
                shift,
                activation,
                room,
                first + rows * stride,
                spare,
                rows,
                0,
            )
            push_grads(narrow_dz, narrow_dz_x_hat, mean_hi, rstd, xa, a)
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
def input_grad_row(
    x, dy, dx, dresidual, residual, w, mean_hi, rstd, slope, offset, gain, scale, shift, activation
):  # fmt: skip
    """Dx, and dz where it is wanted, of one row of lanes; no slope: constant statistics, or a row that does not count.

    Such a row may hold NaN where dy is 0: then dz is 0.
    """
    for i in range(x.shape[0]):
        value, d = widen(x[i]), widen(dy[i])
        if activation is not None:
            absent = w is not None and slope is None and d == 0
            z = before_activation(value, residual, i, mean_hi[i], scale[i], shift[i])
            d = rounded(0.0, x) if absent else activation_gradient(d, z, activation)
        if dresidual is not None:
            dresidual[i] = narrow(d, x)
        if slope is None:
            dx[i] = narrow(d * gain[i], x)
        else:
            x_hat = standardize(value, mean_hi[i], rstd[i])
            if w is None:
                dx[i] = narrow(input_gradient(d, x_hat, slope[i], offset[i], gain[i]), x)
            else:
                dx[i] = narrow(input_gradient(d, x_hat, w * slope[i], w * offset[i], gain[i]), x)
