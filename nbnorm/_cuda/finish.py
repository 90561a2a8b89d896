"""Small kernels on statistics: they merge the partial results of the large ones, always in the same order."""

from __future__ import annotations

from functools import lru_cache
from math import isfinite
from typing import Any

import numpy as np
from numba import cuda

from nbnorm._cuda.collective import WARP, from_lane, sync, warp_sum
from nbnorm._cuda.memory import BLOCK, FLOAT64, get, put
from nbnorm._cuda.memory import kernel as compiled
from nbnorm._cuda.pieces import ABSENT
from nbnorm._math import blend, merge, reciprocal_std

# Threads of a block of `fold`: across parameters and down the parts.
FOLD_DEPTH = BLOCK // WARP


@lru_cache(maxsize=8)
def moments_kernel(centered: bool) -> Any:
    """Merge the parts of every slot: a warp each, whose lanes take every so many parts and then meet in pairs."""
    steps = WARP.bit_length() - 1

    def kernel(parts, mean, m2, slots, each):
        slot = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) // WARP
        lane = cuda.threadIdx.x % WARP
        if slot < slots:
            n, slot_mean, slot_m2 = 0.0, 0.0, 0.0
            for i in range(slot * each + lane, (slot + 1) * each, WARP):
                part_n, part_mean = get(parts, 3 * i, FLOAT64), get(parts, 3 * i + 1, FLOAT64)
                n, slot_mean, slot_m2 = merge(
                    n, slot_mean, slot_m2, part_n, part_mean, get(parts, 3 * i + 2, FLOAT64)
                )
            distance = 1
            for _ in range(steps):
                other = lane ^ distance
                other_n = from_lane(n, other)
                other_mean = from_lane(slot_mean, other)
                n, slot_mean, slot_m2 = merge(
                    n, slot_mean, slot_m2, other_n, other_mean, from_lane(slot_m2, other)
                )
                distance *= 2
            if lane == 0:
                put(m2, slot, slot_m2, FLOAT64)
                if centered:
                    put(mean, slot, slot_mean, FLOAT64)

    return compiled(BLOCK)(kernel)


@lru_cache(maxsize=1)
def sums_kernel() -> Any:
    """Add the parts of every unit up: a warp each."""

    def kernel(parts, sum_dz, sum_dz_x_hat, units, each):
        unit = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) // WARP
        lane = cuda.threadIdx.x % WARP
        if unit < units:
            a, c = 0.0, 0.0
            for i in range(unit * each + lane, (unit + 1) * each, WARP):
                a += get(parts, 2 * i, FLOAT64)
                c += get(parts, 2 * i + 1, FLOAT64)
            a, c = warp_sum(a), warp_sum(c)
            if lane == 0:
                put(sum_dz, unit, a, FLOAT64)
                put(sum_dz_x_hat, unit, c, FLOAT64)

    return compiled(BLOCK)(kernel)


@lru_cache(maxsize=8)
def weigh_kernel(weight_kind: int) -> Any:
    """Sums of g and of g * x_hat of every slot from those of dz of its runs, a thread per slot."""

    def kernel(sum_dz, sum_dz_x_hat, weight, sums, slots, period, width):
        slot = cuda.grid(1)
        if slot < slots:
            a, c = 0.0, 0.0
            for j in range(width):
                w = 1.0
                if weight_kind != ABSENT:
                    w = get(weight, slot % period * width + j, weight_kind)
                a += w * get(sum_dz, slot * width + j, FLOAT64)
                c += w * get(sum_dz_x_hat, slot * width + j, FLOAT64)
            put(sums, 2 * slot, a, FLOAT64)
            put(sums, 2 * slot + 1, c, FLOAT64)

    return compiled(BLOCK)(kernel)


@lru_cache(maxsize=8)
def fold_kernel(kind: int) -> Any:
    """Add up the parts of every parameter: ``rows`` of them, ``pitch`` elements apart.

    Parameters lie in runs of ``run``, ``jump`` elements apart, from ``start``.
    """

    def kernel(parts, result, parameters, start, run, jump, rows, pitch):
        shared = cuda.shared.array((FOLD_DEPTH, WARP), np.float64)
        parameter = cuda.blockIdx.x * WARP + cuda.threadIdx.x
        depth = cuda.threadIdx.y
        total = 0.0
        if parameter < parameters:
            first = start + parameter // run * jump + parameter % run
            for r in range(depth, rows, FOLD_DEPTH):
                total += get(parts, first + r * pitch, kind)
        shared[depth, cuda.threadIdx.x] = total
        sync()
        if depth == 0 and parameter < parameters:
            for i in range(1, FOLD_DEPTH):
                total += shared[i, cuda.threadIdx.x]
            put(result, parameter, total, FLOAT64)

    return compiled(BLOCK)(kernel)


@lru_cache(maxsize=2)
def rstd_kernel(counted: bool) -> Any:
    """1 / sqrt(var + eps) of every slot; ``period`` slots share a count."""

    def kernel(m2, counts, count, eps, result, slots, period):
        slot = cuda.grid(1)
        if slot < slots:
            n = get(counts, slot // period, FLOAT64) if counted else count
            put(result, slot, reciprocal_std(get(m2, slot, FLOAT64), n, eps), FLOAT64)

    return compiled(BLOCK)(kernel)


@lru_cache(maxsize=1)
def merge_kernel() -> Any:
    """Merge two sets of moments, slot by slot."""

    def kernel(n_a, mean_a, m2_a, n_b, mean_b, m2_b, mean, m2, slots):
        slot = cuda.grid(1)
        if slot < slots:
            own_mean, own_m2 = get(mean_a, slot, FLOAT64), get(m2_a, slot, FLOAT64)
            other_mean, other_m2 = get(mean_b, slot, FLOAT64), get(m2_b, slot, FLOAT64)
            _, own_mean, own_m2 = merge(n_a, own_mean, own_m2, n_b, other_mean, other_m2)
            put(mean, slot, own_mean, FLOAT64)
            put(m2, slot, own_m2, FLOAT64)

    return compiled(BLOCK)(kernel)


@lru_cache(maxsize=32)
def update_kernel(mean_kind: int, var_kind: int, guard: bool) -> Any:
    """Blend batch statistics into the running ones; with ``guard`` a slot that would not stay finite keeps its own."""
    largest = (np.inf, np.inf, float(np.finfo(np.float32).max), float(np.finfo(np.float64).max))

    def stays(value, limit):
        return isfinite(value) and abs(value) <= limit

    fits = cuda.jit(device=True)(stays)
    mean_limit, var_limit = largest[mean_kind], largest[var_kind]

    def kernel(running_mean, running_var, mean, m2, freedom, momentum, skipped, slots):
        slot = cuda.grid(1)
        if slot < slots:
            new_mean = blend(get(running_mean, slot, mean_kind), get(mean, slot, FLOAT64), momentum)
            new_var = get(running_var, slot, var_kind)
            if freedom > 0.0:
                new_var = blend(new_var, get(m2, slot, FLOAT64) / freedom, momentum)
            if not guard or (fits(new_mean, mean_limit) and fits(new_var, var_limit)):
                put(running_mean, slot, new_mean, mean_kind)
                if freedom > 0.0:
                    put(running_var, slot, new_var, var_kind)
                put(skipped, slot, 0.0, FLOAT64)
            else:
                put(skipped, slot, 1.0, FLOAT64)

    return compiled(BLOCK)(kernel)
