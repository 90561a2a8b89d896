"""Walk along segments: a warp takes a chunk of a slot, piece by piece; one kernel per pass.

For slots of any size. The first passes write one partial result per chunk, which `finish` merges in order; the
second ones take the chunks in reverse, since what was read last is still in the second-level cache. Bytes per
element: moments 1 read, apply 1 read + 1 write, grad_sums 2 reads, input_grad 2 reads + 1 write.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from nbnorm._cuda.collective import WARP, team_sums
from nbnorm._cuda.memory import BLOCK, FLOAT64, get, load, put, real, store
from nbnorm._cuda.memory import kernel as compiled
from nbnorm._cuda.pieces import (
    ABSENT,
    ELEMENT,
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
from nbnorm._math import gradient_terms, input_gradient, merge, recentered, rounded, standardize


@lru_cache(maxsize=256)
def moments_kernel(b: Build) -> Any:
    """Count, mean and m2 of every chunk: one warp each."""
    first_place, _ = places_of(b.whole, b.stride)
    read = reader(b.kind, b.width, b.steps, b.whole, b.stride)
    read_mask = mask_reader(b.kind, b.width, b.steps, b.stride, b.rule)
    moments = moments_of(b)
    number, span, team, width, kind, has_mask = real(b.kind), b.span, b.team, b.width, b.kind, b.has_mask
    mask_span = span if has_mask else 1

    def kernel(
        x, mask, parts, chunks, chunk, slots, values, length, pitch, jump, turn, period, run, positions
    ):
        index = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) // WARP
        lane = cuda.threadIdx.x % WARP
        slot = index // chunks
        if slot < slots:
            held = cuda.local.array(span, number)
            weights = cuda.local.array(mask_span, number)
            start = index % chunks * chunk
            end = min(start + chunk, values)
            n, mean, m2 = 0.0, 0.0, 0.0
            for first in range(start, end, team * span):
                valid = vectors(lane, first, end, team, width)
                position = first + lane * width
                place, column = first_place(position, slot * length, length, pitch)
                read(held, x, place, column, valid, jump, turn, length, pitch)
                if has_mask:
                    read_mask(weights, mask, slot // period * positions, position, valid, run)
                base = number(get(x, first_place(first, slot * length, length, pitch)[0], kind))
                size = np.float64(min(end - first, team * span))
                own = moments(held, weights, valid, base, size, held)
                n, mean, m2 = merge(n, mean, m2, own[0], own[1], own[2])
            if lane == 0:
                put(parts, 3 * index, n, FLOAT64)
                put(parts, 3 * index + 1, mean, FLOAT64)
                put(parts, 3 * index + 2, m2, FLOAT64)

    return compiled(BLOCK)(kernel)


@lru_cache(maxsize=256)
def apply_kernel(b: Build) -> Any:
    """Normalize every chunk by given statistics: one warp each."""
    first_place, next_place = places_of(b.whole, b.stride)
    read = reader(b.kind, b.width, b.steps, b.whole, b.stride)
    coefficients = coefficients_of(b.kind, b.rule, b.weight, b.bias)
    read_weight, read_bias = (parameters_of(b.kind, b.width, b.rule, p) for p in (b.weight, b.bias))
    z_of = before_activation(b.rule, b.weight != ABSENT, b.bias != ABSENT, b.has_residual)
    activated, _ = activation_of(b.activation, b.kind)
    number, span, team, width, steps, kind = real(b.kind), b.span, b.team, b.width, b.steps, b.kind
    has_residual, centered, rule = b.has_residual, b.centered, b.rule
    residual_span = width if has_residual else 1
    parameter_span = 1 if rule == SLOT else width

    def kernel(
        x, y, weight, bias, residual, mean, rstd, chunks, chunk, slots, values, length, pitch, jump, turn,
        period, per_slot, run,
    ):  # fmt: skip
        index = slots * chunks - 1 - (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) // WARP
        lane = cuda.threadIdx.x % WARP
        if index >= 0:
            slot = index // chunks
            held = cuda.local.array(span, number)
            added = cuda.local.array(residual_span, number)
            w = cuda.local.array(parameter_span, number)
            shift_by = cuda.local.array(parameter_span, number)
            parameter = slot % period * per_slot
            slot_mean = get(mean, slot, FLOAT64) if centered else 0.0
            mean_hi, scale, shift = coefficients(
                slot_mean, get(rstd, slot, FLOAT64), weight, bias, parameter, held
            )
            start = index % chunks * chunk
            end = min(start + chunk, values)
            for first in range(start, end, team * span):
                valid = vectors(lane, first, end, team, width)
                place, column = first_place(first + lane * width, slot * length, length, pitch)
                read(held, x, place, column, valid, jump, turn, length, pitch)
                for k in range(steps):
                    if k < valid:
                        read_weight(w, weight, parameter, column, run)
                        read_bias(shift_by, bias, parameter, column, run)
                        if has_residual:
                            load(added, 0, residual, place, kind, width)
                        for i in range(width):
                            extra = added[i] if has_residual else number(0)
                            z = z_of(held[k * width + i], mean_hi, scale, shift, w, shift_by, extra, i)
                            held[k * width + i] = activated(z)
                        store(y, place, held, k * width, kind, width)
                    place, column = next_place(place, column, jump, turn, length, pitch)

    return compiled(BLOCK)(kernel)


@lru_cache(maxsize=256)
def grad_sums_kernel(b: Build) -> Any:
    """Sums of dz and of dz * x_hat of every chunk of a *unit*, one warp each.

    A unit is what shares a parameter within a slot: a run, or all of the slot. Where every element has a
    parameter of its own, the unit is the slot and the sums are those of g = dz * weight.
    """
    first_place, next_place = places_of(b.whole, b.stride)
    read = reader(b.kind, b.width, b.steps, b.whole, b.stride)
    coefficients = coefficients_of(b.kind, b.rule, b.weight, b.bias)
    read_weight, read_bias = (parameters_of(b.kind, b.width, b.rule, p) for p in (b.weight, b.bias))
    z_of = before_activation(b.rule, b.weight != ABSENT, b.bias != ABSENT, b.has_residual)
    _, gradient = activation_of(b.activation, b.kind)
    number, span, team, width, steps, kind = real(b.kind), b.span, b.team, b.width, b.steps, b.kind
    has_residual, centered, needs_z = b.has_residual, b.centered, b.needs_z
    times_weight = b.rule == ELEMENT and b.weight != ABSENT
    residual_span = width if has_residual else 1
    parameter_span = width if b.rule == ELEMENT else 1

    def kernel(
        x, dy, weight, bias, residual, mean, rstd, parts, chunks, chunk, units, unit_values, length, pitch, jump,
        turn, period, width_of_slot,
    ):  # fmt: skip
        index = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) // WARP
        lane = cuda.threadIdx.x % WARP
        unit = index // chunks
        if unit < units:
            slot = unit // width_of_slot
            parameter = slot % period * width_of_slot + unit % width_of_slot
            held = cuda.local.array(span, number)
            incoming = cuda.local.array(span, number)
            added = cuda.local.array(residual_span, number)
            w = cuda.local.array(parameter_span, number)
            shift_by = cuda.local.array(parameter_span, number)
            slot_mean = get(mean, slot, FLOAT64) if centered else 0.0
            slot_rstd = get(rstd, slot, FLOAT64)
            mean_hi, scale, shift = coefficients(slot_mean, slot_rstd, weight, bias, parameter, held)
            narrow_rstd = rounded(slot_rstd, held)
            start = index % chunks * chunk
            end = min(start + chunk, unit_values)
            sum_dz, sum_dz_x_hat = 0.0, 0.0
            for first in range(start, end, team * span):
                valid = vectors(lane, first, end, team, width)
                place, column = first_place(first + lane * width, unit * length, length, pitch)
                read(held, x, place, column, valid, jump, turn, length, pitch)
                read(incoming, dy, place, column, valid, jump, turn, length, pitch)
                a, c = number(0), number(0)
                for k in range(steps):
                    if k < valid:
                        if needs_z or times_weight:
                            read_weight(w, weight, parameter, column, length)
                        if needs_z:
                            read_bias(shift_by, bias, parameter, column, length)
                            if has_residual:
                                load(added, 0, residual, place, kind, width)
                        for i in range(width):
                            value, dz = held[k * width + i], incoming[k * width + i]
                            if needs_z:
                                extra = added[i] if has_residual else number(0)
                                dz = gradient(dz, z_of(value, mean_hi, scale, shift, w, shift_by, extra, i))
                            if times_weight:
                                dz *= w[i]
                            a += dz
                            c += dz * standardize(value, mean_hi, narrow_rstd)
                    place, column = next_place(place, column, jump, turn, length, pitch)
                wide_a, wide_c = team_sums(a, c, held, 1, 1)
                sum_dz += wide_a
                sum_dz_x_hat += wide_c
            if lane == 0:
                put(parts, 2 * index, sum_dz, FLOAT64)
                exact = recentered(sum_dz_x_hat, sum_dz, slot_mean, np.float64(mean_hi), slot_rstd)
                put(parts, 2 * index + 1, exact, FLOAT64)

    return compiled(BLOCK)(kernel)


@lru_cache(maxsize=256)
def input_grad_kernel(b: Build, constant: bool, writes_residual: bool) -> Any:
    """Dx (and dresidual = dz) of every chunk for given sums over the slots: one warp each."""
    first_place, next_place = places_of(b.whole, b.stride)
    read = reader(b.kind, b.width, b.steps, b.whole, b.stride)
    read_mask = mask_reader(b.kind, b.width, 1, b.stride, b.rule)
    coefficients = coefficients_of(b.kind, b.rule, b.weight, b.bias)
    read_weight, read_bias = (parameters_of(b.kind, b.width, b.rule, p) for p in (b.weight, b.bias))
    z_of = before_activation(b.rule, b.weight != ABSENT, b.bias != ABSENT, b.has_residual)
    _, gradient = activation_of(b.activation, b.kind)
    number, span, team, width, steps, kind = real(b.kind), b.span, b.team, b.width, b.steps, b.kind
    has_residual, has_mask, centered, needs_z = b.has_residual, b.has_mask, b.centered, b.needs_z
    slot_weight = b.weight if b.rule == SLOT else ABSENT
    own_weight = b.rule != SLOT and b.weight != ABSENT
    residual_span = width if has_residual else 1
    mask_span = width if has_mask else 1
    parameter_span = 1 if b.rule == SLOT else width

    def kernel(
        x, dy, dx, dresidual, weight, bias, residual, mask, mean, rstd, sums, counts, count, chunks, chunk, slots,
        values, length, pitch, jump, turn, period, per_slot, run, positions,
    ):  # fmt: skip
        index = slots * chunks - 1 - (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) // WARP
        lane = cuda.threadIdx.x % WARP
        if index >= 0:
            slot = index // chunks
            held = cuda.local.array(span, number)
            incoming = cuda.local.array(span, number)
            added = cuda.local.array(residual_span, number)
            counted = cuda.local.array(mask_span, number)
            w = cuda.local.array(parameter_span, number)
            shift_by = cuda.local.array(parameter_span, number)
            parameter = slot % period * per_slot
            slot_mean = get(mean, slot, FLOAT64) if centered else 0.0
            slot_rstd = get(rstd, slot, FLOAT64)
            mean_hi, scale, shift = coefficients(slot_mean, slot_rstd, weight, bias, parameter, held)
            narrow_rstd = rounded(slot_rstd, held)
            n, sum_g, sum_g_x_hat = count, 0.0, 0.0
            if has_mask:
                n = get(counts, slot // period, FLOAT64)
            if not constant:
                sum_g, sum_g_x_hat = get(sums, 2 * slot, FLOAT64), get(sums, 2 * slot + 1, FLOAT64)
            slope, offset, factor = gradient_terms(
                slot_mean, slot_rstd, sum_g, sum_g_x_hat, n, centered, constant, has_mask, held
            )
            if slot_weight != ABSENT:
                factor *= get(weight, parameter, slot_weight)
            gain = rounded(factor, held)
            start = index % chunks * chunk
            end = min(start + chunk, values)
            for first in range(start, end, team * span):
                valid = vectors(lane, first, end, team, width)
                position = first + lane * width
                place, column = first_place(position, slot * length, length, pitch)
                if needs_z or not constant:
                    read(held, x, place, column, valid, jump, turn, length, pitch)
                read(incoming, dy, place, column, valid, jump, turn, length, pitch)
                for k in range(steps):
                    if k < valid:
                        read_weight(w, weight, parameter, column, run)
                        if needs_z:
                            read_bias(shift_by, bias, parameter, column, run)
                            if has_residual:
                                load(added, 0, residual, place, kind, width)
                        if has_mask:
                            read_mask(counted, mask, slot // period * positions, position, 1, run)
                        for i in range(width):
                            value, dz = held[k * width + i], incoming[k * width + i]
                            if needs_z:
                                extra = added[i] if has_residual else number(0)
                                dz = gradient(dz, z_of(value, mean_hi, scale, shift, w, shift_by, extra, i))
                            held[k * width + i] = dz
                            if own_weight:
                                dz *= w[i]
                            if constant:
                                incoming[k * width + i] = dz * gain
                            else:
                                x_hat = standardize(value, mean_hi, narrow_rstd)
                                a, c = slope, offset
                                if has_mask:
                                    a *= counted[i]
                                    c *= counted[i]
                                incoming[k * width + i] = input_gradient(dz, x_hat, a, c, gain)
                        if writes_residual:
                            store(dresidual, place, held, k * width, kind, width)
                        store(dx, place, incoming, k * width, kind, width)
                    position += team * width
                    place, column = next_place(place, column, jump, turn, length, pitch)

    return compiled(BLOCK)(kernel)
