"""What the constructors of layers take and refuse, and how layers show it."""

import numpy as np
import pytest

import nbnorm

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
