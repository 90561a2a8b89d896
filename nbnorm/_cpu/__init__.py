"""The CPU backend: verbs on a view and arrays that share its memory order.

Every verb flattens its arrays, picks the traversal of the view and starts one kernel: a fused one where threads share
whole slots, else one that goes through chunks pass after pass; both give the same bits. Statistics and sums
are float64 arrays with one entry per slot.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from nbnorm._cpu.halves import computing
from nbnorm._cpu.launch import flat, kernel, line, optional, threads_for
from nbnorm._math import blend, merge, reciprocal_std
from nbnorm._options import Epilogue, Mask
from nbnorm._view import View

__all__ = [
    "apply", "backward", "forward", "grad_sums", "input_grad", "merge_moments", "moments", "rstd", "update_running",
]  # fmt: skip

Array = np.ndarray
Sums = tuple[Array, Array]


class Start(NamedTuple):
    """Where a view is walked, and how."""

    walk: Any  # the module of its traversal
    geometry: Array
    team: int  # threads that should share whole slots; 0 where it is better that they share their chunks


@lru_cache(maxsize=4096)
def start(view: View, threads: int, masked: bool, size: int, letter: str) -> Start:
    """Choose how to walk a view; ``size`` is that of all arrays in bytes.

    A traversal is imported when a view asks for it: few programs need all three (benchmarks/bench_start.py).
    """
    walk = import_module(f"nbnorm._cpu.{view.traversal}")
    return Start(walk, walk.geometry(view, threads, masked, size, letter), walk.fused(view, threads, masked))


def moments(
    view: View, x: Array, centered: bool = True, mask: Mask | None = None
) -> tuple[Array | None, Array]:
    """Mean and m2 (the sum of squared deviations) of every slot; not centered, None and the sum of squares."""
    room = np.empty if view.size else np.zeros
    m2, mean = room(view.slots), room(view.slots) if centered else None
    if view.size:
        threads = threads_for(view.size)
        walk, g, _ = start(view, threads, mask is not None, 0, x.dtype.char)
        options = _options(view, Epilogue(), mask)
        walk.passes_kernel.on(threads)(g, flat(x), None, *options, None, mean, m2, None)
    return mean, m2


def _options(view: View, epilogue: Epilogue, mask: Mask | None, gradient: bool = False) -> tuple[Any, ...]:
    """Return epilogue and mask as kernels take them; rows know weight and bias alone.

    No gradient depends on the bias but through an activation; without one, kernels for gradients need not know it.
    """
    weight, bias, residual, activation = epilogue
    weight, bias = line(weight), None if gradient and activation is None else line(bias)
    if view.traversal == "rows":
        return weight, bias
    weights, counts = (None, None) if mask is None else mask
    options = weight, bias, optional(residual), activation, weights
    return options if gradient else (*options, counts)


def rstd(m2: Array, count: float | Array, eps: float) -> Array:
    """1 / sqrt(var + eps) of every slot; ``count`` is that of all, or one for each of equal blocks of slots."""
    result = np.empty(m2.shape)
    if isinstance(count, np.ndarray):
        _rstd_kernel(m2, 0.0, np.repeat(count, m2.size // max(count.size, 1)), eps, result)
    else:
        _rstd_kernel(m2, count, None, eps, result)
    return result


def apply(view: View, x: Array, y: Array, mean: Array | None, rstd: Array, epilogue: Epilogue) -> None:
    """Normalize x with given statistics into y."""
    if view.size:
        threads = threads_for(view.size)
        walk, g, _ = start(view, threads, False, 2 * x.nbytes, x.dtype.char)
        options = _options(view, epilogue, None)
        walk.passes_kernel.on(threads)(g, flat(x), flat(y), *options, None, mean, None, rstd)


def forward(
    view: View,
    x: Array,
    y: Array,
    epilogue: Epilogue,
    eps: float,
    centered: bool = True,
    mask: Mask | None = None,
) -> tuple[Array | None, Array, Array]:
    """Normalize x with its own statistics into y; return mean (None if not centered), m2 and rstd."""
    room = np.empty if view.size else np.zeros
    m2, slot_rstd, mean = room(view.slots), room(view.slots), room(view.slots) if centered else None
    if view.size:
        threads = threads_for(view.size)
        walk, g, team = start(view, threads, mask is not None, 2 * x.nbytes, x.dtype.char)
        run = walk.forward_kernel.on(team) if team else walk.passes_kernel.on(threads)
        options = _options(view, epilogue, mask)
        run(g, flat(x), flat(y), *options, eps, mean, m2, slot_rstd)
    return mean, m2, slot_rstd


def grad_sums(
    view: View,
    x: Array,
    dy: Array,
    mean: Array | None,
    rstd: Array,
    epilogue: Epilogue,
    mask: Mask | None = None,
) -> Sums:
    """Sums of dz and of dz * x_hat that belong to each parameter."""
    if view.traversal == "rows":
        return _row_gradients(view, x, dy, None, mean, rstd, None, True)
    sums = _no_sums(view)
    _gradient_passes(view, x, dy, None, None, mean, rstd, epilogue, sums, 0.0, mask, None)
    return _by_parameter(view, sums)


def _no_sums(view: View) -> Array:
    """Return zeros for both sums of every run of every slot."""
    return np.zeros((2, view.slots, view.width))


def _by_parameter(view: View, sums: Array) -> Sums:
    """Add the sums of slots that share parameters."""
    parameters = view.period * view.width
    if sums.size == 2 * parameters:
        total = sums.reshape(2, parameters)
    else:
        total = np.zeros((2, parameters))
        _add_kernel(sums.reshape(2, -1, parameters), total)
    return total[0], total[1]


def input_grad(
    view: View, x: Array, dy: Array, dx: Array, dresidual: Array | None, mean: Array, rstd: Array,
    epilogue: Epilogue, sums: Sums | None, count: float, mask: Mask | None = None,
) -> None:  # fmt: skip
    """Write dx, and dz into ``dresidual``, for given sums over every slot; without sums statistics are constants.

    For norms whose every slot has parameters of its own.
    """
    slot_sums = _no_sums(view) if sums is None else np.stack(sums)[:, :, np.newaxis]
    _gradient_passes(view, x, dy, dx, dresidual, mean, rstd, epilogue, slot_sums, count, mask, sums is None)


def _gradient_passes(view, x, dy, dx, dresidual, mean, rstd, epilogue, sums, count, mask, constant):
    """Write the sums, where ``constant`` is None, and dx, if there is room for it; planes and columns.

    Else sums are given, and ``constant`` says whether the statistics are constants.
    """
    if view.size:
        threads = threads_for(view.size)
        size = 0 if dx is None else 3 * x.nbytes
        walk, g, _ = start(view, threads, mask is not None, size, x.dtype.char)
        walk.gradient_passes_kernel.on(threads)(
            g, flat(x), flat(dy), optional(dx), optional(dresidual), mean, rstd,
            *_options(view, epilogue, mask, gradient=True), sums, *_counts(count), constant,
        )  # fmt: skip


def _row_gradients(
    view: View, x: Array, dy: Array, dx: Array | None, mean: Array | None, rstd: Array, weight: Array | None,
    with_parameters: bool,
) -> Sums:  # fmt: skip
    """Write dx, if there is room for it, and return the parameters' sums; rows."""
    parameters = view.period * view.width
    if not view.size:
        return np.zeros(parameters), np.zeros(parameters)
    threads = threads_for(view.size)
    walk, g, team = start(view, threads, False, 0 if dx is None else 3 * x.nbytes, x.dtype.char)
    sums = total = rest = None
    if with_parameters:
        sums = np.empty((walk.band_count(g), 2, parameters), computing(x.dtype))
        total, rest = np.empty((2, parameters)), np.empty((2, parameters))
    long = walk.long_rows(view.inner, x.dtype.char)
    arrays = (g, flat(x), flat(dy), optional(dx), mean, rstd, line(weight), sums, total, rest, long)
    if team and dx is not None:
        walk.backward_kernel.on(team)(*arrays)
    else:
        walk.gradient_passes_kernel.on(threads)(*arrays)
    return (np.zeros(0), np.zeros(0)) if total is None else (total[0], total[1])


def _counts(count: float | Array) -> tuple[float, Array | None]:
    """Return the number of values of a slot as kernels take it: one for all, or one for each row of a mask.

    It may be that of a batch of which x is a part, so that the mask does not know it.
    """
    return (0.0, count.reshape(-1)) if isinstance(count, np.ndarray) else (float(count), None)


def backward(
    view: View, x: Array, dy: Array, dx: Array, dresidual: Array | None, mean: Array | None, rstd: Array,
    epilogue: Epilogue, count: float, mask: Mask | None = None, with_parameters: bool = True,
) -> Sums:  # fmt: skip
    """Write dx, and dz into ``dresidual``, and return the sums of `grad_sums`; statistics are those of x."""
    if view.traversal == "rows":
        return _row_gradients(view, x, dy, dx, mean, rstd, epilogue.weight, with_parameters)
    sums = _no_sums(view)
    if view.size:
        threads = threads_for(view.size)
        walk, g, team = start(view, threads, mask is not None, 3 * x.nbytes, x.dtype.char)
        arguments = (
            g, flat(x), flat(dy), flat(dx), optional(dresidual), mean, rstd,
            *_options(view, epilogue, mask, gradient=True), sums, *_counts(count),
        )  # fmt: skip
        if team:
            walk.backward_kernel.on(team)(*arguments)
        else:
            walk.gradient_passes_kernel.on(threads)(*arguments, None)
    return _by_parameter(view, sums)


def merge_moments(
    n_a: float, mean_a: Array, m2_a: Array, n_b: float, mean_b: Array, m2_b: Array
) -> tuple[float, Array, Array]:
    """Merge two sets of moments, slot by slot."""
    mean, m2 = np.empty((2, mean_a.size))
    _merge_kernel(n_a, mean_a, m2_a, n_b, mean_b, m2_b, mean, m2)
    return n_a + n_b, mean, m2


def update_running(
    running_mean: Array, running_var: Array, mean: Array, m2: Array, freedom: float, momentum: float, guard: bool
) -> int:  # fmt: skip
    """Blend batch statistics into the running ones; ``guard`` leaves out slots that would become non-finite.

    The variance is m2 / freedom; without freedom only the mean is blended. Returns the number of slots left out.
    """
    return int(_update_kernel(running_mean, running_var, mean, m2, freedom, momentum, guard))


@kernel
def _add_kernel(sums, total):
    for i in range(2):
        for k in range(sums.shape[1]):
            for p in range(sums.shape[2]):
                total[i, p] += sums[i, k, p]


@kernel
def _rstd_kernel(m2, count, counts, eps, result):
    for i in range(m2.shape[0]):
        result[i] = reciprocal_std(m2[i], count if counts is None else counts[i], eps)


@kernel
def _merge_kernel(n_a, mean_a, m2_a, n_b, mean_b, m2_b, mean, m2):
    for i in range(mean.shape[0]):
        _, mean[i], m2[i] = merge(n_a, mean_a[i], m2_a[i], n_b, mean_b[i], m2_b[i])


@kernel
def _update_kernel(running_mean, running_var, mean, m2, freedom, momentum, guard):
    skipped = 0
    for i in range(mean.shape[0]):
        new_mean = running_mean.dtype.type(blend(running_mean[i], mean[i], momentum))
        new_var = running_var[i]
        if freedom > 0.0:
            new_var = running_var.dtype.type(blend(running_var[i], m2[i] / freedom, momentum))
        if guard and not (np.isfinite(new_mean) and np.isfinite(new_var)):
            skipped += 1
        else:
            running_mean[i] = new_mean
            running_var[i] = new_var
    return skipped
