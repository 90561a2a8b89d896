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

from nbnorm._activation import activate, activation_gradient
from nbnorm._cpu.halves import narrow, widen
from nbnorm._cpu.launch import Twins, balanced, helper, inlined, reduction
from nbnorm._cpu.memory import claim, fetch, row
from nbnorm._cpu.tiles import (
    CHUNK,
    PIECE,
    TILE,
    add_rows,
    before_activation,
    entry,
    line_moments,
    parameter,
    part,
    piece,
    room,
    slot_count,
    tile_moments,
    weighted,
)
from nbnorm._math import (
    accumulate,
    add,
    affine,
    by_type,
    gradient_terms,
    input_gradient,
    is_none,
    recentered,
    reciprocal_std,
    rounded,
    settled,
    standardize,
)
from nbnorm._view import View

# Thresholds in elements, for float32, from benchmarks/choices.py on an AMD EPYC (Zen 4, two cores, 1 MB of second-level
# and 32 MB of last-level cache). Between these two, forward passes by two kernels, the second of which goes through
# memory in order and finds x in the last-level cache, take a tenth to a quarter less than by a fused one.
SPLIT = 1 << 20
SHARED = 1 << 23
# From FAR on, while a slot has up to NEAR, the next slot's segments, which lie behind those of this one, are fetched
# ahead: a fifth to a third of the time of a reading pass. If segments are SHORT, the lines that are written are, too.
FAR = 3 << 21
NEAR = 1 << 15
SHORT = 512


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
    ahead: int  # how far to fetch ahead what is read, and below what is written; 0: not at all
    claim: int


@lru_cache(maxsize=4096)
def geometry(view: View, masked: bool = False) -> np.ndarray:
    """Return the `Cut` of a view as an array, the cheapest way to hand a kernel many integers.

    A mask makes no difference here.
    """
    rows, cols = (1, CHUNK) if view.inner > CHUNK else (max(1, CHUNK // view.inner), view.inner)
    chunks = -(-view.outer // rows) * -(-view.inner // cols)
    rule = (view.period, view.width, view.run)
    ahead = view.inner if view.size >= FAR and view.outer * view.inner <= NEAR else 0
    claim = ahead if view.inner <= SHORT else 0
    return np.array(Cut(view.outer, view.group, view.inner, *rule, rows, cols, chunks, ahead, claim))


def fused(view: View, threads: int, masked: bool = False, backward: bool = False) -> bool:
    """Whether one kernel should do both passes: whole slots keep the threads busy, and its walk costs little."""
    scattered = view.outer > 1 and SPLIT <= view.size <= SHARED and not backward
    return balanced(view.slots, threads) and not scattered


@helper
def unpack(g):
    """Name the integers of a geometry."""
    return Cut(g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10])


@helper
def block(index, outer, inner, rows, cols):
    """First row, rows, first column and columns of a block of an outer x inner plane."""
    across = -(-inner // cols)
    r, c = index // across * rows, index % across * cols
    return r, min(rows, outer - r), c, min(cols, inner - c)


@helper
def chunk_moments(g, x, weights, slot, chunk):
    """Count, mean and m2 of one chunk of a slot: its tiles merged in order."""
    if weights is not None:
        return counted_chunk_moments(g, x, entry(weights, slot // unpack(g).period), slot, chunk)
    cut = unpack(g)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    tile_rows, tile_cols = max(1, min(rows, TILE // cols)), min(cols, TILE)
    n = mean = m2 = rest = 0.0
    for tile in range(-(-rows // tile_rows) * -(-cols // tile_cols)):
        r, height, c, width = block(tile, rows, cols, tile_rows, tile_cols)
        first = ((r0 + r) * cut.group + slot) * cut.inner + c0 + c
        tile_n, tile_mean, tile_m2 = tile_moments(
            x, None, first, cut.group * cut.inner, height, width, cut.ahead
        )
        n, mean, m2, rest = accumulate(n, mean, m2, rest, tile_n, tile_mean, tile_m2)
    return n, mean, settled(m2, rest)


@helper
def counted_chunk_moments(g, x, weights, slot, chunk):
    """`chunk_moments` with the weights of the slot's positions: a segment of a run at a time."""
    cut = unpack(g)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    first_run, end_run = runs(c0, cols, cut.run)
    n = mean = m2 = rest = 0.0
    for j in range(first_run, end_run):
        start, end = max(c0, j * cut.run), min(c0 + cols, (j + 1) * cut.run)
        for r in range(r0, r0 + rows):
            base = (r * cut.group + slot) * cut.inner
            segment_weights = positions(weights, cut, r, j, start, end)
            part_n, part_mean, part_m2 = line_moments(
                row(x, base + start, end - start), segment_weights, True
            )
            n, mean, m2, rest = accumulate(n, mean, m2, rest, part_n, part_mean, part_m2)
    return n, mean, settled(m2, rest)


@helper
def positions(weights, cut, r, j, start, n):
    """Weights of ``n`` columns of run ``j`` in row ``r``: every run has the same."""
    return part(weights, (r - j) * cut.run + start, n)


@helper
def runs(c0, cols, run):
    """First run and one past the last run that the columns [c0, c0 + cols) meet."""
    return c0 // run, -(-(c0 + cols) // run)


@helper
def apply_segment(x, y, residual, mean_hi, scale, shift, activation):
    """Normalize neighbours that share their coefficients."""
    for i in range(x.shape[0]):
        z = before_activation(widen(x[i]), residual, i, mean_hi, scale, shift)
        y[i] = narrow(activate(z, activation), y)


@helper
def run_affine(cut, x, slot, j, mean, rstd, weight, bias):
    """Coefficients of `normalize` for one run of a slot."""
    p = slot % cut.period * cut.width + j
    return affine(mean, rstd, parameter(weight, p, 1.0), parameter(bias, p, 0.0), x)


@helper
def bounds(cut, j, c0, cols):
    """First column of run ``j`` within [c0, c0 + cols), and how many there are."""
    start = max(c0, j * cut.run)
    return start, min(c0 + cols, (j + 1) * cut.run) - start


@helper
def apply_run(cut, x, y, residual, first, n, mean_hi, scale, shift, activation):
    """Normalize neighbours that share their coefficients, and claim what is written next."""
    if cut.claim > 0:
        claim(y, first + cut.claim, n)
    own_residual = part(residual, first, n)
    apply_segment(row(x, first, n), row(y, first, n), own_residual, mean_hi, scale, shift, activation)


@helper
def apply_chunk(g, x, y, slot, chunk, mean, rstd, weight, bias, residual, activation):
    """Normalize one chunk of a slot, run by run, backwards: what has been read last is still in cache."""
    cut = unpack(g)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    first_run, end_run = runs(c0, cols, cut.run)
    for j in range(first_run, end_run):
        mean_hi, scale, shift = run_affine(cut, x, slot, j, mean, rstd, weight, bias)
        start, n = bounds(cut, j, c0, cols)
        for r in range(r0 + rows - 1, r0 - 1, -1):
            first = (r * cut.group + slot) * cut.inner + start
            apply_run(cut, x, y, residual, first, n, mean_hi, scale, shift, activation)


@helper
def stretch(g, task):
    """First segment, number of segments, first column and columns of a task that goes through memory in order."""
    cut = unpack(g)
    return block(task, cut.outer * cut.group, cut.inner, cut.rows, cut.cols)


@helper
def stretches(g):
    """How many of them there are."""
    cut = unpack(g)
    return -(-cut.outer * cut.group // cut.rows) * -(-cut.inner // cut.cols)


@helper
def apply_stretch(g, x, y, task, mean, rstd, weight, bias, residual, activation):
    """Normalize segments in the order in which they lie in memory."""
    cut = unpack(g)
    first_segment, count, c0, cols = stretch(g, task)
    first_run, end_run = runs(c0, cols, cut.run)
    for segment in range(first_segment, first_segment + count):
        slot = segment % cut.group
        for j in range(first_run, end_run):
            mean_hi, scale, shift = run_affine(cut, x, slot, j, mean[slot], rstd[slot], weight, bias)
            start, n = bounds(cut, j, c0, cols)
            first = segment * cut.inner + start
            apply_run(cut, x, y, residual, first, n, mean_hi, scale, shift, activation)


@reduction
def piece_grad_sums(x, dz, mean_hi, rstd):
    """Sums of dz and dz * x_hat over one piece; x_hat relative to the rounded mean."""
    sum_dz = rounded(0.0, x)
    sum_dz_x_hat = rounded(0.0, x)
    for i in range(x.shape[0]):
        d = widen(dz[i])
        sum_dz += d
        sum_dz_x_hat += d * standardize(widen(x[i]), mean_hi, rstd)
    return sum_dz, sum_dz_x_hat


def summands(x, dy, residual, weights, mean_hi, scale, shift, activation, room):
    """x and dz of one piece: as they are, or computed into ``room`` where they depend on options."""
    given = (x, dy, residual, weights, mean_hi, scale, shift, activation, room)
    return _summands(*given)(*given)


@by_type(summands)
def _summands(x, dy, residual, weights, mean_hi, scale, shift, activation, room):
    if is_none(room):
        return lambda x, dy, residual, weights, mean_hi, scale, shift, activation, room: (x, dy)
    return lambda x, dy, residual, weights, mean_hi, scale, shift, activation, room: computed_summands(
        x, dy, residual, weights, mean_hi, scale, shift, activation, room
    )


@helper
def computed_summands(x, dy, residual, weights, mean_hi, scale, shift, activation, room):
    """Write x and dz of one piece out.

    So dz takes part in the same sums, and gives the same bits, as one that comes from outside. What neither counts
    nor has a gradient may be NaN; it takes part as 0.
    """
    n = x.shape[0]
    x_room, dz_room = row(room[0], 0, n), row(room[1], 0, n)
    for i in range(n):
        value, d = widen(x[i]), widen(dy[i])
        absent = False
        if weights is not None:
            absent = weights[i] == 0 and d == 0
        if activation is not None:
            z = before_activation(value, residual, i, mean_hi, scale, shift)
            d = activation_gradient(d, z, activation)
        x_room[i] = mean_hi if absent else value
        dz_room[i] = rounded(0.0, x) if absent else d
    return x_room, dz_room


@helper
def chunk_grad_sums(g, x, dy, slot, chunk, mean, rstd, weight, bias, residual, activation, weights, sums):
    """Add the sums of dz and of dz * x_hat over one chunk of a slot to those of its runs: total, rest, of each."""
    cut = unpack(g)
    mean_hi, hat_scale, _ = affine(mean, rstd, 1.0, 0.0, x)
    own_weights = entry(weights, slot // cut.period)
    own_room = room((2, PIECE), x, weights, activation)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    first_run, end_run = runs(c0, cols, cut.run)
    for j in range(first_run, end_run):
        _, scale, shift = run_affine(cut, x, slot, j, mean, rstd, weight, bias)
        start, size = bounds(cut, j, c0, cols)
        a = a_rest = b = b_rest = 0.0
        for r in range(r0, r0 + rows):
            base = (r * cut.group + slot) * cut.inner
            for i in range(start, start + size, piece(x)):
                first, n = base + i, min(piece(x), start + size - i)
                if cut.ahead > 0:
                    fetch(x, first + cut.ahead, n)
                    fetch(dy, first + cut.ahead, n)
                x_piece, dz_piece = summands(
                    row(x, first, n), row(dy, first, n), part(residual, first, n),
                    positions(own_weights, cut, r, j, i, n), mean_hi, scale, shift, activation, own_room,
                )  # fmt: skip
                piece_a, piece_b = piece_grad_sums(x_piece, dz_piece, mean_hi, hat_scale)
                a, a_rest = add(a, a_rest, piece_a)
                b, b_rest = add(b, b_rest, piece_b)
        a = settled(a, a_rest)
        b = recentered(settled(b, b_rest), a, mean, mean_hi, rstd)
        sums[0, j], sums[1, j] = add(sums[0, j], sums[1, j], a)
        sums[2, j], sums[3, j] = add(sums[2, j], sums[3, j], b)


@helper
def settle(sums, sum_dz, sum_dz_x_hat):
    """Write a slot's sums out with what rounding has left out of them."""
    for j in range(sum_dz.shape[0]):
        sum_dz[j] = settled(sums[0, j], sums[1, j])
        sum_dz_x_hat[j] = settled(sums[2, j], sums[3, j])


@inlined
def input_grad_segment(
    x, dy, dx, dresidual, residual, weights, mean_hi, hat_scale, slope, offset, gain, scale, shift, activation
):  # fmt: skip
    """Dx, and dz where it is wanted, of neighbours that share their coefficients; no slope: constant statistics."""
    for i in range(x.shape[0]):
        value, d = widen(x[i]), widen(dy[i])
        absent = False
        if weights is not None:
            absent = weights[i] == 0 and d == 0
        if activation is not None:
            z = before_activation(value, residual, i, mean_hi, scale, shift)
            d = rounded(0.0, x) if absent else activation_gradient(d, z, activation)
        if dresidual is not None:
            dresidual[i] = narrow(d, x)
        if slope is None:
            dx[i] = narrow(d * gain, x)
        elif weights is None:
            dx[i] = narrow(input_gradient(d, standardize(value, mean_hi, hat_scale), slope, offset, gain), x)
        else:
            w = weights[i]
            x_hat = standardize(value, mean_hi, hat_scale) if w > 0 else rounded(0.0, x)
            dx[i] = narrow(input_gradient(d, x_hat, w * slope, w * offset, gain), x)


@helper
def slot_terms(g, x, slot, mean, rstd, weight, weights, sum_dz, sum_dz_x_hat, count, counts, constant, terms):
    """Write what dx of a slot is computed from: mean, rstd, slope, offset and the factor of the gain."""
    cut = unpack(g)
    first = slot % cut.period * cut.width
    sum_g, sum_g_x_hat = weighted(weight, first, sum_dz, slot), weighted(weight, first, sum_dz_x_hat, slot)
    n = slot_count(count, counts, slot, cut.period)
    terms[0], terms[1], _ = affine(mean, rstd, 1.0, 0.0, x)
    terms[2], terms[3], terms[4] = gradient_terms(
        mean, rstd, sum_g, sum_g_x_hat, n, True, constant, weights is not None, x
    )


@helper
def run_terms(cut, x, slot, j, mean, rstd, weight, bias, terms):
    """Coefficients for dx of one run: those of its slot, the gain, and scale and shift of `normalize`."""
    _, scale, shift = run_affine(cut, x, slot, j, mean, rstd, weight, bias)
    gain = terms[4] * parameter(weight, slot % cut.period * cut.width + j, 1.0)
    return (
        rounded(terms[0], x), rounded(terms[1], x), rounded(terms[2], x), rounded(terms[3], x), rounded(gain, x),
        scale, shift,
    )  # fmt: skip


@inlined
def input_grad_run(cut, x, dy, dx, dresidual, residual, activation, weights, i, n, terms, constant):
    """Dx of ``n`` neighbours of one run, by its terms, and claim what is written next."""
    if cut.claim > 0:
        claim(dx, i + cut.claim, n)
    arrays = (
        row(x, i, n),
        row(dy, i, n),
        row(dx, i, n),
        part(dresidual, i, n),
        part(residual, i, n),
        weights,
    )
    mean_hi, hat_scale, slope, offset, gain, scale, shift = terms
    if constant:
        input_grad_segment(*arrays, mean_hi, hat_scale, None, None, gain, scale, shift, activation)
    else:
        input_grad_segment(*arrays, mean_hi, hat_scale, slope, offset, gain, scale, shift, activation)


@helper
def input_grad_chunk(
    g, x, dy, dx, dresidual, slot, chunk, mean, rstd, weight, bias, residual, activation, weights, terms
):
    """Dx of one chunk of a slot, run by run, backwards as `apply_chunk`."""
    cut = unpack(g)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    first_run, end_run = runs(c0, cols, cut.run)
    slot_weights = entry(weights, slot // cut.period)
    for j in range(first_run, end_run):
        start, n = bounds(cut, j, c0, cols)
        own = run_terms(cut, x, slot, j, mean, rstd, weight, bias, terms)
        for r in range(r0 + rows - 1, r0 - 1, -1):
            i = (r * cut.group + slot) * cut.inner + start
            own_weights = positions(slot_weights, cut, r, j, start, n)
            input_grad_run(cut, x, dy, dx, dresidual, residual, activation, own_weights, i, n, own, False)


@helper
def input_grad_stretch(
    g, x, dy, dx, dresidual, task, mean, rstd, weight, bias, residual, activation, weights, terms, constant
):
    """Dx of segments in the order in which they lie in memory."""
    cut = unpack(g)
    first, count, c0, cols = stretch(g, task)
    first_run, end_run = runs(c0, cols, cut.run)
    for segment in range(first, first + count):
        r, slot = segment // cut.group, segment % cut.group
        slot_weights = entry(weights, slot // cut.period)
        for j in range(first_run, end_run):
            start, n = bounds(cut, j, c0, cols)
            own = run_terms(cut, x, slot, j, mean[slot], rstd[slot], weight, bias, terms[slot])
            own_weights = positions(slot_weights, cut, r, j, start, n)
            i = segment * cut.inner + start
            input_grad_run(cut, x, dy, dx, dresidual, residual, activation, own_weights, i, n, own, constant)


@Twins
def moments_kernel(g, x, weights, mean, m2):
    """One chunk per task, then the chunks of each slot in order; reads x once."""
    cut = unpack(g)
    group, chunks = cut.group, cut.chunks
    part_moments = np.empty((group * chunks, 3))
    for task in prange(group * chunks):
        own = part_moments[task]
        own[0], own[1], own[2] = chunk_moments(g, x, weights, task // chunks, task % chunks)
    for slot in range(group):
        n = slot_mean = slot_m2 = rest = 0.0
        for i in range(slot * chunks, (slot + 1) * chunks):
            own = part_moments[i]
            n, slot_mean, slot_m2, rest = accumulate(n, slot_mean, slot_m2, rest, own[0], own[1], own[2])
        mean[slot], m2[slot] = slot_mean, settled(slot_m2, rest)


@Twins
def apply_kernel(g, x, y, mean, rstd, weight, bias, residual, activation):
    """One stretch of memory per task; reads x and writes y once."""
    for task in prange(stretches(g)):
        apply_stretch(g, x, y, task, mean, rstd, weight, bias, residual, activation)


@Twins
def forward_kernel(g, x, y, weight, bias, residual, activation, weights, eps, mean, m2, rstd):
    """One slot per task: its moments, then its normalization from cache."""
    cut = unpack(g)
    group, chunks = cut.group, cut.chunks
    for slot in prange(group):
        n = slot_mean = slot_m2 = rest = 0.0
        for chunk in range(chunks):
            part_n, part_mean, part_m2 = chunk_moments(g, x, weights, slot, chunk)
            n, slot_mean, slot_m2, rest = accumulate(n, slot_mean, slot_m2, rest, part_n, part_mean, part_m2)
        slot_m2 = settled(slot_m2, rest)
        slot_rstd = reciprocal_std(slot_m2, n, eps)
        mean[slot], m2[slot], rstd[slot] = slot_mean, slot_m2, slot_rstd
        for chunk in range(chunks - 1, -1, -1):
            apply_chunk(g, x, y, slot, chunk, slot_mean, slot_rstd, weight, bias, residual, activation)


@Twins
def grad_sums_kernel(
    g, x, dy, mean, rstd, weight, bias, residual, activation, weights, sum_dz, sum_dz_x_hat
):  # fmt: skip
    """One chunk per task, then the chunks of each slot in order; reads x and dy once."""
    cut = unpack(g)
    group, chunks = cut.group, cut.chunks
    sums = np.zeros((group * chunks, 4, cut.width))
    for task in prange(group * chunks):
        k = task // chunks
        chunk_grad_sums(
            g,
            x,
            dy,
            k,
            task % chunks,
            mean[k],
            rstd[k],
            weight,
            bias,
            residual,
            activation,
            weights,
            sums[task],
        )
    for slot in range(group):
        first = slot * chunks
        for task in range(first + 1, first + chunks):
            add_rows(sums[first, 0], sums[first, 1], sums[task, 0])
            add_rows(sums[first, 2], sums[first, 3], sums[task, 2])
        settle(sums[first], sum_dz[slot], sum_dz_x_hat[slot])


@Twins
def input_grad_kernel(
    g, x, dy, dx, dresidual, mean, rstd, weight, bias, residual, activation, weights, sum_dz, sum_dz_x_hat,
    count, counts, constant,
):  # fmt: skip
    """One stretch of memory per task; reads x and dy and writes dx once."""
    group = unpack(g).group
    terms = np.empty((group, 5))
    for k in prange(group):
        slot_terms(
            g,
            x,
            k,
            mean[k],
            rstd[k],
            weight,
            weights,
            sum_dz,
            sum_dz_x_hat,
            count,
            counts,
            constant,
            terms[k],
        )
    for task in prange(stretches(g)):
        input_grad_stretch(
            g,
            x,
            dy,
            dx,
            dresidual,
            task,
            mean,
            rstd,
            weight,
            bias,
            residual,
            activation,
            weights,
            terms,
            constant,
        )


@Twins
def backward_kernel(
    g, x, dy, dx, dresidual, mean, rstd, weight, bias, residual, activation, weights, sum_dz, sum_dz_x_hat,
    count, counts,
):  # fmt: skip
    """One slot per task: its sums, then its dx from cache."""
    cut = unpack(g)
    chunks = cut.chunks
    sums, terms = np.zeros((cut.group, 4, cut.width)), np.empty((cut.group, 5))
    for k in prange(cut.group):
        for chunk in range(chunks):
            chunk_grad_sums(
                g, x, dy, k, chunk, mean[k], rstd[k], weight, bias, residual, activation, weights, sums[k]
            )
        settle(sums[k], sum_dz[k], sum_dz_x_hat[k])
        slot_terms(
            g, x, k, mean[k], rstd[k], weight, weights, sum_dz, sum_dz_x_hat, count, counts, False, terms[k]
        )
        for chunk in range(chunks - 1, -1, -1):
            input_grad_chunk(
                g, x, dy, dx, dresidual, k, chunk, mean[k], rstd[k], weight, bias, residual, activation, weights,
                terms[k],
            )  # fmt: skip
