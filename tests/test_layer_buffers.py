"""Layers that write into the same arrays again and again: same results, no new arrays, no stale state."""

import tracemalloc

import numpy as np
import pytest

import nbnorm
import oracle
from layer_kinds import KINDS, SHAPE, drawn
from nbnorm._buffers import LAYOUTS, Buffers

on_kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


@on_kinds
@pytest.mark.parametrize("accumulate", [False, True], ids=["fill", "accumulate"])
def test_same_results_in_the_same_arrays(kind, accumulate, rng):
    """Three steps have the bits of a layer without buffers, and the addresses of the first step."""
    layer, twin = kind.drawn(SHAPE, rng, reuse_buffers=True), kind.make(SHAPE)
    twin.load_state_dict(layer.state_dict())
    firsts = []
    for _ in range(3):
        x, dy = drawn(rng)
        y, dx = layer(x), layer.backward(dy, accumulate=accumulate)
        oracle.assert_same_bits(y, twin(x))
        oracle.assert_same_bits(dx, twin.backward(dy, accumulate=accumulate))
        for name, gradient in twin.grads.items():
            oracle.assert_same_bits(layer.grads[name], gradient, name)
        firsts = firsts or [y, dx]
        assert y is firsts[0]
        assert dx is firsts[1]


@on_kinds
def test_layouts_have_buffers_of_their_own(kind, rng):
    """A ragged last batch, another type and another memory order each keep theirs, and results their order."""
    layer, (x, dy) = kind.drawn(SHAPE, rng, reuse_buffers=True), drawn(rng)
    whole, part = layer(x), layer(x[:2])
    assert whole is layer(x)
    assert part is layer(x[:2])
    turned = np.ascontiguousarray(np.moveaxis(x, 0, -1))
    turned = np.moveaxis(turned, -1, 0)  # x with the samples innermost in memory
    y = layer(turned)
    assert y.strides == turned.strides
    assert layer.backward(dy).strides == turned.strides
    assert y is layer(turned)
    assert y is not layer(x)
    assert layer(x) is whole
    mine = np.empty_like(x)
    assert layer(x, out=mine) is mine
    assert layer.backward(dy, out=mine) is mine


@on_kinds
def test_stale_state_is_refused(kind, rng):
    """A later forward, kept or not, takes the buffers over; backward of the latest may run twice."""
    layer, (x, dy) = kind.drawn(SHAPE, rng, reuse_buffers=True), drawn(rng)
    first, second = layer.forward(x)[1], layer.forward(x)[1]
    expected = layer.backward(dy, second).copy()
    oracle.assert_same_bits(layer.backward(dy, second), expected)
    with pytest.raises(RuntimeError, match="saved is stale: with reuse_buffers=True"):
        layer.backward(dy, first)
    layer(x, keep=False)
    with pytest.raises(RuntimeError, match="saved is stale"):
        layer.backward(dy, second)
    with pytest.raises(RuntimeError, match="backward called before forward"):
        layer.backward(dy)


@on_kinds
def test_a_result_is_no_input(kind, rng):
    """What the layer is about to write again is refused, and so is a part of it; a copy is fine."""
    layer, (x, dy) = kind.drawn(SHAPE, rng, reuse_buffers=True), drawn(rng)
    y, dx = layer(x), layer.backward(dy)
    for result in (y, dx, y[:2], dx[::-1]):
        with pytest.raises(ValueError, match="x shares memory with an earlier result of this layer"):
            layer(result)
    assert layer(y.copy()) is y
    assert layer.backward(dx) is dx  # a gradient may be replaced by the next


@on_kinds
def test_a_step_allocates_no_array(kind, rng):
    """After the first step arrays do not grow by a byte, and within a step only statistics come and go."""
    shape = (8, 8, 16, 16)  # below the size that starts threads, whose kernels compile long
    layer, (x, dy) = kind.drawn(shape, rng, reuse_buffers=True), drawn(rng, shape)

    def step():
        layer(x)
        layer.backward(dy)
        layer.backward(dy, accumulate=True)

    def arrays():
        only = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
        return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([only]).traces)

    step()
    tracemalloc.start()
    try:
        step()
        before = arrays()
        tracemalloc.reset_peak()
        start = tracemalloc.get_traced_memory()[0]
        for _ in range(20):
            step()
        peak = tracemalloc.get_traced_memory()[1] - start
        assert arrays() == before
    finally:
        tracemalloc.stop()
    assert peak < x.nbytes / 4


def test_buffers_are_bounded():
    """The layout that has waited longest gives way; one that is in use stays."""
    buffers = Buffers()
    first = buffers.get("y", np.empty(1))
    for n in range(2, LAYOUTS + 2):
        assert buffers.get("y", np.empty(1)) is first
        buffers.get("y", np.empty(n))
    assert sum(1 for _ in buffers) == LAYOUTS
    assert 2 not in {array.size for array in buffers}
    assert buffers.get("dx", np.empty(1)) is not first


def test_without_the_option_results_are_new(rng):
    """The neutral default: nothing is shared, nothing is stale."""
    layer, (x, _) = nbnorm.BatchNorm(6), drawn(rng)
    assert not layer.reuse_buffers
    assert not np.shares_memory(layer(x), layer(x))
