"""Walk along segments: a slot is ``outer`` segments of ``inner`` neighbours, one parameter per slot.

The fused kernels take a slot per task, whose second pass finds it in cache (forward: 1 read + 1 write of
the tensor, backward: 2 reads + 1 write). Few or uneven slots are split into chunks instead, one kernel
per pass. Chunks and tiles are blocks of whole segments or parts of one, cut by the shape alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import prange

from nbnorm._cpu.launch import Twins, balanced, helper, reduction
from nbnorm._cpu.tiles import CHUNK, PIECE, TILE, parameter, tile_moments
from nbnorm._math import affine, gradient_terms, input_gradient, merge, normalize, reciprocal_std
from nbnorm._view import View


class Cut(NamedTuple):
    """How an array is cut: `View` sizes, then the rows and columns of a chunk and the chunks of a slot."""

    outer: int
    group: int
    inner: int
    period: int
    rows: int
    cols: int
    chunks: int


@lru_cache(maxsize=4096)
def geometry(view: View) -> np.ndarray:
    """Return the `Cut` of a view as an array, the cheapest way to hand a kernel many integers."""
    rows, cols = (1, CHUNK) if view.inner > CHUNK else (max(1, CHUNK // view.inner), view.inner)
    chunks = -(-view.outer // rows) * -(-view.inner // cols)
    return np.array(Cut(view.outer, view.group, view.inner, view.period, rows, cols, chunks))


def fused(view: View, threads: int) -> bool:
    """Whether whole slots keep the threads busy."""
    return balanced(view.slots, threads)


@helper
def unpack(g):
    """Name the integers of a geometry."""
    return Cut(g[0], g[1], g[2], g[3], g[4], g[5], g[6])


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
    n = mean = m2 = 0.0
    for tile in range(-(-rows // tile_rows) * -(-cols // tile_cols)):
        r, height, c, width = block(tile, rows, cols, tile_rows, tile_cols)
        first = ((r0 + r) * cut.group + slot) * cut.inner + c0 + c
        tile_mean, tile_m2 = tile_moments(x, first, cut.group * cut.inner, height, width)
        n, mean, m2 = merge(n, mean, m2, np.float64(height * width), tile_mean, tile_m2)
    return n, mean, m2


@helper
def apply_segment(x, y, mean_hi, scale, shift):
    """Normalize neighbours that share their coefficients."""
    for i in range(x.shape[0]):
        y[i] = normalize(x[i], mean_hi, scale, shift)


@helper
def apply_chunk(g, x, y, slot, chunk, mean, rstd, weight, bias):
    """Normalize one chunk of a slot."""
    cut = unpack(g)
    p = slot % cut.period
    mean_hi, scale, shift = affine(mean, rstd, parameter(weight, p, 1.0), parameter(bias, p, 0.0), x)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    for r in range(r0, r0 + rows):
        first = (r * cut.group + slot) * cut.inner + c0
        apply_segment(x[first : first + cols], y[first : first + cols], mean_hi, scale, shift)


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
def chunk_grad_sums(g, x, dy, slot, chunk, mean, rstd):
    """Sums of dz and dz * x_hat over one chunk of a slot."""
    cut = unpack(g)
    mean_hi, scale, _ = affine(mean, rstd, 1.0, 0.0, x)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    sum_dz = sum_dz_x_hat = 0.0
    for r in range(r0, r0 + rows):
        first = (r * cut.group + slot) * cut.inner + c0
        for i in range(first, first + cols, PIECE):
            end = min(i + PIECE, first + cols)
            a, b = piece_grad_sums(x[i:end], dy[i:end], mean_hi, scale)
            sum_dz += a
            sum_dz_x_hat += b
    return sum_dz, sum_dz_x_hat - (mean - mean_hi) * rstd * sum_dz


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
    """Dx of one chunk of a slot."""
    cut = unpack(g)
    w = parameter(weight, slot % cut.period, 1.0)
    mean_hi, scale, _ = affine(mean, rstd, 1.0, 0.0, x)
    slope, offset, gain = gradient_terms(mean, rstd, w, sum_dz, sum_dz_x_hat, n, constant, x)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    for r in range(r0, r0 + rows):
        first = (r * cut.group + slot) * cut.inner + c0
        end = first + cols
        if constant:
            constant_grad_segment(dy[first:end], dx[first:end], gain)
        else:
            input_grad_segment(
                x[first:end], dy[first:end], dx[first:end], mean_hi, scale, slope, offset, gain
            )


@Twins
def moments_kernel(g, x, mean, m2):
    """One chunk per task, then the chunks of each slot in order; reads x once."""
    group, chunks = g[1], g[6]
    part = np.empty((group * chunks, 3))
    for task in prange(group * chunks):
        part[task, 0], part[task, 1], part[task, 2] = chunk_moments(g, x, task // chunks, task % chunks)
    for slot in range(group):
        n = slot_mean = slot_m2 = 0.0
        for i in range(slot * chunks, (slot + 1) * chunks):
            n, slot_mean, slot_m2 = merge(n, slot_mean, slot_m2, part[i, 0], part[i, 1], part[i, 2])
        mean[slot], m2[slot] = slot_mean, slot_m2


@Twins
def apply_kernel(g, x, y, mean, rstd, weight, bias):
    """One chunk per task; reads x and writes y once."""
    group, chunks = g[1], g[6]
    for task in prange(group * chunks):
        slot = task // chunks
        apply_chunk(g, x, y, slot, task % chunks, mean[slot], rstd[slot], weight, bias)


@Twins
def forward_kernel(g, x, y, weight, bias, eps, mean, m2, rstd):
    """One slot per task: its moments, then its normalization from cache."""
    group, chunks = g[1], g[6]
    for slot in prange(group):
        n = slot_mean = slot_m2 = 0.0
        for chunk in range(chunks):
            part_n, part_mean, part_m2 = chunk_moments(g, x, slot, chunk)
            n, slot_mean, slot_m2 = merge(n, slot_mean, slot_m2, part_n, part_mean, part_m2)
        slot_rstd = reciprocal_std(slot_m2, n, eps)
        mean[slot], m2[slot], rstd[slot] = slot_mean, slot_m2, slot_rstd
        for chunk in range(chunks):
            apply_chunk(g, x, y, slot, chunk, slot_mean, slot_rstd, weight, bias)


@Twins
def grad_sums_kernel(g, x, dy, mean, rstd, sum_dz, sum_dz_x_hat):
    """One chunk per task, then the chunks of each slot in order; reads x and dy once."""
    group, chunks = g[1], g[6]
    part = np.empty((group * chunks, 2))
    for task in prange(group * chunks):
        slot = task // chunks
        part[task, 0], part[task, 1] = chunk_grad_sums(g, x, dy, slot, task % chunks, mean[slot], rstd[slot])
    for slot in range(group):
        a = b = 0.0
        for i in range(slot * chunks, (slot + 1) * chunks):
            a += part[i, 0]
            b += part[i, 1]
        sum_dz[slot], sum_dz_x_hat[slot] = a, b


@Twins
def input_grad_kernel(g, x, dy, dx, mean, rstd, weight, sum_dz, sum_dz_x_hat, n, constant):
    """One chunk per task; reads x and dy and writes dx once."""
    group, chunks = g[1], g[6]
    for task in prange(group * chunks):
        k = task // chunks
        input_grad_chunk(
            g, x, dy, dx, k, task % chunks, mean[k], rstd[k], weight, sum_dz[k], sum_dz_x_hat[k], n, constant
        )


@Twins
def backward_kernel(g, x, dy, dx, mean, rstd, weight, sum_dz, sum_dz_x_hat, n):
    """One slot per task: its sums, then its dx from cache."""
    group, chunks = g[1], g[6]
    for slot in prange(group):
        a = b = 0.0
        for chunk in range(chunks):
            part_a, part_b = chunk_grad_sums(g, x, dy, slot, chunk, mean[slot], rstd[slot])
            a += part_a
            b += part_b
        sum_dz[slot], sum_dz_x_hat[slot] = a, b
        for chunk in range(chunks):
            input_grad_chunk(g, x, dy, dx, slot, chunk, mean[slot], rstd[slot], weight, a, b, n, False)
