"""Where results go: buffers of any strides, buffers that are inputs too, and gradients nobody asked for."""

import numpy as np
import pytest

import nbnorm
import oracle
from cases import COLUMNS, PLANES, TRAVERSALS

on_traversals = pytest.mark.parametrize("case", TRAVERSALS, ids=lambda case: case.reason)
on_both_kinds = pytest.mark.parametrize("case", [PLANES, COLUMNS], ids=lambda case: case.reason)


@on_traversals
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_need(case, training, rng):
    """Any subset of the gradients has the bits of the full set; the others are None."""
    names = ("dx", "dweight", "dbias")
    x, dy = case.x(rng, np.float32), case.dy(rng, np.float32)
    running = case.running(rng)
    saved = nbnorm.batch_norm_forward(x, *case.parameters(rng, np.float32), *running, training=training)[1]
    full = nbnorm.batch_norm_backward(dy, saved)
    for need in ((), ("dx",), ("dweight",), ("dbias",), ("dx", "dbias"), ["dbias", "dweight"], names[::-1]):
        found = nbnorm.batch_norm_backward(dy, saved, need=need)
        for name, one, expected in zip(names, found, full, strict=True):
            if name in need:
                oracle.assert_same_bits(one, expected, name)
            else:
                assert one is None, name


OUT_LAYOUTS = [
    "C",
    "F",
    "axis 1 fastest",
    "gaps inside",
    "gaps outside",
    "gaps on axis 1",
    "all reversed",
    "inner block",
]


@on_traversals
@pytest.mark.parametrize("layout", OUT_LAYOUTS)
def test_out(case, layout, rng, poisoned):
    """A result buffer of any strides gets every element, and nothing beside it is written."""
    x, dy = case.x(rng, np.float32), case.dy(rng, np.float32)
    parameters, running = case.parameters(rng, np.float32), case.running(rng)
    y, saved = nbnorm.batch_norm_forward(x, *parameters)
    expected = [
        y,
        nbnorm.batch_norm_backward(dy, saved)[0],
        nbnorm.batch_norm_inference(x, *running, *parameters),
    ]
    buffers = [poisoned(x.shape, x.dtype, layout) for _ in expected]
    y, saved = nbnorm.batch_norm_forward(x, *parameters, out=buffers[0].out)
    dx = nbnorm.batch_norm_backward(dy, saved, out=(buffers[1].out, None, None))[0]
    inferred = nbnorm.batch_norm_inference(x, *running, *parameters, out=buffers[2].out)
    for found, buffer, value in zip((y, dx, inferred), buffers, expected, strict=True):
        assert found is buffer.out
        oracle.assert_same_bits(found, value)
        buffer.assert_gaps_untouched()


def test_out_of_parameter_gradients(rng, poisoned):
    """Buffers for dweight and dbias, with gaps too, and a buffer that is not needed stays as it is."""
    x, dy = PLANES.x(rng, np.float32), PLANES.dy(rng, np.float32)
    saved = nbnorm.batch_norm_forward(x, *PLANES.parameters(rng, np.float32))[1]
    expected = nbnorm.batch_norm_backward(dy, saved)
    buffers = [poisoned(e.shape, e.dtype, "gaps inside") for e in expected]
    found = nbnorm.batch_norm_backward(dy, saved, out=tuple(buffer.out for buffer in buffers))
    for one, buffer, value in zip(found, buffers, expected, strict=True):
        assert one is buffer.out
        oracle.assert_same_bits(one, value)
        buffer.assert_gaps_untouched()


@on_both_kinds
def test_inference_into_its_input(case, rng):
    """An exact alias is allowed; a partial overlap gives the result of disjoint arrays."""
    x, parameters, running = case.x(rng, np.float32), case.parameters(rng, np.float32), case.running(rng)
    expected = nbnorm.batch_norm_inference(x, *running, *parameters)
    alias = x.copy()
    assert nbnorm.batch_norm_inference(alias, *running, *parameters, out=alias) is alias
    oracle.assert_same_bits(alias, expected)
    for source, target in (
        (slice(None, -1), slice(1, None)),
        (slice(1, None), slice(None, -1)),
        (slice(1, None), slice(-1, 0, -1)),
    ):
        block = np.concatenate([x, x[:1]])
        block[source] = x
        nbnorm.batch_norm_inference(block[source], *running, *parameters, out=block[target])
        oracle.assert_same_bits(block[target], expected)


@on_both_kinds
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_dx_into_dy(case, training, rng):
    """An exact alias is allowed; a partial overlap gives the result of disjoint arrays."""
    x, dy = case.x(rng, np.float32), case.dy(rng, np.float32)
    parameters, running = case.parameters(rng, np.float32), case.running(rng)
    saved = nbnorm.batch_norm_forward(x, *parameters, *running, training=training)[1]
    expected = nbnorm.batch_norm_backward(dy, saved)
    alias = dy.copy()
    found = nbnorm.batch_norm_backward(alias, saved, out=(alias, None, None))
    block = np.concatenate([dy, dy[:1]])
    shifted = nbnorm.batch_norm_backward(block[:-1], saved, out=(block[1:], None, None))
    for one, two, value in zip(found, shifted, expected, strict=True):
        oracle.assert_same_bits(one, value)
        oracle.assert_same_bits(two, value)


@on_both_kinds
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_dx_into_x(case, training, rng):
    """Whoever needs x no more may give its memory away: all of it, or a part."""
    dy, parameters, running = case.dy(rng, np.float32), case.parameters(rng, np.float32), case.running(rng)
    values = case.x(rng, np.float32)
    for source, target in ((slice(1, None), slice(1, None)), (slice(1, None), slice(None, -1))):
        block = np.concatenate([values[:1], values])
        saved = nbnorm.batch_norm_forward(
            block[source], *parameters, *running, training=training, momentum=0
        )[1]
        expected = nbnorm.batch_norm_backward(dy, saved)
        found = nbnorm.batch_norm_backward(dy, saved, out=(block[target], None, None))
        for one, value in zip(found, expected, strict=True):
            oracle.assert_same_bits(one, value)
