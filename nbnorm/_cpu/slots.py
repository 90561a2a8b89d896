"""What a task does to chunks of neighbouring slots to normalize them; `slot_grads` for their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbnorm._cpu.cut import alike, at_once, block, bounds, positions, runs, unpack
from nbnorm._cpu.lane_terms import affine_rows
from nbnorm._cpu.launch import allocating, helper, inlined
from nbnorm._cpu.memory import borrowed, entry, part, row
from nbnorm._cpu.scratch import scratch, wide
from nbnorm._cpu.segments import apply_block, apply_segment
from nbnorm._cpu.short_slots import SLOTS, short_moments
from nbnorm._cpu.stores import seam_like
from nbnorm._cpu.streams import begin, finish, writer
from nbnorm._cpu.tiles import TILE, line_moments, reciprocal_stds, slot_count, within
from nbnorm._cpu.vector_results import LONGEST, in_vectors, normalize_vectors
from nbnorm._cpu.vector_terms import by_vectors
from nbnorm._math import accumulate, reciprocal_std, settled


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
    x, shift, sums, found = borrowed(x), scratch(SLOTS, x), wide((4, SLOTS)), wide((2, SLOTS))
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
def fill_affine(g, slot, slots, mean, rstd, weight, bias, terms, at):
    """Write the coefficients of `normalize` of all runs of some slots into three rows of the terms."""
    cut = unpack(g)
    k, end = slot, slot + slots
    while k < end:
        n = alike(cut, k, end)
        first, p, size = (k - slot) * cut.width, within(k, cut.period) * cut.width, n * cut.width
        affine_rows(
            row(terms, (at, first), size), row(terms, (at + 1, first), size), row(terms, (at + 2, first), size),
            row(mean, k, n), row(rstd, k, n), part(weight, p, size), part(bias, p, size), cut.width, terms,
        )  # fmt: skip
        k += n


def _piece(apply: Any) -> Any:
    """Return a function for `writer` that normalizes some neighbours of a run."""

    @inlined
    def piece(y, at, i, n, given):
        x, residual, own, activation = given
        apply(row(x, at, n), y, part(residual, at, n), *own, activation)

    return piece


write_run = writer(_piece(apply_segment), _piece(apply_block))


@helper
def apply_chunk(g, x, y, slot, slots, chunk, terms, residual, activation):
    """Normalize one chunk of each of some slots, run by run."""
    cut = unpack(g)
    x, y, seam, stream = borrowed(x), borrowed(y), seam_like(y), begin(y, cut.streamed)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    together, n = at_once(cut, slots, cols)
    vectors = in_vectors(x) and by_vectors(activation, (residual,)) and cut.run <= LONGEST
    vectors = vectors and not stream.past
    for r in range(r0, r0 + rows):
        for k in range(0, slots, together):
            c = k * cut.inner + c0
            first_run, end_run = runs(c, n, cut.run)
            for q in range(first_run, end_run):
                start, size = bounds(cut, q, c, n)
                own = (terms[0, q], terms[1, q], terms[2, q])
                first = (r * cut.group + slot) * cut.inner + start
                if vectors:
                    normalize_vectors(row(x, first, size), row(y, first, size), *own, activation)
                else:
                    given = (x, residual, own, activation)
                    stream = write_run(y, seam, stream, first, size, given)
    finish(y, seam, stream)
