"""From the arguments of a verb to what its kernel is compiled for."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbnorm._cuda.arrays import is_aligned
from nbnorm._cuda.launch import Lines, parameter_rule, vector_width
from nbnorm._cuda.memory import kind_of
from nbnorm._cuda.pieces import ABSENT, ELEMENT, SLOT, Build
from nbnorm._options import Epilogue, Mask
from nbnorm._view import View

Array = Any
NO_EPILOGUE = Epilogue()


def size_of(x: Any) -> int:
    """Elements of an array of any library."""
    return int(np.prod(x.shape, dtype=np.int64))


def optional_kind(x: Array | None) -> int:
    """Return the kind of an optional array."""
    return ABSENT if x is None else kind_of(x.dtype)


def weights_of(mask: Mask | None) -> Array | None:
    return None if mask is None else mask.weights


def positions_of(view: View) -> int:
    """Positions of a row of a mask."""
    return view.outer * view.run


def registers_held(x: Array, arrays: int) -> int:
    """Return how many registers an element takes of which a thread holds ``arrays``."""
    return arrays * (2 if x.dtype.itemsize == 8 else 1)


def what_dz_needs(epilogue: Epilogue, element: bool) -> Epilogue:
    """Leave out what the sums of dz do not depend on."""
    if epilogue.activation is not None:
        return epilogue
    return Epilogue(epilogue.weight if element else None)


def width_for(view: View, xs: list[Array | None], epilogue: Epilogue, mask: Mask | None) -> int:
    """Elements of a vector: all arrays aligned, and no vector across the end of a run, a segment or a row."""
    arrays = [*xs, epilogue.residual, weights_of(mask)]
    if view.traversal == "columns":
        neighbours = view.group * view.inner
    else:
        rule = parameter_rule(view)
        neighbours = view.inner if rule in (SLOT, ELEMENT) else view.run
        if rule == ELEMENT:
            arrays += [epilogue.weight, epilogue.bias]
    if mask is not None and view.traversal != "columns" and positions_of(view) % 8:
        return 1  # rows of the mask start off a vector
    return vector_width(optional_kind(xs[0]), neighbours, is_aligned(arrays, xs[0]))


def named_activation(epilogue: Epilogue) -> tuple[str, float] | None:
    """Name and slope of an activation from its marker."""
    marker = epilogue.activation
    if marker is None:
        return None
    if isinstance(marker, (bool, np.bool_)):
        return "relu", 0.0
    return ("leaky_relu", float(marker)) if isinstance(marker, (float, np.floating)) else ("silu", 0.0)


def line_build(
    view: View, x: Array, lines: Lines, epilogue: Epilogue, mask: Mask | None, centered: bool
) -> Build:
    return Build(
        kind_of(x.dtype), lines.width, lines.steps, lines.warps, parameter_rule(view), optional_kind(epilogue.weight),
        optional_kind(epilogue.bias), epilogue.residual is not None, named_activation(epilogue), mask is not None,
        centered, view.outer == 1, lines.blocks,
    )  # fmt: skip


def column_build(x: Array, width: int, epilogue: Epilogue, mask: Mask | None, centered: bool) -> Build:
    return Build(
        kind_of(x.dtype), width, 1, 1, SLOT, optional_kind(epilogue.weight), optional_kind(epilogue.bias),
        epilogue.residual is not None, named_activation(epilogue), mask is not None, centered,
    )  # fmt: skip
