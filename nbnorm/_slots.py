"""The forward pass that layer, RMS, group and instance norm share: statistics of x alone, no state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nbnorm import _checks, _layout
from nbnorm._dispatch import backend
from nbnorm._layout import Planner
from nbnorm._view import group_view, trailing_view
from nbnorm.saved import Saved

Array = np.ndarray
Shape = tuple[int, ...]


def channels_forward(
    norm: str, x: Any, groups_of: Callable[[int], int], weight: Any, bias: Any, eps: Any, channel_axis: Any,
    out: Array | None,
) -> tuple[Array, Saved]:  # fmt: skip
    """Normalize groups of channels of each sample; ``groups_of`` turns their number into that of the groups."""
    source = _checks.array("x", x)
    _checks.at_least_2d(norm, source)
    axis = _checks.axis("channel_axis", channel_axis, source.ndim)
    weight = _checks.parameter("weight", weight, axis, source.shape)
    bias = _checks.parameter("bias", bias, axis, source.shape)
    groups = groups_of(source.shape[axis])
    sample_axis = 1 if axis == 0 else 0
    order = [sample_axis, axis, *(i for i in range(source.ndim) if i not in (sample_axis, axis))]

    def planner(shape: Shape, strides: Shape, itemsize: int) -> Any:
        return group_view(shape, strides, itemsize, axis, groups)

    return _forward(norm, source, planner, order, (source.shape[sample_axis], groups), weight, bias, eps, out)


def trailing_forward(
    norm: str, x: Any, axis: Any, weight: Any, bias: Any, eps: Any, out: Array | None, centered: bool
) -> tuple[Array, Saved]:
    """Normalize over trailing axes."""
    source = _checks.array("x", x)
    split = _checks.trailing_axes(norm, axis, source.ndim)
    normalized = source.shape[split:]
    weight = _checks.normalized_parameter("weight", weight, normalized, source.shape)
    bias = _checks.normalized_parameter("bias", bias, normalized, source.shape)

    def planner(shape: Shape, strides: Shape, itemsize: int) -> Any:
        return trailing_view(shape, strides, itemsize, len(normalized))

    order = range(source.ndim)
    return _forward(norm, source, planner, order, source.shape[:split], weight, bias, eps, out, centered)


def _forward(
    norm: str, source: Array, planner: Planner, order: Sequence[int], statistics: Shape, weight: Any, bias: Any,
    eps: Any, out: Array | None, centered: bool = True,
) -> tuple[Array, Saved]:  # fmt: skip
    """Plan, normalize and keep what backward needs; ``statistics`` is the shape of the means."""
    eps = _checks.eps(eps)
    if out is not None:
        _checks.out("out", out, source.shape, source.dtype)
        _checks.disjoint("out", out, [("x", source)], ", which backward needs")
        _checks.disjoint_from_parameters("out", out, weight, bias)
    x, view, result_order = _layout.plan(source, planner, order)
    target = np.empty_like(source) if out is None else out
    work = _layout.workspace(target, x)
    mean, m2, rstd = backend(x).forward(view, x, work, weight, bias, eps, centered)
    y = _layout.deliver(work, target)
    if eps == 0.0 and view.size and not m2.all():
        warnings.warn(f"invalid value encountered in {norm}_forward", RuntimeWarning, stacklevel=4)
    saved = Saved(
        norm, x, weight, bias, mean.reshape(statistics) if centered else None, rstd.reshape(statistics),
        np.float64(view.values), None, False, view, result_order,
    )  # fmt: skip
    return y, saved
