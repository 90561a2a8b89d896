"""Every kind of layer: equal to its functions, and the same in all that a layer adds to them."""

import copy
import pickle

import numpy as np
import pytest

import nbnorm
import oracle
from layer_kinds import CHANNEL_KINDS, KINDS, SHAPE, drawn

on_kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
EPS = 0.03


def flat_state(layer):
    """Copy all arrays of a layer."""
    return {**layer.state_dict(), **{f"d{name}": grad.copy() for name, grad in layer.grads.items()}}


def assert_same_state(one, other):
    """Fail unless two layers hold the same bits."""
    one, other = flat_state(one), flat_state(other)
    assert list(one) == list(other)
    for name, value in one.items():
        oracle.assert_same_bits(value, other[name], name)


@on_kinds
def test_a_step_equals_the_functions(kind, rng):
    """Output and all gradients to the last bit, with an eps and parameters that are seen in them."""
    layer, (x, dy) = kind.drawn(SHAPE, rng, eps=EPS), drawn(rng)
    y, saved = kind.forward(x, *layer.params.values(), eps=EPS)
    dx, *gradients = kind.backward(dy, saved)
    oracle.assert_same_bits(layer(x), y)
    oracle.assert_same_bits(layer.backward(dy), dx)
    assert len(layer.grads) == len(gradients) == (1 if kind.name == "rms" else 2)
    for name, gradient in zip(layer.grads, gradients, strict=True):
        oracle.assert_same_bits(layer.grads[name], gradient, name)
    assert np.abs(y - kind.forward(x, *layer.params.values())[0]).max() > 1e-3, "eps is not seen"


@pytest.mark.parametrize("kind", CHANNEL_KINDS, ids=str)
def test_channels_last(kind, rng):
    """The same memory under other axes gives the same bits."""
    layer, (x, dy) = kind.drawn(SHAPE, rng), drawn(rng)
    twin = kind.make(SHAPE, channel_axis=-1)
    twin.load_state_dict(layer.state_dict())
    oracle.assert_same_bits(np.moveaxis(twin(np.moveaxis(x, 1, -1)), -1, 1), layer(x))
    oracle.assert_same_bits(np.moveaxis(twin.backward(np.moveaxis(dy, 1, -1)), -1, 1), layer.backward(dy))
    assert_same_state(twin, layer)


@on_kinds
def test_gradients_fill_or_accumulate_in_place(kind, rng):
    """The arrays in ``grads`` keep their identity: zeros at birth, filled, added to, zeroed."""
    layer, (x, dy) = kind.drawn(SHAPE, rng), drawn(rng)
    kept = dict(layer.grads)
    assert not any(gradient.any() for gradient in kept.values())
    layer(x)
    layer.backward(dy)
    once = {name: gradient.copy() for name, gradient in kept.items()}
    layer.backward(dy)
    for name, gradient in kept.items():
        oracle.assert_same_bits(gradient, once[name], "filled, not added to")
    layer.backward(dy, accumulate=True)
    for name, gradient in kept.items():
        assert layer.grads[name] is gradient
        oracle.assert_same_bits(gradient, once[name] + once[name], "added to")
    layer.zero_grad()
    assert not any(gradient.any() for gradient in kept.values())


@on_kinds
def test_calls_in_flight(kind, rng):
    """Each ``saved`` goes with its own backward, whatever the layer remembers."""
    layer = kind.drawn(SHAPE, rng)
    (x, dy), (other_x, other_dy) = drawn(rng), drawn(rng)
    layer(x)
    expected = layer.backward(dy)
    saved, other = layer.forward(x)[1], layer.forward(other_x)[1]
    layer(other_x)
    oracle.assert_same_bits(layer.backward(dy, saved), expected)
    oracle.assert_same_bits(layer.backward(other_dy, other), layer.backward(other_dy))


@on_kinds
def test_keep_and_out(kind, rng, poisoned):
    """keep=False remembers nothing, also of the call before; results go where they are asked to."""
    layer, (x, dy) = kind.drawn(SHAPE, rng), drawn(rng)
    with pytest.raises(RuntimeError, match="backward called before forward"):
        layer.backward(dy)
    y = layer(x)
    dx = layer.backward(dy)
    buffers = [poisoned(SHAPE, np.float32, layout) for layout in ("gaps inside", "F")]
    assert layer(x, out=buffers[0].out) is buffers[0].out
    assert layer.backward(dy, out=buffers[1].out) is buffers[1].out
    for buffer, expected in zip(buffers, (y, dx), strict=True):
        oracle.assert_same_bits(buffer.out, expected)
        buffer.assert_gaps_untouched()
    oracle.assert_same_bits(layer(x, keep=False), y)
    with pytest.raises(RuntimeError, match="after a call with keep=False"):
        layer.backward(dy)


@on_kinds
def test_a_failed_call_leaves_nothing_to_backward(kind, rng):
    """Not even the state of the call before; a wrong dy leaves the gradients alone and may be given anew."""
    layer, (x, dy) = kind.drawn(SHAPE, rng), drawn(rng)
    layer(x)
    before = flat_state(layer)
    with pytest.raises(ValueError, match=r"dy has shape \(3, 6, 5, 3\), expected \(4, 6, 5, 3\)"):
        layer.backward(dy[:3])
    with pytest.raises(TypeError, match=r"saved must be a nbnorm\.Saved, got int"):
        layer.backward(dy, 3)
    for name, value in flat_state(layer).items():
        oracle.assert_same_bits(value, before[name], name)
    assert layer.backward(dy).shape == SHAPE
    with pytest.raises(TypeError, match="x has dtype int64"):
        layer(np.ones(SHAPE, np.int64))
    with pytest.raises(RuntimeError, match="backward called before forward"):
        layer.backward(dy)


TRAVELS = {"pickle": lambda layer: pickle.loads(pickle.dumps(layer)), "deepcopy": copy.deepcopy}


@on_kinds
@pytest.mark.parametrize("travel", TRAVELS)
def test_copies_are_independent(kind, travel, rng):
    """A copy goes on exactly as the first does, and shares nothing with it but its settings."""
    layer, (x, dy) = kind.drawn(SHAPE, rng, eps=EPS, reuse_buffers=True), drawn(rng)
    layer(x)
    layer.backward(dy)
    twin = TRAVELS[travel](layer)
    assert repr(twin) == repr(layer)
    assert_same_state(twin, layer)
    with pytest.raises(RuntimeError, match="backward called before forward"):
        twin.backward(dy)
    before = flat_state(layer)
    y = twin(x).copy()
    dx = twin.backward(dy, accumulate=True).copy()
    for name, value in flat_state(layer).items():
        oracle.assert_same_bits(value, before[name], name)
    oracle.assert_same_bits(layer(x), y)
    oracle.assert_same_bits(layer.backward(dy, accumulate=True), dx)
    assert_same_state(twin, layer)
    assert not TRAVELS[travel](layer.eval()).training


@on_kinds
def test_state_travels_by_dictionary(kind, rng):
    """PyTorch's names; loading copies into the arrays that are there, all or nothing."""
    layer, twin = kind.drawn(SHAPE, rng), kind.make(SHAPE)
    kept, state = dict(twin.params), layer.state_dict()
    names = ["weight"] if kind.name == "rms" else ["weight", "bias"]
    assert list(state)[: len(names)] == list(kept) == names
    twin.load_state_dict({name: value.tolist() for name, value in state.items()})
    assert_same_state(twin, layer)
    before = flat_state(twin)
    wrong = {name: value + 1 for name, value in state.items()}
    wrong[names[-1]] = wrong[names[-1]][1:]
    with pytest.raises(ValueError, match=rf"{names[-1]} has shape .*, expected "):
        twin.load_state_dict(wrong)
    with pytest.raises(KeyError, match=r"missing keys \['weight'\] and unexpected keys \['gamma'\]"):
        twin.load_state_dict({"gamma" if name == "weight" else name: v for name, v in state.items()})
    for name, value in flat_state(twin).items():
        oracle.assert_same_bits(value, before[name], name)
    assert all(twin.params[name] is array for name, array in kept.items())
    twin.weight = np.full(kept["weight"].shape, 3.0)
    np.testing.assert_array_equal(kept["weight"], 3)


@on_kinds
def test_modes_and_birth(kind):
    """train and eval return the layer; parameters are neutral and of the type that was asked for."""
    layer = kind.make(SHAPE, dtype=np.float64)
    assert layer.training
    assert layer.eval() is layer
    assert not layer.training
    assert layer.train() is layer
    for name, neutral in (("weight", 1), ("bias", 0)):
        if name in layer.params:
            oracle.assert_same_bits(layer.params[name], np.full_like(layer.params[name], neutral))
    assert {array.dtype for array in (*layer.params.values(), *layer.grads.values())} == {np.dtype(float)}


def test_without_parameters(rng):
    """A layer without a scale or a shift returns dx alone."""
    x, dy = drawn(rng)
    layer = nbnorm.InstanceNorm(6)
    y, saved = nbnorm.instance_norm_forward(x)
    oracle.assert_same_bits(layer(x), y)
    oracle.assert_same_bits(layer.backward(dy, accumulate=True), nbnorm.instance_norm_backward(dy, saved)[0])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name in ("batch", "layer")], ids=str)
@pytest.mark.parametrize("reuse_buffers", [False, True], ids=["new arrays", "reused"])
def test_half_types(kind, reuse_buffers, rng):
    """Activations of two bytes with parameters of four: the layer has no say in it."""
    layer, (x, dy) = kind.drawn(SHAPE, rng, reuse_buffers=reuse_buffers), drawn(rng, dtype=np.float16)
    y, saved = kind.forward(x, *layer.params.values())
    dx, *gradients = kind.backward(dy, saved)
    oracle.assert_same_bits(layer(x), y)
    oracle.assert_same_bits(layer.backward(dy), dx)
    assert y.dtype == dx.dtype == np.float16
    for name, gradient in zip(layer.grads, gradients, strict=True):
        oracle.assert_same_bits(layer.grads[name], gradient, name)
        assert gradient.dtype == np.float32
