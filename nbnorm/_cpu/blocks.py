"""What a task does to one block of lanes: moments, coefficients, results.

``moments`` has two rows for each chunk, ``lane_sums`` four, ``pool``, for what lies between, four altogether,
``terms`` three to normalize and eight for gradients, all as long as a block of lanes, terms longer by one of a stream.
"""

from __future__ import annotations

import numpy as np

from nbnorm._cpu.grid import lanes_in, locate, rows_end, rows_in_one, unpack
from nbnorm._cpu.lane_grads import chunk_lane_grad_sums, line_sum
from nbnorm._cpu.lane_merges import merge_sets, slot_moments
from nbnorm._cpu.lane_moments import chunk_lane_moments, total_weight
from nbnorm._cpu.lane_terms import add_chunks, affine_rows, fill_gradient_terms, repeat, settle_runs
from nbnorm._cpu.lanes import apply_row, copy_row, fill, input_grad_row, row_weight
from nbnorm._cpu.launch import allocating, helper, inlined, loop
from nbnorm._cpu.memory import borrowed, entry, part, row
from nbnorm._cpu.scratch import room, scratch, wide
from nbnorm._cpu.stores import BLOCK, seam_like
from nbnorm._cpu.streams import begin, finish, writer
from nbnorm._cpu.tiles import (
    add_rows,
    reciprocal_stds,
    settle_rows,
    slot_count,
    within,
)


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
    down, across = 1, 0
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
def term_length(cut, x):
    """Length of a row of terms."""
    return cut.block + BLOCK // x.itemsize


@helper
def spread(g, own, terms, first, end, run):
    """Turn rows [first, end) of the terms, which begin with a value for each run, into values for all lanes.

    Behind the last of all lanes follow the first again, for blocks that go on in the next row.
    """
    cut = unpack(g)
    for k in range(first, end):
        values = row(terms, (k, 0), terms.shape[1])
        repeat(values, own.width // run, run)
        for f in range(1, cut.fold):
            copy_row(row(values, f * own.width, own.width), row(values, 0, own.width))
        if cut.streamed and cut.blocks == 1:  # with more lanes than a block has elements (`streams.LEAST`)
            n = terms.shape[1] - cut.block
            copy_row(row(values, own.lanes, n), row(values, 0, n))


@helper
def spread_affine(g, index, mean, rstd, weight, bias, terms, at):
    """Lay the coefficients of `normalize` out along the lanes of a block, from row ``at`` of the terms."""
    cut, own = unpack(g), locate(g, index)
    p, n = within(own.slot, cut.period) * cut.width, own.slots * cut.width
    affine_rows(
        row(terms, (at, 0), n), row(terms, (at + 1, 0), n), row(terms, (at + 2, 0), n),
        row(mean, own.slot, own.slots), row(rstd, own.slot, own.slots), part(weight, p, n), part(bias, p, n),
        cut.width, terms,
    )  # fmt: skip
    spread(g, own, terms, at, at + 3, cut.run)


@helper
def spread_for_sums(g, index, mean, rstd, weight, bias, activation, terms):
    """Lay out what gradients' sums are computed from: mean and rstd; behind all else, z's terms for an activation."""
    spread_affine(g, index, mean, rstd, None, None, terms, 0)
    if activation is not None:
        spread_affine(g, index, mean, rstd, weight, bias, terms, 5)


@inlined
def apply_lanes(y, at, i, n, given):
    """Normalize some neighbouring lanes."""
    x, residual, terms, lanes, activation = given
    i = i % lanes
    mean_hi, scale, shift = row(terms, (0, i), n), row(terms, (1, i), n), row(terms, (2, i), n)
    apply_row(row(x, at, n), y, part(residual, at, n), mean_hi, scale, shift, activation)


write_lanes = writer(apply_lanes)


@loop
def apply_chunk(g, x, y, residual, activation, index, chunk, terms):
    """Normalize one chunk of rows of a block."""
    cut, own = unpack(g), locate(g, index)
    x, y, seam, stream = borrowed(x), borrowed(y), seam_like(y), begin(y, cut.streamed)
    start, end = chunk * cut.chunk, rows_end(cut, chunk)
    rows, given = (
        rows_in_one(cut, own, end - start, None, stream),
        (x, residual, terms, own.lanes, activation),
    )
    for r in range(start, end, rows):
        first = own.base + r * cut.lanes + own.lane
        stream = write_lanes(y, seam, stream, first, lanes_in(cut, own, r, rows), given)
    finish(y, seam, stream)


@allocating
def chunk_grad_sums(g, x, dy, residual, activation, weights, index, chunk, terms, lane_sums):
    """Sums of dz and dz * x_hat of the lanes of a block over one chunk of rows, each with its rest."""
    cut, own = unpack(g), locate(g, index)
    start, end = chunk * cut.chunk, rows_end(cut, chunk)
    whole = min(end, cut.rows) - start
    chunk_lane_grad_sums(
        x, dy, residual, rows_weights(weights, own.batch, start, whole), activation,
        own.base + start * cut.lanes + own.lane, cut.lanes, whole, cut.spare if end > cut.rows else 0,
        terms, scratch((2, own.lanes), x), room((4, 2, cut.block), x, weights, None), lane_sums[chunk],
    )  # fmt: skip


@helper
def block_grad_sums(g, index, mean, rstd, terms, lane_sums, slot_sums):
    """Add chunks and folds of a block up, then the lanes of each run."""
    cut, own = unpack(g), locate(g, index)
    add_chunks(lane_sums, cut.chunks, own.lanes)
    top = lane_sums[0]
    for k in (0, 2):
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
    n = own.slots * cut.width
    settle_runs(
        row(slot_sums, (0, own.slot, 0), n), row(slot_sums, (1, own.slot, 0), n), dz, dz_x_hat,
        row(mean, own.slot, own.slots), row(rstd, own.slot, own.slots), row(terms, (0, 0), own.width),
        cut.width, cut.run,
    )  # fmt: skip


@inlined
def term_rows(terms, first, n):
    """Mean, rstd, slope, offset and gain of some neighbouring lanes."""
    return (
        row(terms, (0, first), n), row(terms, (1, first), n), row(terms, (2, first), n), row(terms, (3, first), n),
        row(terms, (4, first), n),
    )  # fmt: skip


@helper
def spread_gradient_terms(
    g, index, mean, rstd, weight, weights, slot_sums, count, counts, constant, pool, terms
):
    """Lay the coefficients of `input_gradient` out along the lanes of a block, behind mean and rstd."""
    cut, own = unpack(g), locate(g, index)
    n = own.slots * cut.width
    fill_gradient_terms(
        row(mean, own.slot, own.slots), row(rstd, own.slot, own.slots),
        part(weight, within(own.slot, cut.period) * cut.width, n), cut.width,
        row(slot_sums, (0, own.slot, 0), n), row(slot_sums, (1, own.slot, 0), n),
        slot_count(count, counts, own.slot, cut.period), constant, weights is not None, pool, terms, 0,
    )  # fmt: skip
    spread(g, own, terms, 0, 4, cut.inner)
    spread(g, own, terms, 4, 5, cut.run)


@inlined
def input_grad_lanes(dx, at, i, n, given):
    """Dx of some neighbouring lanes, by the terms ``t``; ``alone``: no other value has a part in it."""
    x, dy, dresidual, residual, w, t, lanes, activation, alone = given
    i = i % lanes
    mean_hi, rstd, slope, offset, gain = term_rows(t, i, n)
    scale, shift = row(t, (6, i), n), row(t, (7, i), n)
    arrays = (row(x, at, n), row(dy, at, n), dx, part(dresidual, at, n), part(residual, at, n))
    if alone:
        input_grad_row(*arrays, w, mean_hi, rstd, None, None, gain, scale, shift, activation)
    else:
        input_grad_row(*arrays, w, mean_hi, rstd, slope, offset, gain, scale, shift, activation)


write_input_grad = writer(input_grad_lanes)


@loop
def input_grad_chunk(g, x, dy, dx, dresidual, residual, activation, weights, index, chunk, t, constant):
    """Dx of one chunk of rows of a block, by the terms ``t``."""
    cut, own = unpack(g), locate(g, index)
    x, dy, dx, seam, stream = borrowed(x), borrowed(dy), borrowed(dx), seam_like(dx), begin(dx, cut.streamed)
    start, end = chunk * cut.chunk, rows_end(cut, chunk)
    rows = rows_in_one(cut, own, end - start, weights, stream)
    for r in range(start, end, rows):
        own_weights = entry(weights, own.batch)
        w, alone = entry(own_weights, r), constant or row_weight(own_weights, r) == 0.0
        given = (x, dy, dresidual, residual, w, t, own.lanes, activation, alone)
        first = own.base + r * cut.lanes + own.lane
        stream = write_input_grad(dx, seam, stream, first, lanes_in(cut, own, r, rows), given)
    finish(dx, seam, stream)
