"""Walk down columns: rows of lanes lie one after the other, and every lane belongs to one slot.

A lane has a fixed place in its row, so SIMD runs across lanes. Narrow rows are folded, ``fold`` of them
side by side, until a row is worth vectorizing; wide ones are cut into blocks of whole slots. Lanes of one
slot, from folding or from ``inner`` > 1, are merged at the end. The fused kernels take a block per task
with all of its rows; otherwise a task is a chunk of rows of a block, one kernel per pass.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import prange

from nbnorm._cpu.halves import scratch
from nbnorm._cpu.lanes import (
    apply_row,
    chunk_lane_grad_sums,
    chunk_lane_moments,
    copy_row,
    fill,
    input_grad_row,
    line_sum,
    merge_rows,
    row,
    row_weight,
    slot_moments,
    total_weight,
)
from nbnorm._cpu.launch import Twins, balanced, helper
from nbnorm._cpu.tiles import CHUNK, add_rows, entry, parameter, part, settle_rows, slot_count, weighted
from nbnorm._math import affine, gradient_terms, recentered, reciprocal_std, rounded
from nbnorm._view import View

# Folding fills rows up to this many lanes (benchmarks/bench_batch_norm.py, Columns).
WIDE = 768
# Folding leaves at least this many rows.
MIN_ROWS = 16
# Lanes of a block whose rows all fit the second-level cache together, and of one whose rows do not.
CACHED_LANES = 256
STREAMED_LANES = 2048
# Chunks of a block: CHUNK values each until there are SOME, LONG values each until there are MANY. Every chunk has
# moments or sums of its own for each lane, whose merge is one thread's work: moments of (65536, 64) in 64 chunks take
# 1.4 times as long as in 16 (benchmarks/choices.py; AMD EPYC, AVX-512, two threads). MANY_CHUNKS and LONG_CHUNK are
# reasoned, not measured.
SOME_CHUNKS = 16
MANY_CHUNKS = 64
LONG_CHUNK = 1 << 20


class Cut(NamedTuple):
    """How an array is cut: `View` sizes, then what `geometry` chooses and what follows from it."""

    batch: int
    outer: int
    group: int
    inner: int
    period: int
    width: int
    run: int
    fold: int  # rows of the array side by side in one row of lanes
    block: int  # lanes of a block: all of them, or some whole slots
    chunk: int  # rows of a chunk
    lanes: int
    rows: int  # whole rows of lanes
    spare: int  # lanes of the partial row that folding leaves over; it ends the last chunk
    blocks: int
    chunks: int


@lru_cache(maxsize=4096)
def geometry(view: View, masked: bool = False) -> np.ndarray:
    """Return the `Cut` of a view as an array, the cheapest way to hand a kernel many integers.

    Rows of a mask are not folded: a row of lanes has one weight.
    """
    width = view.group * view.inner
    fold = 1 if masked else max(1, min(WIDE // width, view.outer // MIN_ROWS))
    lanes, rows = fold * width, view.outer // fold
    if fold > 1:
        block = lanes
    elif rows * CACHED_LANES <= CHUNK:
        block = min(CHUNK // rows, 4 * CACHED_LANES)
    else:
        block = STREAMED_LANES
    block = min(lanes, max(block // view.inner, 1) * view.inner) if fold == 1 else lanes
    values = rows * block
    chunks = min(values // CHUNK, max(SOME_CHUNKS, values // LONG_CHUNK), MANY_CHUNKS)
    chunk = -(-rows // max(chunks, 1))
    spare = view.outer % fold * width
    sizes = (view.batch, view.outer, view.group, view.inner, view.period, view.width, view.run)
    return np.array(
        Cut(*sizes, fold, block, chunk, lanes, rows, spare, -(-lanes // block), -(-rows // chunk))
    )


@lru_cache(maxsize=4096)
def fused(view: View, threads: int, masked: bool = False) -> bool:
    """Whether whole blocks keep the threads busy."""
    cut = Cut(*geometry(view, masked))
    return balanced(cut.batch * cut.blocks, threads)


@helper
def unpack(g):
    """Name the integers of a geometry."""
    return Cut(g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10], g[11], g[12], g[13], g[14])


class Block(NamedTuple):
    """A block of lanes of one batch entry."""

    batch: int
    base: int  # index of the batch entry's first element
    lane: int
    lanes: int
    width: int  # lanes that remain once folds are merged
    slot: int
    slots: int


@helper
def locate(g, index):
    """Find a block by its index."""
    cut = unpack(g)
    b, lane = index // cut.blocks, index % cut.blocks * cut.block
    lanes = min(cut.block, cut.lanes - lane)
    width = lanes // cut.fold
    base = b * cut.outer * cut.group * cut.inner
    return Block(b, base, lane, lanes, width, b * cut.group + lane // cut.inner, width // cut.inner)


@helper
def rows_weights(weights, batch, first, rows):
    """Weights of some rows of a batch entry."""
    return None if weights is None else weights[batch, first : first + rows]


@helper
def chunk_weight(g, weights, batch, chunk):
    """Number of values of a lane that count in a chunk of whole rows."""
    cut = unpack(g)
    start = chunk * cut.chunk
    rows = min(cut.chunk, cut.rows - start)
    return total_weight(rows_weights(weights, batch, start, rows), 0, rows)


@helper
def chunk_moments(g, x, weights, index, chunk, lane_moments):
    """Moments of the lanes of a block over one chunk of whole rows: mean, m2, and scratch for the rest of m2."""
    cut, own = unpack(g), locate(g, index)
    start = chunk * cut.chunk
    rows = min(cut.chunk, cut.rows - start)
    sums, wide_sums = scratch((3, own.lanes), x), np.empty((3, own.lanes))
    own_moments = lane_moments[own.batch * cut.chunks + chunk]
    chunk_lane_moments(
        x, rows_weights(weights, own.batch, start, rows), own.base + start * cut.lanes + own.lane, cut.lanes, rows,
        sums, wide_sums, row(own_moments[0], own.lane, own.lanes), row(own_moments[1], own.lane, own.lanes),
        row(own_moments[2], own.lane, own.lanes),
    )  # fmt: skip


@helper
def block_moments(g, x, weights, index, lane_moments, mean, m2):
    """Merge chunks and folds of a block, then the spare row, then the lanes of each slot."""
    cut, own = unpack(g), locate(g, index)
    top = own.batch * cut.chunks
    top_mean, top_m2 = (
        row(lane_moments[top, 0], own.lane, own.width),
        row(lane_moments[top, 1], own.lane, own.width),
    )
    rest = row(lane_moments[top, 2], own.lane, own.width)
    fill(rest, 0.0)
    n = chunk_weight(g, weights, own.batch, 0)
    for other in range(1, cut.chunks * cut.fold):
        chunk, at = other // cut.fold, own.lane + other % cut.fold * own.width
        other_n = chunk_weight(g, weights, own.batch, chunk)
        moments = lane_moments[top + chunk]
        merge_rows(
            top_mean, top_m2, rest, n, row(moments[0], at, own.width), row(moments[1], at, own.width), other_n
        )
        n += other_n
    for at in range(0, cut.spare, own.width):
        spare_row = row(x, own.base + cut.rows * cut.lanes + at, own.width)
        merge_rows(top_mean, top_m2, rest, n, spare_row, None, 1.0)
        n += 1.0
    settle_rows(top_m2, rest)
    for i in range(own.slots):
        if cut.inner == 1:
            mean[own.slot + i], m2[own.slot + i] = top_mean[i], top_m2[i]
        else:
            at = i * cut.inner
            slot_mean, slot_m2 = slot_moments(row(top_mean, at, cut.inner), row(top_m2, at, cut.inner), n)
            mean[own.slot + i], m2[own.slot + i] = slot_mean, slot_m2


@helper
def block_rstd(g, weights, index, m2, eps, rstd):
    """Reciprocal standard deviations of a block's slots."""
    cut, own = unpack(g), locate(g, index)
    n = total_weight(rows_weights(weights, own.batch, 0, cut.outer), 0, cut.outer) * cut.inner
    for slot in range(own.slot, own.slot + own.slots):
        rstd[slot] = reciprocal_std(m2[slot], n, eps)


@helper
def repeat_folds(g, own, terms, first, end):
    """Copy rows [first, end) of the terms of a block's first fold to its other folds."""
    fold = unpack(g).fold
    for k in range(first, end):
        source = row(terms[own.batch, k], own.lane, own.width)
        for f in range(1, fold):
            copy_row(row(terms[own.batch, k], own.lane + f * own.width, own.width), source)


@helper
def lay_out(terms, lane, run, value):
    """Write one coefficient to the lanes of a run."""
    if run == 1:
        terms[lane] = value
    else:
        fill(row(terms, lane, run), value)


@helper
def spread_affine(g, index, mean, rstd, weight, bias, terms, at):
    """Lay the coefficients of `normalize` out along the lanes of a block, from row ``at`` of the terms."""
    cut, own = unpack(g), locate(g, index)
    rows = terms[own.batch]
    lane = own.lane
    for slot in range(own.slot, own.slot + own.slots):
        for j in range(cut.width):
            p = slot % cut.period * cut.width + j
            w, b = parameter(weight, p, 1.0), parameter(bias, p, 0.0)
            mean_hi, scale, shift = affine(mean[slot], rstd[slot], w, b, terms)
            lay_out(rows[at], lane, cut.run, mean_hi)
            lay_out(rows[at + 1], lane, cut.run, scale)
            lay_out(rows[at + 2], lane, cut.run, shift)
            lane += cut.run
    repeat_folds(g, own, terms, at, at + 3)


@helper
def spread_activation(g, index, mean, rstd, weight, bias, activation, terms):
    """Lay out, behind all else, what z is computed from, if an activation asks for it."""
    if activation is not None:
        spread_affine(g, index, mean, rstd, weight, bias, terms, 5)


@helper
def row_lanes(cut, own, r):
    """Lanes that row ``r`` of a block has: the row after the whole ones is the spare one."""
    return own.lanes if r < cut.rows else cut.spare


@helper
def rows_end(cut, chunk):
    """One past the last row of a chunk, the spare row included."""
    return min((chunk + 1) * cut.chunk, cut.rows) + (chunk == cut.chunks - 1 and cut.spare > 0)


@helper
def apply_chunk(g, x, y, residual, activation, index, chunk, terms):
    """Normalize one chunk of rows of a block."""
    cut, own = unpack(g), locate(g, index)
    for r in range(chunk * cut.chunk, rows_end(cut, chunk)):
        n, first = row_lanes(cut, own, r), own.base + r * cut.lanes + own.lane
        own_terms = terms[own.batch]
        apply_row(
            row(x, first, n), row(y, first, n), part(residual, first, first + n),
            row(own_terms[0], own.lane, n), row(own_terms[1], own.lane, n), row(own_terms[2], own.lane, n),
            activation,
        )  # fmt: skip


@helper
def summands_room(g, x, weights, activation):
    """Room for the `summands` of four rows, None where they are computed from nothing but x and dy."""
    if activation is None:
        return None if weights is None else scratch((4, 2, unpack(g).block), x)
    return scratch((4, 2, unpack(g).block), x)


@helper
def chunk_grad_sums(g, x, dy, residual, activation, weights, index, chunk, terms, lane_sums):
    """Sums of dz and dz * x_hat of the lanes of a block over one chunk of rows, each with its rest."""
    cut, own = unpack(g), locate(g, index)
    start, end = chunk * cut.chunk, rows_end(cut, chunk)
    whole = min(end, cut.rows) - start
    own_terms = terms[own.batch]
    chunk_lane_grad_sums(
        x, dy, residual, rows_weights(weights, own.batch, start, whole), activation,
        own.base + start * cut.lanes + own.lane, cut.lanes, whole, cut.spare if end > cut.rows else 0,
        row(own_terms[0], own.lane, own.lanes), row(own_terms[1], own.lane, own.lanes),
        row(own_terms[6], own.lane, own.lanes), row(own_terms[7], own.lane, own.lanes),
        scratch((2, own.lanes), x),
        summands_room(g, x, weights, activation),
        lane_sums[own.batch * cut.chunks + chunk, :, own.lane : own.lane + own.lanes],
    )  # fmt: skip


@helper
def block_grad_sums(g, index, mean, rstd, terms, lane_sums, sum_dz, sum_dz_x_hat):
    """Add chunks and folds of a block up, then the lanes of each run."""
    cut, own = unpack(g), locate(g, index)
    top = lane_sums[own.batch * cut.chunks, :, own.lane : own.lane + own.width]
    for other in range(1, cut.chunks * cut.fold):
        at = own.lane + other % cut.fold * own.width
        part_sums = lane_sums[own.batch * cut.chunks + other // cut.fold]
        for k in (0, 2):
            add_rows(top[k], top[k + 1], row(part_sums[k], at, own.width))
            add_rows(top[k], top[k + 1], row(part_sums[k + 1], at, own.width))
    for i in range(own.slots):
        slot = own.slot + i
        mean_hi = terms[own.batch, 0, own.lane + i * cut.inner]
        for j in range(cut.width):
            first = i * cut.inner + j * cut.run
            a = line_sum(top[0], top[1], first, first + cut.run)
            b = line_sum(top[2], top[3], first, first + cut.run)
            sum_dz[slot, j] = a
            sum_dz_x_hat[slot, j] = recentered(b, a, mean[slot], mean_hi, rstd[slot])


@helper
def spread_gradient_terms(
    g, index, mean, rstd, weight, weights, sum_dz, sum_dz_x_hat, count, counts, constant, terms
):
    """Lay the coefficients of `input_gradient` out along the lanes of a block, behind mean and rstd."""
    cut, own = unpack(g), locate(g, index)
    rows = terms[own.batch]
    lane = own.lane
    for k in range(own.slot, own.slot + own.slots):
        first = k % cut.period * cut.width
        sum_g, sum_g_x_hat = weighted(weight, first, sum_dz[k]), weighted(weight, first, sum_dz_x_hat[k])
        mean_hi, scale, _ = affine(mean[k], rstd[k], 1.0, 0.0, terms)
        n = slot_count(count, counts, k, cut.period)
        slope, offset, factor = gradient_terms(
            mean[k], rstd[k], sum_g, sum_g_x_hat, n, True, constant, weights is not None, terms
        )
        for j in range(cut.width):
            gain = rounded(factor * parameter(weight, first + j, 1.0), terms)
            lay_out(rows[0], lane, cut.run, mean_hi)
            lay_out(rows[1], lane, cut.run, scale)
            lay_out(rows[2], lane, cut.run, slope)
            lay_out(rows[3], lane, cut.run, offset)
            lay_out(rows[4], lane, cut.run, gain)
            lane += cut.run
    repeat_folds(g, own, terms, 0, 5)


@helper
def input_grad_chunk(g, x, dy, dx, dresidual, residual, activation, weights, index, chunk, terms, constant):
    """Dx of one chunk of rows of a block."""
    cut, own = unpack(g), locate(g, index)
    t = terms[own.batch]
    for r in range(chunk * cut.chunk, rows_end(cut, chunk)):
        n, i = row_lanes(cut, own, r), own.base + r * cut.lanes + own.lane
        end, lane = i + n, own.lane
        arrays = (x[i:end], dy[i:end], dx[i:end], part(dresidual, i, end), part(residual, i, end))
        mean_hi, rstd, gain = row(t[0], lane, n), row(t[1], lane, n), row(t[4], lane, n)
        scale, shift = row(t[6], lane, n), row(t[7], lane, n)
        w = lane_weight(weights, own.batch, r)
        if constant or row_weight(entry(weights, own.batch), r) == 0.0:
            input_grad_row(*arrays, w, mean_hi, rstd, None, None, gain, scale, shift, activation)
        else:
            slope, offset = row(t[2], lane, n), row(t[3], lane, n)
            input_grad_row(*arrays, w, mean_hi, rstd, slope, offset, gain, scale, shift, activation)


@helper
def lane_weight(weights, batch, r):
    """Weight of a row, None without a mask."""
    return None if weights is None else weights[batch, r]


@Twins
def moments_kernel(g, x, weights, mean, m2):
    """One chunk of a block per task, then one block per task; reads x once."""
    cut = unpack(g)
    blocks, chunks = cut.batch * cut.blocks, cut.chunks
    lane_moments = np.empty((cut.batch * chunks, 3, cut.lanes))
    for task in prange(blocks * chunks):
        chunk_moments(g, x, weights, task // chunks, task % chunks, lane_moments)
    for index in prange(blocks):
        block_moments(g, x, weights, index, lane_moments, mean, m2)


@Twins
def apply_kernel(g, x, y, mean, rstd, weight, bias, residual, activation):
    """One chunk of a block per task; reads x and writes y once."""
    cut = unpack(g)
    blocks, chunks = cut.batch * cut.blocks, cut.chunks
    terms = scratch((cut.batch, 3, cut.lanes), x)
    for index in prange(blocks):
        spread_affine(g, index, mean, rstd, weight, bias, terms, 0)
    for task in prange(blocks * chunks):
        apply_chunk(g, x, y, residual, activation, task // chunks, task % chunks, terms)


@Twins
def forward_kernel(g, x, y, weight, bias, residual, activation, weights, eps, mean, m2, rstd):
    """One block per task: its moments, then its normalization from cache."""
    cut = unpack(g)
    blocks, chunks = cut.batch * cut.blocks, cut.chunks
    lane_moments = np.empty((cut.batch * chunks, 3, cut.lanes))
    terms = scratch((cut.batch, 3, cut.lanes), x)
    for index in prange(blocks):
        for chunk in range(chunks):
            chunk_moments(g, x, weights, index, chunk, lane_moments)
        block_moments(g, x, weights, index, lane_moments, mean, m2)
        block_rstd(g, weights, index, m2, eps, rstd)
        spread_affine(g, index, mean, rstd, weight, bias, terms, 0)
        for chunk in range(chunks):
            apply_chunk(g, x, y, residual, activation, index, chunk, terms)


@Twins
def grad_sums_kernel(
    g, x, dy, mean, rstd, weight, bias, residual, activation, weights, sum_dz, sum_dz_x_hat
):  # fmt: skip
    """One chunk of a block per task, then one block per task; reads x and dy once."""
    cut = unpack(g)
    blocks, chunks = cut.batch * cut.blocks, cut.chunks
    lane_sums = np.empty((cut.batch * chunks, 4, cut.lanes))
    terms = scratch((cut.batch, 8, cut.lanes), x)
    for index in prange(blocks):
        spread_affine(g, index, mean, rstd, None, None, terms, 0)
        spread_activation(g, index, mean, rstd, weight, bias, activation, terms)
    for task in prange(blocks * chunks):
        chunk_grad_sums(
            g,
            x,
            dy,
            residual,
            activation,
            weights,
            task // chunks,
            task % chunks,
            terms,
            lane_sums,
        )
    for index in prange(blocks):
        block_grad_sums(g, index, mean, rstd, terms, lane_sums, sum_dz, sum_dz_x_hat)


@Twins
def input_grad_kernel(
    g, x, dy, dx, dresidual, mean, rstd, weight, bias, residual, activation, weights, sum_dz, sum_dz_x_hat,
    count, counts, constant,
):  # fmt: skip
    """One chunk of a block per task; reads x and dy and writes dx once."""
    cut = unpack(g)
    blocks, chunks = cut.batch * cut.blocks, cut.chunks
    terms = scratch((cut.batch, 8, cut.lanes), x)
    for index in prange(blocks):
        spread_gradient_terms(
            g, index, mean, rstd, weight, weights, sum_dz, sum_dz_x_hat, count, counts, constant, terms
        )
        spread_activation(g, index, mean, rstd, weight, bias, activation, terms)
    for task in prange(blocks * chunks):
        input_grad_chunk(
            g,
            x,
            dy,
            dx,
            dresidual,
            residual,
            activation,
            weights,
            task // chunks,
            task % chunks,
            terms,
            constant,
        )


@Twins
def backward_kernel(
    g, x, dy, dx, dresidual, mean, rstd, weight, bias, residual, activation, weights, sum_dz, sum_dz_x_hat,
    count, counts,
):  # fmt: skip
    """One block per task: its sums, then its dx from cache."""
    cut = unpack(g)
    blocks, chunks = cut.batch * cut.blocks, cut.chunks
    lane_sums = np.empty((cut.batch * chunks, 4, cut.lanes))
    terms = scratch((cut.batch, 8, cut.lanes), x)
    for index in prange(blocks):
        spread_affine(g, index, mean, rstd, None, None, terms, 0)
        spread_activation(g, index, mean, rstd, weight, bias, activation, terms)
        for chunk in range(chunks):
            chunk_grad_sums(g, x, dy, residual, activation, weights, index, chunk, terms, lane_sums)
        block_grad_sums(g, index, mean, rstd, terms, lane_sums, sum_dz, sum_dz_x_hat)
        spread_gradient_terms(
            g, index, mean, rstd, weight, weights, sum_dz, sum_dz_x_hat, count, counts, False, terms
        )
        for chunk in range(chunks):
            input_grad_chunk(
                g, x, dy, dx, dresidual, residual, activation, weights, index, chunk, terms, False
            )
