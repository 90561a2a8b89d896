"""The planner: every element in exactly one slot, the right parameter, and no copy where none is promised."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbnorm._view import (
    SEGMENT_BY_ROWS,
    SHORT_SEGMENT,
    View,
    batch_view,
    group_view,
    memory_order,
    trailing_view,
)

shapes = st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple)


def slots_and_parameters(view: View) -> tuple[np.ndarray, np.ndarray]:
    """Slot and parameter of every element in memory order, by the rule that the module states."""
    b, _, g, i = np.indices((view.batch, view.outer, view.group, view.inner)).reshape(4, -1)
    slot = b * view.group + g
    return slot, (slot % view.period) * view.width + i // view.run


def check(x: np.ndarray, view: View, slot_of: np.ndarray, parameter_of: np.ndarray) -> None:
    """Compare a view with labels by axes: equal labels must mean equal slots, and parameters must be the same."""
    assert np.shares_memory(x.ravel("K"), x) or x.size == 0
    slot, parameter = slots_and_parameters(view)
    assert view.size == x.size
    assert view.width * view.run == view.inner
    labels = memory_line(x, slot_of)
    pairs = set(zip(labels.tolist(), slot.tolist(), strict=True))
    assert len(pairs) == len(set(labels.tolist())) == len(set(slot.tolist())) == view.slots
    assert np.bincount(slot).tolist() == [view.values] * view.slots
    np.testing.assert_array_equal(parameter, memory_line(x, parameter_of))


def memory_line(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values by axes in the order in which the elements of x lie in memory."""
    line = np.empty(x.size, dtype=np.int64)
    offsets = np.zeros(x.shape, dtype=np.int64)
    for axis, index in enumerate(np.indices(x.shape)):
        offsets += index * (x.strides[axis] // x.itemsize)
    line[offsets.ravel()] = np.broadcast_to(values, x.shape).ravel()
    return line


def along(shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Index along one axis, broadcastable to the shape."""
    return np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])


def dense(shape: tuple[int, ...], order: tuple[int, ...]) -> np.ndarray:
    """An array whose axes lie in memory in the given order."""
    memory = np.zeros([shape[axis] for axis in order], np.float32)
    return memory.transpose(np.argsort(order))


@given(data=st.data(), shape=shapes)
def test_batch_view_plans_every_permutation_of_axes(data, shape):
    order = data.draw(st.permutations(range(len(shape))))
    axis = data.draw(st.integers(0, len(shape) - 1))
    x = dense(shape, tuple(order))
    view = batch_view(x.shape, x.strides, x.itemsize, axis)
    assert view is not None
    check(x, view, along(shape, axis), along(shape, axis))


@given(data=st.data(), shape=shapes, last=st.booleans())
def test_group_view_plans_channels_first_and_last(data, shape, last):
    channels, spatial = 6, shape[2:]
    groups = data.draw(st.sampled_from([1, 2, 3, 6]))
    full = (shape[0], *spatial, channels) if last else (shape[0], channels, *spatial)
    x = np.zeros(full, np.float32)
    axis = len(full) - 1 if last else 1
    view = group_view(x.shape, x.strides, x.itemsize, axis, groups)
    assert view is not None
    channel = along(full, axis)
    check(x, view, along(full, 0) * groups + channel // (channels // groups), channel)


@given(shape=shapes, last=st.booleans())
def test_instance_view_keeps_samples_and_channels(shape, last):
    x = np.zeros(shape, np.float64)
    axis = len(shape) - 1 if last else 1
    view = group_view(x.shape, x.strides, x.itemsize, axis, shape[axis])
    assert view is not None
    check(x, view, along(shape, 0) * shape[axis] + along(shape, axis), along(shape, axis))


@given(data=st.data(), shape=shapes)
def test_trailing_view_keeps_the_leading_axes(data, shape):
    normalized = data.draw(st.integers(1, len(shape)))
    x = np.zeros(shape, np.float32)
    view = trailing_view(x.shape, x.strides, x.itemsize, normalized)
    assert view is not None
    split = len(shape) - normalized
    rows = np.arange(np.prod(shape[:split], dtype=int)).reshape(*shape[:split], *[1] * normalized)
    elements = np.arange(np.prod(shape[split:], dtype=int)).reshape(*[1] * split, *shape[split:])
    check(x, view, rows, elements)


def per_channel(shape, strides, itemsize, channel_axis):
    """Instance norm: group norm with a group per channel."""
    return group_view(shape, strides, itemsize, channel_axis, shape[channel_axis])


# One row of the table of layouts per case: what is normalized, and the sizes and rule it is seen by.
TABLE = {
    "batch, channels first": (batch_view, (8, 3, 20, 20), 1, (1, 8, 3, 400, 3, 1, 400, "planes")),
    "batch, channels last": (batch_view, (8, 20, 20, 3), 3, (1, 3200, 3, 1, 3, 1, 1, "columns")),
    "batch, (N, C)": (batch_view, (32, 64), 1, (1, 32, 64, 1, 64, 1, 1, "columns")),
    "batch, short segments": (batch_view, (13, 32, 5, 5), 1, (1, 13, 32, 25, 32, 1, 25, "columns")),
    "instance, channels first": (per_channel, (8, 3, 20, 20), 1, (1, 1, 24, 400, 3, 1, 400, "planes")),
    "instance, channels last": (per_channel, (8, 20, 20, 3), 3, (8, 400, 3, 1, 3, 1, 1, "columns")),
}


def same(view, expected):
    """Whether a view is what its attributes say; two views are equal only if they are the same."""
    return repr(view) == repr(View(*expected))


@pytest.mark.parametrize("row", TABLE)
def test_table_of_layouts(row):
    plan, shape, axis, expected = TABLE[row]
    x = np.zeros(shape, np.float32)
    assert same(plan(x.shape, x.strides, x.itemsize, axis), expected)


def test_group_and_trailing_rows_of_the_table():
    strides = np.zeros((8, 6, 5, 5)).strides
    assert same(group_view((8, 6, 5, 5), strides, 8, 1, 2), (1, 1, 16, 75, 2, 3, 25, "planes"))
    strides = np.zeros((8, 5, 5, 6)).strides
    assert same(group_view((8, 5, 5, 6), strides, 8, 3, 2), (8, 25, 2, 3, 2, 3, 1, "columns"))
    strides = np.zeros((4, 5, 6)).strides
    assert same(trailing_view((4, 5, 6), strides, 8, 2), (1, 1, 4, 30, 1, 30, 1, "rows"))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("rows", [2, 3, SHORT_SEGMENT // SEGMENT_BY_ROWS + 1, 1000])
def test_short_segments_are_columns_where_there_are_enough_of_them(rows, dtype):
    longest = min(SHORT_SEGMENT, SEGMENT_BY_ROWS * rows) // np.dtype(dtype).itemsize
    for inner, traversal in ((longest, "columns"), (longest + 1, "planes")):
        x = np.empty((rows, 4, inner), dtype)
        view = batch_view(x.shape, x.strides, x.itemsize, 1)
        assert view is not None
        assert view.traversal == traversal


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((4, 6))[:, ::2],  # a gap between neighbours
        np.zeros((4, 6))[::2],  # a gap between rows
        np.zeros((4, 6))[::-1],  # backwards
        np.broadcast_to(np.zeros(6), (4, 6)),  # one element seen four times
    ],
    ids=["columns", "rows", "reversed", "broadcast"],
)
def test_gaps_need_a_packed_copy(x):
    assert memory_order(x.shape, x.strides, x.itemsize) is None
    assert batch_view(x.shape, x.strides, x.itemsize, 1) is None


def test_other_norms_pack_other_orders():
    x = dense((4, 6, 5, 5), (2, 0, 1, 3))
    assert group_view(x.shape, x.strides, x.itemsize, 1, 3) is None
    assert group_view(x.shape, x.strides, x.itemsize, 1, 6) is None
    x = dense((4, 6, 5), (0, 2, 1))
    assert trailing_view(x.shape, x.strides, x.itemsize, 2) is None


def test_empty_arrays_have_a_view():
    for shape in permutations((0, 3, 4)):
        x = np.zeros(shape)
        view = batch_view(x.shape, x.strides, x.itemsize, 1)
        assert view is not None
        assert (view.slots, view.size) == (shape[1], 0)
