"""What a task does to chunks of neighbouring slots for their gradients.

``terms`` has eight rows of coefficients, one for each run of the slots: mean and rstd, slope, offset and gain of
`input_gradient`, then mean, once more, scale and shift of `normalize`, which only an activation asks for. ``sums`` has
four rows for each chunk: sums of dz and what rounding leaves out of them, then both for dz * x_hat.
"""

from __future__ import annotations

import numpy as np

from nbnorm._cpu.cut import alike, at_once, block, bounds, positions, runs, unpack
from nbnorm._cpu.held_sums import ROWS, held_like, held_totals, hold_grad_sums
from nbnorm._cpu.lane_terms import add_chunks, fill_gradient_terms, repeat, settle_runs
from nbnorm._cpu.lanes import fill
from nbnorm._cpu.launch import allocating, helper, inlined, loop
from nbnorm._cpu.memory import borrowed, entry, part, row
from nbnorm._cpu.scratch import room, wide
from nbnorm._cpu.segments import fill_counted, input_grad_segment
from nbnorm._cpu.slots import fill_affine
from nbnorm._cpu.stores import seam_like
from nbnorm._cpu.streams import begin, finish, writer
from nbnorm._cpu.tiles import (
    PIECE,
    add_rows,
    in_fours,
    piece,
    piece_grad_sums,
    settle_rows,
    slot_count,
    within,
)
from nbnorm._cpu.vector_results import LONGEST, in_vectors, input_grad_vectors
from nbnorm._cpu.vector_terms import by_vectors
from nbnorm._math import add


@helper
def fill_for_sums(g, slot, slots, mean, rstd, weight, bias, activation, terms):
    """Write what sums are computed from: mean and rstd, and for an activation the last three rows."""
    fill_affine(g, slot, slots, mean, rstd, None, None, terms, 0)
    if activation is not None:
        fill_affine(g, slot, slots, mean, rstd, weight, bias, terms, 5)


@inlined
def own_positions(weights, cut, slot, q, r, start, n):
    """Weights of ``n`` columns in row ``r`` of run ``q`` of some slots from one on; None without a mask."""
    return positions(entry(weights, (slot + q // cut.width) // cut.period), cut, r, q, start, n)


@inlined
def sum_terms(terms, q, some):
    """Mean, rstd, scale and shift of some runs."""
    return (
        row(terms, (0, q), some),
        row(terms, (1, q), some),
        row(terms, (6, q), some),
        row(terms, (7, q), some),
    )


@inlined
def hold_at_once(x, dy, at, stride, segments, some, n, terms, q, activation, held, i):
    """Keep, from number ``i`` on, the sums of ``n`` columns of each of some runs, which vectors take from x and dy."""
    own_x, own_dy = row(x, at, some * n), row(dy, at, some * n)
    hold_grad_sums(own_x, stride, own_dy, stride, segments, n, sum_terms(terms, q, some), activation, held, i)


@inlined
def hold_runs(
    cut, x, dy, residual, activation, weights, slot, q, some, r, segments, start, n, terms, own_room, held, i
):
    """Keep, from number ``i`` on, the sums of ``n`` columns of each of some runs in some rows from ``r`` on."""
    stride, at = cut.group * cut.inner, (r * cut.group + slot) * cut.inner + start
    if weights is None and activation is None:  # with nothing to ask for, what follows is not compiled
        hold_at_once(x, dy, at, stride, segments, some, n, terms, q, activation, held, i)
        return
    if by_vectors(activation, (residual, weights)):
        hold_at_once(x, dy, at, stride, segments, some, n, terms, q, activation, held, i)
        return
    for k in range(some):
        j, first = q + k, at + k * n
        for s in range(segments):
            a = first + s * stride
            fill_counted(
                row(x, a, n), row(dy, a, n), part(residual, a, n),
                own_positions(weights, cut, slot, j, r + s, start + k * n, n), terms[0, j], terms[6, j], terms[7, j],
                activation, row(own_room, (0, s * n), n), row(own_room, (1, s * n), n),
            )  # fmt: skip
        dz, own = row(own_room, (1, 0), n), sum_terms(terms, j, 1)
        if weights is None:
            hold_grad_sums(row(x, first, n), stride, dz, n, segments, n, own, None, held, i + k)
        else:
            hold_grad_sums(row(own_room, (0, 0), n), n, dz, n, segments, n, own, None, held, i + k)


@helper
def add_held(held, count, q, first_run, end_run, found, sums):
    """Add what is held of so many runs, from ``q`` on, and after the last again from the first, to their sums."""
    held_totals(held, 0, count, row(found, (0, 0), ROWS))
    held_totals(held, 1, count, row(found, (1, 0), ROWS))
    i = 0
    while i < count:
        n = min(count - i, end_run - q)
        add_rows(row(sums, (0, q), n), row(sums, (1, q), n), row(found, (0, i), n))
        add_rows(row(sums, (2, q), n), row(sums, (3, q), n), row(found, (1, i), n))
        i, q = i + n, first_run


@inlined
def add_short_runs(
    cut, x, dy, residual, activation, weights, slot, r, rows, c, n, terms, own_room, found, sums
):
    """Add to the sums of runs their parts of the columns [c, c + n) in some rows from ``r`` on.

    Of a run four rows are taken together, as long as there are, and what vectors hold of some runs side by side.
    """
    first_run, end_run = runs(c, n, cut.run)
    held, count, first_held, end = held_like(x), 0, first_run, r + rows
    together = in_fours(cut.run, x)
    while r < end:
        segments, q = min(together, end - r), first_run
        while q < end_run:
            start, size = bounds(cut, q, c, n)
            some = 1 if size < cut.run else min(ROWS - count, (c + n) // cut.run - q)
            hold_runs(
                cut, x, dy, residual, activation, weights, slot, q, some, r, segments, start, size, terms,
                own_room, held, count,
            )  # fmt: skip
            count, q = count + some, q + some
            if count == ROWS:
                add_held(held, count, first_held, first_run, end_run, found, sums)
                count, first_held = 0, q if q < end_run else first_run
        r += segments
    add_held(held, count, first_held, first_run, end_run, found, sums)


@inlined
def add_long_runs(cut, x, dy, residual, activation, weights, slot, r, rows, c, n, terms, own_room, sums):
    """Add to the sums of runs their parts of the columns [c, c + n) in some rows from ``r`` on, piece by piece."""
    first_run, end_run = runs(c, n, cut.run)
    for s in range(r, r + rows):
        for q in range(first_run, end_run):
            start, size = bounds(cut, q, c, n)
            own = (terms[0, q], terms[1, q], terms[6, q], terms[7, q])
            for i in range(start, start + size, piece(x)):
                m = min(piece(x), start + size - i)
                at = (s * cut.group + slot) * cut.inner + i
                own_x, own_dy, own_residual = row(x, at, m), row(dy, at, m), part(residual, at, m)
                if weights is None:
                    a, b = piece_grad_sums(own_x, own_dy, None, *own, activation, own_residual)
                else:
                    counted_x, dz = row(own_room, (0, 0), m), row(own_room, (1, 0), m)
                    fill_counted(
                        own_x, own_dy, own_residual, own_positions(weights, cut, slot, q, s, i, m),
                        own[0], own[2], own[3], activation, counted_x, dz,
                    )  # fmt: skip
                    a, b = piece_grad_sums(counted_x, dz, None, own[0], own[1])
                sums[0, q], sums[1, q] = add(sums[0, q], sums[1, q], np.float64(a))
                sums[2, q], sums[3, q] = add(sums[2, q], sums[3, q], np.float64(b))


@allocating
def chunk_grad_sums(g, x, dy, slot, slots, chunk, terms, residual, activation, weights, sums):
    """Sums of dz and of dz * x_hat over one chunk of each of some slots, by run, with their rests.

    The walk is along memory. An activation makes dz of dy within the sums of long runs; of short ones relu does, others
    do so in room before them.
    """
    cut = unpack(g)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    together, n = at_once(cut, slots, cols)
    fill(row(sums, (0, 0), sums.size), 0.0)
    given = (cut, x, dy, residual, activation, weights, slot, r0, rows)
    if cut.run <= piece(x):
        short_room, found = room((2, PIECE), x, weights, activation), wide((2, ROWS))
        for k in range(0, slots, together):
            add_short_runs(*given, k * cut.inner + c0, n, terms, short_room, found, sums)
    else:
        long_room = room((2, PIECE), x, weights, None)
        for k in range(0, slots, together):
            add_long_runs(*given, k * cut.inner + c0, n, terms, long_room, sums)


@helper
def slot_grad_sums(g, slot, slots, mean, rstd, terms, sums, slot_sums):
    """Add up the chunks of some slots, in order, with what rounding leaves out."""
    cut = unpack(g)
    n = slots * cut.width
    add_chunks(sums, cut.chunks, n)
    dz, dz_x_hat = row(sums, (0, 0, 0), n), row(sums, (0, 2, 0), n)
    settle_rows(dz, row(sums, (0, 1, 0), n))
    settle_rows(dz_x_hat, row(sums, (0, 3, 0), n))
    settle_runs(
        row(slot_sums, (0, slot, 0), n), row(slot_sums, (1, slot, 0), n), dz, dz_x_hat,
        row(mean, slot, slots), row(rstd, slot, slots), row(terms, (0, 0), n), cut.width, 1,
    )  # fmt: skip


@allocating
def fill_terms(g, slot, slots, mean, rstd, weight, weights, slot_sums, count, counts, constant, terms):
    """Write what dx of some slots is computed from."""
    cut = unpack(g)
    pool = wide((3, slots))
    k, end = slot, slot + slots
    while k < end:
        n = alike(cut, k, end)
        first, size = (k - slot) * cut.width, n * cut.width
        fill_gradient_terms(
            row(mean, k, n), row(rstd, k, n), part(weight, within(k, cut.period) * cut.width, size), cut.width,
            row(slot_sums, (0, k, 0), size), row(slot_sums, (1, k, 0), size),
            slot_count(count, counts, k, cut.period), constant, weights is not None, pool, terms, first,
        )  # fmt: skip
        for i in range(4):
            repeat(row(terms, (i, first), size), n, cut.width)
        k += n


@inlined
def input_grad_piece(dx, at, i, n, given):
    """Dx of some neighbours of a run, by its terms."""
    x, dy, dresidual, residual, weights, own, activation, constant = given
    mean_hi, hat_scale, slope, offset, gain, scale, shift = own
    arrays = (
        row(x, at, n), row(dy, at, n), dx, part(dresidual, at, n), part(residual, at, n), part(weights, i, n),
    )  # fmt: skip
    if constant:
        input_grad_segment(*arrays, mean_hi, hat_scale, None, None, gain, scale, shift, activation)
    else:
        input_grad_segment(*arrays, mean_hi, hat_scale, slope, offset, gain, scale, shift, activation)


write_input_grad = writer(input_grad_piece)


@loop
def input_grad_chunk(
    g, x, dy, dx, dresidual, slot, slots, chunk, terms, residual, activation, weights, constant
):  # fmt: skip
    """Dx of one chunk of each of some slots, run by run."""
    cut = unpack(g)
    x, dy, dx, seam, stream = borrowed(x), borrowed(dy), borrowed(dx), seam_like(dx), begin(dx, cut.streamed)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    together, n = at_once(cut, slots, cols)
    vectors = in_vectors(x) and by_vectors(activation, (dresidual, residual, weights))
    vectors = vectors and cut.run <= LONGEST and not (constant or stream.past)
    for r in range(r0, r0 + rows):
        for k in range(0, slots, together):
            c = k * cut.inner + c0
            first_run, end_run = runs(c, n, cut.run)
            for q in range(first_run, end_run):
                start, size = bounds(cut, q, c, n)
                own = (
                    terms[0, q], terms[1, q], terms[2, q], terms[3, q], terms[4, q], terms[6, q], terms[7, q],
                )  # fmt: skip
                first = (r * cut.group + slot) * cut.inner + start
                if vectors:
                    input_grad_vectors(
                        row(x, first, size), row(dy, first, size), row(dx, first, size), *own, activation
                    )
                else:
                    own_weights = own_positions(weights, cut, slot, q, r, start, size)
                    given = (x, dy, dresidual, residual, own_weights, own, activation, constant)
                    stream = write_input_grad(dx, seam, stream, first, size, given)
    finish(dx, seam, stream)
