"""What a task does to a band of samples, a few of them at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbnorm._cpu.lanes import copy_row, fill
from nbnorm._cpu.launch import allocating, helper, inlined
from nbnorm._cpu.lines import (
    apply_block,
    apply_line,
    input_grad_line,
    parameter_grad_four,
    parameter_grad_line,
    short_input_grad_line,
)
from nbnorm._cpu.memory import LINE, borrowed, fetch, part, row
from nbnorm._cpu.row_sums import (
    chunk_grad_sums,
    fill_terms,
    four_grad_sums,
    in_one_walk,
    note,
    note_four,
    note_rows,
    note_short_rows,
    prepare_four,
    value_of,
)
from nbnorm._cpu.scratch import scratch, wide
from nbnorm._cpu.short_slots import SLOTS, short_moments
from nbnorm._cpu.spans import ROWS, samples_of, short_rows, span, unpack
from nbnorm._cpu.stores import rounded_in_blocks, seam_like
from nbnorm._cpu.streams import begin, finish, writer
from nbnorm._cpu.tiles import FOUR, add_rows, line_moments, reciprocal_stds, settle_rows
from nbnorm._math import affine, merge

# Columns over which the sums of all bands are added before the next ones.
SUM_COLUMNS = 1024


@inlined
def row_moments(g, x, r, mean, m2):
    """Moments of a row, its chunks merged in order, as the kernel of moments alone does it."""
    n = row_mean = row_m2 = 0.0
    for chunk in range(unpack(g).chunks):
        first, size, _ = span(g, r, chunk)
        part_n, part_mean, part_m2 = line_moments(row(x, first, size), None, mean is not None)
        if chunk == 0:  # as `merge` would have it, but short rows notice its call
            n, row_mean, row_m2 = part_n, part_mean, part_m2
        else:
            n, row_mean, row_m2 = merge(n, row_mean, row_m2, part_n, part_mean, part_m2)
    m2[r] = row_m2
    if mean is not None:
        mean[r] = row_mean


def _piece(apply: Any) -> Any:
    """Return a function for `writer` that normalizes some neighbours of a row."""

    @inlined
    def piece(y, at, i, n, given):
        x, p, mean_hi, scale, rest, weight, bias = given
        apply(row(x, at, n), y, mean_hi, scale, rest, part(weight, p + i, n), part(bias, p + i, n))

    return piece


write_line = writer(_piece(apply_line), _piece(apply_block))


@helper
def apply_chunk(g, x, y, r, chunk, mean, rstd, weight, bias):
    """Normalize one chunk of a row, which is a task."""
    x, y, seam, stream = borrowed(x), borrowed(y), seam_like(y), begin(y, unpack(g).streamed)
    stream = normalize_chunk(g, x, y, seam, stream, r, chunk, mean, rstd, weight, bias)
    finish(y, seam, stream)


@inlined
def normalize_chunk(g, x, y, seam, stream, r, chunk, mean, rstd, weight, bias):
    """Normalize one chunk of a row."""
    first, size, p = span(g, r, chunk)
    mean_hi, scale, rest = affine(mean, rstd, 1.0, 0.0, x)
    given = (x, p, mean_hi, scale, rest, weight, bias)
    return write_line(y, seam, stream, first, size, given)


@inlined
def normalize_short(g, x, y, r, mean, rstd, weight, bias):
    """Normalize one of the rows that are taken together: they are short, and notice who could stream them."""
    first, n, p = span(g, r, 0)
    own = affine(mean, rstd, 1.0, 0.0, x)
    apply_line(row(x, first, n), row(y, first, n), *own, part(weight, p, n), part(bias, p, n))


@inlined
def fetch_rows(g, x, first, last):
    """Ask for some rows, as far as there are such, that are needed soon."""
    n = unpack(g).inner
    for i in range(first * n, min(last * n, x.shape[0]), LINE // x.itemsize):
        fetch(x, i)


@allocating
def forward_bands(g, x, y, band, bands, weight, bias, eps, mean, m2, rstd):
    """Moments and normalization of some neighbouring bands."""
    cut = unpack(g)
    x, y, seam, stream = borrowed(x), borrowed(y), seam_like(y), begin(y, cut.streamed)
    start, end = samples_of(g, band)[0], samples_of(g, band + bands - 1)[1]
    shift, sums = scratch(SLOTS, x), wide((4, SLOTS))
    for first in range(start * cut.period, end * cut.period, cut.step):
        last = min(first + cut.step, end * cut.period)
        n = last - first
        if cut.step > 1:
            short_moments(
                x, first * cut.inner, cut.inner, n, 0, 1, cut.inner, shift, sums,
                part(mean, first, n), row(m2, first, n),
            )  # fmt: skip
        else:
            row_moments(g, x, first, mean, m2)
        reciprocal_stds(row(m2, first, n), np.float64(cut.inner), eps, row(rstd, first, n))
        fetch_rows(g, x, last, last + cut.ahead)
        for r in range(first, last):
            if cut.step > 1 and not cut.streamed:
                normalize_short(g, x, y, r, value_of(mean, r), rstd[r], weight, bias)
            else:
                for chunk in range(cut.chunks):
                    stream = normalize_chunk(
                        g, x, y, seam, stream, r, chunk, value_of(mean, r), rstd[r], weight, bias
                    )
    finish(y, seam, stream)


@inlined
def parameter_grads(g, x, dy, first, rows, chunk, terms, band, sums):
    """Add what one chunk of a few rows, each a sample behind the other, contributes to the sums of a band."""
    cut = unpack(g)
    stride = cut.period * cut.inner
    start, n, p = span(g, first, chunk)
    sum_dz, sum_dz_x_hat = row(sums, (band, 0, p), n), row(sums, (band, 1, p), n)
    for r in range(0, rows, FOUR):
        i = start + r * stride
        if r + FOUR <= rows:
            j, k, m = i + stride, i + 2 * stride, i + 3 * stride
            parameter_grad_four(
                row(x, i, n), row(x, j, n), row(x, k, n), row(x, m, n),
                row(dy, i, n), row(dy, j, n), row(dy, k, n), row(dy, m, n), terms, r, sum_dz, sum_dz_x_hat,
            )  # fmt: skip
        else:
            for k in range(r, rows):
                parameter_grad_line(row(x, i, n), row(dy, i, n), terms, k, sum_dz, sum_dz_x_hat)
                i += stride


@inlined
def input_grad_piece(dx, at, i, n, given):
    """Dx of some neighbours of a row."""
    x, dy, weight, p, terms, k = given
    input_grad_line(row(x, at, n), row(dy, at, n), dx, part(weight, p + i, n), terms, k)


write_input_grad = writer(input_grad_piece)


@inlined
def short_input_grads(g, x, dy, dx, first, rows, terms, weight):
    """Dx of a few short rows, each a sample behind the other."""
    i, n, p = span(g, first, 0)
    stride, weight = unpack(g).period * n, part(weight, p, n)
    for k in range(rows):
        short_input_grad_line(row(x, i, n), row(dy, i, n), row(dx, i, n), weight, terms, k)
        i += stride


@inlined
def finish_rows(g, x, dy, dx, seam, stream, first, rows, chunk, terms, weight, band, sums, long):
    """Gradients of one chunk of a few rows, each a sample behind the other, as far as there is room for them.

    Those of parameters have been added if they are four long ones.
    """
    if sums is not None and not in_one_walk(long, rows):  # before dx, which may go into dy
        parameter_grads(g, x, dy, first, rows, chunk, terms, band, sums)
    if dx is not None:
        if long is None and short_rows(g) and not (stream.past or rounded_in_blocks(dx)):
            short_input_grads(g, x, dy, dx, first, rows, terms, weight)
        else:
            for k in range(rows):
                start, size, p = span(g, first + k * unpack(g).period, chunk)
                given = (x, dy, weight, p, terms, k)
                stream = write_input_grad(dx, seam, stream, start, size, given)
    return stream


@inlined
def clear(g, chunk, band, sums):
    """Set the sums of a band over one chunk of the columns to 0, if they are wanted."""
    cut = unpack(g)
    if sums is not None:
        for k in range(cut.period):
            _, n, p = span(g, k, chunk)
            fill(row(sums, (band, 0, p), n), 0)
            fill(row(sums, (band, 1, p), n), 0)


@allocating
def long_band_sums(g, x, dy, band, chunk, mean, rstd, weight, sums, found):
    """Sums over one chunk of the columns of a band of long rows, and of their parameters, if they are wanted."""
    cut = unpack(g)
    start, end = samples_of(g, band)
    terms, statistics = scratch(6 * ROWS, x), wide(4 * ROWS)
    clear(g, chunk, band, sums)
    for sample in range(start, end, cut.together):
        rows = min(cut.together, end - sample)
        for first in range(sample * cut.period, (sample + 1) * cut.period):
            at, apart = first * cut.chunks + chunk, cut.period * cut.chunks
            if rows == FOUR:
                prepare_four(g, first, mean, rstd, terms, statistics)
                four_grad_sums(g, x, dy, first, chunk, terms, weight, band, sums, found, at, apart)
            else:
                for k in range(rows):
                    r = first + k * cut.period
                    own = chunk_grad_sums(g, x, dy, r, chunk, value_of(mean, r), rstd[r], weight)
                    found[at + k * apart, 0], found[at + k * apart, 1] = own


@allocating
def input_grad_band(g, x, dy, dx, band, chunk, mean, rstd, weight, sum_g, sum_g_x_hat, sums, long):
    """Gradients of one chunk of the columns of a band, as far as there is room for them; dx by the sums over rows."""
    cut = unpack(g)
    start, end = samples_of(g, band)
    terms, statistics = scratch(6 * ROWS, x), wide(4 * ROWS)
    seam, stream = seam_like(x), begin(x if dx is None else dx, cut.streamed)
    if long is None:
        clear(g, chunk, band, sums)
    for sample in range(start, end, cut.together):
        rows = min(cut.together, end - sample)
        relative = not in_one_walk(long, rows)
        for first in range(sample * cut.period, (sample + 1) * cut.period):
            for k in range(rows):
                r = first + k * cut.period
                note(statistics, k, value_of(mean, r), rstd[r], sum_g[r], sum_g_x_hat[r])
            fill_terms(terms, statistics, rows, np.float64(cut.inner), mean is not None, relative)
            stream = finish_rows(
                g, x, dy, dx, seam, stream, first, rows, chunk, terms, weight, band, sums, long
            )
    if dx is not None:
        finish(dx, seam, stream)


@allocating
def backward_band(g, x, dy, dx, band, mean, rstd, weight, sums, long):
    """Sums over the rows of a band and all their gradients, a few rows at a time."""
    cut = unpack(g)
    x, dy, dx = borrowed(x), borrowed(dy), borrowed(dx)
    mean, rstd, weight = borrowed(mean), borrowed(rstd), borrowed(weight)
    start, end = samples_of(g, band)
    terms, statistics, found = scratch(6 * ROWS, x), wide(4 * ROWS), wide((FOUR, 2))
    seam, stream = seam_like(x), begin(x if dx is None else dx, cut.streamed)
    for chunk in range(cut.chunks):
        clear(g, chunk, band, sums)
    for sample in range(start, end, cut.together):
        rows = min(cut.together, end - sample)
        relative = not in_one_walk(long, rows)
        for first in range(sample * cut.period, (sample + 1) * cut.period):
            if long is not None and in_one_walk(long, rows):  # the first leaves it out where it is None
                note_four(g, x, dy, first, mean, rstd, weight, band, sums, terms, statistics, found)
            elif long is None and short_rows(g):
                note_short_rows(g, x, dy, first, rows, mean, rstd, weight, statistics)
            else:
                note_rows(g, x, dy, first, rows, mean, rstd, weight, statistics)
            fill_terms(terms, statistics, rows, np.float64(cut.inner), mean is not None, relative)
            for chunk in range(cut.chunks):
                stream = finish_rows(
                    g, x, dy, dx, seam, stream, first, rows, chunk, terms, weight, band, sums, long
                )
    if dx is not None:
        finish(dx, seam, stream)


@helper
def column_tasks(sums):
    """How many tasks share the columns of the parameters' sums."""
    return -(-sums.shape[2] // SUM_COLUMNS)


@helper
def add_bands(sums, total, rest, task):
    """Add the sums (of dz, of dz * x_hat) of all bands, in order, over the columns of a task."""
    first = task * SUM_COLUMNS
    n = min(SUM_COLUMNS, sums.shape[2] - first)
    for i in range(2):
        own, own_rest = row(total, (i, first), n), row(rest, (i, first), n)
        copy_row(own, row(sums, (0, i, first), n))
        fill(own_rest, 0.0)
        for band in range(1, sums.shape[0]):
            add_rows(own, own_rest, row(sums, (band, i, first), n))
        settle_rows(own, own_rest)
