"""Sums of gradients down each lane of a block.

``terms`` holds the coefficients of a block, row by row: mean and rstd, slope, offset and gain of `input_gradient`,
then mean, scale and shift of `normalize`, which only an activation asks for.
"""

from __future__ import annotations

from nbnorm._cpu.halves import widen
from nbnorm._cpu.lanes import TILE_ROWS, fill, odd, row_weight, summed
from nbnorm._cpu.launch import contracted, helper, loop
from nbnorm._cpu.memory import part, row
from nbnorm._cpu.tiles import add_rows, below_activation
from nbnorm._math import settled, standardize


@contracted
def push_grads(sum_dz, sum_dz_x_hat, mean_hi, rstd, scale, shift, x, dy, activation=None, residual=None):
    """Add one row to the sums of dz and dz * x_hat; x_hat relative to the rounded mean."""
    for i in range(x.shape[0]):
        value = widen(x[i])
        d = below_activation(widen(dy[i]), value, residual, i, mean_hi[i], scale[i], shift[i], activation)
        sum_dz[i] += d
        sum_dz_x_hat[i] += d * standardize(value, mean_hi[i], rstd[i])


@contracted
def push_four_grads(
    sum_dz, sum_dz_x_hat, mean_hi, rstd, scale, shift, xa, xb, xc, xd, dya, dyb, dyc, dyd,
    activation=None, ra=None, rb=None, rc=None, rd=None,
):  # fmt: skip
    """Add four rows at once, so that the sums are read and written once for all of them."""
    for i in range(xa.shape[0]):
        m, r = mean_hi[i], rstd[i]
        a, b, c, d = widen(xa[i]), widen(xb[i]), widen(xc[i]), widen(xd[i])
        da = below_activation(widen(dya[i]), a, ra, i, m, scale[i], shift[i], activation)
        db = below_activation(widen(dyb[i]), b, rb, i, m, scale[i], shift[i], activation)
        dc = below_activation(widen(dyc[i]), c, rc, i, m, scale[i], shift[i], activation)
        dd = below_activation(widen(dyd[i]), d, rd, i, m, scale[i], shift[i], activation)
        sum_dz[i] += (da + db) + (dc + dd)
        sum_dz_x_hat[i] += (da * standardize(a, m, r) + db * standardize(b, m, r)) + (
            dc * standardize(c, m, r) + dd * standardize(d, m, r)
        )


@helper
def push_row(sums, x, dy, residual, weights, terms, activation, room, first, n, r):
    """Add row ``r`` to the sums of a block; what a mask leaves out is taken out first."""
    dz, dz_x_hat, mean_hi, rstd, scale, shift = sums[0], sums[1], terms[0], terms[1], terms[6], terms[7]
    if weights is None:
        push_grads(
            dz, dz_x_hat, mean_hi, rstd, scale, shift, row(x, first, n), row(dy, first, n), activation,
            part(residual, first, n),
        )  # fmt: skip
    else:
        own_x, own_dz = counted(x, dy, residual, weights, terms, activation, room, first, n, r, 0)
        push_grads(dz, dz_x_hat, mean_hi, rstd, scale, shift, own_x, own_dz)


@helper
def push_four_rows(sums, x, dy, residual, weights, terms, activation, room, first, n, r, step, apart):
    """Add row ``r`` and three others, each ``apart`` rows, and ``step`` elements, behind the last."""
    dz, dz_x_hat, mean_hi, rstd, scale, shift = sums[0], sums[1], terms[0], terms[1], terms[6], terms[7]
    i, j, k, m = first, first + step, first + 2 * step, first + 3 * step
    if weights is None:
        push_four_grads(
            dz, dz_x_hat, mean_hi, rstd, scale, shift, row(x, i, n), row(x, j, n), row(x, k, n), row(x, m, n),
            row(dy, i, n), row(dy, j, n), row(dy, k, n), row(dy, m, n), activation,
            part(residual, i, n), part(residual, j, n), part(residual, k, n), part(residual, m, n),
        )  # fmt: skip
    else:
        given = (x, dy, residual, weights, terms, activation, room)
        xa, a = counted(*given, i, n, r, 0)
        xb, b = counted(*given, j, n, r + apart, 1)
        xc, c = counted(*given, k, n, r + 2 * apart, 2)
        xd, d = counted(*given, m, n, r + 3 * apart, 3)
        push_four_grads(dz, dz_x_hat, mean_hi, rstd, scale, shift, xa, xb, xc, xd, a, b, c, d)


@helper
def counted(x, dy, residual, weights, terms, activation, room, first, n, r, at):
    """X and dz of one row as far as they count, in room ``at``: what neither does nor has a gradient may be NaN."""
    x_room, dz_room = row(room, (at, 0, 0), n), row(room, (at, 1, 0), n)
    fill_counted(
        row(x, first, n), row(dy, first, n), part(residual, first, n), terms[0], terms[6], terms[7],
        activation, row_weight(weights, r) == 0.0, x_room, dz_room,
    )  # fmt: skip
    return x_room, dz_room


@loop
def fill_counted(x, dy, residual, mean_hi, scale, shift, activation, masked, x_room, dz_room):
    """Compute one row of x and dz."""
    for i in range(x.shape[0]):
        value, d = widen(x[i]), widen(dy[i])
        absent = masked and d == 0
        m = mean_hi[i]
        x_room[i] = m if absent else value
        dz_room[i] = below_activation(d, value, residual, i, m, scale[i], shift[i], activation, absent)


@helper
def chunk_lane_grad_sums(
    x, dy, residual, weights, activation, first, stride, rows, spare, terms, sums, room, lane_sums
):
    """Sums of dz and dz * x_hat of each lane of a block over whole rows and one spare row of fewer lanes.

    Rows are taken four at once, each of nearly a quarter of a tile, as `shifted_lane_sums` takes eight.
    ``lane_sums`` takes both totals, each followed by what rounding leaves out of it.
    """
    n = sums.shape[1]
    dz, dz_x_hat = sums[0], sums[1]
    given = (sums, x, dy, residual, weights, terms, activation, room)
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
                push_four_rows(*given, first + ra * stride, n, ra, step, apart)
            r += 4 * apart
        while r < end:
            push_row(*given, first + r * stride, n, r)
            r += 1
        if end == rows and spare:
            push_row(*given, first + rows * stride, spare, rows)
        add_rows(row(lane_sums, (0, 0), n), row(lane_sums, (1, 0), n), dz)
        add_rows(row(lane_sums, (2, 0), n), row(lane_sums, (3, 0), n), dz_x_hat)


@helper
def line_sum(values, rests):
    """Sum of neighbouring lanes with their rests."""
    return settled(summed(values), summed(rests))
