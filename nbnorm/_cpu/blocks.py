"""What a task does to one block of lanes: moments, coefficients, results.

``moments`` has two rows for each chunk, ``lane_sums`` four, ``pool``, in which moments are computed, four altogether,
``terms`` three to normalize and eight for gradients, all as long as a block.
"""

from __future__ import annotations

import numpy as np

from nbnorm._cpu.grid import locate, row_lanes, rows_end, unpack
from nbnorm._cpu.lane_grads import chunk_lane_grad_sums, line_sum
from nbnorm._cpu.lane_merges import merge_sets, slot_moments
from nbnorm._cpu.lane_moments import chunk_lane_moments, total_weight
from nbnorm._cpu.lanes import apply_row, copy_row, fill, input_grad_row, row_weight
from nbnorm._cpu.launch import allocating, helper, inlined, loop
from nbnorm._cpu.memory import borrowed, entry, part, row
from nbnorm._cpu.scratch import room, scratch, wide
from nbnorm._cpu.streams import before_blocks, block_like, finish, store_block
from nbnorm._cpu.tiles import (
    add_rows,
    parameter,
    reciprocal_stds,
    settle_rows,
    slot_count,
    weighted,
    within,
)
from nbnorm._math import affine, gradient_terms, recentered, rounded


@helper
def rows_weights(weights, batch, first, rows):
    """Weights of some rows of a batch entry."""
    return part(entry(weights, batch), first, rows)


@allocating
def chunk_weights(g, weights, batch):
    """Number of values of a lane that count in each chunk of whole rows."""
    cut = unpack(g)
    counts = wide(cut.chunks)
    for chunk in range(cut.chunks):
        start = chunk * cut.chunk
        rows = min(cut.chunk, cut.rows - start)
        counts[chunk] = total_weight(rows_weights(weights, batch, start, rows), 0, rows)
    return counts


@allocating
def chunk_moments(g, x, weights, index, chunk, pool, moments):
    """Moments of the lanes of a block over one chunk of whole rows."""
    cut, own = unpack(g), locate(g, index)
    start = chunk * cut.chunk
    rows = min(cut.chunk, cut.rows - start)
    first = own.base + start * cut.lanes + own.lane
    own_weights = rows_weights(weights, own.batch, start, rows)
    sums = scratch((3, own.lanes), x)
    chunk_lane_moments(x, own_weights, first, cut.lanes, rows, sums, pool, moments[chunk])


@allocating
def block_moments(g, x, weights, index, pool, moments, mean, m2):
    """Merge chunks, folds and the spare row of a block, then the lanes of each slot."""
    cut, own = unpack(g), locate(g, index)
    # As numbers written out these would have `merge_sets` compiled twice.
    down, across = np.int64(1), np.int64(0)
    counts, folds = chunk_weights(g, weights, own.batch), wide(cut.fold)
    n = merge_sets(moments, cut.chunks, down, across, counts, row(x, 0, 0), own.lanes, pool)
    fill(row(folds, 0, cut.fold), n)
    spare = row(x, own.base + cut.rows * cut.lanes, cut.spare)
    n = merge_sets(moments, cut.fold, across, own.width, folds, spare, own.width, pool)
    lane_mean, lane_m2 = row(moments, (0, 0, 0), own.width), row(moments, (0, 1, 0), own.width)
    if cut.inner == 1:
        copy_row(row(mean, own.slot, own.slots), lane_mean)
        copy_row(row(m2, own.slot, own.slots), lane_m2)
        return
    for i in range(own.slots):
        at = i * cut.inner
        mean[own.slot + i], m2[own.slot + i] = slot_moments(
            row(lane_mean, at, cut.inner), row(lane_m2, at, cut.inner), n
        )


@helper
def block_rstd(g, counts, index, m2, eps, rstd):
    """Reciprocal standard deviations of a block's slots."""
    cut, own = unpack(g), locate(g, index)
    n = slot_count(np.float64(cut.outer * cut.inner), counts, own.slot, cut.period)
    reciprocal_stds(row(m2, own.slot, own.slots), n, eps, row(rstd, own.slot, own.slots))


@helper
def spread(g, own, terms, first, end):
    """Turn rows [first, end) of the terms, which begin with a value for each run, into values for all lanes."""
    cut = unpack(g)
    for k in range(first, end):
        values = row(terms, (k, 0), own.lanes)
        if cut.run > 1:
            for i in range(own.slots * cut.width - 1, -1, -1):
                fill(row(values, i * cut.run, cut.run), values[i])
        for f in range(1, cut.fold):
            copy_row(row(values, f * own.width, own.width), row(values, 0, own.width))


@helper
def spread_affine(g, index, mean, rstd, weight, bias, terms, at):
    """Lay the coefficients of `normalize` out along the lanes of a block, from row ``at`` of the terms."""
    cut, own = unpack(g), locate(g, index)
    p, n = within(own.slot, cut.period) * cut.width, own.slots * cut.width
    mean_hi, scale, shift = row(terms, (at, 0), n), row(terms, (at + 1, 0), n), row(terms, (at + 2, 0), n)
    for i in range(own.slots):
        slot = own.slot + i
        for j in range(i * cut.width, (i + 1) * cut.width):
            w, b = parameter(weight, p + j, 1.0), parameter(bias, p + j, 0.0)
            mean_hi[j], scale[j], shift[j] = affine(mean[slot], rstd[slot], w, b, terms)
    spread(g, own, terms, at, at + 3)


@helper
def spread_activation(g, index, mean, rstd, weight, bias, activation, terms):
    """Lay out, behind all else, what z is computed from, if an activation asks for it."""
    if activation is not None:
        spread_affine(g, index, mean, rstd, weight, bias, terms, 5)


@inlined
def apply_lanes(x, y, residual, terms, first, n, activation):
    """Normalize some neighbouring lanes of a row."""
    mean_hi, scale, shift = row(terms, (0, first), n), row(terms, (1, first), n), row(terms, (2, first), n)
    apply_row(x, y, residual, mean_hi, scale, shift, activation)


@loop
def apply_chunk(g, x, y, residual, activation, index, chunk, terms):
    """Normalize one chunk of rows of a block."""
    cut, own = unpack(g), locate(g, index)
    x, y, block_of_y = borrowed(x), borrowed(y), block_like(y)
    for r in range(chunk * cut.chunk, rows_end(cut, chunk)):
        lanes, first = row_lanes(cut, own, r), own.base + r * cut.lanes + own.lane
        i, n = 0, before_blocks(y, first, lanes, cut.streamed)
        while i < lanes:
            at = first + i
            apply_lanes(row(x, at, n), row(y, at, n), part(residual, at, n), terms, i, n, activation)
            i += n
            n = block_of_y.shape[0]
            while i + n <= lanes:
                at = first + i
                apply_lanes(row(x, at, n), block_of_y, part(residual, at, n), terms, i, n, activation)
                store_block(block_of_y, y, at)
                i += n
            n = lanes - i
    finish(cut.streamed)


@allocating
def chunk_grad_sums(g, x, dy, residual, activation, weights, index, chunk, terms, lane_sums):
    """Sums of dz and dz * x_hat of the lanes of a block over one chunk of rows, each with its rest."""
    cut, own = unpack(g), locate(g, index)
    start, end = chunk * cut.chunk, rows_end(cut, chunk)
    whole = min(end, cut.rows) - start
    chunk_lane_grad_sums(
        x, dy, residual, rows_weights(weights, own.batch, start, whole), activation,
        own.base + start * cut.lanes + own.lane, cut.lanes, whole, cut.spare if end > cut.rows else 0,
        terms, scratch((2, own.lanes), x), room((4, 2, cut.block), x, weights, activation), lane_sums[chunk],
    )  # fmt: skip


@helper
def block_grad_sums(g, index, mean, rstd, terms, lane_sums, slot_sums):
    """Add chunks and folds of a block up, then the lanes of each run."""
    cut, own = unpack(g), locate(g, index)
    top = lane_sums[0]
    for k in (0, 2):
        total, rest = row(top, (k, 0), own.lanes), row(top, (k + 1, 0), own.lanes)
        for chunk in range(1, cut.chunks):
            add_rows(total, rest, row(lane_sums, (chunk, k, 0), own.lanes))
            add_rows(total, rest, row(lane_sums, (chunk, k + 1, 0), own.lanes))
        total, rest = row(top, (k, 0), own.width), row(top, (k + 1, 0), own.width)
        for f in range(1, cut.fold):
            add_rows(total, rest, row(top, (k, f * own.width), own.width))
            add_rows(total, rest, row(top, (k + 1, f * own.width), own.width))
    dz, dz_rest = row(top, (0, 0), own.width), row(top, (1, 0), own.width)
    dz_x_hat, dz_x_hat_rest = row(top, (2, 0), own.width), row(top, (3, 0), own.width)
    if cut.run == 1:
        settle_rows(dz, dz_rest)
        settle_rows(dz_x_hat, dz_x_hat_rest)
    else:  # the sums of a run go where it begins
        for first in range(0, own.width, cut.run):
            dz[first] = line_sum(row(dz, first, cut.run), row(dz_rest, first, cut.run))
            dz_x_hat[first] = line_sum(row(dz_x_hat, first, cut.run), row(dz_x_hat_rest, first, cut.run))
    for i in range(own.slots):
        k = own.slot + i
        for j in range(cut.width):
            at = i * cut.inner + j * cut.run
            slot_sums[0, k, j] = dz[at]
            slot_sums[1, k, j] = recentered(dz_x_hat[at], dz[at], mean[k], terms[0, at], rstd[k])


@inlined
def term_rows(terms, first, n):
    """Mean, rstd, slope, offset and gain of some neighbouring lanes."""
    return (
        row(terms, (0, first), n), row(terms, (1, first), n), row(terms, (2, first), n), row(terms, (3, first), n),
        row(terms, (4, first), n),
    )  # fmt: skip


@helper
def spread_gradient_terms(g, index, mean, rstd, weight, weights, slot_sums, count, counts, constant, terms):
    """Lay the coefficients of `input_gradient` out along the lanes of a block, behind mean and rstd."""
    cut, own = unpack(g), locate(g, index)
    p = within(own.slot, cut.period) * cut.width
    means, rstds, slopes, offsets, gains = term_rows(terms, 0, own.slots * cut.width)
    for i in range(own.slots):
        k, first = own.slot + i, p + i * cut.width
        sum_g = weighted(weight, first, slot_sums, 0, k)
        sum_g_x_hat = weighted(weight, first, slot_sums, 1, k)
        mean_hi, scale, _ = affine(mean[k], rstd[k], 1.0, 0.0, terms)
        n = slot_count(count, counts, k, cut.period)
        slope, offset, factor = gradient_terms(
            mean[k], rstd[k], sum_g, sum_g_x_hat, n, True, constant, weights is not None, terms
        )
        for j in range(i * cut.width, (i + 1) * cut.width):
            means[j], rstds[j], slopes[j], offsets[j] = mean_hi, scale, slope, offset
            gains[j] = rounded(factor * parameter(weight, p + j, 1.0), terms)
    spread(g, own, terms, 0, 5)


@inlined
def input_grad_lanes(x, dy, dx, dresidual, residual, w, t, first, n, activation, alone):
    """Dx of some neighbouring lanes of a row, by the terms ``t``; ``alone``: no other value has a part in it."""
    mean_hi, rstd, slope, offset, gain = term_rows(t, first, n)
    scale, shift = row(t, (6, first), n), row(t, (7, first), n)
    arrays = (x, dy, dx, dresidual, residual)
    if alone:
        input_grad_row(*arrays, w, mean_hi, rstd, None, None, gain, scale, shift, activation)
    else:
        input_grad_row(*arrays, w, mean_hi, rstd, slope, offset, gain, scale, shift, activation)


@loop
def input_grad_chunk(g, x, dy, dx, dresidual, residual, activation, weights, index, chunk, t, constant):
    """Dx of one chunk of rows of a block, by the terms ``t``."""
    cut, own = unpack(g), locate(g, index)
    x, dy, dx, block_of_dx = borrowed(x), borrowed(dy), borrowed(dx), block_like(dx)
    for r in range(chunk * cut.chunk, rows_end(cut, chunk)):
        lanes, first = row_lanes(cut, own, r), own.base + r * cut.lanes + own.lane
        own_weights = entry(weights, own.batch)
        w, alone = entry(own_weights, r), constant or row_weight(own_weights, r) == 0.0
        i, n = 0, before_blocks(dx, first, lanes, cut.streamed)
        while i < lanes:
            at = first + i
            input_grad_lanes(
                row(x, at, n), row(dy, at, n), row(dx, at, n), part(dresidual, at, n), part(residual, at, n),
                w, t, i, n, activation, alone,
            )  # fmt: skip
            i += n
            n = block_of_dx.shape[0]
            while i + n <= lanes:
                at = first + i
                input_grad_lanes(
                    row(x, at, n), row(dy, at, n), block_of_dx, part(dresidual, at, n), part(residual, at, n),
                    w, t, i, n, activation, alone,
                )  # fmt: skip
                store_block(block_of_dx, dx, at)
                i += n
            n = lanes - i
    finish(cut.streamed)
