"""Walk along rows: a slot is one row of neighbours, each of which has a parameter of its own.

The fused kernels take a band of rows per task and finish each row while it is in cache (forward: 1 read +
1 write of the tensor, backward: 2 reads + 1 write). Few rows are split into chunks of columns, one kernel
per pass. The gradients of the parameters, which run across rows, are summed band by band and added in order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import prange

from nbnorm._cpu.halves import computing, narrow, widen
from nbnorm._cpu.lanes import fill
from nbnorm._cpu.launch import Twins, balanced, flat, helper, inlined, kernel, line, reduction, threads_for
from nbnorm._cpu.memory import row
from nbnorm._cpu.tiles import CHUNK, add_rows, entry, line_moments, part, piece, settle_rows
from nbnorm._math import (
    affine,
    gradient_terms,
    input_gradient,
    merge,
    normalize,
    recentered,
    reciprocal_std,
    rounded,
    standardize,
)
from nbnorm._view import View

# Bands at most, and rows of a band at least unless that leaves fewer than MIN_BANDS: every band has sums of its
# own for each parameter, which must stay small beside the rows that they sum.
MAX_BANDS = 64
MIN_BANDS = 8
BAND_ROWS = 32
# Rows whose parameter gradients are summed in the array's own type before float64 takes over.
TILE_ROWS = 32


class Cut(NamedTuple):
    """How rows are cut: `View` sizes, then rows of a band, columns of a chunk, and how many there are."""

    rows: int
    inner: int
    period: int
    band: int
    chunk: int
    bands: int
    chunks: int


@lru_cache(maxsize=4096)
def geometry(view: View, threads: int, masked: bool = False) -> np.ndarray:
    """Return the `Cut` of a view as an array, the cheapest way to hand a kernel many integers.

    Neither threads nor a mask make a difference here.
    """
    rows, inner = view.slots, view.inner
    wanted = min(MAX_BANDS, max(MIN_BANDS, rows // BAND_ROWS), -(-rows * inner // CHUNK))
    band = -(-rows // max(wanted, 1))
    return np.array(Cut(rows, inner, view.period, band, CHUNK, -(-rows // band), -(-inner // CHUNK)))


@lru_cache(maxsize=4096)
def fused(view: View, threads: int, masked: bool = False) -> bool:
    """Whether whole bands keep the threads busy."""
    return balanced(Cut(*geometry(view, threads)).bands, threads)


@helper
def unpack(g):
    """Name the integers of a geometry."""
    return Cut(g[0], g[1], g[2], g[3], g[4], g[5], g[6])


@helper
def span(g, r, chunk):
    """First element of a chunk of a row, how many there are, and where their parameters start."""
    cut = unpack(g)
    start = chunk * cut.chunk
    n = min(cut.chunk, cut.inner - start)
    return r * cut.inner + start, n, r % cut.period * cut.inner + start


@helper
def value_of(statistic, r):
    """Element of the means, 0 where there are none."""
    return 0.0 if statistic is None else statistic[r]


@helper
def apply_line(x, y, mean_hi, rstd, rest, weight, bias):
    """Normalize neighbours that share statistics; ``rest`` is what the rounded mean leaves of x_hat."""
    for i in range(x.shape[0]):
        z = normalize(widen(x[i]), mean_hi, rstd, rest)
        if weight is not None:
            z = rounded(z * weight[i], x)
        if bias is not None:
            z = rounded(z + bias[i], x)
        y[i] = narrow(z, y)


@helper
def apply_chunk(g, x, y, r, chunk, mean, rstd, weight, bias):
    """Normalize one chunk of a row."""
    first, n, p = span(g, r, chunk)
    mean_hi, scale, rest = affine(mean, rstd, 1.0, 0.0, x)
    apply_line(row(x, first, n), row(y, first, n), mean_hi, scale, rest, part(weight, p, n), part(bias, p, n))


@reduction
def piece_grad_sums(x, dy, weight, mean_hi, rstd):
    """Sums of g = dy * weight and of g * x_hat over one piece, x_hat relative to the rounded mean."""
    sum_g = rounded(0.0, x)
    sum_g_x_hat = rounded(0.0, x)
    for i in range(x.shape[0]):
        g = widen(dy[i])
        if weight is not None:
            g = rounded(g * weight[i], x)
        sum_g += g
        sum_g_x_hat += g * standardize(widen(x[i]), mean_hi, rstd)
    return sum_g, sum_g_x_hat


@helper
def chunk_grad_sums(g, x, dy, r, chunk, mean, rstd, weight):
    """Sums of g and of g * x_hat over one chunk of a row."""
    first, n, p = span(g, r, chunk)
    mean_hi, scale, _ = affine(mean, rstd, 1.0, 0.0, x)
    sum_g = sum_g_x_hat = 0.0
    for i in range(0, n, piece(x)):
        size = min(piece(x), n - i)
        a, b = piece_grad_sums(
            row(x, first + i, size), row(dy, first + i, size), part(weight, p + i, size), mean_hi, scale
        )
        sum_g += a
        sum_g_x_hat += b
    return sum_g, recentered(sum_g_x_hat, sum_g, mean, mean_hi, rstd)


@inlined
def input_grad_line(x, dy, dx, weight, mean_hi, rstd, slope, offset, gain):
    """Dx of neighbours that share statistics."""
    for i in range(x.shape[0]):
        g = widen(dy[i])
        if weight is not None:
            g = rounded(g * weight[i], x)
        x_hat = standardize(widen(x[i]), mean_hi, rstd)
        dx[i] = narrow(input_gradient(g, x_hat, slope, offset, gain), dx)


@inlined
def parameter_grad_line(x, dy, mean_hi, rstd, rest, sum_dz, sum_dz_x_hat):
    """Add the row's terms to the parameters' gradients."""
    for i in range(x.shape[0]):
        d = widen(dy[i])
        sum_dz[i] += d
        sum_dz_x_hat[i] += d * normalize(widen(x[i]), mean_hi, rstd, rest)


@helper
def backward_chunk(g, x, dy, dx, r, chunk, mean, rstd, weight, sum_g, sum_g_x_hat, sums):
    """Dx of one chunk of a row and its terms of the parameters' gradients, each only if there is room for it."""
    cut = unpack(g)
    first, size, p = span(g, r, chunk)
    row_mean = value_of(mean, r)
    mean_hi, scale, rest = affine(row_mean, rstd[r], 1.0, 0.0, x)
    if sums is not None:  # before dx, which may go into dy
        parameter_grad_line(
            row(x, first, size), row(dy, first, size), mean_hi, scale, rest,
            row(sums[0], p, size), row(sums[1], p, size),
        )  # fmt: skip
    if dx is not None:
        n = np.float64(cut.inner)
        slope, offset, factor = gradient_terms(
            row_mean, rstd[r], sum_g, sum_g_x_hat, n, mean is not None, False, False, x
        )
        gain = rounded(factor, x)
        input_grad_line(
            row(x, first, size), row(dy, first, size), row(dx, first, size), part(weight, p, size),
            mean_hi, scale, slope, offset, gain,
        )  # fmt: skip


@helper
def flush(g, chunk, sums, wide):
    """Add a chunk of columns' sums in the array's type to the float64 ones and start them anew."""
    cut = unpack(g)
    for k in range(cut.period):
        first = k * cut.inner + chunk * cut.chunk
        n = min(cut.chunk, cut.inner - chunk * cut.chunk)
        for i in range(2):
            own = row(sums[i], first, n)
            add_rows(row(wide[2 * i], first, n), row(wide[2 * i + 1], first, n), own)
            fill(own, 0)


@helper
def band_rows(g, band):
    """First and one past the last row of a band."""
    cut = unpack(g)
    return band * cut.band, min((band + 1) * cut.band, cut.rows)


@Twins
def moments_kernel(g, x, mean, m2):
    """One chunk of a row per task, then the chunks of each row in order; reads x once."""
    cut = unpack(g)
    rows, chunks = cut.rows, cut.chunks
    part_moments = np.empty((rows * chunks, 3))
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


@Twins
def apply_kernel(g, x, y, mean, rstd, weight, bias):
    """One chunk of a row per task; reads x and writes y once."""
    cut = unpack(g)
    chunks = cut.chunks
    for task in prange(cut.rows * chunks):
        r = task // chunks
        apply_chunk(g, x, y, r, task % chunks, value_of(mean, r), rstd[r], weight, bias)


@Twins
def forward_kernel(g, x, y, weight, bias, eps, mean, m2, rstd):
    """One band of rows per task: the moments of each row, then its normalization from cache."""
    cut = unpack(g)
    chunks = cut.chunks
    for band in prange(cut.bands):
        start, end = band_rows(g, band)
        for r in range(start, end):
            n = row_mean = row_m2 = 0.0
            for chunk in range(chunks):
                first, size, _ = span(g, r, chunk)
                part_n, part_mean, part_m2 = line_moments(row(x, first, size), None, mean is not None)
                n, row_mean, row_m2 = merge(n, row_mean, row_m2, part_n, part_mean, part_m2)
            row_rstd = reciprocal_std(row_m2, n, eps)
            m2[r], rstd[r] = row_m2, row_rstd
            if mean is not None:
                mean[r] = row_mean
            for chunk in range(chunks):
                apply_chunk(g, x, y, r, chunk, row_mean, row_rstd, weight, bias)


@Twins
def grad_sums_kernel(g, x, dy, mean, rstd, weight, sum_g, sum_g_x_hat):
    """One chunk of a row per task, then the chunks of each row in order; reads x and dy once."""
    cut = unpack(g)
    chunks = cut.chunks
    part_sums = np.empty((cut.rows * chunks, 2))
    for task in prange(cut.rows * chunks):
        r = task // chunks
        own = part_sums[task]
        own[0], own[1] = chunk_grad_sums(g, x, dy, r, task % chunks, value_of(mean, r), rstd[r], weight)
    for r in prange(cut.rows):
        a = b = 0.0
        for i in range(r * chunks, (r + 1) * chunks):
            a += part_sums[i, 0]
            b += part_sums[i, 1]
        sum_g[r], sum_g_x_hat[r] = a, b


@helper
def finish_row(g, r, start, end, chunk, sums, wide):
    """Flush the sums of a chunk of columns after every few rows and at the end of the band."""
    if sums is not None and ((r - start) % TILE_ROWS == TILE_ROWS - 1 or r == end - 1):
        flush(g, chunk, sums, wide)


@helper
def input_grad_band(
    g, x, dy, dx, band, chunk, mean, rstd, weight, sum_g, sum_g_x_hat, narrow_sums, wide_sums
):
    """Dx of one chunk of the columns of a band, row by row, for given sums."""
    start, end = band_rows(g, band)
    own, own_wide = entry(narrow_sums, band), entry(wide_sums, band)
    for r in range(start, end):
        a, b = value_of(sum_g, r), value_of(sum_g_x_hat, r)
        backward_chunk(g, x, dy, dx, r, chunk, mean, rstd, weight, a, b, own)
        finish_row(g, r, start, end, chunk, own, own_wide)


@helper
def backward_band(g, x, dy, dx, band, mean, rstd, weight, narrow_sums, wide_sums):
    """Sums and dx of a band, row by row."""
    chunks = unpack(g).chunks
    start, end = band_rows(g, band)
    own, own_wide = entry(narrow_sums, band), entry(wide_sums, band)
    for r in range(start, end):
        a = b = 0.0
        for chunk in range(chunks):
            part_a, part_b = chunk_grad_sums(g, x, dy, r, chunk, value_of(mean, r), rstd[r], weight)
            a += part_a
            b += part_b
        for chunk in range(chunks):
            backward_chunk(g, x, dy, dx, r, chunk, mean, rstd, weight, a, b, own)
            finish_row(g, r, start, end, chunk, own, own_wide)


@kernel
def add_bands_kernel(wide):
    """Add the parameters' sums of all bands to those of the first, in order."""
    for i in (0, 2):
        for band in range(1, wide.shape[0]):
            add_rows(wide[0, i], wide[0, i + 1], wide[band, i])
            add_rows(wide[0, i], wide[0, i + 1], wide[band, i + 1])
        settle_rows(wide[0, i], wide[0, i + 1])


@Twins
def input_grad_kernel(g, x, dy, dx, mean, rstd, weight, sum_g, sum_g_x_hat, narrow_sums, wide_sums):
    """One chunk of the columns of a band per task; reads x and dy and writes dx once."""
    cut = unpack(g)
    chunks = cut.chunks
    for task in prange(cut.bands * chunks):
        input_grad_band(
            g,
            x,
            dy,
            dx,
            task // chunks,
            task % chunks,
            mean,
            rstd,
            weight,
            sum_g,
            sum_g_x_hat,
            narrow_sums,
            wide_sums,
        )


@Twins
def backward_kernel(g, x, dy, dx, mean, rstd, weight, narrow_sums, wide_sums):
    """One band of rows per task: the sums of each row, then its dx from cache."""
    for band in prange(unpack(g).bands):
        backward_band(g, x, dy, dx, band, mean, rstd, weight, narrow_sums, wide_sums)


def backward(
    view: View, x: np.ndarray, dy: np.ndarray, dx: np.ndarray | None, mean: np.ndarray | None,
    rstd: np.ndarray, weight: np.ndarray | None, with_parameters: bool,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Write dx, if there is room for it, and return the parameters' sums of dz and of dz * x_hat."""
    parameters = view.period * view.width
    if not view.size:
        return np.zeros(parameters), np.zeros(parameters)
    threads = threads_for(view.size)
    g = geometry(view, threads)
    own_weight = line(weight)
    arrays = (flat(x), flat(dy), None if dx is None else flat(dx), mean, rstd, own_weight)
    bands = Cut(*g).bands
    narrow_sums = np.zeros((bands, 2, parameters), computing(x.dtype)) if with_parameters else None
    wide_sums = np.zeros((bands, 4, parameters)) if with_parameters else None
    if dx is not None and fused(view, threads):
        backward_kernel(threads, g, *arrays, narrow_sums, wide_sums)
    else:
        sum_g = sum_g_x_hat = None
        if dx is not None:
            sum_g, sum_g_x_hat = np.empty((2, view.slots))
            grad_sums_kernel(threads, g, *arrays[:2], mean, rstd, own_weight, sum_g, sum_g_x_hat)
        input_grad_kernel(threads, g, *arrays, sum_g, sum_g_x_hat, narrow_sums, wide_sums)
    if wide_sums is None:
        return np.zeros(0), np.zeros(0)
    add_bands_kernel(wide_sums)
    return wide_sums[0, 0], wide_sums[0, 2]
