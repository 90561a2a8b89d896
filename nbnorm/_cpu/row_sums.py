"""Sums over a few rows, each a sample behind the other, and the coefficients of their gradients.

Sums of a row are those of g and of g * x_hat, x_hat relative to the rounded mean. Four long rows have their terms of
the parameters' gradients added in the same walk, for which x_hat is whole.
"""

from __future__ import annotations

import numpy as np

from nbnorm._cpu.launch import helper, inlined
from nbnorm._cpu.lines import grads_of_four
from nbnorm._cpu.memory import part, row
from nbnorm._cpu.spans import ROWS, span, unpack
from nbnorm._cpu.tiles import FOUR, piece, piece_grad_sums, short_grad_sums
from nbnorm._math import affine, gradient_terms, recentered

# Columns of four long rows that are summed before float64 takes over: where a vector has 16 values, no chain is longer
# than 32 additions, with 8 than 64.
LONG_PIECE = 512


@inlined
def value_of(statistic, r):
    """Element of the means, 0 where there are none."""
    return 0.0 if statistic is None else statistic[r]


@inlined
def chunk_grad_sums(g, x, dy, r, chunk, mean, rstd, weight):
    """Sums of g and of g * x_hat over one chunk of a row, x_hat relative to the rounded mean."""
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
    return sum_g, sum_g_x_hat


@inlined
def row_grad_sums(g, x, dy, r, mean, rstd, weight):
    """Sums of g and of g * x_hat over a row."""
    a = b = 0.0
    for chunk in range(unpack(g).chunks):
        part_a, part_b = chunk_grad_sums(g, x, dy, r, chunk, mean, rstd, weight)
        a += part_a
        b += part_b
    return a, b


@inlined
def short_row_grad_sums(x, dy, first, n, mean, rstd, weight):
    """The same over a short row, without loops over its chunks and their pieces, which such rows notice."""
    mean_hi, scale, _ = affine(mean, rstd, 1.0, 0.0, x)
    return short_grad_sums(row(x, first, n), row(dy, first, n), weight, mean_hi, scale)


@inlined
def note(statistics, k, mean, rstd, sum_g, sum_g_x_hat):
    """Put down from what `fill_terms` computes the coefficients of a row."""
    statistics[k], statistics[ROWS + k] = mean, rstd
    statistics[2 * ROWS + k], statistics[3 * ROWS + k] = sum_g, sum_g_x_hat


@inlined
def note_rows(g, x, dy, first, rows, mean, rstd, weight, statistics):
    """Put down the sums over a few rows, each a sample behind the other."""
    period = unpack(g).period
    for k in range(rows):
        r = first + k * period
        a, b = row_grad_sums(g, x, dy, r, value_of(mean, r), rstd[r], weight)
        note(statistics, k, value_of(mean, r), rstd[r], a, b)


@inlined
def note_short_rows(g, x, dy, first, rows, mean, rstd, weight, statistics):
    """The same for short rows, which notice what it takes to find each of them."""
    i, n, p = span(g, first, 0)
    r, period, weight = first, unpack(g).period, part(weight, p, n)
    for k in range(rows):
        r_mean, r_rstd = value_of(mean, r), rstd[r]
        a, b = short_row_grad_sums(x, dy, i, n, r_mean, r_rstd, weight)
        note(statistics, k, r_mean, r_rstd, a, b)
        i, r = i + period * n, r + period


@helper
def in_one_walk(long, rows):
    """Whether the sums of so many rows are taken in one walk with those of parameters, then not relative."""
    return long is not None and rows == FOUR


@inlined
def prepare_four(g, first, mean, rstd, terms, statistics):
    """Put down what is known of four rows before their sums, and compute the coefficients of `normalize`."""
    for k in range(FOUR):
        r = first + k * unpack(g).period
        note(statistics, k, value_of(mean, r), rstd[r], 0.0, 0.0)
    fill_terms(terms, statistics, FOUR, 1.0, mean is not None, False)


@inlined
def four_grad_sums(g, x, dy, first, chunk, terms, weight, band, sums, found, at, apart):
    """Sums over one chunk of four long rows, and what it contributes to the sums of a band, if they are wanted.

    Those of the first row go to ``found[at]``, of the next one ``apart`` entries behind.
    """
    cut = unpack(g)
    i, n, p = span(g, first, chunk)
    stride = cut.period * cut.inner
    for k in range(FOUR):
        found[at + k * apart, 0] = found[at + k * apart, 1] = 0.0
    for done in range(0, n, LONG_PIECE):
        size, q = min(LONG_PIECE, n - done), p + done
        j, k, m = i + stride, i + 2 * stride, i + 3 * stride
        own = grads_of_four(
            row(x, i, size), row(x, j, size), row(x, k, size), row(x, m, size),
            row(dy, i, size), row(dy, j, size), row(dy, k, size), row(dy, m, size),
            part(weight, q, size), terms, part(sums, (band, 0, q), size), part(sums, (band, 1, q), size),
        )  # fmt: skip
        for k in range(FOUR):
            found[at + k * apart, 0] += np.float64(own[k])
            found[at + k * apart, 1] += np.float64(own[FOUR + k])
        i += size


@inlined
def note_four(g, x, dy, first, mean, rstd, weight, band, sums, terms, statistics, found):
    """Put down the sums over four long rows, and add what they contribute to those of a band."""
    prepare_four(g, first, mean, rstd, terms, statistics)
    for chunk in range(unpack(g).chunks):
        four_grad_sums(g, x, dy, first, chunk, terms, weight, band, sums, found, 0, 1)
        for k in range(FOUR):
            statistics[2 * ROWS + k] += found[k, 0]
            statistics[3 * ROWS + k] += found[k, 1]


@helper
def fill_terms(terms, statistics, rows, n, centered, relative):
    """Coefficients of rows: mean, scale and rest of `normalize`, then slope, offset and gain of `input_gradient`.

    ``statistics`` are what `note` has put down, sums ``relative`` to the rounded mean or not. Both have room for `ROWS`
    rows of each: at distances that the compiler knows, so that all rows are computed side by side.
    """
    for k in range(rows):
        mean, rstd, sum_g = statistics[k], statistics[ROWS + k], statistics[2 * ROWS + k]
        mean_hi, scale, rest = affine(mean, rstd, 1.0, 0.0, terms)
        sum_g_x_hat = statistics[3 * ROWS + k]
        if relative:
            sum_g_x_hat = recentered(sum_g_x_hat, sum_g, mean, mean_hi, rstd)
        slope, offset, gain = gradient_terms(mean, rstd, sum_g, sum_g_x_hat, n, centered, False, False, terms)
        terms[k], terms[ROWS + k], terms[2 * ROWS + k] = mean_hi, scale, rest
        terms[3 * ROWS + k], terms[4 * ROWS + k], terms[5 * ROWS + k] = slope, offset, gain
