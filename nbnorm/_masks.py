"""Masks: which positions count in the statistics, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nbnorm import _checks
from nbnorm._dispatch import library
from nbnorm._options import Mask
from nbnorm._view import View, memory_order

Array = np.ndarray


def arrange(weights: Array, x: Array, view: View, channel_axis: int) -> Mask:
    """Lay checked weights, of the shape of x without its channels, out as the kernels of a view walk over x."""
    order = memory_order(x.shape, x.strides, x.itemsize)
    assert order is not None
    axes = [axis for axis in range(x.ndim) if axis not in order] + list(order)
    xp = library(x)
    spread = xp.expand_dims(xp.asarray(weights), channel_axis).transpose(axes).reshape(-1)
    rows = view.slots // view.period if view.period else 0
    lines = spread.reshape(rows, spread.size // rows) if rows else spread[:0].reshape(0, 0)
    computing = np.float64 if x.itemsize == 8 else np.float32
    counts = lines.sum(axis=1, dtype=np.float64) * view.width
    return Mask(xp.ascontiguousarray(lines.astype(computing)), counts)  # a copy: the user's may change


def single(mask: Mask | None, view: View) -> bool:
    """Whether the statistics of a batch rest on one value per channel."""
    if mask is None:
        return view.values == 1
    return bool(mask.counts.size == 1 and mask.counts[0] == 1.0 and np.count_nonzero(mask.weights) == 1)


def without_uncounted(x: Array, mask: Mask, sample_axis: int) -> Any:
    """Return x with zeros wherever no value counts at all, so that its NaN leave no trace there."""
    empty = mask.counts == 0.0
    if not empty.any():
        return x
    cleaned = library(x).empty_like(x)
    cleaned[...] = x
    where: list[Any] = [slice(None)] * x.ndim
    if empty.size > 1:
        where[sample_axis] = empty
    cleaned[tuple(where)] = 0
    return cleaned


def check(value: Any, x_shape: Sequence[int], channel_axis: int) -> Any:
    """Return checked weights, broadcast to the shape of x without its channels."""
    return _checks.mask(value, tuple(n for axis, n in enumerate(x_shape) if axis != channel_axis))
