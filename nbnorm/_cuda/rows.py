"""Slots that fit on chip: a team reads a slot into registers once and finishes it there.

For rows of layer and RMS norm, planes of instance and group norm, small channels of batch norm. Bytes per element:
forward 1 read + 1 write, backward 2 reads + 1 write. The gradients of parameters that run across rows are summed by
the threads that hold their columns, band by band of rows, and the bands are added in order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from nbnorm._cuda.collective import SHARED, WARP, cluster_of, sync, team_sums, warp_sum
from nbnorm._cuda.memory import BLOCK, FLOAT32, FLOAT64, change, device, get, load, put, real, store
from nbnorm._cuda.memory import kernel as compiled
from nbnorm._cuda.pieces import (
    ABSENT,
    ELEMENT,
    RUN,
    SLOT,
    Build,
    activation_of,
    before_activation,
    coefficients_of,
    mask_reader,
    moments_of,
    parameters_of,
    places_of,
    reader,
    vectors,
)
from nbnorm._math import (
    gradient_terms,
    input_gradient,
    merge,
    normalize,
    recentered,
    reciprocal_std,
    rounded,
    standardize,
)


@lru_cache(maxsize=256)
def forward_kernel(b: Build, writes: bool) -> Any:
    """Statistics of a slot per team, and its normalization unless only they are wanted."""
    first_place, next_place = places_of(b.whole, b.stride)
    read = reader(b.kind, b.width, b.steps, b.whole, b.stride)
    read_mask = mask_reader(b.kind, b.width, b.steps, b.stride, b.rule)
    moments = moments_of(b)
    coefficients = coefficients_of(b.kind, b.rule, b.weight, b.bias)
    read_weight, read_bias = (parameters_of(b.kind, b.width, b.rule, p) for p in (b.weight, b.bias))
    z_of = before_activation(b.rule, b.weight != ABSENT, b.bias != ABSENT, b.has_residual)
    activated, _ = activation_of(b.activation, b.kind)
    number, span, team, width, steps, kind = real(b.kind), b.span, b.team, b.width, b.steps, b.kind
    has_residual, has_mask, centered, blocks = b.has_residual, b.has_mask, b.centered, b.blocks
    residual_span = width if has_residual else 1
    mask_span = span if has_mask else 1
    parameter_span = 1 if b.rule == SLOT else width
    room = SHARED if b.warps > 1 else 1
    apart = b.activation is not None and b.activation[0] == "silu"  # long enough to have a walk of its own

    def kernel(
        x, y, weight, bias, residual, mask, mean, m2, rstd, eps, slots, values, length, pitch, jump, turn, period,
        per_slot, run, positions,
    ):  # fmt: skip
        cluster_of(blocks)
        thread = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) % team
        slot = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) // team
        shared = cuda.shared.array(room, np.float64)
        if slot < slots:
            held = cuda.local.array(span, number)
            weights = cuda.local.array(mask_span, number)
            added = cuda.local.array(residual_span, number)
            w = cuda.local.array(parameter_span, number)
            shift_by = cuda.local.array(parameter_span, number)
            parameter = slot % period * per_slot
            valid = vectors(thread, 0, values, team, width)
            position = thread * width
            place, column = first_place(position, slot * length, length, pitch)
            read(held, x, place, column, valid, jump, turn, length, pitch)
            if has_mask:
                read_mask(weights, mask, slot // period * positions, position, valid, run)
            base = number(get(x, slot * length, kind))
            n, slot_mean, slot_m2 = moments(held, weights, valid, base, np.float64(values), shared)
            # The same zero start as where many pieces are merged, so that all routes have the same bits.
            n, slot_mean, slot_m2 = merge(0.0, 0.0, 0.0, n, slot_mean, slot_m2)
            slot_rstd = reciprocal_std(slot_m2, n, eps)
            if thread == 0:
                put(m2, slot, slot_m2, FLOAT64)
                if writes:
                    put(rstd, slot, slot_rstd, FLOAT64)
                if centered:
                    put(mean, slot, slot_mean, FLOAT64)
            if writes:
                mean_hi, scale, shift = coefficients(slot_mean, slot_rstd, weight, bias, parameter, held)
                for k in range(steps):
                    if k < valid:
                        read_weight(w, weight, parameter, column, run)
                        read_bias(shift_by, bias, parameter, column, run)
                        if has_residual:
                            load(added, 0, residual, place, kind, width)
                        for i in range(width):
                            extra = added[i] if has_residual else number(0)
                            z = z_of(held[k * width + i], mean_hi, scale, shift, w, shift_by, extra, i)
                            held[k * width + i] = z if apart else activated(z)
                        if not apart:
                            store(y, place, held, k * width, kind, width)
                    place, column = next_place(place, column, jump, turn, length, pitch)
                if apart:
                    change(held, span, activated)
                    place, column = first_place(position, slot * length, length, pitch)
                    for k in range(steps):
                        if k < valid:
                            store(y, place, held, k * width, kind, width)
                        place, column = next_place(place, column, jump, turn, length, pitch)

    return compiled(max(b.warps * WARP, BLOCK))(kernel)


@device
def leave_sums(parts, piece, dz, dz_x_hat, mean, mean_hi, rstd):
    """Let a warp leave what its threads have summed, x_hat having been relative to the rounded mean."""
    sum_dz, sum_dz_x_hat = np.float64(warp_sum(dz)), np.float64(warp_sum(dz_x_hat))
    if cuda.threadIdx.x % WARP == 0:
        put(parts, 2 * piece, sum_dz, FLOAT64)
        put(parts, 2 * piece + 1, recentered(sum_dz_x_hat, sum_dz, mean, mean_hi, rstd), FLOAT64)


@lru_cache(maxsize=256)
def backward_kernel(b: Build, with_parameters: bool, writes_residual: bool) -> Any:
    """Sums and dx of one slot after the other, a band of neighbouring slots per team.

    Where a slot has one parameter, its sums are written as they are. Where every element has its own, each thread
    adds up the columns that it holds over the band. Where a run shares one, it is cut into pieces of one vector of
    each thread of a warp, which leave their sums one by one.
    """
    first_place, next_place = places_of(b.whole, b.stride)
    read = reader(b.kind, b.width, b.steps, b.whole, b.stride)
    read_mask = mask_reader(b.kind, b.width, 1, b.stride, b.rule)
    coefficients = coefficients_of(b.kind, b.rule, b.weight, b.bias)
    read_weight, read_bias = (parameters_of(b.kind, b.width, b.rule, p) for p in (b.weight, b.bias))
    z_of = before_activation(b.rule, b.weight != ABSENT, b.bias != ABSENT, b.has_residual)
    _, gradient = activation_of(b.activation, b.kind)
    number, span, team, width, steps, kind = real(b.kind), b.span, b.team, b.width, b.steps, b.kind
    warps, blocks, has_residual, has_mask, centered, needs_z = (
        b.warps, b.blocks, b.has_residual, b.has_mask, b.centered, b.needs_z,
    )  # fmt: skip
    slot_weight = b.weight if b.rule == SLOT else ABSENT
    own_weight = b.rule != SLOT and b.weight != ABSENT
    across, by_run = with_parameters and b.rule == ELEMENT, with_parameters and b.rule == RUN
    sums_span = span if across else 1
    residual_span = width if has_residual else 1
    mask_span = width if has_mask else 1
    parameter_span = 1 if b.rule == SLOT else width
    room = SHARED if b.warps > 1 else 1
    sums_kind = FLOAT64 if kind == FLOAT64 else FLOAT32

    def kernel(
        x, dy, dx, dresidual, weight, bias, residual, mask, mean, rstd, sum_dz, sum_dz_x_hat, parts, counts, count,
        bands, band, slots, values, length, pitch, jump, turn, period, per_slot, run, positions,
    ):  # fmt: skip
        cluster_of(blocks)
        thread = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) % team
        index = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) // team
        shared = cuda.shared.array(room, np.float64)
        if index < bands * period:
            held = cuda.local.array(span, number)
            incoming = cuda.local.array(span, number)
            column_dz = cuda.local.array(sums_span, number)
            column_dz_x_hat = cuda.local.array(sums_span, number)
            added = cuda.local.array(residual_span, number)
            counted = cuda.local.array(mask_span, number)
            w = cuda.local.array(parameter_span, number)
            shift_by = cuda.local.array(parameter_span, number)
            first = index // period * band * period + index % period
            end = min(first + band * period, slots)
            parameter = index % period * per_slot
            valid = vectors(thread, 0, values, team, width)
            if across:
                for i in range(span):
                    column_dz[i] = number(0)
                    column_dz_x_hat[i] = number(0)
            for slot in range(first, end, period):
                slot_mean = get(mean, slot, FLOAT64) if centered else 0.0
                slot_rstd = get(rstd, slot, FLOAT64)
                mean_hi, scale, shift = coefficients(slot_mean, slot_rstd, weight, bias, parameter, held)
                narrow_rstd = rounded(slot_rstd, held)
                start, column = first_place(thread * width, slot * length, length, pitch)
                read(held, x, start, column, valid, jump, turn, length, pitch)
                read(incoming, dy, start, column, valid, jump, turn, length, pitch)
                a, c = number(0), number(0)
                place = start
                for k in range(steps):
                    if k < valid:
                        piece_dz, piece_dz_x_hat = number(0), number(0)
                        if own_weight:
                            read_weight(w, weight, parameter, column, run)
                        if needs_z:
                            read_bias(shift_by, bias, parameter, column, run)
                            if has_residual:
                                load(added, 0, residual, place, kind, width)
                        for i in range(width):
                            j = k * width + i
                            value, dz = held[j], incoming[j]
                            if needs_z:
                                extra = added[i] if has_residual else number(0)
                                dz = gradient(dz, z_of(value, mean_hi, scale, shift, w, shift_by, extra, i))
                                incoming[j] = dz
                            if across:
                                column_dz[j] += dz
                                column_dz_x_hat[j] += dz * normalize(value, mean_hi, scale, shift)
                            held[j] = standardize(value, mean_hi, narrow_rstd)
                            if by_run:
                                piece_dz += dz
                                piece_dz_x_hat += dz * held[j]
                            if own_weight:
                                dz *= w[i]
                            a += dz
                            c += dz * held[j]
                        if by_run:
                            piece = (slot * values + (thread + k * team) * width) // (WARP * width)
                            leave_sums(
                                parts,
                                piece,
                                piece_dz,
                                piece_dz_x_hat,
                                slot_mean,
                                np.float64(mean_hi),
                                slot_rstd,
                            )
                        if writes_residual:
                            store(dresidual, place, incoming, k * width, kind, width)
                    place, column = next_place(place, column, jump, turn, length, pitch)
                sum_g, sum_g_x_hat = team_sums(a, c, shared, warps, blocks)
                sum_g_x_hat = recentered(sum_g_x_hat, sum_g, slot_mean, np.float64(mean_hi), slot_rstd)
                if thread == 0 and with_parameters and not (across or by_run):
                    put(sum_dz, slot, sum_g, FLOAT64)
                    put(sum_dz_x_hat, slot, sum_g_x_hat, FLOAT64)
                n = count
                if has_mask:
                    n = get(counts, slot // period, FLOAT64)
                factor_weight = 1.0
                if slot_weight != ABSENT:
                    factor_weight = get(weight, parameter, slot_weight)
                slope, offset, factor = gradient_terms(
                    slot_mean, slot_rstd, factor_weight * sum_g, factor_weight * sum_g_x_hat, n, centered, False,
                    has_mask, held,
                )  # fmt: skip
                gain = rounded(factor * factor_weight, held)
                place, column = first_place(thread * width, slot * length, length, pitch)
                position = thread * width
                for k in range(steps):
                    if k < valid:
                        if own_weight:
                            read_weight(w, weight, parameter, column, run)
                        if has_mask:
                            read_mask(counted, mask, slot // period * positions, position, 1, run)
                        for i in range(width):
                            j = k * width + i
                            dz = incoming[j]
                            if own_weight:
                                dz *= w[i]
                            m, o = slope, offset
                            if has_mask:
                                m *= counted[i]
                                o *= counted[i]
                            incoming[j] = input_gradient(dz, held[j], m, o, gain)
                        store(dx, place, incoming, k * width, kind, width)
                    position += team * width
                    place, column = next_place(place, column, jump, turn, length, pitch)
            if across:
                for k in range(steps):
                    if k < valid:
                        place = 2 * index * values + (thread + k * team) * width
                        store(parts, place, column_dz, k * width, sums_kind, width)
                        store(parts, place + values, column_dz_x_hat, k * width, sums_kind, width)

    return compiled(max(b.warps * WARP, BLOCK))(kernel)


# Rows of a band at most: as many terms of a parameter's sum meet in the array's own type.
BAND_ROWS = 32


@lru_cache(maxsize=64)
def parameter_sums_kernel(b: Build) -> Any:
    """Sums of dz and of dz * x_hat down the columns of a band of rows; a thread owns ``width`` columns.

    For rows too long for `backward_kernel`; reads x and dy once.
    """
    number, width, kind = real(b.kind), b.width, b.kind
    coefficients = coefficients_of(b.kind, b.rule, b.weight, b.bias)
    read_weight, read_bias = (parameters_of(b.kind, b.width, b.rule, p) for p in (b.weight, b.bias))
    z_of = before_activation(b.rule, b.weight != ABSENT, b.bias != ABSENT, b.has_residual)
    _, gradient = activation_of(b.activation, b.kind)
    has_residual, centered, needs_z = b.has_residual and b.needs_z, b.centered, b.needs_z
    residual_span = width if has_residual else 1
    parameter_span = width if needs_z else 1
    sums_kind = FLOAT64 if kind == FLOAT64 else FLOAT32

    def kernel(
        x, dy, weight, bias, residual, mean, rstd, parts, lane_blocks, bands, band, slots, values, period
    ):
        column = (cuda.blockIdx.x % lane_blocks * cuda.blockDim.x + cuda.threadIdx.x) * width
        index = cuda.blockIdx.x // lane_blocks
        terms = cuda.shared.array((BAND_ROWS, 3), number)
        held = cuda.local.array(width, number)
        incoming = cuda.local.array(width, number)
        added = cuda.local.array(residual_span, number)
        w = cuda.local.array(parameter_span, number)
        shift_by = cuda.local.array(parameter_span, number)
        sum_dz = cuda.local.array(width, number)
        sum_dz_x_hat = cuda.local.array(width, number)
        first = index // period * band * period + index % period
        end = min(first + band * period, slots)
        for i in range(cuda.threadIdx.x, (end - first + period - 1) // period, cuda.blockDim.x):
            slot = first + i * period
            slot_mean = get(mean, slot, FLOAT64) if centered else 0.0
            mean_hi, scale, shift = coefficients(slot_mean, get(rstd, slot, FLOAT64), weight, bias, 0, held)
            terms[i, 0], terms[i, 1], terms[i, 2] = mean_hi, scale, shift
        sync()
        if column < values:
            for i in range(width):
                sum_dz[i], sum_dz_x_hat[i] = number(0), number(0)
            if needs_z:
                read_weight(w, weight, index % period * values, column, 1)
                read_bias(shift_by, bias, index % period * values, column, 1)
            for slot in range(first, end, period):
                row = (slot - first) // period
                load(held, 0, x, slot * values + column, kind, width)
                load(incoming, 0, dy, slot * values + column, kind, width)
                if has_residual:
                    load(added, 0, residual, slot * values + column, kind, width)
                for i in range(width):
                    mean_hi, scale, shift = terms[row, 0], terms[row, 1], terms[row, 2]
                    dz = incoming[i]
                    if needs_z:
                        extra = added[i] if has_residual else number(0)
                        dz = gradient(dz, z_of(held[i], mean_hi, scale, shift, w, shift_by, extra, i))
                    sum_dz[i] += dz
                    sum_dz_x_hat[i] += dz * normalize(held[i], mean_hi, scale, shift)
            store(parts, 2 * index * values + column, sum_dz, 0, sums_kind, width)
            store(parts, 2 * index * values + values + column, sum_dz_x_hat, 0, sums_kind, width)

    return compiled(BLOCK)(kernel)
