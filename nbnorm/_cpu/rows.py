"""Walk along rows: a slot is one row of neighbours, each of which has a parameter of its own.

The fused kernels take a band of samples per task and finish each row, or a few, while they are in cache (forward: 1
read + 1 write of the tensor, backward: 2 reads + 1 write). Few rows are split into chunks of columns, pass after
pass. The gradients of the parameters, which run across samples, are summed band by band and added in order.

Tried and left out, on Zen 4: gradients of 512 or 1024 columns of a few long rows before those of the next columns, so
that dx finds x and dy in the first-level cache (0.93 to 1.13 of the time, mostly 1).
"""

from __future__ import annotations

from numba import prange

from nbnorm._cpu.bands import (
    add_bands,
    apply_chunk,
    backward_band,
    column_tasks,
    forward_bands,
    input_grad_band,
    long_band_sums,
)
from nbnorm._cpu.lanes import fill
from nbnorm._cpu.launch import Twins
from nbnorm._cpu.memory import part, row
from nbnorm._cpu.row_sums import chunk_grad_sums, short_row_grad_sums, value_of
from nbnorm._cpu.scratch import wide
from nbnorm._cpu.spans import band_count, fused, geometry, long_rows, short_rows, span, unpack
from nbnorm._cpu.tiles import line_moments
from nbnorm._math import merge, reciprocal_std

__all__ = [
    "backward_kernel",
    "band_count",
    "forward_kernel",
    "fused",
    "geometry",
    "gradient_passes_kernel",
    "long_rows",
    "passes_kernel",
]


@Twins
def forward_kernel(g, x, y, weight, bias, eps, mean, m2, rstd):
    """Some bands per task: the moments of a row, or of a few short ones, then their normalization from cache."""
    bands, bundle = unpack(g).bands, unpack(g).bundle
    for task in prange(-(-bands // bundle)):
        first = task * bundle
        forward_bands(g, x, y, first, min(bundle, bands - first), weight, bias, eps, mean, m2, rstd)


@Twins
def passes_kernel(g, x, y, weight, bias, eps, mean, m2, rstd):
    """One chunk of a row per task, pass after pass: x is read for moments, if there is an m2, and for y.

    Without eps there is no rstd of these moments; without moments, mean and rstd are given.
    """
    cut = unpack(g)
    rows, chunks = cut.rows, cut.chunks
    if m2 is not None:
        part_moments = wide((rows * chunks, 3))
        for task in prange(rows * chunks):
            first, size, _ = span(g, task // chunks, task % chunks)
            own = part_moments[task]
            own[0], own[1], own[2] = line_moments(row(x, first, size), None, mean is not None)
        for r in prange(rows):
            n, row_mean, row_m2 = part_moments[r * chunks]
            for i in range(r * chunks + 1, (r + 1) * chunks):
                own = part_moments[i]
                n, row_mean, row_m2 = merge(n, row_mean, row_m2, own[0], own[1], own[2])
            if mean is not None:
                mean[r] = row_mean
            m2[r] = row_m2
            if eps is not None:
                rstd[r] = reciprocal_std(row_m2, n, eps)
    if y is not None:
        for task in prange(rows * chunks):
            r = task // chunks
            apply_chunk(g, x, y, r, task % chunks, value_of(mean, r), rstd[r], weight, bias)


@Twins
def gradient_passes_kernel(g, x, dy, dx, mean, rstd, weight, sums, total, rest, long):
    """One chunk per task, pass after pass: x and dy are read for the sums of rows and for gradients.

    ``long`` is what `long_rows` says.
    """
    cut = unpack(g)
    rows, chunks = cut.rows, cut.chunks
    part_sums = wide((rows * chunks, 2))
    sum_g, sum_g_x_hat = wide(rows), wide(rows)
    fill(row(sum_g, 0, rows), 0.0)
    fill(row(sum_g_x_hat, 0, rows), 0.0)
    if long is not None:
        for task in prange(cut.bands * chunks):
            long_band_sums(g, x, dy, task // chunks, task % chunks, mean, rstd, weight, sums, part_sums)
    elif dx is not None:
        for task in prange(rows * chunks):
            r = task // chunks
            own = part_sums[task]
            r_mean, r_rstd = value_of(mean, r), rstd[r]
            if short_rows(g):
                first, n, p = span(g, r, 0)
                own[0], own[1] = short_row_grad_sums(x, dy, first, n, r_mean, r_rstd, part(weight, p, n))
            else:
                own[0], own[1] = chunk_grad_sums(g, x, dy, r, task % chunks, r_mean, r_rstd, weight)
    if dx is not None:
        for r in prange(rows):
            for i in range(r * chunks, (r + 1) * chunks):
                sum_g[r] += part_sums[i, 0]
                sum_g_x_hat[r] += part_sums[i, 1]
    for task in prange(cut.bands * chunks):
        band, chunk = task // chunks, task % chunks
        input_grad_band(
            g, x, dy, dx, band, chunk, mean, rstd, weight, sum_g, sum_g_x_hat, sums, long
        )  # fmt: skip
    if sums is not None:
        for task in prange(column_tasks(sums)):
            add_bands(sums, total, rest, task)


@Twins
def backward_kernel(g, x, dy, dx, mean, rstd, weight, sums, total, rest, long):
    """One band per task: the sums over a few rows, then their gradients from cache; at last all bands together."""
    for band in prange(unpack(g).bands):
        backward_band(g, x, dy, dx, band, mean, rstd, weight, sums, long)
    if sums is not None:
        tasks = column_tasks(sums)
        if tasks == 1:
            add_bands(sums, total, rest, 0)
        else:
            for task in prange(tasks):
                add_bands(sums, total, rest, task)
