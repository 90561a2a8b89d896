"""Every kind of layer: equal to its functions, and the same in all that a layer adds to them."""

import copy
import pickle
import sys
from types import ModuleType

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


REPRS = [
    (nbnorm.BatchNorm(12, momentum=0.3, channel_axis=-1), "BatchNorm(12, momentum=0.3, channel_axis=-1)"),
    (nbnorm.BatchNorm(2, momentum=None, dtype=np.float64), "BatchNorm(2, momentum=None, dtype='float64')"),
    (nbnorm.LayerNorm(768, center=False), "LayerNorm((768,), center=False)"),
    (nbnorm.RMSNorm((2, np.uint8(200)), eps=0), "RMSNorm((2, 200), eps=0.0)"),
    (nbnorm.GroupNorm(2, 6, activation="relu"), "GroupNorm(2, 6, activation='relu')"),
    (nbnorm.InstanceNorm(3), "InstanceNorm(3)"),
    (
        nbnorm.InstanceNorm(3, affine=True, reuse_buffers=1),
        "InstanceNorm(3, affine=True, reuse_buffers=True)",
    ),
]


@pytest.mark.parametrize(("layer", "text"), REPRS, ids=[text for _, text in REPRS])
def test_repr(layer, text):
    """A layer shows what was chosen, as the call that makes it again."""
    assert repr(layer) == text
    assert repr(eval(text, vars(nbnorm))) == text


PARAMETERS = [
    (nbnorm.LayerNorm, (5,), {}, ["weight", "bias"]),
    (nbnorm.LayerNorm, (5,), {"center": False}, ["weight"]),
    (nbnorm.LayerNorm, (5,), {"scale": False}, ["bias"]),
    (nbnorm.LayerNorm, (5,), {"affine": False, "center": True}, []),
    (nbnorm.RMSNorm, (5,), {}, ["weight"]),
    (nbnorm.RMSNorm, (5,), {"affine": False}, []),
    (nbnorm.GroupNorm, (1, 5), {"center": False}, ["weight"]),
    (nbnorm.GroupNorm, (5, 5), {"affine": False}, []),
    (nbnorm.InstanceNorm, (5,), {}, []),
    (nbnorm.InstanceNorm, (5,), {"center": True, "scale": True}, []),
    (nbnorm.InstanceNorm, (5,), {"affine": True}, ["weight", "bias"]),
    (nbnorm.InstanceNorm, (5,), {"affine": True, "scale": False}, ["bias"]),
]


@pytest.mark.parametrize(("layer", "sizes", "options", "names"), PARAMETERS)
def test_parameters(layer, sizes, options, names):
    """What a layer does not have appears nowhere."""
    layer = layer(*sizes, **options)
    assert list(layer.params) == list(layer.grads) == list(layer.state_dict()) == names
    for name in ("weight", "bias"):
        assert (getattr(layer, name) is None) == (name not in names)
        if name not in names:
            with pytest.raises(AttributeError, match=f"this layer has no {name} to set"):
                setattr(layer, name, np.ones(5))


def test_without_parameters(rng):
    """A layer without a scale or a shift returns dx alone."""
    x, dy = drawn(rng)
    layer = nbnorm.InstanceNorm(6)
    y, saved = nbnorm.instance_norm_forward(x)
    oracle.assert_same_bits(layer(x), y)
    oracle.assert_same_bits(layer.backward(dy, accumulate=True), nbnorm.instance_norm_backward(dy, saved)[0])


X = np.ones((4, 2), np.float32)
FAULTS = [
    (
        lambda: nbnorm.LayerNorm(()),
        ValueError,
        r"normalized_shape must be a positive integer or several, got \(\)",
    ),
    (lambda: nbnorm.LayerNorm((3, 0)), ValueError, "normalized_shape must be a positive integer, got 0"),
    (lambda: nbnorm.RMSNorm(2.5), ValueError, "normalized_shape must be a positive integer, got 2.5"),
    (lambda: nbnorm.RMSNorm(2, eps=-1), ValueError, "eps must be a finite number >= 0, got -1"),
    (lambda: nbnorm.GroupNorm(0, 4), ValueError, "num_groups must be a positive integer, got 0"),
    (lambda: nbnorm.GroupNorm(2, True), ValueError, "num_channels must be a positive integer, got True"),
    (
        lambda: nbnorm.GroupNorm(4, 6),
        ValueError,
        "number of channels 6 is not divisible by num_groups 4",
    ),
    (lambda: nbnorm.InstanceNorm(-1), ValueError, "num_features must be a positive integer, got -1"),
    (lambda: nbnorm.InstanceNorm(2, channel_axis=1.0), TypeError, "channel_axis must be an integer, got 1.0"),
    (lambda: nbnorm.InstanceNorm(2, dtype=int), TypeError, "dtype must be .*float32"),
    (lambda: nbnorm.InstanceNorm(2, xp="cupy"), TypeError, "xp must be a library of arrays .* got 'cupy'"),
    (
        lambda: nbnorm.LayerNorm(3)(X),
        ValueError,
        r"normalized_shape \(3,\) does not match trailing dimensions of x \(4, 2\)",
    ),
    (
        lambda: nbnorm.RMSNorm((1, 4, 2))(X),
        ValueError,
        r"normalized_shape \(1, 4, 2\) does not match trailing dimensions of x \(4, 2\)",
    ),
    (lambda: nbnorm.LayerNorm(3)(X[0, 0]), ValueError, r"normalized_shape \(3,\) does not match .* x \(\)"),
    (
        lambda: nbnorm.GroupNorm(1, 3)(X),
        ValueError,
        r"GroupNorm expects 3 channels on axis 1, got x with shape \(4, 2\)",
    ),
    (
        lambda: nbnorm.InstanceNorm(3, channel_axis=0)(X),
        ValueError,
        r"InstanceNorm expects 3 channels on axis 0, got x with shape \(4, 2\)",
    ),
    (lambda: nbnorm.InstanceNorm(4)(X[:, 0]), ValueError, r"InstanceNorm expects at least 2 dimensions"),
    (
        lambda: nbnorm.GroupNorm(1, 2, channel_axis=3)(X),
        np.exceptions.AxisError,
        "axis 3 is out of bounds for array of dimension 2",
    ),
    (lambda: nbnorm.InstanceNorm(2).to(None), TypeError, "xp must be a library of arrays .* got None"),
]


@pytest.mark.parametrize(("call", "exception", "message"), FAULTS, ids=range(len(FAULTS)))
def test_faults(call, exception, message):
    """What came and what was expected."""
    with pytest.raises(exception, match=message):
        call()


class DeviceArray(np.ndarray):
    """An array that NumPy must not convert silently, as CuPy's are."""

    __cuda_array_interface__ = None

    def get(self):
        """Copy to the host."""
        return np.array(self.view(np.ndarray))


@pytest.fixture
def device_library(monkeypatch):
    """Make a library whose arrays lie on a device, found by its name as modules are."""
    library = ModuleType("device_library")
    for name in ("asarray", "ones", "zeros", "zeros_like"):
        make = getattr(np, name)
        setattr(library, name, lambda *args, make=make: np.array(make(*args)).view(DeviceArray))
    monkeypatch.setitem(sys.modules, library.__name__, library)
    return library


def arrays_of(layer):
    """List every array that moves with a layer."""
    running = [layer.running_mean, layer.running_var] if isinstance(layer, nbnorm.BatchNorm) else []
    return [*layer.params.values(), *layer.grads.values(), *running]


@on_kinds
def test_to_another_library(kind, rng, device_library):
    """There, by dictionary and by pickle, and back, with the same values; there already, nothing happens."""
    layer, (x, dy) = kind.drawn(SHAPE, rng), drawn(rng)
    y = layer(x)
    layer.backward(dy)
    expected, dictionaries = flat_state(layer), (layer.params, layer.grads)
    before = arrays_of(layer)
    assert layer.to(np) is layer
    assert all(now is array for now, array in zip(arrays_of(layer), before, strict=True))
    assert layer.to(device_library) is layer
    assert layer.params is dictionaries[0]
    assert layer.grads is dictionaries[1]
    assert {type(array) for array in arrays_of(layer)} == {DeviceArray}
    with pytest.raises(RuntimeError, match="backward called before forward"):
        layer.backward(dy)
    twin = pickle.loads(pickle.dumps(kind.make(SHAPE, xp=device_library)))
    assert {type(array) for array in arrays_of(twin)} == {DeviceArray}
    twin.load_state_dict(layer.state_dict())
    assert {type(array) for array in arrays_of(twin)} == {DeviceArray}
    for one in (layer, twin):
        one.to(np)
        assert {type(array) for array in arrays_of(one)} == {np.ndarray}
        for name, value in one.state_dict().items():
            oracle.assert_same_bits(value, expected[name], name)
    oracle.assert_same_bits(twin.eval()(x) if kind.name != "batch" else twin(x), y)


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
