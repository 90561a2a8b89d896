"""Sums of gradients down each lane of a block.

``terms`` holds the coefficients of a block, row by row: mean and rstd, slope, offset and gain of `input_gradient`,
then mean, scale and shift of `normalize`, which only an activation asks for.
"""

from __future__ import annotations

from nbnorm._activation import activation_gradient
from nbnorm._cpu.halves import widen
from nbnorm._cpu.lanes import TILE_ROWS, fill, odd, row_weight, summed
from nbnorm._cpu.launch import contracted, helper, loop
from nbnorm._cpu.memory import part, row
from nbnorm._cpu.tiles import add_rows, before_activation
from nbnorm._math import by_type, is_none, rounded, settled, standardize


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


def summands(x, dy, residual, weights, terms, activation, room, first, n, r, at):
    """Lanes of x and dz of row ``r``: as they are, or computed into room ``at``, as `planes.summands` does."""
    given = (x, dy, residual, weights, terms, activation, room, first, n, r, at)
    return _summands(*given)(*given)


@by_type(summands)
def _summands(x, dy, residual, weights, terms, activation, room, first, n, r, at):
    if is_none(room):
        return lambda x, dy, residual, weights, terms, activation, room, first, n, r, at: (
            row(x, first, n),
            row(dy, first, n),
        )
    return lambda x, dy, residual, weights, terms, activation, room, first, n, r, at: computed_summands(
        x, dy, residual, weights, terms, activation, room, first, n, r, at
    )


@helper
def computed_summands(x, dy, residual, weights, terms, activation, room, first, n, r, at):
    """Write x and dz of one row out."""
    x_room, dz_room = row(room, (at, 0, 0), n), row(room, (at, 1, 0), n)
    fill_summands(
        row(x, first, n), row(dy, first, n), part(residual, first, n), terms[0], terms[6], terms[7],
        activation, row_weight(weights, r) == 0.0, x_room, dz_room,
    )  # fmt: skip
    return x_room, dz_room


@loop
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
    x, dy, residual, weights, activation, first, stride, rows, spare, terms, sums, room, lane_sums
):
    """Sums of dz and dz * x_hat of each lane of a block over whole rows and one spare row of fewer lanes.

    Rows are taken four at once, each of nearly a quarter of a tile, as `shifted_lane_sums` takes eight.
    ``lane_sums`` takes both totals, each followed by what rounding leaves out of it.
    """
    n = sums.shape[1]
    dz, dz_x_hat, mean_hi, rstd = sums[0], sums[1], terms[0], terms[1]
    for k in range(4):
        fill(lane_sums[k], 0.0)
    for start in range(0, max(rows, 1), TILE_ROWS):
        fill(dz, 0)
        fill(dz_x_hat, 0)
        r, end = start, min(start + TILE_ROWS, rows)
        while r + 4 <= end:
            apart = odd((end - r) // 4)
            step = apart * stride
            for ra in range(r, r + apart):
                i, rb, rc, rd = first + ra * stride, ra + apart, ra + 2 * apart, ra + 3 * apart
                xa, a = summands(x, dy, residual, weights, terms, activation, room, i, n, ra, 0)
                xb, b = summands(x, dy, residual, weights, terms, activation, room, i + step, n, rb, 1)
                xc, c = summands(x, dy, residual, weights, terms, activation, room, i + 2 * step, n, rc, 2)
                xd, d = summands(x, dy, residual, weights, terms, activation, room, i + 3 * step, n, rd, 3)
                push_four_grads(dz, dz_x_hat, mean_hi, rstd, xa, xb, xc, xd, a, b, c, d)
            r += 4 * apart
        while r < end:
            i = first + r * stride
            xa, a = summands(x, dy, residual, weights, terms, activation, room, i, n, r, 0)
            push_grads(dz, dz_x_hat, mean_hi, rstd, xa, a)
            r += 1
        if end == rows and spare:
            i = first + rows * stride
            xa, a = summands(x, dy, residual, weights, terms, activation, room, i, spare, rows, 0)
            push_grads(dz, dz_x_hat, mean_hi, rstd, xa, a)
        add_rows(row(lane_sums, (0, 0), n), row(lane_sums, (1, 0), n), dz)
        add_rows(row(lane_sums, (2, 0), n), row(lane_sums, (3, 0), n), dz_x_hat)


@helper
def line_sum(values, rests):
    """Sum of neighbouring lanes with their rests."""
    return settled(summed(values), summed(rests))
