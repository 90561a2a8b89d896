"""Verbs of the forward pass: one kernel where a slot fits into the registers of a team, else one per pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbnorm._cuda import columns, finish, planes, rows
from nbnorm._cuda.arrays import empty, zeros
from nbnorm._cuda.builds import (
    NO_EPILOGUE,
    column_build,
    line_build,
    positions_of,
    registers_held,
    weights_of,
    width_for,
)
from nbnorm._cuda.launch import Lines, blocks_of, column_lanes, held_lines, start, streamed_lines, teams_of
from nbnorm._cuda.memory import BLOCK, kind_of
from nbnorm._cuda.pieces import Build
from nbnorm._cuda.statistics import rstd
from nbnorm._options import Epilogue, Mask
from nbnorm._view import View

Array = Any


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
    width = width_for(view, [x], NO_EPILOGUE, mask)
    lines = _held_lines(view, x, width, mask)
    if lines is not None:
        held_forward(view, lines, x, None, NO_EPILOGUE, 1.0, mask, mean, m2, None)
        return mean, m2
    lines = streamed_lines(view, view.inner, width)
    build = line_build(view, x, lines, NO_EPILOGUE, mask, centered)
    parts = empty(3 * view.slots * lines.chunks, np.float64, x)
    start(
        planes.moments_kernel(build), blocks_of(view.slots * lines.chunks), BLOCK, x,
        x, weights_of(mask), parts, lines.chunks, lines.chunk, view.slots, lines.values, lines.length, lines.pitch,
        lines.jump, lines.turn, view.period, view.run, positions_of(view),
    )  # fmt: skip
    _finish_moments(view, parts, lines.chunks, mean, m2)
    return mean, m2


def _held_lines(view: View, x: Array, width: int, mask: Mask | None) -> Lines | None:
    """Return the team that holds x of a slot, and its weights, None if there is none: the same for all verbs."""
    return held_lines(view, width, registers_held(x, 1 if mask is None else 2))


def _column_moments(view: View, x: Array, mask: Mask | None, mean: Array | None, m2: Array) -> None:
    lanes = column_lanes(view, width_for(view, [x], NO_EPILOGUE, mask))
    build = Build(kind_of(x.dtype), lanes.width, 1, 1, has_mask=mask is not None)
    parts = empty(3 * view.batch * lanes.lanes * lanes.chunks, np.float64, x)
    start(
        columns.moments_kernel(build), view.batch * lanes.chunks * lanes.lane_blocks, lanes.threads, x,
        x, weights_of(mask), parts, lanes.lane_blocks, lanes.chunks, lanes.chunk, lanes.lanes, view.outer, view.group,
        view.inner, view.period, view.run, positions_of(view),
    )  # fmt: skip
    _finish_moments(view, parts, view.inner * lanes.chunks, mean, m2)


def _finish_moments(view: View, parts: Array, count: int, mean: Array | None, m2: Array) -> None:
    """Merge the parts of every slot."""
    kernel = finish.moments_kernel(mean is not None)
    start(kernel, blocks_of(view.slots), BLOCK, parts, parts, mean, m2, view.slots, count)


def apply(view: View, x: Array, y: Array, mean: Array | None, rstd: Array, epilogue: Epilogue) -> None:
    """Normalize x with given statistics into y."""
    if not view.size:
        return
    width = width_for(view, [x, y], epilogue, None)
    arrays = (x, y, epilogue.weight, epilogue.bias, epilogue.residual, mean, rstd)
    if view.traversal == "columns":
        lanes = column_lanes(view, width)
        build = column_build(x, lanes.width, epilogue, None, mean is not None)
        blocks = view.batch * lanes.chunks * lanes.lane_blocks
        start(
            columns.apply_kernel(build), blocks, lanes.threads, x, *arrays, lanes.lane_blocks, lanes.chunks,
            lanes.chunk, lanes.lanes, view.outer, view.group, view.inner, view.period, view.run, blocks,
        )  # fmt: skip
        return
    lines = streamed_lines(view, view.inner, width)
    build = line_build(view, x, lines, epilogue, None, mean is not None)
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
        lines = _held_lines(view, x, width_for(view, [x, y], epilogue, mask), mask)
    if lines is None:
        mean, m2 = moments(view, x, centered, mask)
        slot_rstd = rstd(m2, view.values if mask is None else mask.counts, eps)
        apply(view, x, y, mean, slot_rstd, epilogue)
        return mean, m2, slot_rstd
    m2, slot_rstd = empty(view.slots, np.float64, x), empty(view.slots, np.float64, x)
    mean = empty(view.slots, np.float64, x) if centered else None
    held_forward(view, lines, x, y, epilogue, eps, mask, mean, m2, slot_rstd)
    return mean, m2, slot_rstd


def held_forward(
    view: View, lines: Lines, x: Array, y: Array | None, epilogue: Epilogue, eps: float, mask: Mask | None,
    mean: Array | None, m2: Array, rstd: Array | None,
) -> None:  # fmt: skip
    """Statistics of slots that fit into registers and, where there is room for it, y."""
    build = line_build(view, x, lines, epilogue, mask, mean is not None)
    blocks, threads = teams_of(view.slots, lines)
    start(
        rows.forward_kernel(build, y is not None), blocks, threads, x, x, y, epilogue.weight, epilogue.bias,
        epilogue.residual, weights_of(mask), mean, m2, rstd, float(eps), view.slots, lines.values, lines.length,
        lines.pitch, lines.jump, lines.turn, view.period, view.width, view.run, positions_of(view),
    )  # fmt: skip
