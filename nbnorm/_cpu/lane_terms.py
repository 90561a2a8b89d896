"""Coefficients and sums of neighbouring slots, side by side.

Loops run across slots inside those over the runs of a slot, so that they vectorize where it has one, as most have.
"""

from __future__ import annotations

from nbnorm._cpu.lanes import add_row, fill
from nbnorm._cpu.launch import called, helper
from nbnorm._cpu.memory import row
from nbnorm._cpu.tiles import add_rows, parameter
from nbnorm._math import affine, gradient_terms, recentered, rounded


@called
def affine_rows(mean_hi, scale, shift, mean, rstd, weight, bias, width, like):
    """Coefficients of `normalize` of neighbouring slots, side by side, for each of the ``width`` runs of a slot."""
    for j in range(width):
        for i in range(mean.shape[0]):
            k = i * width + j
            w, b = parameter(weight, k, 1.0), parameter(bias, k, 0.0)
            mean_hi[k], scale[k], shift[k] = affine(mean[i], rstd[i], w, b, like)


@helper
def add_chunks(sums, chunks, n):
    """Add up the sums of ``n`` neighbours over some chunks, in order, into those of the first.

    Each has four rows: sums of dz and what rounding leaves out of them, then both for dz * x_hat.
    """
    for k in (0, 2):
        total, rest = row(sums, (0, k, 0), n), row(sums, (0, k + 1, 0), n)
        for chunk in range(1, chunks):
            add_rows(total, rest, row(sums, (chunk, k, 0), n))
            add_row(rest, row(sums, (chunk, k + 1, 0), n))


@called
def settle_runs(sum_dz, sum_dz_x_hat, dz, dz_x_hat, mean, rstd, mean_hi, width, run):
    """Sums of the runs of neighbouring slots, side by side, from where each begins."""
    for j in range(width):
        for i in range(mean.shape[0]):
            k = i * width + j
            at = k * run
            sum_dz[k] = dz[at]
            sum_dz_x_hat[k] = recentered(dz_x_hat[at], dz[at], mean[i], mean_hi[at], rstd[i])


@called
def add_weighted(total, weight, sums, width, j):
    """Add to the totals of neighbouring slots the sums of run ``j`` of each, times their weights."""
    for i in range(total.shape[0]):
        k = i * width + j
        total[i] += parameter(weight, k, 1.0) * sums[k]


@helper
def weighted_rows(total, weight, sums, width):
    """Totals of the sums of each slot's runs, times their weights, side by side."""
    fill(total, 0.0)
    for j in range(width):
        add_weighted(total, weight, sums, width, j)


@called
def gradient_term_rows(
    means, rstds, slopes, offsets, factors, mean, rstd, sum_g, sum_g_x_hat, n, constant, masked, like
):  # fmt: skip
    """Coefficients of `input_gradient` of neighbouring slots, side by side."""
    for i in range(mean.shape[0]):
        means[i], rstds[i], _ = affine(mean[i], rstd[i], 1.0, 0.0, like)
        slopes[i], offsets[i], factors[i] = gradient_terms(
            mean[i], rstd[i], sum_g[i], sum_g_x_hat[i], n, True, constant, masked, like
        )


@called
def gain_rows(gains, factors, weight, width, like):
    """Gains of the runs of neighbouring slots, side by side."""
    for j in range(width):
        for i in range(factors.shape[0]):
            k = i * width + j
            gains[k] = rounded(factors[i] * parameter(weight, k, 1.0), like)


@helper
def fill_gradient_terms(
    mean, rstd, weight, width, sum_dz, sum_dz_x_hat, n, constant, masked, pool, terms, first
):
    """Write mean, rstd, slope and offset of neighbouring slots, and the gain of each run, from ``first`` on.

    These are rows of the terms; ``pool`` is room for three rows.
    """
    slots = mean.shape[0]
    sum_g, sum_g_x_hat, factors = row(pool, (0, 0), slots), row(pool, (1, 0), slots), row(pool, (2, 0), slots)
    weighted_rows(sum_g, weight, sum_dz, width)
    weighted_rows(sum_g_x_hat, weight, sum_dz_x_hat, width)
    gradient_term_rows(
        row(terms, (0, first), slots), row(terms, (1, first), slots), row(terms, (2, first), slots),
        row(terms, (3, first), slots), factors, mean, rstd, sum_g, sum_g_x_hat, n, constant, masked, terms,
    )  # fmt: skip
    gain_rows(row(terms, (4, first), slots * width), factors, weight, width, terms)


@helper
def repeat(values, n, times):
    """Turn each of the first ``n`` values into so many neighbours."""
    if times > 1:
        for i in range(n - 1, -1, -1):
            value = values[i]
            for k in range(i * times, (i + 1) * times):
                values[k] = value
