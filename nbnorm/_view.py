"""The canonical view: every normalization is one computation on ``(batch, outer, group, inner)``.

Statistics belong to a *slot*, one (batch, group) pair, and are reduced over outer and inner.
Element (slot k, inner i) uses parameter ``(k % period) * width + i // run``, with
``width * run == inner``. Views are planned once from shapes and strides, with plain integers, and cached.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

# Bytes of the longest channels-first segments that are walked as columns of C*S lanes, and of a segment for each row of
# lanes: SIMD loops over shorter segments are mostly head and tail, but each lane has sums and coefficients of its own,
# for which it takes some rows (segments of 9 to 121 values in 2 to 128 rows; benchmarks/choices.py, Zen 4).
SHORT_SEGMENT = 256
SEGMENT_BY_ROWS = 12

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class View:
    """An array in memory order seen as ``(batch, outer, group, inner)``.

    Two are equal if they are the same: views are keys of the cache of launches, which small calls notice.

    Attributes
    ----------
    batch, outer, group, inner : int
        The canonical sizes: batch * group slots of outer * inner values each.
    period, width, run : int
        The parameter rule (see the module).
    traversal : {"rows", "planes", "columns"}
        How memory is walked: along segments with a parameter per element, along segments with a
        parameter per run of elements, or down the columns of all lanes.
    slots, values, size : int
        Number of means and variances, of values in a slot, and of elements.
    """

    batch: int
    outer: int
    group: int
    inner: int
    period: int
    width: int
    run: int
    traversal: str
    slots: int = field(init=False, repr=False)
    values: int = field(init=False, repr=False)
    size: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", self.batch * self.group)
        object.__setattr__(self, "values", self.outer * self.inner)
        object.__setattr__(self, "size", self.slots * self.values)


@lru_cache(maxsize=4096)
def memory_order(shape: Shape, strides: Shape, itemsize: int) -> Shape | None:
    """Return the axes longer than one from slowest to fastest, or None for an array with gaps.

    Two arrays of one shape whose memory orders are equal put every element at the same place. Overlapping
    elements and negative strides count as gaps; an empty array has none.
    """
    order = tuple(sorted((axis for axis, n in enumerate(shape) if n > 1), key=lambda axis: -strides[axis]))
    if 0 in shape:
        return order
    step = itemsize
    for axis in reversed(order):
        if strides[axis] != step:
            return None
        step *= shape[axis]
    return order


def sample_axis(channel_axis: int) -> int:
    """Return the axis of the samples, the first one that is not the channels' (which count from the front)."""
    return 1 if channel_axis == 0 else 0


def short(rows: int, segment: int) -> bool:
    """Whether so many segments of so many bytes should lie side by side as columns."""
    return segment <= min(SHORT_SEGMENT, SEGMENT_BY_ROWS * rows)


@lru_cache(maxsize=4096)
def batch_view(
    shape: Shape, strides: Shape, itemsize: int, channel_axis: int, masked: bool = False
) -> View | None:
    """Plan batch norm: any dense permutation of the axes, a slot per channel; None for an array with gaps.

    A mask gives every position its weight, so that short segments cannot lie side by side as columns.
    """
    order = memory_order(shape, strides, itemsize)
    if order is None:
        return None
    channels = shape[channel_axis]
    at = order.index(channel_axis) if channels > 1 else 0
    outer = prod(shape[axis] for axis in order[:at])
    inner = prod(shape) // (outer * channels) if channels else 0
    down = inner == 1 or (outer > 1 and not masked and short(outer, inner * itemsize))
    return View(1, outer, channels, inner, channels, 1, inner, "columns" if down else "planes")


@lru_cache(maxsize=4096)
def group_view(
    shape: Shape, strides: Shape, itemsize: int, channel_axis: int, num_groups: int, plain: bool = True
) -> View | None:
    """Plan group norm: blocks of neighbouring channels of one sample share statistics; of one channel: instance norm.

    Samples lie on the first axis that is not the channels'. Memory order (samples, channels, space) and
    (samples, space, channels) need no copy; None stands for every other one. Rows take no option but weight and
    bias, so that anything else is not ``plain`` and goes down columns.
    """
    order = memory_order(shape, strides, itemsize)
    if order is None:
        return None
    at = sample_axis(channel_axis)
    samples, channels = shape[at], shape[channel_axis]
    width = channels // num_groups if num_groups else 0
    space = prod(n for axis, n in enumerate(shape) if axis not in (at, channel_axis))
    spatial = tuple(axis for axis in order if axis not in (at, channel_axis))
    sample = (at,) if samples > 1 else ()
    channel = (channel_axis,) if channels > 1 else ()
    if order == sample + channel + spatial or 0 in shape:
        if space == 1 and width > 1 and not plain:
            return View(samples, 1, num_groups, width, num_groups, width, 1, "columns")
        traversal = "rows" if space == 1 and width > 1 else "planes"
        return View(1, 1, samples * num_groups, width * space, num_groups, width, space, traversal)
    if order == sample + spatial + channel:
        return View(samples, space, num_groups, width, num_groups, width, 1, "columns")
    return None


@lru_cache(maxsize=4096)
def trailing_view(shape: Shape, strides: Shape, itemsize: int, normalized: int) -> View | None:
    """Plan layer and RMS norm over the last ``normalized`` axes; None where the array is not in C order."""
    order = memory_order(shape, strides, itemsize)
    if order is None or list(order) != sorted(order):
        return None
    split = len(shape) - normalized
    rows, width = prod(shape[:split]), prod(shape[split:])
    return View(1, 1, rows, width, 1, width, 1, "rows")
