"""Layers that move to another library of arrays, and back."""

import pickle
import sys
from types import ModuleType

import numpy as np
import pytest

import nbnorm
import oracle
from layer_kinds import KINDS, SHAPE, drawn
from test_layers import flat_state


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


@pytest.mark.parametrize("kind", KINDS, ids=str)
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
