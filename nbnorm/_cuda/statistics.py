"""Verbs on statistics alone, a thread per slot."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbnorm._cuda import finish
from nbnorm._cuda.arrays import empty, total
from nbnorm._cuda.builds import size_of
from nbnorm._cuda.launch import blocks_for, start
from nbnorm._cuda.memory import BLOCK, kind_of

Array = Any


def rstd(m2: Array, count: Any, eps: float) -> Array:
    """1 / sqrt(var + eps) of every slot."""
    result = empty(m2.shape, np.float64, m2)
    slots = size_of(m2)
    counted = not isinstance(count, (int, float))
    period = slots // max(1, size_of(count)) if counted else 1
    counts, n = (count, 0.0) if counted else (None, float(count))
    kernel = finish.rstd_kernel(counted)
    start(kernel, blocks_for(slots), BLOCK, m2, m2, counts, n, float(eps), result, slots, max(period, 1))
    return result


def merge_moments(
    n_a: float, mean_a: Array, m2_a: Array, n_b: float, mean_b: Array, m2_b: Array
) -> tuple[float, Array, Array]:
    """Merge two sets of moments, slot by slot."""
    slots = size_of(mean_a)
    mean, m2 = empty(slots, np.float64, mean_a), empty(slots, np.float64, mean_a)
    start(
        finish.merge_kernel(), blocks_for(slots), BLOCK, mean_a, float(n_a), mean_a, m2_a, float(n_b), mean_b,
        m2_b, mean, m2, slots,
    )  # fmt: skip
    return n_a + n_b, mean, m2


def update_running(
    running_mean: Array, running_var: Array, mean: Array, m2: Array, freedom: float, momentum: float, guard: bool
) -> Any:  # fmt: skip
    """Blend batch statistics into the running ones; ``guard`` leaves out slots that would become non-finite.

    The variance is m2 / freedom; without freedom only the mean is blended. Returns the number of slots left out, on the
    device: reading it would wait for it.
    """
    slots = size_of(mean)
    skipped = empty(slots, np.float64, mean)
    kernel = finish.update_kernel(kind_of(running_mean.dtype), kind_of(running_var.dtype), guard)
    start(
        kernel, blocks_for(slots), BLOCK, mean, running_mean, running_var, mean, m2, float(freedom),
        float(momentum), skipped, slots,
    )  # fmt: skip
    return total(skipped) if guard else 0
