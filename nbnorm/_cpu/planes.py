"""Walk along segments: a slot is ``outer`` segments of ``inner`` neighbours, ``run`` of which share a parameter.

The fused kernels take some neighbouring slots per task, whose second pass finds them in cache (forward: 1 read + 1
write of the tensor, backward: 2 reads + 1 write). If these are few or uneven, there is one kernel per pass. All walk
along memory, slot after slot within a row of segments, so that only every few of them the next line is far away.
Chunks and tiles, blocks of whole segments or parts of one, are cut by the shape alone, and so are sums.

Tried and left out: second passes that walk backwards, into what has been read last (a quarter less slot by slot on
1 to 6 MB on Zen 3, no difference on Zen 4); fetching the next segment ahead (3 to 6 % of a reading pass on Zen 3,
nothing on Zen 4); fetching the next slot ahead (a third of a reading pass slot by slot of 14 x 14 on Zen 4, less than
walking along memory gains); dx streamed past the caches (as long at 25 MB, a sixth longer at 50 MB and a twelfth less
at 100 MB on Zen 3; 8 GB/s and thread on Zen 4, half of what plain stores do).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import prange

from nbnorm._activation import activate, activation_gradient
from nbnorm._cpu.halves import narrow, widen
from nbnorm._cpu.lanes import fill
from nbnorm._cpu.launch import Twins, balanced, helper, inlined, reduction
from nbnorm._cpu.memory import row
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

# Elements of the neighbouring slots that a task goes through together, as long as there are some tasks for each thread:
# a tenth to two fifths less time than slot by slot (benchmarks/choices.py; AMD EPYC, Zen 4, two cores, 1 MB of
# second-level and 32 MB of last-level cache).
TOGETHER = 1 << 19
TASKS = 4


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
    slots: int  # neighbours that one task goes through together


@lru_cache(maxsize=4096)
def geometry(view: View, threads: int, masked: bool = False) -> np.ndarray:
    """Return the `Cut` of a view as an array, the cheapest way to hand a kernel many integers.

    A mask makes no difference here, and ``slots`` none for the bits of a result.
    """
    rows, cols = (1, CHUNK) if view.inner > CHUNK else (max(1, CHUNK // view.inner), view.inner)
    chunks = -(-view.outer // rows) * -(-view.inner // cols)
    rule = (view.period, view.width, view.run)
    slots = together(view, threads) if view.outer > 1 else 1
    return np.array(Cut(view.outer, view.group, view.inner, *rule, rows, cols, chunks, slots))


def together(view: View, threads: int) -> int:
    """Return how many neighbouring slots a task should go through, such that equal tasks remain for all threads."""
    slots = min(TOGETHER // max(view.outer * view.inner, 1), view.group // (TASKS * threads))
    while slots > 1 and -(-view.group // (slots * threads)) * slots * threads > 1.05 * view.group:
        slots -= 1
    return max(1, slots)


@lru_cache(maxsize=4096)
def fused(view: View, threads: int, masked: bool = False) -> bool:
    """Whether whole slots keep the threads busy."""
    cut = Cut(*geometry(view, threads))
    return balanced(-(-cut.group // cut.slots), threads)


@helper
def unpack(g):
    """Name the integers of a geometry."""
    return Cut(g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9])


@helper
def block(index, outer, inner, rows, cols):
    """First row, rows, first column and columns of a block of an outer x inner plane."""
    across = -(-inner // cols)
    r, c = index // across * rows, index % across * cols
    return r, min(rows, outer - r), c, min(cols, inner - c)


@helper
def chunk_moments(g, x, weights, slot, slots, chunk, moments):
    """Count, mean and m2 of one chunk of each of some neighbouring slots: its tiles merged in order.

    The walk is along memory, so that all slots take part in turn.
    """
    cut = unpack(g)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    if weights is not None:
        for k in range(slot, slot + slots):
            own = moments[k * cut.chunks + chunk]
            slot_weights = entry(weights, k // cut.period)
            own[0], own[1], own[2] = counted_chunk_moments(cut, x, slot_weights, k, r0, rows, c0, cols)
        return
    for k in range(slot, slot + slots):
        fill(moments[k * cut.chunks + chunk], 0.0)
    tile_rows, tile_cols = max(1, min(rows, TILE // cols)), min(cols, TILE)
    stride = cut.group * cut.inner
    for r in range(0, rows, tile_rows):
        height = min(tile_rows, rows - r)
        for k in range(slot, slot + slots):
            first, own = ((r0 + r) * cut.group + k) * cut.inner + c0, moments[k * cut.chunks + chunk]
            n, mean, m2, rest = own[0], own[1], own[2], own[3]
            for c in range(0, cols, tile_cols):
                width = min(tile_cols, cols - c)
                tile_n, tile_mean, tile_m2 = tile_moments(x, None, first + c, stride, height, width)
                n, mean, m2, rest = accumulate(n, mean, m2, rest, tile_n, tile_mean, tile_m2)
            own[0], own[1], own[2], own[3] = n, mean, m2, rest
    for k in range(slot, slot + slots):
        own = moments[k * cut.chunks + chunk]
        own[2] = settled(own[2], own[3])


@helper
def counted_chunk_moments(cut, x, weights, slot, r0, rows, c0, cols):
    """`chunk_moments` of one slot with the weights of its positions: a segment of a run at a time."""
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
def slot_moments(g, slot, moments):
    """Merge the chunks of a slot, in order: count, mean and m2."""
    chunks = unpack(g).chunks
    n = mean = m2 = rest = 0.0
    for i in range(slot * chunks, (slot + 1) * chunks):
        n, mean, m2, rest = accumulate(n, mean, m2, rest, moments[i, 0], moments[i, 1], moments[i, 2])
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
    """Normalize neighbours that share their coefficients."""
    own_residual = part(residual, first, n)
    apply_segment(row(x, first, n), row(y, first, n), own_residual, mean_hi, scale, shift, activation)


@helper
def apply_chunk(g, x, y, slot, slots, chunk, mean, rstd, weight, bias, residual, activation):
    """Normalize one chunk of each of some slots, run by run."""
    cut = unpack(g)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    first_run, end_run = runs(c0, cols, cut.run)
    for j in range(first_run, end_run):
        start, n = bounds(cut, j, c0, cols)
        for r in range(r0, r0 + rows):
            for k in range(slot, slot + slots):
                mean_hi, scale, shift = run_affine(cut, x, k, j, mean[k], rstd[k], weight, bias)
                first = (r * cut.group + k) * cut.inner + start
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
def chunk_grad_sums(
    g, x, dy, slot, slots, chunk, mean, rstd, weight, bias, residual, activation, weights, sums
):
    """Sums of dz and of dz * x_hat over one chunk of each of some slots, by run: total, rest, of each.

    The walk is that of `chunk_moments`.
    """
    cut = unpack(g)
    own_room = room((2, PIECE), x, weights, activation)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    first_run, end_run = runs(c0, cols, cut.run)
    for j in range(first_run, end_run):
        start, size = bounds(cut, j, c0, cols)
        for r in range(r0, r0 + rows):
            for k in range(slot, slot + slots):
                mean_hi, hat_scale, _ = affine(mean[k], rstd[k], 1.0, 0.0, x)
                _, scale, shift = run_affine(cut, x, k, j, mean[k], rstd[k], weight, bias)
                slot_weights, own = entry(weights, k // cut.period), sums[k * cut.chunks + chunk]
                a, a_rest, b, b_rest = own[0, j], own[1, j], own[2, j], own[3, j]
                base = (r * cut.group + k) * cut.inner
                for i in range(start, start + size, piece(x)):
                    first, n = base + i, min(piece(x), start + size - i)
                    x_piece, dz_piece = summands(
                        row(x, first, n), row(dy, first, n), part(residual, first, n),
                        positions(slot_weights, cut, r, j, i, n), mean_hi, scale, shift, activation, own_room,
                    )  # fmt: skip
                    piece_a, piece_b = piece_grad_sums(x_piece, dz_piece, mean_hi, hat_scale)
                    a, a_rest = add(a, a_rest, piece_a)
                    b, b_rest = add(b, b_rest, piece_b)
                own[0, j], own[1, j], own[2, j], own[3, j] = a, a_rest, b, b_rest
        for k in range(slot, slot + slots):
            own = sums[k * cut.chunks + chunk]
            mean_hi, _, _ = affine(mean[k], rstd[k], 1.0, 0.0, x)
            a = settled(own[0, j], own[1, j])
            b = recentered(settled(own[2, j], own[3, j]), a, mean[k], mean_hi, rstd[k])
            own[0, j], own[1, j], own[2, j], own[3, j] = a, 0.0, b, 0.0


@helper
def slot_sums(g, slot, sums, sum_dz, sum_dz_x_hat):
    """Add up the chunks of a slot, in order, with what rounding leaves out."""
    chunks, top = unpack(g).chunks, sums[slot * unpack(g).chunks]
    for i in range(slot * chunks + 1, (slot + 1) * chunks):
        add_rows(top[0], top[1], sums[i, 0])
        add_rows(top[2], top[3], sums[i, 2])
    for j in range(top.shape[1]):
        sum_dz[slot, j] = settled(top[0, j], top[1, j])
        sum_dz_x_hat[slot, j] = settled(top[2, j], top[3, j])


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
    """Dx of ``n`` neighbours of one run, by its terms."""
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
    g,
    x,
    dy,
    dx,
    dresidual,
    slot,
    slots,
    chunk,
    mean,
    rstd,
    weight,
    bias,
    residual,
    activation,
    weights,
    terms,
):
    """Dx of one chunk of each of some slots, run by run."""
    cut = unpack(g)
    r0, rows, c0, cols = block(chunk, cut.outer, cut.inner, cut.rows, cut.cols)
    first_run, end_run = runs(c0, cols, cut.run)
    for j in range(first_run, end_run):
        start, n = bounds(cut, j, c0, cols)
        for r in range(r0, r0 + rows):
            for k in range(slot, slot + slots):
                slot_weights = entry(weights, k // cut.period)
                own = run_terms(cut, x, k, j, mean[k], rstd[k], weight, bias, terms[k])
                i = (r * cut.group + k) * cut.inner + start
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


@helper
def neighbours(g, task):
    """First slot, number of slots and chunk of a task of a reading pass."""
    cut = unpack(g)
    slot = task // cut.chunks * cut.slots
    return slot, min(cut.slots, cut.group - slot), task % cut.chunks


@Twins
def moments_kernel(g, x, weights, mean, m2):
    """One chunk of some slots per task, then the chunks of each slot in order; reads x once."""
    cut = unpack(g)
    moments = np.empty((cut.group * cut.chunks, 4))
    for task in prange(-(-cut.group // cut.slots) * cut.chunks):
        slot, slots, chunk = neighbours(g, task)
        chunk_moments(g, x, weights, slot, slots, chunk, moments)
    for slot in range(cut.group):
        _, mean[slot], m2[slot] = slot_moments(g, slot, moments)


@Twins
def apply_kernel(g, x, y, mean, rstd, weight, bias, residual, activation):
    """One stretch of memory per task; reads x and writes y once."""
    for task in prange(stretches(g)):
        apply_stretch(g, x, y, task, mean, rstd, weight, bias, residual, activation)


@Twins
def forward_kernel(g, x, y, weight, bias, residual, activation, weights, eps, mean, m2, rstd):
    """Some slots per task: their moments, then their normalization from cache."""
    cut = unpack(g)
    group, chunks, together = cut.group, cut.chunks, cut.slots
    moments = np.empty((group * chunks, 4))
    for task in prange(-(-group // together)):
        first = task * together
        slots = min(together, group - first)
        for chunk in range(chunks):
            chunk_moments(g, x, weights, first, slots, chunk, moments)
        for slot in range(first, first + slots):
            n, mean[slot], m2[slot] = slot_moments(g, slot, moments)
            rstd[slot] = reciprocal_std(m2[slot], n, eps)
        for chunk in range(chunks):
            apply_chunk(g, x, y, first, slots, chunk, mean, rstd, weight, bias, residual, activation)


@Twins
def grad_sums_kernel(
    g, x, dy, mean, rstd, weight, bias, residual, activation, weights, sum_dz, sum_dz_x_hat
):  # fmt: skip
    """One chunk of some slots per task, then the chunks of each slot in order; reads x and dy once."""
    cut = unpack(g)
    sums = np.zeros((cut.group * cut.chunks, 4, cut.width))
    for task in prange(-(-cut.group // cut.slots) * cut.chunks):
        slot, slots, chunk = neighbours(g, task)
        chunk_grad_sums(
            g, x, dy, slot, slots, chunk, mean, rstd, weight, bias, residual, activation, weights, sums
        )
    for slot in range(cut.group):
        slot_sums(g, slot, sums, sum_dz, sum_dz_x_hat)


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
    """Some slots per task: their sums, then their dx from cache."""
    cut = unpack(g)
    group, chunks, together = cut.group, cut.chunks, cut.slots
    sums, terms = np.zeros((group * chunks, 4, cut.width)), np.empty((group, 5))
    for task in prange(-(-group // together)):
        first = task * together
        slots = min(together, group - first)
        for chunk in range(chunks):
            chunk_grad_sums(
                g, x, dy, first, slots, chunk, mean, rstd, weight, bias, residual, activation, weights, sums
            )
        for k in range(first, first + slots):
            slot_sums(g, k, sums, sum_dz, sum_dz_x_hat)
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
                False,
                terms[k],
            )
        for chunk in range(chunks):
            input_grad_chunk(
                g, x, dy, dx, dresidual, first, slots, chunk, mean, rstd, weight, bias, residual, activation,
                weights, terms,
            )  # fmt: skip
