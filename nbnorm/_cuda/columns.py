"""Walk down columns: a thread owns ``width`` neighbouring lanes of a chunk of rows.

A block is ``across`` threads wide and the rest of its threads deep; neighbours in depth take neighbouring rows, so
that narrow arrays are read in whole lines too. First passes leave one partial result per lane and chunk, in the order
that `finish` merges them, lanes of a slot side by side. Bytes per element as in `planes`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from nbnorm._cuda.collective import sync
from nbnorm._cuda.memory import BLOCK, FLOAT64, device, get, load, put, real, store
from nbnorm._cuda.memory import kernel as compiled
from nbnorm._cuda.pieces import ABSENT, Build, activation_of
from nbnorm._math import (
    affine,
    gradient_terms,
    input_gradient,
    merge,
    normalize,
    recentered,
    rounded,
    standardize,
)

# Rows whose sums are kept in the array's own type before float64 takes over.
TILE_ROWS = 64
# Rows of which a thread takes the shift of its sums: the first of its tile.
LEADING = 8
# A shifted sum of squares this much larger than m2 has cancelled too many bits.
CANCELLATION = 4.0


@device
def locate(index, lane_blocks, chunks, across, width):
    """Batch entry and chunk of a block, and the first lane of the thread."""
    lane = (index % lane_blocks * across + cuda.threadIdx.x) * width
    return index // (lane_blocks * chunks), index // lane_blocks % chunks, lane


@lru_cache(maxsize=64)
def _mask_weight(number: Any, has_mask: bool) -> Any:
    """Return the function that reads the weight of a lane in a row, 1 without a mask."""
    kind = FLOAT64 if number is np.float64 else 2

    @device
    def weight_of(mask, row_of_mask, r, run, lane):
        return number(get(mask, row_of_mask + r * run + lane % run, kind)) if has_mask else number(1)

    return weight_of


@lru_cache(maxsize=64)
def _careful(kind: int, width: int, has_mask: bool) -> Any:
    """Return the function that takes a tile's moments again, in range of every finite input.

    The mean relative to an element, then squares in units of the largest deviation: three more passes over rows.
    """
    number = real(kind)
    zero, smallest = number(0), number(1e-30 if number is np.float32 else 1e-290)
    mask_weight = _mask_weight(number, has_mask)

    @device
    def careful(
        x, mask, row_of_mask, run, lane, base, first, end, stride, row, counted, shift, top, total, squares
    ):
        held = cuda.local.array(width, number)
        for i in range(width):
            counted[i], shift[i], top[i], total[i], squares[i] = zero, zero, smallest, zero, zero
        for r in range(first, end, stride):
            load(held, 0, x, base + r * row, kind, width)
            for i in range(width):
                w = mask_weight(mask, row_of_mask, r, run, lane + i)
                if w > zero:
                    if counted[i] == zero:
                        shift[i] = held[i]
                    counted[i] += w
                    total[i] += w * (held[i] - shift[i])
        for i in range(width):
            if counted[i] > zero:
                shift[i] += total[i] / counted[i]
            total[i] = zero
        for r in range(first, end, stride):
            load(held, 0, x, base + r * row, kind, width)
            for i in range(width):
                if mask_weight(mask, row_of_mask, r, run, lane + i) > zero:
                    top[i] = max(top[i], abs(held[i] - shift[i]))
        for r in range(first, end, stride):
            load(held, 0, x, base + r * row, kind, width)
            for i in range(width):
                w = mask_weight(mask, row_of_mask, r, run, lane + i)
                if w > zero:
                    d = (held[i] - shift[i]) / top[i]
                    total[i] += w * d
                    squares[i] += w * d * d

    return careful


@device
def _corrected(shift, total, squares, n, unit):
    """Mean and m2 from the sums about a shift, in units of ``unit``."""
    if not n > 0.0:
        return 0.0, 0.0
    correction = total / n
    m2 = (squares - total * correction) * unit * unit
    return shift + correction * unit, 0.0 if m2 < 0.0 else m2


@lru_cache(maxsize=64)
def moments_kernel(b: Build) -> Any:
    """Count, mean and m2 of the lanes of every chunk."""
    number, width, kind, has_mask = real(b.kind), b.width, b.kind, b.has_mask
    zero = number(0)
    tiny = 1e-25 if number is np.float32 else 1e-280
    mask_weight = _mask_weight(number, has_mask)
    careful = _careful(b.kind, width, has_mask)

    def kernel(x, mask, parts, lane_blocks, chunks, chunk, lanes, rows, group, inner, period, run, positions):
        batch, part, lane = locate(cuda.blockIdx.x, lane_blocks, chunks, cuda.blockDim.x, width)
        depth, deep = cuda.threadIdx.y, cuda.blockDim.y
        shared = cuda.shared.array((BLOCK, 3), np.float64)
        held = cuda.local.array(width, number)
        shift = cuda.local.array(width, number)
        total = cuda.local.array(width, number)
        squares = cuda.local.array(width, number)
        counted = cuda.local.array(width, number)
        trusted = cuda.local.array(width, number)
        top = cuda.local.array(width, number)
        n = cuda.local.array(width, np.float64)
        mean = cuda.local.array(width, np.float64)
        m2 = cuda.local.array(width, np.float64)
        for i in range(width):
            n[i], mean[i], m2[i] = 0.0, 0.0, 0.0
        row_of_mask = batch * group // period * positions
        base = batch * rows * lanes + lane
        end = min((part + 1) * chunk, rows)
        for first in range(part * chunk + depth, end if lane < lanes else 0, TILE_ROWS * deep):
            last = min(first + TILE_ROWS * deep, end)
            leading = min(first + LEADING * deep, last)
            load(shift, 0, x, base + first * lanes, kind, width)
            for i in range(width):
                total[i] = zero
            for r in range(first + deep, leading, deep):
                load(held, 0, x, base + r * lanes, kind, width)
                for i in range(width):
                    total[i] += held[i] - shift[i]
            leaders = number((leading - first + deep - 1) // deep)
            for i in range(width):
                shift[i] += total[i] / leaders
                total[i], squares[i], counted[i] = zero, zero, zero
            for r in range(first, last, deep):
                load(held, 0, x, base + r * lanes, kind, width)
                for i in range(width):
                    d = held[i] - shift[i]
                    if has_mask:
                        w = mask_weight(mask, row_of_mask, r, run, lane + i)
                        counted[i] += w
                        d = d if w > zero else zero
                        total[i] += w * d
                        squares[i] += w * d * d
                    else:
                        total[i] += d
                        squares[i] += d * d
            size = np.float64((last - first + deep - 1) // deep)
            suspect = False
            for i in range(width):
                own_n = np.float64(counted[i]) if has_mask else size
                wide_squares = np.float64(squares[i])
                own_mean, own_m2 = _corrected(
                    np.float64(shift[i]), np.float64(total[i]), wide_squares, own_n, 1.0
                )
                fine = tiny <= wide_squares < np.inf and CANCELLATION * own_m2 >= wide_squares
                trusted[i] = number(1) if fine else zero
                if fine:
                    n[i], mean[i], m2[i] = merge(n[i], mean[i], m2[i], own_n, own_mean, own_m2)
                else:
                    suspect = True
            if suspect:
                careful(
                    x, mask, row_of_mask, run, lane, base, first, last, deep, lanes, counted, shift, top, total,
                    squares,
                )  # fmt: skip
                for i in range(width):
                    if trusted[i] == zero:
                        own_n = np.float64(counted[i])
                        own_mean, own_m2 = _corrected(
                            np.float64(shift[i]), np.float64(total[i]), np.float64(squares[i]), own_n,
                            np.float64(top[i]),
                        )  # fmt: skip
                        n[i], mean[i], m2[i] = merge(n[i], mean[i], m2[i], own_n, own_mean, own_m2)
        thread = depth * cuda.blockDim.x + cuda.threadIdx.x
        for i in range(width):
            sync()
            shared[thread, 0], shared[thread, 1], shared[thread, 2] = n[i], mean[i], m2[i]
            below = deep // 2
            while below:
                sync()
                if depth < below:
                    other = thread + below * cuda.blockDim.x
                    shared[thread, 0], shared[thread, 1], shared[thread, 2] = merge(
                        shared[thread, 0], shared[thread, 1], shared[thread, 2],
                        shared[other, 0], shared[other, 1], shared[other, 2],
                    )  # fmt: skip
                below //= 2
            if depth == 0 and lane < lanes:
                at = 3 * ((batch * lanes + lane + i) * chunks + part)
                for j in range(3):
                    put(parts, at + j, shared[thread, j], FLOAT64)

    return compiled(BLOCK)(kernel)


@lru_cache(maxsize=64)
def _lane_terms(number: Any, weight_kind: int, bias_kind: int, centered: bool) -> Any:
    """Return the function that gives slot, parameter, mean, rstd, weight and bias of a lane."""

    @device
    def terms(lane, batch, group, inner, period, run, mean, rstd, weight, bias):
        slot = batch * group + lane // inner
        parameter = slot % period * (inner // run) + lane % inner // run
        slot_mean = get(mean, slot, FLOAT64) if centered else 0.0
        w = get(weight, parameter, weight_kind) if weight_kind != ABSENT else 1.0
        b = get(bias, parameter, bias_kind) if bias_kind != ABSENT else 0.0
        return slot, slot_mean, get(rstd, slot, FLOAT64), w, b

    return terms


@lru_cache(maxsize=64)
def apply_kernel(b: Build) -> Any:
    """Normalize the lanes of every chunk by given statistics."""
    number, width, kind, has_residual = real(b.kind), b.width, b.kind, b.has_residual
    activated, _ = activation_of(b.activation, b.kind)
    terms = _lane_terms(number, b.weight, b.bias, b.centered)
    residual_span = width if has_residual else 1

    def kernel(
        x, y, weight, bias, residual, mean, rstd, lane_blocks, chunks, chunk, lanes, rows, group, inner, period, run,
        blocks,
    ):  # fmt: skip
        index = blocks - 1 - cuda.blockIdx.x
        batch, part, lane = locate(index, lane_blocks, chunks, cuda.blockDim.x, width)
        held = cuda.local.array(width, number)
        added = cuda.local.array(residual_span, number)
        mean_hi = cuda.local.array(width, number)
        scale = cuda.local.array(width, number)
        shift = cuda.local.array(width, number)
        if lane < lanes:
            for i in range(width):
                _, m, s, w, c = terms(lane + i, batch, group, inner, period, run, mean, rstd, weight, bias)
                mean_hi[i], scale[i], shift[i] = affine(m, s, w, c, held)
            for r in range(part * chunk + cuda.threadIdx.y, min((part + 1) * chunk, rows), cuda.blockDim.y):
                at = (batch * rows + r) * lanes + lane
                load(held, 0, x, at, kind, width)
                if has_residual:
                    load(added, 0, residual, at, kind, width)
                for i in range(width):
                    z = normalize(held[i], mean_hi[i], scale[i], shift[i])
                    if has_residual:
                        z += added[i]
                    held[i] = activated(z)
                store(y, at, held, 0, kind, width)

    return compiled(BLOCK)(kernel)


@lru_cache(maxsize=64)
def _dz(b: Build) -> Any:
    """Return the function that gives dz of one element."""
    number, needs_z, has_residual = real(b.kind), b.needs_z, b.has_residual
    _, gradient = activation_of(b.activation, b.kind)

    @device
    def dz_of(dy, value, mean_hi, scale, shift, added, i):
        if needs_z:
            z = normalize(value, mean_hi, scale, shift)
            if has_residual:
                z += added[i]
            return gradient(dy, z)
        return number(dy)

    return dz_of


@lru_cache(maxsize=64)
def grad_sums_kernel(b: Build) -> Any:
    """Sums of dz and of dz * x_hat of the lanes of every chunk."""
    number, width, kind = real(b.kind), b.width, b.kind
    zero = number(0)
    has_residual, needs_z = b.has_residual and b.needs_z, b.needs_z
    terms, dz_of = _lane_terms(number, b.weight, b.bias, b.centered), _dz(b)
    residual_span = width if has_residual else 1
    z_span = width if needs_z else 1

    def kernel(
        x, dy, weight, bias, residual, mean, rstd, parts, lane_blocks, chunks, chunk, lanes, rows, group, inner,
        period, run,
    ):  # fmt: skip
        batch, part, lane = locate(cuda.blockIdx.x, lane_blocks, chunks, cuda.blockDim.x, width)
        depth, deep = cuda.threadIdx.y, cuda.blockDim.y
        shared = cuda.shared.array((BLOCK, 2), np.float64)
        held = cuda.local.array(width, number)
        incoming = cuda.local.array(width, number)
        added = cuda.local.array(residual_span, number)
        mean_hi = cuda.local.array(width, number)
        narrow_rstd = cuda.local.array(width, number)
        scale = cuda.local.array(z_span, number)
        shift = cuda.local.array(z_span, number)
        sum_dz = cuda.local.array(width, number)
        sum_dz_x_hat = cuda.local.array(width, number)
        wide_dz = cuda.local.array(width, np.float64)
        wide_dz_x_hat = cuda.local.array(width, np.float64)
        end = min((part + 1) * chunk, rows) if lane < lanes else 0
        for i in range(width):
            wide_dz[i], wide_dz_x_hat[i], mean_hi[i], narrow_rstd[i] = 0.0, 0.0, zero, zero
            if lane < lanes:
                _, m, s, w, c = terms(lane + i, batch, group, inner, period, run, mean, rstd, weight, bias)
                mean_hi[i], narrow_rstd[i] = rounded(m, held), rounded(s, held)
                if needs_z:
                    _, scale[i], shift[i] = affine(m, s, w, c, held)
        for first in range(part * chunk + depth, end, TILE_ROWS * deep):
            for i in range(width):
                sum_dz[i], sum_dz_x_hat[i] = zero, zero
            for r in range(first, min(first + TILE_ROWS * deep, end), deep):
                at = (batch * rows + r) * lanes + lane
                load(held, 0, x, at, kind, width)
                load(incoming, 0, dy, at, kind, width)
                if has_residual:
                    load(added, 0, residual, at, kind, width)
                for i in range(width):
                    j = i if needs_z else 0
                    dz = dz_of(incoming[i], held[i], mean_hi[i], scale[j], shift[j], added, i)
                    sum_dz[i] += dz
                    sum_dz_x_hat[i] += dz * standardize(held[i], mean_hi[i], narrow_rstd[i])
            for i in range(width):
                wide_dz[i] += np.float64(sum_dz[i])
                wide_dz_x_hat[i] += np.float64(sum_dz_x_hat[i])
        thread = depth * cuda.blockDim.x + cuda.threadIdx.x
        for i in range(width):
            sync()
            shared[thread, 0], shared[thread, 1] = wide_dz[i], wide_dz_x_hat[i]
            below = deep // 2
            while below:
                sync()
                if depth < below:
                    other = thread + below * cuda.blockDim.x
                    shared[thread, 0] += shared[other, 0]
                    shared[thread, 1] += shared[other, 1]
                below //= 2
            if depth == 0 and lane < lanes:
                _, m, s, _, _ = terms(lane + i, batch, group, inner, period, run, mean, rstd, weight, bias)
                at = 2 * ((batch * lanes + lane + i) * chunks + part)
                put(parts, at, shared[thread, 0], FLOAT64)
                exact = recentered(shared[thread, 1], shared[thread, 0], m, np.float64(mean_hi[i]), s)
                put(parts, at + 1, exact, FLOAT64)

    return compiled(BLOCK)(kernel)


@lru_cache(maxsize=64)
def input_grad_kernel(b: Build, constant: bool, writes_residual: bool) -> Any:
    """Dx (and dresidual = dz) of the lanes of every chunk for given sums over the slots."""
    number, width, kind = real(b.kind), b.width, b.kind
    has_residual, has_mask, needs_z, centered = (
        b.has_residual and b.needs_z, b.has_mask, b.needs_z, b.centered,
    )  # fmt: skip
    reads_x = needs_z or not constant
    terms, dz_of = _lane_terms(number, b.weight, b.bias, centered), _dz(b)
    mask_weight = _mask_weight(number, has_mask)
    residual_span = width if has_residual else 1
    z_span = width if needs_z else 1

    def kernel(
        x, dy, dx, dresidual, weight, bias, residual, mask, mean, rstd, sums, counts, count, lane_blocks, chunks,
        chunk, lanes, rows, group, inner, period, run, positions, blocks,
    ):  # fmt: skip
        index = blocks - 1 - cuda.blockIdx.x
        batch, part, lane = locate(index, lane_blocks, chunks, cuda.blockDim.x, width)
        held = cuda.local.array(width, number)
        incoming = cuda.local.array(width, number)
        added = cuda.local.array(residual_span, number)
        mean_hi = cuda.local.array(width, number)
        narrow_rstd = cuda.local.array(width, number)
        scale = cuda.local.array(z_span, number)
        shift = cuda.local.array(z_span, number)
        slope = cuda.local.array(width, number)
        offset = cuda.local.array(width, number)
        gain = cuda.local.array(width, number)
        row_of_mask = batch * group // period * positions
        if lane < lanes:
            n = get(counts, batch * group // period, FLOAT64) if has_mask else count
            for i in range(width):
                slot, m, s, w, c = terms(lane + i, batch, group, inner, period, run, mean, rstd, weight, bias)
                mean_hi[i], narrow_rstd[i] = rounded(m, held), rounded(s, held)
                if needs_z:
                    _, scale[i], shift[i] = affine(m, s, w, c, held)
                sum_g, sum_g_x_hat = 0.0, 0.0
                if not constant:
                    sum_g, sum_g_x_hat = get(sums, 2 * slot, FLOAT64), get(sums, 2 * slot + 1, FLOAT64)
                slope[i], offset[i], factor = gradient_terms(
                    m, s, sum_g, sum_g_x_hat, n, centered, constant, has_mask, held
                )
                gain[i] = rounded(factor * w, held)
            for r in range(part * chunk + cuda.threadIdx.y, min((part + 1) * chunk, rows), cuda.blockDim.y):
                at = (batch * rows + r) * lanes + lane
                if reads_x:
                    load(held, 0, x, at, kind, width)
                load(incoming, 0, dy, at, kind, width)
                if has_residual:
                    load(added, 0, residual, at, kind, width)
                for i in range(width):
                    j = i if needs_z else 0
                    dz = dz_of(incoming[i], held[i], mean_hi[i], scale[j], shift[j], added, i)
                    if constant:
                        incoming[i] = dz * gain[i]
                    else:
                        x_hat = standardize(held[i], mean_hi[i], narrow_rstd[i])
                        counted = mask_weight(mask, row_of_mask, r, run, lane + i)
                        a, c = slope[i], offset[i]
                        if has_mask:
                            a *= counted
                            c *= counted
                        incoming[i] = input_gradient(dz, x_hat, a, c, gain[i])
                    held[i] = dz
                if writes_residual:
                    store(dresidual, at, held, 0, kind, width)
                store(dx, at, incoming, 0, kind, width)

    return compiled(BLOCK)(kernel)
