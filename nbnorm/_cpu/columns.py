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

from nbnorm._cpu.lanes import (
    apply_row,
    chunk_lane_grad_sums,
    chunk_lane_moments,
    constant_grad_row,
    input_grad_row,
    line_sum,
    merge_rows,
    row,
    slot_moments,
)
from nbnorm._cpu.launch import Twins, balanced, helper
from nbnorm._cpu.tiles import CHUNK, add_rows, parameter, settle_rows, weighted
from nbnorm._math import affine, gradient_terms, reciprocal_std
from nbnorm._view import View

# Folding fills rows up to this many lanes (benchmarks/bench_batch_norm.py, Columns).
WIDE = 768
# Folding leaves at least this many rows.
MIN_ROWS = 16
# Lanes of a block whose rows all fit the second-level cache together, and of one whose rows do not.
CACHED_LANES = 256
STREAMED_LANES = 2048
# Chunks of a column at most: more would only lengthen the merge.
MAX_CHUNKS = 64


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
def geometry(view: View) -> np.ndarray:
    """Return the `Cut` of a view as an array, the cheapest way to hand a kernel many integers."""
    width = view.group * view.inner
    fold = max(1, min(WIDE // width, view.outer // MIN_ROWS))
    lanes, rows = fold * width, view.outer // fold
    if fold > 1:
        block = lanes
    elif rows * CACHED_LANES <= CHUNK:
        block = min(CHUNK // rows, 4 * CACHED_LANES)
    else:
        block = STREAMED_LANES
    block = min(lanes, max(block // view.inner, 1) * view.inner) if fold == 1 else lanes
    chunk = max(CHUNK // block, -(-rows // MAX_CHUNKS))
    spare = view.outer % fold * width
    sizes = (view.batch, view.outer, view.group, view.inner, view.period, view.width, view.run)
    return np.array(
        Cut(*sizes, fold, block, chunk, lanes, rows, spare, -(-lanes // block), -(-rows // chunk))
    )


@lru_cache(maxsize=4096)
def fused(view: View, threads: int) -> bool:
    """Whether whole blocks keep the threads busy."""
    cut = Cut(*geometry(view))
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
def chunk_moments(g, x, index, chunk, sums, wide_sums, lane_moments):
    """Moments of the lanes of a block over one chunk of whole rows: mean, m2, and scratch for the rest of m2."""
    cut, own = unpack(g), locate(g, index)
    start = chunk * cut.chunk
    own_moments = lane_moments[own.batch * cut.chunks + chunk]
    chunk_lane_moments(
        x, own.base + start * cut.lanes + own.lane, cut.lanes, min(cut.chunk, cut.rows - start), sums, wide_sums,
        row(own_moments[0], own.lane, own.lanes), row(own_moments[1], own.lane, own.lanes),
        row(own_moments[2], own.lane, own.lanes),
    )  # fmt: skip


@helper
def block_moments(g, x, index, lane_moments, mean, m2):
    """Merge chunks and folds of a block, then the spare row, then the lanes of each slot."""
    cut, own = unpack(g), locate(g, index)
    top = own.batch * cut.chunks
    top_mean, top_m2 = (
        row(lane_moments[top, 0], own.lane, own.width),
        row(lane_moments[top, 1], own.lane, own.width),
    )
    rest = row(lane_moments[top, 2], own.lane, own.width)
    rest[:] = 0.0
    n = np.float64(min(cut.chunk, cut.rows))
    for part in range(1, cut.chunks * cut.fold):
        chunk, at = part // cut.fold, own.lane + part % cut.fold * own.width
        part_n = np.float64(min(cut.chunk, cut.rows - chunk * cut.chunk))
        part_moments = lane_moments[top + chunk]
        part_mean, part_m2 = row(part_moments[0], at, own.width), row(part_moments[1], at, own.width)
        merge_rows(top_mean, top_m2, rest, n, part_mean, part_m2, part_n)
        n += part_n
    for at in range(0, cut.spare, own.width):
        spare_row = row(x, own.base + cut.rows * cut.lanes + at, own.width)
        merge_rows(top_mean, top_m2, rest, n, spare_row, None, 1.0)
        n += 1.0
    settle_rows(top_m2, rest)
    for i in range(own.slots):
        first = i * cut.inner
        slot_mean, slot_m2 = slot_moments(row(top_mean, first, cut.inner), row(top_m2, first, cut.inner), n)
        mean[own.slot + i], m2[own.slot + i] = slot_mean, slot_m2


@helper
def block_rstd(g, index, m2, n, eps, rstd):
    """Reciprocal standard deviations of a block's slots."""
    own = locate(g, index)
    for slot in range(own.slot, own.slot + own.slots):
        rstd[slot] = reciprocal_std(m2[slot], n, eps)


@helper
def spread(g, index, first, n, terms, values):
    """Write values to ``n`` lanes of a block, in every fold: terms[k, lane] = values[k]."""
    cut, own = unpack(g), locate(g, index)
    for f in range(cut.fold):
        start = own.lane + f * own.width + first
        for lane in range(start, start + n):
            for k in range(len(values)):
                terms[own.batch, k, lane] = values[k]


@helper
def spread_affine(g, index, mean, rstd, weight, bias, terms):
    """Lay the coefficients of `normalize` out along the lanes of a block."""
    cut, own = unpack(g), locate(g, index)
    for i in range(own.slots):
        slot = own.slot + i
        for j in range(cut.width):
            p = slot % cut.period * cut.width + j
            w, b = parameter(weight, p, 1.0), parameter(bias, p, 0.0)
            values = affine(mean[slot], rstd[slot], w, b, terms)
            spread(g, index, i * cut.inner + j * cut.run, cut.run, terms, values)


@helper
def row_lanes(cut, own, r):
    """Lanes that row ``r`` of a block has: the row after the whole ones is the spare one."""
    return own.lanes if r < cut.rows else cut.spare


@helper
def rows_end(cut, chunk):
    """One past the last row of a chunk, the spare row included."""
    return min((chunk + 1) * cut.chunk, cut.rows) + (chunk == cut.chunks - 1 and cut.spare > 0)


@helper
def apply_chunk(g, x, y, index, chunk, terms):
    """Normalize one chunk of rows of a block."""
    cut, own = unpack(g), locate(g, index)
    for r in range(chunk * cut.chunk, rows_end(cut, chunk)):
        n, first = row_lanes(cut, own, r), own.base + r * cut.lanes + own.lane
        own_terms = terms[own.batch]
        apply_row(
            row(x, first, n), row(y, first, n),
            row(own_terms[0], own.lane, n), row(own_terms[1], own.lane, n), row(own_terms[2], own.lane, n),
        )  # fmt: skip


@helper
def chunk_grad_sums(g, x, dy, index, chunk, terms, sums, lane_sums):
    """Sums of dz and dz * x_hat of the lanes of a block over one chunk of rows, each with its rest."""
    cut, own = unpack(g), locate(g, index)
    start, end = chunk * cut.chunk, rows_end(cut, chunk)
    whole = min(end, cut.rows) - start
    own_terms = terms[own.batch]
    chunk_lane_grad_sums(
        x, dy, own.base + start * cut.lanes + own.lane, cut.lanes, whole, cut.spare if end > cut.rows else 0,
        row(own_terms[0], own.lane, own.lanes), row(own_terms[1], own.lane, own.lanes), sums,
        lane_sums[own.batch * cut.chunks + chunk, :, own.lane : own.lane + own.lanes],
    )  # fmt: skip


@helper
def block_grad_sums(g, index, mean, rstd, terms, lane_sums, sum_dz, sum_dz_x_hat):
    """Add chunks and folds of a block up, then the lanes of each run."""
    cut, own = unpack(g), locate(g, index)
    top = lane_sums[own.batch * cut.chunks, :, own.lane : own.lane + own.width]
    for part in range(1, cut.chunks * cut.fold):
        at = own.lane + part % cut.fold * own.width
        part_sums = lane_sums[own.batch * cut.chunks + part // cut.fold]
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
            sum_dz_x_hat[slot, j] = b - (mean[slot] - mean_hi) * rstd[slot] * a


@helper
def spread_gradient_terms(g, index, mean, rstd, weight, sum_dz, sum_dz_x_hat, n, constant, terms):
    """Lay the coefficients of `input_gradient` out along the lanes of a block, behind mean and rstd."""
    cut, own = unpack(g), locate(g, index)
    for i in range(own.slots):
        k = own.slot + i
        first = k % cut.period * cut.width
        sum_g, sum_g_x_hat = weighted(weight, first, sum_dz[k]), weighted(weight, first, sum_dz_x_hat[k])
        mean_hi, scale, _ = affine(mean[k], rstd[k], 1.0, 0.0, terms)
        slope, offset, factor = gradient_terms(mean[k], rstd[k], sum_g, sum_g_x_hat, n, True, constant, terms)
        for j in range(cut.width):
            gain = terms.dtype.type(factor * parameter(weight, first + j, 1.0))
            values = (mean_hi, scale, slope, offset, gain)
            spread(g, index, i * cut.inner + j * cut.run, cut.run, terms, values)


@helper
def input_grad_chunk(g, x, dy, dx, index, chunk, terms, constant):
    """Dx of one chunk of rows of a block."""
    cut, own = unpack(g), locate(g, index)
    own_terms = terms[own.batch]
    for r in range(chunk * cut.chunk, rows_end(cut, chunk)):
        n, first = row_lanes(cut, own, r), own.base + r * cut.lanes + own.lane
        if constant:
            constant_grad_row(row(dy, first, n), row(dx, first, n), row(own_terms[4], own.lane, n))
        else:
            input_grad_row(
                row(x, first, n), row(dy, first, n), row(dx, first, n),
                row(own_terms[0], own.lane, n), row(own_terms[1], own.lane, n), row(own_terms[2], own.lane, n),
                row(own_terms[3], own.lane, n), row(own_terms[4], own.lane, n),
            )  # fmt: skip


@Twins
def moments_kernel(g, x, mean, m2):
    """One chunk of a block per task, then one block per task; reads x once."""
    cut = unpack(g)
    blocks, chunks = cut.batch * cut.blocks, cut.chunks
    lane_moments = np.empty((cut.batch * chunks, 3, cut.lanes))
    sums, wide_sums = (
        np.empty((blocks * chunks, 3, cut.block), x.dtype),
        np.empty((blocks * chunks, 3, cut.block)),
    )
    for task in prange(blocks * chunks):
        chunk_moments(g, x, task // chunks, task % chunks, sums[task], wide_sums[task], lane_moments)
    for index in prange(blocks):
        block_moments(g, x, index, lane_moments, mean, m2)


@Twins
def apply_kernel(g, x, y, mean, rstd, weight, bias):
    """One chunk of a block per task; reads x and writes y once."""
    cut = unpack(g)
    blocks, chunks = cut.batch * cut.blocks, cut.chunks
    terms = np.empty((cut.batch, 3, cut.lanes), x.dtype)
    for index in prange(blocks):
        spread_affine(g, index, mean, rstd, weight, bias, terms)
    for task in prange(blocks * chunks):
        apply_chunk(g, x, y, task // chunks, task % chunks, terms)


@Twins
def forward_kernel(g, x, y, weight, bias, eps, mean, m2, rstd):
    """One block per task: its moments, then its normalization from cache."""
    cut = unpack(g)
    blocks, chunks, n = cut.batch * cut.blocks, cut.chunks, np.float64(cut.outer * cut.inner)
    lane_moments = np.empty((cut.batch * chunks, 3, cut.lanes))
    sums, wide_sums = np.empty((blocks, 3, cut.block), x.dtype), np.empty((blocks, 3, cut.block))
    terms = np.empty((cut.batch, 3, cut.lanes), x.dtype)
    for index in prange(blocks):
        for chunk in range(chunks):
            chunk_moments(g, x, index, chunk, sums[index], wide_sums[index], lane_moments)
        block_moments(g, x, index, lane_moments, mean, m2)
        block_rstd(g, index, m2, n, eps, rstd)
        spread_affine(g, index, mean, rstd, weight, bias, terms)
        for chunk in range(chunks):
            apply_chunk(g, x, y, index, chunk, terms)


@Twins
def grad_sums_kernel(g, x, dy, mean, rstd, sum_dz, sum_dz_x_hat):
    """One chunk of a block per task, then one block per task; reads x and dy once."""
    cut = unpack(g)
    blocks, chunks = cut.batch * cut.blocks, cut.chunks
    lane_sums = np.empty((cut.batch * chunks, 4, cut.lanes))
    sums = np.empty((blocks * chunks, 2, cut.block), x.dtype)
    terms = np.empty((cut.batch, 3, cut.lanes), x.dtype)
    for index in prange(blocks):
        spread_affine(g, index, mean, rstd, None, None, terms)
    for task in prange(blocks * chunks):
        chunk_grad_sums(g, x, dy, task // chunks, task % chunks, terms, sums[task], lane_sums)
    for index in prange(blocks):
        block_grad_sums(g, index, mean, rstd, terms, lane_sums, sum_dz, sum_dz_x_hat)


@Twins
def input_grad_kernel(g, x, dy, dx, mean, rstd, weight, sum_dz, sum_dz_x_hat, n, constant):
    """One chunk of a block per task; reads x and dy and writes dx once."""
    cut = unpack(g)
    blocks, chunks = cut.batch * cut.blocks, cut.chunks
    terms = np.empty((cut.batch, 5, cut.lanes), x.dtype)
    for index in prange(blocks):
        spread_gradient_terms(g, index, mean, rstd, weight, sum_dz, sum_dz_x_hat, n, constant, terms)
    for task in prange(blocks * chunks):
        input_grad_chunk(g, x, dy, dx, task // chunks, task % chunks, terms, constant)


@Twins
def backward_kernel(g, x, dy, dx, mean, rstd, weight, sum_dz, sum_dz_x_hat, n):
    """One block per task: its sums, then its dx from cache."""
    cut = unpack(g)
    blocks, chunks = cut.batch * cut.blocks, cut.chunks
    lane_sums = np.empty((cut.batch * chunks, 4, cut.lanes))
    sums = np.empty((blocks, 2, cut.block), x.dtype)
    terms = np.empty((cut.batch, 5, cut.lanes), x.dtype)
    for index in prange(blocks):
        spread_affine(g, index, mean, rstd, None, None, terms)
        for chunk in range(chunks):
            chunk_grad_sums(g, x, dy, index, chunk, terms, sums[index], lane_sums)
        block_grad_sums(g, index, mean, rstd, terms, lane_sums, sum_dz, sum_dz_x_hat)
        spread_gradient_terms(g, index, mean, rstd, weight, sum_dz, sum_dz_x_hat, n, False, terms)
        for chunk in range(chunks):
            input_grad_chunk(g, x, dy, dx, index, chunk, terms, False)
