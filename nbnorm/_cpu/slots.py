"""What a task does to chunks of neighbouring slots."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbnorm._cpu.cut import block, bounds, positions, runs, unpack
from nbnorm._cpu.launch import allocating, helper, inlined, loop
from nbnorm._cpu.memory import borrowed, entry, part, row
from nbnorm._cpu.scratch import room, scratch, wide
from nbnorm._cpu.segments import apply_block, apply_segment, counted, input_grad_segment
from nbnorm._cpu.short_slots import SLOTS, short_moments
from nbnorm._cpu.stores import seam_like
from nbnorm._cpu.streams import begin, finish, writer
from nbnorm._cpu.tiles import (
    FOUR,
    PIECE,
    TILE,
    grad_sums_of_four,
    in_fours,
    line_moments,
    parameter,
    piece,
    piece_grad_sums,
    reciprocal_stds,
    slot_count,
    within,
)
from nbnorm._math import accumulate, add, affine, gradient_terms, recentered, reciprocal_std, rounded, settled


@helper
def add_tiles(g, slot, slots, chunk, count, means, m2s, moments):
    """Merge a tile of ``count`` values into the moments of a chunk of each of some slots."""
    chunks = unpack(g).chunks
    for i in range(slots):
        own = moments[(slot + i) * chunks + chunk]
        if own[0] == 0.0:  # as `accumulate` would have it, but short slots notice its call
            own[0], own[1], own[2], own[3] = count, means[i], m2s[i], 0.0
        else:
            own[0], own[1], own[2], own[3] = accumulate(
                own[0], own[1], own[2], own[3], count, means[i], m2s[i]
            )


@allocating
def chunk_moments(g, x, weights, slot, slots, chunk, moments):
    """Count, mean and m2 of one chunk of each of some neighbouring slots: its tiles merged in order.

    The walk is along memory, so that all slots take part in turn, and their tiles are concluded side by side.
    """
    cut = unpack(g)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    if weights is not None:
        for k in range(slot, slot + slots):
            own = moments[k * cut.chunks + chunk]
            slot_weights = entry(weights, k // cut.period)
            own[0], own[1], own[2] = counted_chunk_moments(cut, x, slot_weights, k, r0, rows, c0, cols)
        return
    for k in range(slot, slot + slots):
        moments[k * cut.chunks + chunk, 0] = 0.0
    x, shift, sums, found = borrowed(x), scratch(SLOTS, x), wide((3, SLOTS)), wide((2, SLOTS))
    tile_rows, tile_cols = max(1, min(rows, TILE // cols)), min(cols, TILE)
    stride, together = cut.group * cut.inner, SLOTS if cols <= TILE else 1
    for r in range(0, rows, tile_rows):
        height = min(tile_rows, rows - r)
        for k in range(slot, slot + slots, together):
            first, n = ((r0 + r) * cut.group + k) * cut.inner + c0, min(together, slot + slots - k)
            for c in range(0, cols, tile_cols):
                width = min(tile_cols, cols - c)
                means, m2s = row(found, (0, 0), n), row(found, (1, 0), n)
                short_moments(x, first + c, cut.inner, n, stride, height, width, shift, sums, means, m2s)
                add_tiles(g, k, n, chunk, np.float64(height * width), means, m2s, moments)
    for k in range(slot, slot + slots):
        own = moments[k * cut.chunks + chunk]
        own[2] = settled(own[2], own[3])


@helper
def counted_chunk_moments(cut, x, weights, slot, r0, rows, c0, cols):
    """`chunk_moments` of one slot with the weights of its positions: a segment of a run at a time."""
    first_run, end_run = runs(c0, cols, cut.run)
    n = mean = m2 = rest = 0.0
    for j in range(first_run, end_run):
        start, size = bounds(cut, j, c0, cols)
        for r in range(r0, r0 + rows):
            first = (r * cut.group + slot) * cut.inner + start
            own_weights = positions(weights, cut, r, j, start, size)
            part_n, part_mean, part_m2 = line_moments(row(x, first, size), own_weights, True)
            n, mean, m2, rest = accumulate(n, mean, m2, rest, part_n, part_mean, part_m2)
    return n, mean, settled(m2, rest)


@helper
def merge_chunks(g, counts, slot, slots, moments, eps, mean, m2, rstd):
    """Mean and m2 of some slots, their chunks merged in order, and rstd unless there is no eps."""
    cut = unpack(g)
    values = np.float64(cut.outer * cut.inner)
    for k in range(slot, slot + slots):
        first = k * cut.chunks
        n, own_mean, own_m2, rest = moments[first, 0], moments[first, 1], moments[first, 2], 0.0
        for i in range(first + 1, first + cut.chunks):
            n, own_mean, own_m2, rest = accumulate(
                n, own_mean, own_m2, rest, moments[i, 0], moments[i, 1], moments[i, 2]
            )
        mean[k], m2[k] = own_mean, settled(own_m2, rest)
        if eps is not None and counts is not None:
            rstd[k] = reciprocal_std(m2[k], slot_count(values, counts, k, cut.period), eps)
    if eps is not None and counts is None:
        reciprocal_stds(row(m2, slot, slots), values, eps, row(rstd, slot, slots))


@helper
def run_affine(cut, x, slot, j, mean, rstd, weight, bias):
    """Coefficients of `normalize` for one run of a slot."""
    p = within(slot, cut.period) * cut.width + j
    return affine(mean, rstd, parameter(weight, p, 1.0), parameter(bias, p, 0.0), x)


def _piece(apply: Any) -> Any:
    """Return a function for `writer` that normalizes some neighbours of a run."""

    @inlined
    def piece(y, at, i, n, given):
        x, residual, own, activation = given
        apply(row(x, at, n), y, part(residual, at, n), *own, activation)

    return piece


write_run = writer(_piece(apply_segment), _piece(apply_block))


@helper
def apply_chunk(g, x, y, slot, slots, chunk, mean, rstd, weight, bias, residual, activation):
    """Normalize one chunk of each of some slots, run by run."""
    cut = unpack(g)
    x, y, seam, stream = borrowed(x), borrowed(y), seam_like(y), begin(y, cut.streamed)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    first_run, end_run = runs(c0, cols, cut.run)
    for r in range(r0, r0 + rows):
        for k in range(slot, slot + slots):
            for j in range(first_run, end_run):
                start, size = bounds(cut, j, c0, cols)
                first = (r * cut.group + k) * cut.inner + start
                own = run_affine(cut, x, k, j, mean[k], rstd[k], weight, bias)
                given = (x, residual, own, activation)
                stream = write_run(y, seam, stream, first, size, given)
    finish(y, seam, stream)


@inlined
def segment_sums(cut, x, dy, residual, weights, slot, j, r, start, n, rstd, coefficients, activation, room):
    """`piece_grad_sums` of ``n`` columns of run ``j`` in row ``r``, by mean, scale and shift of `normalize`."""
    i = (r * cut.group + slot) * cut.inner + start
    own_x, own_dy, own_residual = row(x, i, n), row(dy, i, n), part(residual, i, n)
    mean_hi, scale, shift = coefficients
    if weights is None:
        return piece_grad_sums(own_x, own_dy, None, mean_hi, rstd, scale, shift, activation, own_residual)
    own_weights = positions(entry(weights, slot // cut.period), cut, r, j, start, n)
    own_x, own_dy = counted(own_x, own_dy, own_residual, own_weights, *coefficients, activation, room, 0)
    return piece_grad_sums(own_x, own_dy, None, mean_hi, rstd)


@inlined
def four_segments_sums(
    cut, x, dy, residual, weights, slot, j, r, start, n, rstd, coefficients, activation, room
):
    """`grad_sums_of_four`, likewise, of that row and the next three."""
    i, stride = (r * cut.group + slot) * cut.inner + start, cut.group * cut.inner
    k, m, o = i + stride, i + 2 * stride, i + 3 * stride
    xa, xb, xc, xd = row(x, i, n), row(x, k, n), row(x, m, n), row(x, o, n)
    a, b, c, d = row(dy, i, n), row(dy, k, n), row(dy, m, n), row(dy, o, n)
    ra, rb, rc, rd = part(residual, i, n), part(residual, k, n), part(residual, m, n), part(residual, o, n)
    mean_hi, scale, shift = coefficients
    if weights is None:
        return grad_sums_of_four(
            xa, xb, xc, xd, a, b, c, d, mean_hi, rstd, scale, shift, activation, ra, rb, rc, rd
        )
    own, how = entry(weights, slot // cut.period), (*coefficients, activation, room)
    xa, a = counted(xa, a, ra, positions(own, cut, r, j, start, n), *how, 0)
    xb, b = counted(xb, b, rb, positions(own, cut, r + 1, j, start, n), *how, n)
    xc, c = counted(xc, c, rc, positions(own, cut, r + 2, j, start, n), *how, 2 * n)
    xd, d = counted(xd, d, rd, positions(own, cut, r + 3, j, start, n), *how, 3 * n)
    return grad_sums_of_four(xa, xb, xc, xd, a, b, c, d, mean_hi, rstd)


@inlined
def note(own, j, a, b):
    """Add to the sums of dz and of dz * x_hat of a run, and to what rounding leaves out of them."""
    own[0, j], own[1, j] = add(own[0, j], own[1, j], a)
    own[2, j], own[3, j] = add(own[2, j], own[3, j], b)


@inlined
def add_segments(
    g, x, dy, slot, slots, chunk, mean, rstd, weight, bias, residual, activation, weights, sums, room, first, end,
    height,
):  # fmt: skip
    """Add to the sums of a chunk of each of some slots its segments in the rows [first, end), ``height`` at once."""
    cut = unpack(g)
    _, _, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    first_run, end_run = runs(c0, cols, cut.run)
    for r in range(first, end, height):
        for k in range(slot, slot + slots):
            own = sums[k * cut.chunks + chunk]
            _, hat_scale, _ = affine(mean[k], rstd[k], 1.0, 0.0, x)
            for j in range(first_run, end_run):
                start, size = bounds(cut, j, c0, cols)
                given = (cut, x, dy, residual, weights, k, j)
                how = (hat_scale, run_affine(cut, x, k, j, mean[k], rstd[k], weight, bias), activation, room)
                if height == FOUR:
                    note(own, j, *four_segments_sums(*given, r, start, size, *how))
                else:
                    for i in range(start, start + size, piece(x)):
                        n = min(piece(x), start + size - i)
                        note(own, j, *segment_sums(*given, r, i, n, *how))


@allocating
def chunk_grad_sums(
    g, x, dy, slot, slots, chunk, mean, rstd, weight, bias, residual, activation, weights, sums
):
    """Sums of dz and of dz * x_hat over one chunk of each of some slots, by run: total, rest, of each.

    The walk is along memory, short segments four at once.
    """
    cut = unpack(g)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    first_run, end_run = runs(c0, cols, cut.run)
    fours = in_fours(rows, min(cut.run, cols), x)
    given = (g, x, dy, slot, slots, chunk, mean, rstd, weight, bias, residual, activation, weights, sums)
    own_room = room((2, PIECE), x, weights)
    add_segments(*given, own_room, r0, r0 + fours, FOUR)
    add_segments(*given, own_room, r0 + fours, r0 + rows, 1)
    for k in range(slot, slot + slots):
        own = sums[k * cut.chunks + chunk]
        mean_hi, _, _ = affine(mean[k], rstd[k], 1.0, 0.0, x)
        for j in range(first_run, end_run):
            a = settled(own[0, j], own[1, j])
            b = recentered(settled(own[2, j], own[3, j]), a, mean[k], mean_hi, rstd[k])
            own[0, j], own[1, j], own[2, j], own[3, j] = a, 0.0, b, 0.0


@helper
def add_chunks(g, slot, slots, sums, slot_sums):
    """Add up the chunks of some slots, in order, with what rounding leaves out."""
    chunks = unpack(g).chunks
    for k in range(slot, slot + slots):
        first = k * chunks
        for j in range(sums.shape[2]):
            a, a_rest, b, b_rest = sums[first, 0, j], sums[first, 1, j], sums[first, 2, j], sums[first, 3, j]
            for i in range(first + 1, first + chunks):
                a, a_rest = add(a, a_rest, sums[i, 0, j])
                b, b_rest = add(b, b_rest, sums[i, 2, j])
            slot_sums[0, k, j], slot_sums[1, k, j] = settled(a, a_rest), settled(b, b_rest)


@helper
def weighted(weight, first, slot_sums, which, slot):
    """Total of one of the sums of a slot's runs, each times its weight, which starts at ``first``."""
    total = 0.0
    for j in range(slot_sums.shape[2]):
        total += parameter(weight, first + j, 1.0) * slot_sums[which, slot, j]
    return total


@helper
def fill_terms(g, x, slot, slots, mean, rstd, weight, weights, slot_sums, count, counts, constant, terms):
    """Write what dx of some slots is computed from: mean, rstd, slope, offset and the factor of the gain."""
    cut = unpack(g)
    for k in range(slot, slot + slots):
        first = within(k, cut.period) * cut.width
        sum_g = weighted(weight, first, slot_sums, 0, k)
        sum_g_x_hat = weighted(weight, first, slot_sums, 1, k)
        n = slot_count(count, counts, k, cut.period)
        terms[k, 0], terms[k, 1], _ = affine(mean[k], rstd[k], 1.0, 0.0, x)
        terms[k, 2], terms[k, 3], terms[k, 4] = gradient_terms(
            mean[k], rstd[k], sum_g, sum_g_x_hat, n, True, constant, weights is not None, x
        )


@helper
def run_terms(cut, x, slot, j, mean, rstd, weight, bias, terms):
    """Coefficients for dx of one run: those of its slot, the gain, and scale and shift of `normalize`."""
    _, scale, shift = run_affine(cut, x, slot, j, mean, rstd, weight, bias)
    gain = terms[4] * parameter(weight, within(slot, cut.period) * cut.width + j, 1.0)
    return (
        rounded(terms[0], x), rounded(terms[1], x), rounded(terms[2], x), rounded(terms[3], x), rounded(gain, x),
        scale, shift,
    )  # fmt: skip


@inlined
def input_grad_piece(dx, at, i, n, given):
    """Dx of some neighbours of a run, by its `run_terms`."""
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
    g, x, dy, dx, dresidual, slot, slots, chunk, mean, rstd, weight, bias, residual, activation, weights, terms,
    constant,
):  # fmt: skip
    """Dx of one chunk of each of some slots, run by run."""
    cut = unpack(g)
    x, dy, dx, seam, stream = borrowed(x), borrowed(dy), borrowed(dx), seam_like(dx), begin(dx, cut.streamed)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    first_run, end_run = runs(c0, cols, cut.run)
    for r in range(r0, r0 + rows):
        for k in range(slot, slot + slots):
            for j in range(first_run, end_run):
                start, size = bounds(cut, j, c0, cols)
                first = (r * cut.group + k) * cut.inner + start
                own_weights = positions(entry(weights, k // cut.period), cut, r, j, start, size)
                own = run_terms(cut, x, k, j, mean[k], rstd[k], weight, bias, terms[k])
                given = (x, dy, dresidual, residual, own_weights, own, activation, constant)
                stream = write_input_grad(dx, seam, stream, first, size, given)
    finish(dx, seam, stream)
