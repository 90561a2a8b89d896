"""Arrays in the memory order that kernels walk: packing inputs, choosing and filling result buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nbnorm import _checks, _glance
from nbnorm._dispatch import library
from nbnorm._view import View, memory_order
from nbnorm.saved import Saved


def order(x: np.ndarray) -> tuple[int, ...] | None:
    """Memory order of an array, None if it has gaps."""
    return memory_order(x.shape, x.strides, x.itemsize)


def pack(x: np.ndarray) -> Any:
    """Copy an array into memory without gaps, its axes in the same order."""
    packed = empty_like(x)
    packed[...] = x
    return packed


def empty_like(x: Any) -> Any:
    """Return a new array of the shape, type, memory order and library of another one."""
    if isinstance(x, np.ndarray):
        return np.empty_like(x, subok=False)
    return library(x).empty_like(x)


Order = Callable[[], Sequence[int]]
Planner = Callable[[tuple[int, ...], tuple[int, ...], int], View | None]


def plan(x: np.ndarray, planner: Planner, fallback: Order) -> tuple[np.ndarray, View, tuple[int, ...] | None]:
    """Return x, packed once if its memory has no view, the view, and the order of results if packing changed it.

    An array with gaps is packed in its own order of axes, one in an order without a view in the order
    that ``fallback`` returns, which has one.
    """
    view = planner(x.shape, x.strides, x.itemsize)
    if view is None and order(x) is None:
        x = pack(x)
        view = planner(x.shape, x.strides, x.itemsize)
    if view is not None:
        return x, view, None
    order_with_view = fallback()
    packed = library(x).ascontiguousarray(x.transpose(order_with_view)).transpose(inverse(order_with_view))
    view = planner(packed.shape, packed.strides, packed.itemsize)
    assert view is not None
    axes = sorted(range(x.ndim), key=lambda axis: -x.strides[axis])
    return packed, view, tuple(axes)


def result(saved: Saved) -> Any:
    """Return a new array for dx in the memory order of the x that came."""
    if saved.order is None:
        return empty_like(saved.x)
    memory = library(saved.x).empty([saved.x.shape[axis] for axis in saved.order], saved.x.dtype)
    return memory.transpose(inverse(saved.order))


def inverse(axes: Sequence[int]) -> tuple[int, ...]:
    """Return the transposition that undoes another one."""
    return tuple(int(axis) for axis in np.argsort(axes))


def arrange(x: np.ndarray, like: np.ndarray) -> Any:
    """Return an array of equal shape in the memory order of another one, copied only if it differs."""
    if x.strides == like.strides or order(x) == order(like):
        return x
    arranged = empty_like(like)
    arranged[...] = x
    return arranged


def workspace(out: np.ndarray | None, like: np.ndarray, *inputs: np.ndarray | None) -> Any:
    """Return where a kernel may write: ``out`` itself, or a new array if its memory does not allow that.

    A buffer that coincides with an input is fine, since every element is read before it is written; one
    that overlaps an input otherwise, or is laid out differently, is filled from the new array by `deliver`.
    """
    if out is None or (out.strides != like.strides and order(out) != order(like)):
        return empty_like(like)
    if _glance.apart(out, *inputs):
        return out
    for x in inputs:
        if x is not None and x is not out and _checks.overlap(out, x) and _address(out) != _address(x):
            return empty_like(like)
    return out


def deliver(work: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    """Return the result in the buffer that was asked for."""
    if out is None or out is work:
        return work
    out[...] = work
    return out


def _address(x: np.ndarray) -> int:
    """Return where the first element lies."""
    if not isinstance(x, np.ndarray):
        return int(x.data.ptr)
    return int(x.__array_interface__["data"][0])
