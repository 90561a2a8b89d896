"""Verbs of the backward pass: one kernel where x and dy of a slot fit into a team's registers, else one per pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbnorm._cuda import columns, finish, planes, rows
from nbnorm._cuda.arrays import empty, zeros
from nbnorm._cuda.builds import (
    NO_EPILOGUE,
    column_build,
    line_build,
    named_activation,
    optional_kind,
    positions_of,
    registers_held,
    size_of,
    weights_of,
    what_dz_needs,
    width_for,
)
from nbnorm._cuda.collective import WARP
from nbnorm._cuda.launch import (
    Bands,
    blocks_for,
    blocks_of,
    column_lanes,
    held_lines,
    parameter_rule,
    row_bands,
    start,
    streamed_lines,
    teams_of,
)
from nbnorm._cuda.memory import BLOCK, FLOAT64, kind_of, real
from nbnorm._cuda.pieces import ELEMENT, RUN, SLOT, Build
from nbnorm._options import Epilogue, Mask
from nbnorm._view import View

Array = Any
Sums = tuple[Array, Array]


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
    lines = streamed_lines(view, length, width_for(view, [x, dy], epilogue, None))
    build = line_build(view, x, lines, what_dz_needs(epilogue, element), None, mean is not None)
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
    lanes = column_lanes(view, width_for(view, [x, dy], epilogue, None))
    build = column_build(
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
    if size_of(sums) == parameters:
        return sums
    return _fold(sums, FLOAT64, parameters, 0, parameters, 0, size_of(sums) // parameters, parameters)


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
    width = width_for(view, [x, dy], epilogue, None)
    build = Build(
        kind_of(x.dtype), width, 1, 1, ELEMENT, optional_kind(epilogue.weight), optional_kind(epilogue.bias),
        epilogue.residual is not None, named_activation(epilogue), False, mean is not None,
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
    width = width_for(view, [x, dy, dx, dresidual], epilogue, mask)
    arrays = (x, dy, dx, dresidual, epilogue.weight, epilogue.bias, epilogue.residual, weights_of(mask))
    statistics = (mean, rstd, slot_sums, *_counts(count, mask))
    flags = sums is None, dresidual is not None
    if view.traversal == "columns":
        lanes = column_lanes(view, width)
        build = column_build(x, lanes.width, epilogue, mask, mean is not None)
        blocks = view.batch * lanes.chunks * lanes.lane_blocks
        start(
            columns.input_grad_kernel(build, *flags), blocks, lanes.threads, x, *arrays, *statistics,
            lanes.lane_blocks, lanes.chunks, lanes.chunk, lanes.lanes, view.outer, view.group, view.inner,
            view.period, view.run, positions_of(view), blocks,
        )  # fmt: skip
        return
    lines = streamed_lines(view, view.inner, width)
    build = line_build(view, x, lines, epilogue, mask, mean is not None)
    start(
        planes.input_grad_kernel(build, *flags), blocks_of(view.slots * lines.chunks), BLOCK, x, *arrays,
        *statistics, lines.chunks, lines.chunk, view.slots, lines.values, lines.length, lines.pitch, lines.jump,
        lines.turn, view.period, view.width, view.run, positions_of(view),
    )  # fmt: skip


def _counts(count: Any, mask: Mask | None) -> tuple[Array | None, float]:
    """Return the number of values of a slot as kernels take it: one for each row of a mask, or one for all.

    It may be that of a batch of which x is a part, so that the mask does not know it.
    """
    if mask is None:
        return None, float(count)
    return (count.reshape(-1) if getattr(count, "ndim", 0) else 0.0 * mask.counts + count), 0.0


def _slot_sums(view: View, sums: Sums, weight: Array | None) -> Array:
    """Sums of g and g * x_hat of every slot, interleaved, from the sums of its runs."""
    per_slot = size_of(sums[0]) // view.slots
    element = per_slot != view.width
    result = empty(2 * view.slots, np.float64, sums[0])
    weight = None if element else weight
    start(
        finish.weigh_kernel(optional_kind(weight)), blocks_for(view.slots), BLOCK, sums[0], *sums, weight, result,
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
    """Backward of slots that fit into registers; None where they do not, or where runs end within a warp's vectors."""
    rule = parameter_rule(view)
    across, by_run = (with_parameters and rule == r for r in (ELEMENT, RUN))
    width = width_for(view, [x, dy, dx, dresidual], epilogue, mask)
    lines = held_lines(view, width, registers_held(x, 4 if across else 2))
    if lines is None or (by_run and view.run % (WARP * lines.width)):
        return None
    assert (
        not by_run or view.outer == 1
    )  # whose pieces then lie one behind the other, each whole for its warp
    build = line_build(view, x, lines, epilogue, mask, mean is not None)
    bands = row_bands(view, lines.blocks * lines.warps) if across else Bands(1, view.slots // view.period)
    size = view.slots if with_parameters and rule == SLOT else 0
    sums = empty(size, np.float64, x), empty(size, np.float64, x)
    parts = empty(0, np.float64, x)
    if across:
        parts = empty(2 * bands.bands * view.period * view.inner, real(build.kind), x)
    elif by_run:
        parts = empty(2 * view.size // (WARP * lines.width), np.float64, x)
    blocks, threads = teams_of(bands.bands * view.period, lines)
    start(
        rows.backward_kernel(build, with_parameters, dresidual is not None), blocks, threads, x, x, dy, dx, dresidual,
        epilogue.weight, epilogue.bias, epilogue.residual, weights_of(mask), mean, rstd, *sums, parts,
        *_counts(count, mask), bands.bands, bands.band, view.slots, lines.values,
        lines.length, lines.pitch, lines.jump, lines.turn, view.period, view.width, view.run, positions_of(view),
    )  # fmt: skip
    if across:
        return _fold_bands(view, parts, bands.bands)
    if by_run:
        sums = _finish_sums(parts, view.slots * view.width, view.run // (WARP * lines.width))
    return (_by_parameter(view, sums[0]), _by_parameter(view, sums[1])) if with_parameters else sums
