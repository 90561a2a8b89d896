"""Arrays in the memory order that kernels walk: packing inputs, choosing and filling result buffers."""

from __future__ import annotations

import numpy as np

from nbnorm import _checks
from nbnorm._view import View, batch_view, memory_order


def order(x: np.ndarray) -> tuple[int, ...] | None:
    """Memory order of an array, None if it has gaps."""
    return memory_order(x.shape, x.strides, x.itemsize)


def pack(x: np.ndarray) -> np.ndarray:
    """Copy an array into memory without gaps, its axes in the same order."""
    packed = np.empty_like(x, subok=False)
    packed[...] = x
    return packed


def plan_batch(x: np.ndarray, channel_axis: int) -> tuple[np.ndarray, View]:
    """Return x, packed once if it has gaps, and its view."""
    view = batch_view(x.shape, x.strides, x.itemsize, channel_axis)
    if view is None:
        return plan_batch(pack(x), channel_axis)
    return x, view


def arrange(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Return an array of equal shape in the memory order of another one, copied only if it differs."""
    if x.strides == like.strides or order(x) == order(like):
        return x
    arranged = np.empty_like(like)
    arranged[...] = x
    return arranged


def workspace(out: np.ndarray | None, like: np.ndarray, *inputs: np.ndarray) -> np.ndarray:
    """Return where a kernel may write: ``out`` itself, or a new array if its memory does not allow that.

    A buffer that coincides with an input is fine, since every element is read before it is written; one
    that overlaps an input otherwise, or is laid out differently, is filled from the new array by `deliver`.
    """
    if out is None:
        return np.empty_like(like)
    if order(out) != order(like):
        return np.empty_like(like)
    for x in inputs:
        if _checks.overlap(out, x) and _address(out) != _address(x):
            return np.empty_like(like)
    return out


def deliver(work: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    """Return the result in the buffer that was asked for."""
    if out is None or out is work:
        return work
    out[...] = work
    return out


def _address(x: np.ndarray) -> int:
    """Return where the first element lies."""
    return int(x.__array_interface__["data"][0])
