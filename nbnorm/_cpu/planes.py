"""Walk along segments: a slot is ``outer`` segments of ``inner`` neighbours, ``run`` of which share a parameter.

The fused kernels take a slot per task, whose second pass finds it in cache (forward: 1 read + 1 write of
the tensor, backward: 2 reads + 1 write). Few or uneven slots are split into chunks instead, one kernel
per pass. Chunks and tiles are blocks of whole segments or parts of one, cut by the shape alone.

Second passes walk backwards, into what has been read last: a quarter less time on tensors of 1 to 6 MB (Zen 3, two
cores, 512 KB of second-level cache). Tried and left out there: prefetching the next segment saved 3 to 6 % of a reading
pass alone; dx streamed past the caches (non-temporal stores from a buffer of 256) took as long at 25 MB, a sixth
longer at 50 MB and a twelfth less at 100 MB.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import prange

from nbnorm._cpu.launch import Twins, balanced, helper, reduction
from nbnorm._cpu.tiles import CHUNK, TILE, add_rows, parameter, piece, tile_moments, weighted
from nbnorm._math import (
    accumulate,
    add,
    affine,
    gradient_terms,
    input_gradient,
    normalize,
    reciprocal_std,
    settled,
)
from nbnorm._view import View


class Cut(NamedTuple):
    """How an array is cut: `View` sizes, then the rows and columns of a chunk and the chunks of a slot."""

    outer: int
    group: int
    inner: int
    period: int
    width: int
    run: int
    rows: int
    cols: int
    chunks: int


@lru_cache(maxsize=4096)
def geometry(view: View) -> np.ndarray:
    """Return the `Cut` of a view as an array, the cheapest way to hand a kernel many integers."""
    rows, cols = (1, CHUNK) if view.inner > CHUNK else (max(1, CHUNK // view.inner), view.inner)
    chunks = -(-view.outer // rows) * -(-view.inner // cols)
    rule = (view.period, view.width, view.run)
    return np.array(Cut(view.outer, view.group, view.inner, *rule, rows, cols, chunks))


def fused(view: View, threads: int) -> bool:
    """Whether whole slots keep the threads busy."""
    return balanced(view.slots, threads)


@helper
def unpack(g):
    """Name the integers of a geometry."""
    return Cut(g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8])


@helper
def block(index, outer, inner, rows, cols):
    """First row, rows, first column and columns of a block of an outer x inner plane."""
    across = -(-inner // cols)
    r, c = index // across * rows, index % across * cols
    return r, min(rows, outer - r), c, min(cols, inner - c)


@helper
def chunk_moments(g, x, slot, chunk):
    """Count, mean and m2 of one chunk of a slot: its tiles merged in order."""
    cut = unpack(g)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    tile_rows, tile_cols = max(1, min(rows, TILE // cols)), min(cols, TILE)
    n = mean = m2 = rest = 0.0
    for tile in range(-(-rows // tile_rows) * -(-cols // tile_cols)):
        r, height, c, width = block(tile, rows, cols, tile_rows, tile_cols)
        first = ((r0 + r) * cut.group + slot) * cut.inner + c0 + c
        tile_mean, tile_m2 = tile_moments(x, first, cut.group * cut.inner, height, width)
        n, mean, m2, rest = accumulate(n, mean, m2, rest, np.float64(height * width), tile_mean, tile_m2)
    return n, mean, settled(m2, rest)


@helper
def apply_segment(x, y, mean_hi, scale, shift):
    """Normalize neighbours that share their coefficients."""
    for i in range(x.shape[0]):
        y[i] = normalize(x[i], mean_hi, scale, shift)


@helper
def runs(c0, cols, run):
    """First run and one past the last run that the columns [c0, c0 + cols) meet."""
    return c0 // run, -(-(c0 + cols) // run)


@helper
def apply_chunk(g, x, y, slot, chunk, mean, rstd, weight, bias):
    """Normalize one chunk of a slot, run by run, backwards: what has been read last is still in cache."""
    cut = unpack(g)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    first_run, end_run = runs(c0, cols, cut.run)
    for j in range(first_run, end_run):
        p = slot % cut.period * cut.width + j
        mean_hi, scale, shift = affine(mean, rstd, parameter(weight, p, 1.0), parameter(bias, p, 0.0), x)
        start, end = max(c0, j * cut.run), min(c0 + cols, (j + 1) * cut.run)
        for r in range(r0 + rows - 1, r0 - 1, -1):
            base = (r * cut.group + slot) * cut.inner
            apply_segment(x[base + start : base + end], y[base + start : base + end], mean_hi, scale, shift)


@reduction
def piece_grad_sums(x, dy, mean_hi, rstd):
    """Sums of dz and dz * x_hat over one piece, in the type of x; x_hat relative to the rounded mean."""
    sum_dz = x.dtype.type(0)
    sum_dz_x_hat = x.dtype.type(0)
    for i in range(x.shape[0]):
        sum_dz += dy[i]
        sum_dz_x_hat += dy[i] * ((x[i] - mean_hi) * rstd)
    return sum_dz, sum_dz_x_hat


@helper
def chunk_grad_sums(g, x, dy, slot, chunk, mean, rstd, sums):
    """Add the sums of dz and of dz * x_hat over one chunk of a slot to those of its runs: total, rest, of each."""
    cut = unpack(g)
    mean_hi, scale, _ = affine(mean, rstd, 1.0, 0.0, x)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    first_run, end_run = runs(c0, cols, cut.run)
    for j in range(first_run, end_run):
        start, end = max(c0, j * cut.run), min(c0 + cols, (j + 1) * cut.run)
        a = a_rest = b = b_rest = 0.0
        for r in range(r0, r0 + rows):
            base = (r * cut.group + slot) * cut.inner
            for i in range(base + start, base + end, piece(x)):
                stop = min(i + piece(x), base + end)
                piece_a, piece_b = piece_grad_sums(x[i:stop], dy[i:stop], mean_hi, scale)
                a, a_rest = add(a, a_rest, piece_a)
                b, b_rest = add(b, b_rest, piece_b)
        a = settled(a, a_rest)
        b = settled(b, b_rest) - (mean - mean_hi) * rstd * a
        sums[0, j], sums[1, j] = add(sums[0, j], sums[1, j], a)
        sums[2, j], sums[3, j] = add(sums[2, j], sums[3, j], b)


@helper
def settle(sums, sum_dz, sum_dz_x_hat):
    """Write a slot's sums out with what rounding has left out of them."""
    for j in range(sum_dz.shape[0]):
        sum_dz[j] = settled(sums[0, j], sums[1, j])
        sum_dz_x_hat[j] = settled(sums[2, j], sums[3, j])


@helper
def input_grad_segment(x, dy, dx, mean_hi, rstd, slope, offset, gain):
    """Dx of neighbours that share their coefficients."""
    for i in range(x.shape[0]):
        dx[i] = input_gradient(dy[i], (x[i] - mean_hi) * rstd, slope, offset, gain)


@helper
def constant_grad_segment(dy, dx, gain):
    """Dx of neighbours whose statistics are constants."""
    for i in range(dy.shape[0]):
        dx[i] = dy[i] * gain


@helper
def input_grad_chunk(g, x, dy, dx, slot, chunk, mean, rstd, weight, sum_dz, sum_dz_x_hat, n, constant):
    """Dx of one chunk of a slot, run by run, from the sums over all of its runs; backwards as `apply_chunk`."""
    cut = unpack(g)
    first = slot % cut.period * cut.width
    sum_g, sum_g_x_hat = weighted(weight, first, sum_dz), weighted(weight, first, sum_dz_x_hat)
    mean_hi, scale, _ = affine(mean, rstd, 1.0, 0.0, x)
    slope, offset, factor = gradient_terms(mean, rstd, sum_g, sum_g_x_hat, n, True, constant, x)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    first_run, end_run = runs(c0, cols, cut.run)
    for j in range(first_run, end_run):
        gain = x.dtype.type(factor * parameter(weight, first + j, 1.0))
        start, end = max(c0, j * cut.run), min(c0 + cols, (j + 1) * cut.run)
        for r in range(r0 + rows - 1, r0 - 1, -1):
            base = (r * cut.group + slot) * cut.inner
            x_run, dy_run, dx_run = (
                x[base + start : base + end],
                dy[base + start : base + end],
                dx[base + start : base + end],
            )
            if constant:
                constant_grad_segment(dy_run, dx_run, gain)
            else:
                input_grad_segment(x_run, dy_run, dx_run, mean_hi, scale, slope, offset, gain)


@Twins
def moments_kernel(g, x, mean, m2):
    """One chunk per task, then the chunks of each slot in order; reads x once."""
    cut = unpack(g)
    group, chunks = cut.group, cut.chunks
    part = np.empty((group * chunks, 3))
    for task in prange(group * chunks):
        part[task, 0], part[task, 1], part[task, 2] = chunk_moments(g, x, task // chunks, task % chunks)
    for slot in range(group):
        n = slot_mean = slot_m2 = rest = 0.0
        for i in range(slot * chunks, (slot + 1) * chunks):
            n, slot_mean, slot_m2, rest = accumulate(
                n, slot_mean, slot_m2, rest, part[i, 0], part[i, 1], part[i, 2]
            )
        mean[slot], m2[slot] = slot_mean, settled(slot_m2, rest)


@Twins
def apply_kernel(g, x, y, mean, rstd, weight, bias):
    """One chunk per task; reads x and writes y once."""
    cut = unpack(g)
    group, chunks = cut.group, cut.chunks
    for task in prange(group * chunks):
        slot = task // chunks
        apply_chunk(g, x, y, slot, task % chunks, mean[slot], rstd[slot], weight, bias)


@Twins
def forward_kernel(g, x, y, weight, bias, eps, mean, m2, rstd):
    """One slot per task: its moments, then its normalization from cache."""
    cut = unpack(g)
    group, chunks = cut.group, cut.chunks
    for slot in prange(group):
        n = slot_mean = slot_m2 = rest = 0.0
        for chunk in range(chunks):
            part_n, part_mean, part_m2 = chunk_moments(g, x, slot, chunk)
            n, slot_mean, slot_m2, rest = accumulate(n, slot_mean, slot_m2, rest, part_n, part_mean, part_m2)
        slot_m2 = settled(slot_m2, rest)
        slot_rstd = reciprocal_std(slot_m2, n, eps)
        mean[slot], m2[slot], rstd[slot] = slot_mean, slot_m2, slot_rstd
        for chunk in range(chunks - 1, -1, -1):
            apply_chunk(g, x, y, slot, chunk, slot_mean, slot_rstd, weight, bias)


@Twins
def grad_sums_kernel(g, x, dy, mean, rstd, sum_dz, sum_dz_x_hat):
    """One chunk per task, then the chunks of each slot in order; reads x and dy once."""
    cut = unpack(g)
    group, chunks = cut.group, cut.chunks
    part = np.zeros((group * chunks, 4, cut.width))
    for task in prange(group * chunks):
        k = task // chunks
        chunk_grad_sums(g, x, dy, k, task % chunks, mean[k], rstd[k], part[task])
    for slot in range(group):
        first = slot * chunks
        for task in range(first + 1, first + chunks):
            add_rows(part[first, 0], part[first, 1], part[task, 0])
            add_rows(part[first, 2], part[first, 3], part[task, 2])
        settle(part[first], sum_dz[slot], sum_dz_x_hat[slot])


@Twins
def input_grad_kernel(g, x, dy, dx, mean, rstd, weight, sum_dz, sum_dz_x_hat, n, constant):
    """One chunk per task; reads x and dy and writes dx once."""
    cut = unpack(g)
    chunks = cut.chunks
    for task in prange(cut.group * chunks):
        k = task // chunks
        input_grad_chunk(
            g, x, dy, dx, k, task % chunks, mean[k], rstd[k], weight, sum_dz[k], sum_dz_x_hat[k], n, constant
        )


@Twins
def backward_kernel(g, x, dy, dx, mean, rstd, weight, sum_dz, sum_dz_x_hat, n):
    """One slot per task: its sums, then its dx from cache."""
    cut = unpack(g)
    chunks = cut.chunks
    sums = np.zeros((cut.group, 4, cut.width))
    for k in prange(cut.group):
        for chunk in range(chunks):
            chunk_grad_sums(g, x, dy, k, chunk, mean[k], rstd[k], sums[k])
        settle(sums[k], sum_dz[k], sum_dz_x_hat[k])
        for chunk in range(chunks - 1, -1, -1):
            input_grad_chunk(
                g, x, dy, dx, k, chunk, mean[k], rstd[k], weight, sum_dz[k], sum_dz_x_hat[k], n, False
            )
