"""The CUDA backend: the verbs of the CPU backend, with the same names and signatures.

A slot that fits into the registers of a team takes one kernel (`rows`); others take one kernel per pass (`planes`,
`columns`), whose partial results are merged in order (`finish`). Nothing waits for the device, and no sum is left to
the order in which threads arrive.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nbnorm._cuda import columns, finish, planes, rows
from nbnorm._cuda.arrays import empty, is_aligned, total, zeros
from nbnorm._cuda.collective import WARP
from nbnorm._cuda.launch import (
    Lines,
    blocks_for,
    blocks_of,
    column_lanes,
    held_lines,
    parameter_rule,
    row_bands,
    start,
    streamed_lines,
    vector_width,
)
from nbnorm._cuda.memory import BLOCK, FLOAT64, kind_of, real
from nbnorm._cuda.pieces import ABSENT, ELEMENT, SLOT, Build
from nbnorm._options import Epilogue, Mask
from nbnorm._view import View

__all__ = [
    "apply", "backward", "forward", "grad_sums", "input_grad", "merge_moments", "moments", "rstd",
    "update_running",
]  # fmt: skip

Array = Any
Sums = tuple[Array, Array]


NO_EPILOGUE = Epilogue()


def moments(
    view: View, x: Array, centered: bool = True, mask: Mask | None = None
) -> tuple[Array | None, Array]:
    """Mean and m2 (the sum of squared deviations) of every slot; not centered, None and the sum of squares."""
    new = empty if view.size else zeros
    m2 = new(view.slots, np.float64, x)
    mean = new(view.slots, np.float64, x) if centered else None
    if not view.size:
        return mean, m2
    if view.traversal == "columns":
        _column_moments(view, x, mask, mean, m2)
        return mean, m2
    width = _width(view, [x], NO_EPILOGUE, mask)
    lines = held_lines(view, width, 1)
    if lines is not None:
        _held_forward(view, lines, x, None, NO_EPILOGUE, 0.0, mask, mean, m2, None)
        return mean, m2
    lines = streamed_lines(view, view.inner, width)
    build = _build(view, x, lines, NO_EPILOGUE, mask, centered)
    parts = empty(3 * view.slots * lines.chunks, np.float64, x)
    start(
        planes.moments_kernel(build), blocks_of(view.slots * lines.chunks), BLOCK, x,
        x, _weights(mask), parts, lines.chunks, lines.chunk, view.slots, lines.values, lines.length, lines.pitch,
        lines.jump, lines.turn, view.period, view.run, _positions(view),
    )  # fmt: skip
    _finish_moments(view, parts, lines.chunks, mean, m2)
    return mean, m2


def _column_moments(view: View, x: Array, mask: Mask | None, mean: Array | None, m2: Array) -> None:
    lanes = column_lanes(view, _width(view, [x], NO_EPILOGUE, mask))
    build = Build(kind_of(x.dtype), lanes.width, 1, 1, has_mask=mask is not None)
    parts = empty(3 * view.batch * lanes.lanes * lanes.chunks, np.float64, x)
    start(
        columns.moments_kernel(build), view.batch * lanes.chunks * lanes.lane_blocks, lanes.threads, x,
        x, _weights(mask), parts, lanes.lane_blocks, lanes.chunks, lanes.chunk, lanes.lanes, view.outer, view.group,
        view.inner, view.period, view.run, _positions(view),
    )  # fmt: skip
    _finish_moments(view, parts, view.inner * lanes.chunks, mean, m2)


def _finish_moments(view: View, parts: Array, count: int, mean: Array | None, m2: Array) -> None:
    """Merge the parts of every slot."""
    kernel = finish.moments_kernel(mean is not None)
    start(kernel, blocks_of(view.slots), BLOCK, parts, parts, mean, m2, view.slots, count)


def rstd(m2: Array, count: Any, eps: float) -> Array:
    """1 / sqrt(var + eps) of every slot."""
    result = empty(m2.shape, np.float64, m2)
    slots = _size(m2)
    counted = not isinstance(count, (int, float))
    period = slots // max(1, _size(count)) if counted else 1
    counts, n = (count, 0.0) if counted else (None, float(count))
    kernel = finish.rstd_kernel(counted)
    start(kernel, blocks_for(slots), BLOCK, m2, m2, counts, n, float(eps), result, slots, max(period, 1))
    return result


def apply(view: View, x: Array, y: Array, mean: Array | None, rstd: Array, epilogue: Epilogue) -> None:
    """Normalize x with given statistics into y."""
    if not view.size:
        return
    width = _width(view, [x, y], epilogue, None)
    arrays = (x, y, epilogue.weight, epilogue.bias, epilogue.residual, mean, rstd)
    if view.traversal == "columns":
        lanes = column_lanes(view, width)
        build = _column_build(x, lanes.width, epilogue, None, mean is not None)
        blocks = view.batch * lanes.chunks * lanes.lane_blocks
        start(
            columns.apply_kernel(build), blocks, lanes.threads, x, *arrays, lanes.lane_blocks, lanes.chunks,
            lanes.chunk, lanes.lanes, view.outer, view.group, view.inner, view.period, view.run, blocks,
        )  # fmt: skip
        return
    lines = streamed_lines(view, view.inner, width)
    build = _build(view, x, lines, epilogue, None, mean is not None)
    start(
        planes.apply_kernel(build), blocks_of(view.slots * lines.chunks), BLOCK, x, *arrays, lines.chunks,
        lines.chunk, view.slots, lines.values, lines.length, lines.pitch, lines.jump, lines.turn, view.period,
        view.width, view.run,
    )  # fmt: skip


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
    lines = None
    if view.traversal != "columns" and view.size:
        lines = held_lines(view, _width(view, [x, y], epilogue, mask), 1)
    if lines is None:
        mean, m2 = moments(view, x, centered, mask)
        slot_rstd = rstd(m2, view.values if mask is None else mask.counts, eps)
        apply(view, x, y, mean, slot_rstd, epilogue)
        return mean, m2, slot_rstd
    m2, slot_rstd = empty(view.slots, np.float64, x), empty(view.slots, np.float64, x)
    mean = empty(view.slots, np.float64, x) if centered else None
    _held_forward(view, lines, x, y, epilogue, eps, mask, mean, m2, slot_rstd)
    return mean, m2, slot_rstd


def _held_forward(
    view: View, lines: Lines, x: Array, y: Array | None, epilogue: Epilogue, eps: float, mask: Mask | None,
    mean: Array | None, m2: Array, rstd: Array | None,
) -> None:  # fmt: skip
    """Statistics of slots that fit into registers and, where there is room for it, y."""
    build = _build(view, x, lines, epilogue, mask, mean is not None)
    blocks, threads = _teams(view.slots, lines.warps)
    start(
        rows.forward_kernel(build, y is not None), blocks, threads, x, x, y, epilogue.weight, epilogue.bias,
        epilogue.residual, _weights(mask), mean, m2, rstd, float(eps), view.slots, lines.values, lines.length,
        lines.pitch, lines.jump, lines.turn, view.period, view.width, view.run, _positions(view),
    )  # fmt: skip


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
    if not view.size:
        return _no_sums(view, x)
    if view.traversal != "columns" and parameter_rule(view) == ELEMENT:
        return _parameter_sums(view, x, dy, mean, rstd, epilogue)
    return tuple(_by_parameter(view, sums) for sums in _run_sums(view, x, dy, mean, rstd, epilogue))


def _no_sums(view: View, x: Array) -> Sums:
    """Sums over an empty array."""
    parameters = view.period * view.width
    return zeros(parameters, np.float64, x), zeros(parameters, np.float64, x)


def _run_sums(view: View, x: Array, dy: Array, mean: Array | None, rstd: Array, epilogue: Epilogue) -> Sums:
    """Sums of dz and of dz * x_hat of every run of every slot; where runs are elements, those of g of a slot."""
    if view.traversal == "columns":
        return _column_sums(view, x, dy, mean, rstd, epilogue)
    element = parameter_rule(view) == ELEMENT
    length, per_slot = (view.inner, 1) if element else (view.run, view.width)
    units = view.slots * per_slot
    lines = streamed_lines(view, length, _width(view, [x, dy], epilogue, None))
    build = _build(view, x, lines, _weighed(epilogue, element), None, mean is not None)
    parts = empty(2 * units * lines.chunks, np.float64, x)
    if not element and view.width > 1:  # a run is to its unit what a slot is elsewhere
        build = build._replace(rule=SLOT)
    start(
        planes.grad_sums_kernel(build), blocks_of(units * lines.chunks), BLOCK, x, x, dy, epilogue.weight,
        epilogue.bias, epilogue.residual, mean, rstd, parts, lines.chunks, lines.chunk, units, lines.values, length,
        lines.pitch, lines.jump, lines.turn, view.period, per_slot,
    )  # fmt: skip
    return _finish_sums(parts, units, lines.chunks)


def _column_sums(
    view: View, x: Array, dy: Array, mean: Array | None, rstd: Array, epilogue: Epilogue
) -> Sums:
    lanes = column_lanes(view, _width(view, [x, dy], epilogue, None))
    build = _column_build(
        x, lanes.width, epilogue if epilogue.activation is not None else NO_EPILOGUE, None, True
    )
    parts = empty(2 * view.batch * lanes.lanes * lanes.chunks, np.float64, x)
    start(
        columns.grad_sums_kernel(build), view.batch * lanes.chunks * lanes.lane_blocks, lanes.threads, x, x, dy,
        epilogue.weight, epilogue.bias, epilogue.residual, mean, rstd, parts, lanes.lane_blocks, lanes.chunks,
        lanes.chunk, lanes.lanes, view.outer, view.group, view.inner, view.period, view.run,
    )  # fmt: skip
    return _finish_sums(parts, view.slots * view.width, view.run * lanes.chunks)


def _finish_sums(parts: Array, units: int, count: int) -> Sums:
    """Add the parts of every unit up."""
    sums = empty(units, np.float64, parts), empty(units, np.float64, parts)
    start(finish.sums_kernel(), blocks_of(units), BLOCK, parts, parts, *sums, units, count)
    return sums


def _by_parameter(view: View, sums: Array) -> Array:
    """Add the sums of slots that share parameters."""
    parameters = view.period * view.width
    if _size(sums) == parameters:
        return sums
    return _fold(sums, FLOAT64, parameters, 0, parameters, 0, _size(sums) // parameters, parameters)


def _fold(
    parts: Array, kind: int, parameters: int, first: int, run: int, jump: int, count: int, pitch: int
) -> Array:
    """Add up ``count`` parts of each parameter, see `finish.fold_kernel`."""
    result = empty(parameters, np.float64, parts)
    start(
        finish.fold_kernel(kind), -(-parameters // WARP), (WARP, finish.FOLD_DEPTH), parts, parts, result,
        parameters, first, run, jump, count, pitch,
    )  # fmt: skip
    return result


def _parameter_sums(
    view: View, x: Array, dy: Array, mean: Array | None, rstd: Array, epilogue: Epilogue
) -> Sums:
    """Sums down the columns of rows whose every element has a parameter."""
    epilogue = epilogue if epilogue.activation is not None else NO_EPILOGUE
    width = _width(view, [x, dy], epilogue, None)
    build = Build(
        kind_of(x.dtype), width, 1, 1, ELEMENT, _kind(epilogue.weight), _kind(epilogue.bias),
        epilogue.residual is not None, _activation(epilogue), False, mean is not None,
    )  # fmt: skip
    threads = min(BLOCK, 128)
    lane_blocks = -(-view.inner // (threads * width))
    bands = row_bands(view, lane_blocks * threads // WARP)
    parts = empty(2 * bands.bands * view.period * view.inner, real(build.kind), x)
    start(
        rows.parameter_sums_kernel(build), lane_blocks * bands.bands * view.period, threads, x, x, dy,
        epilogue.weight, epilogue.bias, epilogue.residual, mean, rstd, parts, lane_blocks, bands.bands, bands.band,
        view.slots, view.inner, view.period,
    )  # fmt: skip
    return _fold_bands(view, parts, bands.bands)


def _fold_bands(view: View, parts: Array, bands: int) -> Sums:
    """Add up the bands' sums, laid out as (band, period, 2, inner)."""
    n = view.inner
    kind, parameters, pitch = kind_of(parts.dtype), view.period * n, 2 * view.period * n
    a, b = (_fold(parts, kind, parameters, which * n, n, 2 * n, bands, pitch) for which in range(2))
    return a, b


def input_grad(
    view: View, x: Array, dy: Array, dx: Array, dresidual: Array | None, mean: Array | None, rstd: Array,
    epilogue: Epilogue, sums: Sums | None, count: float, mask: Mask | None = None,
) -> None:  # fmt: skip
    """Write dx (and dresidual) for given sums over every slot; without sums the statistics are constants.

    For norms whose every slot has parameters of its own.
    """
    if view.size:
        _input_grad(view, x, dy, dx, dresidual, mean, rstd, epilogue, sums, count, mask)


def _input_grad(
    view: View, x: Array, dy: Array, dx: Array, dresidual: Array | None, mean: Array | None, rstd: Array,
    epilogue: Epilogue, sums: Sums | None, count: float, mask: Mask | None,
) -> None:  # fmt: skip
    slot_sums = None if sums is None else _slot_sums(view, sums, epilogue.weight)
    width = _width(view, [x, dy, dx, dresidual], epilogue, mask)
    arrays = (x, dy, dx, dresidual, epilogue.weight, epilogue.bias, epilogue.residual, _weights(mask))
    statistics = (mean, rstd, slot_sums, None if mask is None else mask.counts, float(count))
    flags = sums is None, dresidual is not None
    if view.traversal == "columns":
        lanes = column_lanes(view, width)
        build = _column_build(x, lanes.width, epilogue, mask, mean is not None)
        blocks = view.batch * lanes.chunks * lanes.lane_blocks
        start(
            columns.input_grad_kernel(build, *flags), blocks, lanes.threads, x, *arrays, *statistics,
            lanes.lane_blocks, lanes.chunks, lanes.chunk, lanes.lanes, view.outer, view.group, view.inner,
            view.period, view.run, _positions(view), blocks,
        )  # fmt: skip
        return
    lines = streamed_lines(view, view.inner, width)
    build = _build(view, x, lines, epilogue, mask, mean is not None)
    start(
        planes.input_grad_kernel(build, *flags), blocks_of(view.slots * lines.chunks), BLOCK, x, *arrays,
        *statistics, lines.chunks, lines.chunk, view.slots, lines.values, lines.length, lines.pitch, lines.jump,
        lines.turn, view.period, view.width, view.run, _positions(view),
    )  # fmt: skip


def _slot_sums(view: View, sums: Sums, weight: Array | None) -> Array:
    """Sums of g and g * x_hat of every slot, interleaved, from the sums of its runs."""
    per_slot = _size(sums[0]) // view.slots
    element = per_slot != view.width
    result = empty(2 * view.slots, np.float64, sums[0])
    weight = None if element else weight
    start(
        finish.weigh_kernel(_kind(weight)), blocks_for(view.slots), BLOCK, sums[0], *sums, weight, result,
        view.slots, view.period, per_slot,
    )  # fmt: skip
    return result


def backward(
    view: View, x: Array, dy: Array, dx: Array, dresidual: Array | None, mean: Array | None, rstd: Array,
    epilogue: Epilogue, count: float, mask: Mask | None = None, with_parameters: bool = True,
) -> Sums:  # fmt: skip
    """Write dx (and dresidual) and return the sums of `grad_sums`, statistics being those of x."""
    if not view.size:
        return _no_sums(view, x)
    if view.traversal != "columns":
        held = _held_backward(view, x, dy, dx, dresidual, mean, rstd, epilogue, count, mask, with_parameters)
        if held is not None:
            return held
    element = view.traversal != "columns" and parameter_rule(view) == ELEMENT
    if element and with_parameters:  # before dx, which may go into dy
        parameters = _parameter_sums(view, x, dy, mean, rstd, epilogue)
    sums = _run_sums(view, x, dy, mean, rstd, epilogue)
    _input_grad(view, x, dy, dx, dresidual, mean, rstd, epilogue, sums, count, mask)
    if not with_parameters:
        return sums
    return parameters if element else (_by_parameter(view, sums[0]), _by_parameter(view, sums[1]))


def _held_backward(
    view: View, x: Array, dy: Array, dx: Array, dresidual: Array | None, mean: Array | None, rstd: Array,
    epilogue: Epilogue, count: float, mask: Mask | None, with_parameters: bool,
) -> Sums | None:  # fmt: skip
    """Backward of slots that fit into registers, None where they do not or where runs share parameters."""
    rule = parameter_rule(view)
    across = with_parameters and rule == ELEMENT
    lines = held_lines(view, _width(view, [x, dy, dx, dresidual], epilogue, mask), 2)
    if lines is None or (rule not in (SLOT, ELEMENT)):
        return None
    build = _build(view, x, lines, epilogue, mask, mean is not None)
    bands = row_bands(view, lines.warps)
    if not across:
        bands = type(bands)(1, view.slots // view.period)
    size = view.slots if with_parameters and not across else 0
    sums = empty(size, np.float64, x), empty(size, np.float64, x)
    parts = empty(2 * bands.bands * view.period * view.inner if across else 0, real(build.kind), x)
    blocks, threads = _teams(bands.bands * view.period, lines.warps)
    start(
        rows.backward_kernel(build, with_parameters, dresidual is not None), blocks, threads, x, x, dy, dx, dresidual,
        epilogue.weight, epilogue.bias, epilogue.residual, _weights(mask), mean, rstd, *sums, parts,
        None if mask is None else mask.counts, float(count), bands.bands, bands.band, view.slots, lines.values,
        lines.length, lines.pitch, lines.jump, lines.turn, view.period, view.run, _positions(view),
    )  # fmt: skip
    if across:
        return _fold_bands(view, parts, bands.bands)
    return (_by_parameter(view, sums[0]), _by_parameter(view, sums[1])) if with_parameters else sums


def merge_moments(
    n_a: float, mean_a: Array, m2_a: Array, n_b: float, mean_b: Array, m2_b: Array
) -> tuple[float, Array, Array]:
    """Merge two sets of moments, slot by slot."""
    slots = _size(mean_a)
    mean, m2 = empty(slots, np.float64, mean_a), empty(slots, np.float64, mean_a)
    start(
        finish.merge_kernel(), blocks_for(slots), BLOCK, mean_a, float(n_a), mean_a, m2_a, float(n_b), mean_b,
        m2_b, mean, m2, slots,
    )  # fmt: skip
    return n_a + n_b, mean, m2


def update_running(
    running_mean: Array, running_var: Array, mean: Array, var: Array | None, momentum: float, guard: bool
) -> Any:
    """Blend batch statistics into the running ones; ``guard`` leaves out slots that would become non-finite.

    Without a variance only the mean is blended. Returns the number of slots left out, on the device: reading it would
    wait for it.
    """
    slots = _size(mean)
    skipped = empty(slots, np.float64, mean)
    kernel = finish.update_kernel(
        kind_of(running_mean.dtype), kind_of(running_var.dtype), var is not None, guard
    )
    start(
        kernel, blocks_for(slots), BLOCK, mean, running_mean, running_var, mean, var, float(momentum), skipped,
        slots,
    )  # fmt: skip
    return total(skipped) if guard else 0


def _size(x: Any) -> int:
    """Elements of an array of any library."""
    return int(np.prod(x.shape, dtype=np.int64))


def _kind(x: Array | None) -> int:
    """Return the kind of an optional array."""
    return ABSENT if x is None else kind_of(x.dtype)


def _weights(mask: Mask | None) -> Array | None:
    return None if mask is None else mask.weights


def _positions(view: View) -> int:
    """Positions of a row of a mask."""
    return view.outer * view.run


def _teams(teams: int, warps: int) -> tuple[int, int]:
    """Blocks and threads for so many teams: one of several warps to a block, or as many of one warp as it has."""
    return (teams, warps * WARP) if warps > 1 else (blocks_of(teams), BLOCK)


def _weighed(epilogue: Epilogue, element: bool) -> Epilogue:
    """Leave out what the sums of dz do not depend on."""
    if epilogue.activation is not None:
        return epilogue
    return Epilogue(epilogue.weight if element else None)


def _width(view: View, xs: list[Array | None], epilogue: Epilogue, mask: Mask | None) -> int:
    """Elements of a vector: all arrays aligned, and no vector across the end of a run, a segment or a row."""
    arrays = [*xs, epilogue.residual, _weights(mask)]
    if view.traversal == "columns":
        neighbours = view.group * view.inner
    else:
        rule = parameter_rule(view)
        neighbours = view.inner if rule in (SLOT, ELEMENT) else view.run
        if rule == ELEMENT:
            arrays += [epilogue.weight, epilogue.bias]
    if mask is not None and view.traversal != "columns" and _positions(view) % 8:
        return 1  # rows of the mask start off a vector
    return vector_width(_kind(xs[0]), neighbours, is_aligned(*arrays))


def _activation(epilogue: Epilogue) -> tuple[str, float] | None:
    """Name and slope of an activation from its marker."""
    marker = epilogue.activation
    if marker is None:
        return None
    if isinstance(marker, (bool, np.bool_)):
        return "relu", 0.0
    return ("leaky_relu", float(marker)) if isinstance(marker, (float, np.floating)) else ("silu", 0.0)


def _build(
    view: View, x: Array, lines: Lines, epilogue: Epilogue, mask: Mask | None, centered: bool
) -> Build:
    return Build(
        kind_of(x.dtype), lines.width, lines.steps, lines.warps, parameter_rule(view), _kind(epilogue.weight),
        _kind(epilogue.bias), epilogue.residual is not None, _activation(epilogue), mask is not None, centered,
        view.outer == 1,
    )  # fmt: skip


def _column_build(x: Array, width: int, epilogue: Epilogue, mask: Mask | None, centered: bool) -> Build:
    return Build(
        kind_of(x.dtype), width, 1, 1, SLOT, _kind(epilogue.weight), _kind(epilogue.bias),
        epilogue.residual is not None, _activation(epilogue), mask is not None, centered,
    )  # fmt: skip
