"""Coefficients and sums of neighbouring slots, side by side.

Loops run across slots inside those over the runs of a slot, so that they vectorize where it has one, as most have; they
run along the runs of a slot where it has more than a few.
"""

from __future__ import annotations

from nbnorm._cpu.lanes import add_row, fill
from nbnorm._cpu.launch import called, helper, reduction
from nbnorm._cpu.memory import part, row
from nbnorm._cpu.tiles import add_rows, parameter
from nbnorm._math import affine, gradient_terms, recentered, rounded

# Runs of a slot from which on loops go along them: group norm of 32 runs of 25 to 64 values takes 0.82 to 0.92 of the
# time, of 8 runs of 196 0.97 (Emerald Rapids; benchmarks/bench_norms.py, ShortPlanes, before and after).
ALONG = 8


@helper
def affine_of_run(mean_hi, scale, shift, k, mean, rstd, weight, bias, like):
    """Coefficients of `normalize` of one run."""
    w, b = parameter(weight, k, 1.0), parameter(bias, k, 0.0)
    mean_hi[k], scale[k], shift[k] = affine(mean, rstd, w, b, like)


@called
def affine_rows(mean_hi, scale, shift, mean, rstd, weight, bias, width, like):
    """Coefficients of `normalize` of neighbouring slots, side by side, for each of the ``width`` runs of a slot."""
    if width < ALONG:
        for j in range(width):
            for i in range(mean.shape[0]):
                affine_of_run(mean_hi, scale, shift, i * width + j, mean[i], rstd[i], weight, bias, like)
    else:
        for i in range(mean.shape[0]):
            own_mean, own_rstd = mean[i], rstd[i]
            for j in range(width):
                affine_of_run(mean_hi, scale, shift, i * width + j, own_mean, own_rstd, weight, bias, like)


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


@helper
def settle_run(sum_dz, sum_dz_x_hat, k, dz, dz_x_hat, at, mean, rstd, mean_hi):
    """Sums of one run, from where it begins."""
    sum_dz[k] = dz[at]
    sum_dz_x_hat[k] = recentered(dz_x_hat[at], dz[at], mean, mean_hi[at], rstd)


@called
def settle_runs(sum_dz, sum_dz_x_hat, dz, dz_x_hat, mean, rstd, mean_hi, width, run):
    """Sums of the runs of neighbouring slots, side by side, from where each begins."""
    if width < ALONG:
        for j in range(width):
            for i in range(mean.shape[0]):
                k = i * width + j
                settle_run(sum_dz, sum_dz_x_hat, k, dz, dz_x_hat, k * run, mean[i], rstd[i], mean_hi)
    else:
        for i in range(mean.shape[0]):
            own_mean, own_rstd = mean[i], rstd[i]
            for j in range(width):
                k = i * width + j
                settle_run(sum_dz, sum_dz_x_hat, k, dz, dz_x_hat, k * run, own_mean, own_rstd, mean_hi)


@called
def add_weighted(total, weight, sums, width, j):
    """Add to the totals of neighbouring slots the sums of run ``j`` of each, times their weights."""
    for i in range(total.shape[0]):
        k = i * width + j
        total[i] += parameter(weight, k, 1.0) * sums[k]


@reduction
def weighted(weight, sums):
    """Total of the sums of a slot's runs, times their weights."""
    total = 0.0
    for j in range(sums.shape[0]):
        total += parameter(weight, j, 1.0) * sums[j]
    return total


@helper
def weighted_rows(total, weight, sums, width):
    """Totals of the sums of each slot's runs, times their weights, side by side."""
    if width < ALONG:
        fill(total, 0.0)
        for j in range(width):
            add_weighted(total, weight, sums, width, j)
    else:
        for i in range(total.shape[0]):
            total[i] = weighted(part(weight, i * width, width), row(sums, i * width, width))


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


@helper
def gain_of_run(gains, k, factor, weight, like):
    """Gain of one run."""
    gains[k] = rounded(factor * parameter(weight, k, 1.0), like)


@called
def gain_rows(gains, factors, weight, width, like):
    """Gains of the runs of neighbouring slots, side by side."""
    if width < ALONG:
        for j in range(width):
            for i in range(factors.shape[0]):
                gain_of_run(gains, i * width + j, factors[i], weight, like)
    else:
        for i in range(factors.shape[0]):
            factor = factors[i]
            for j in range(width):
                gain_of_run(gains, i * width + j, factor, weight, like)


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
