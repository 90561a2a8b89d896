"""What a layer refuses: bad options, bad states, backward without forward."""

import numpy as np
import pytest

import nbnorm
import oracle
from cases import PLANES

OPTIONS = [
    ({"num_features": 0}, ValueError, r"num_features must be a positive integer, got 0"),
    ({"num_features": -2}, ValueError, r"num_features must be a positive integer, got -2"),
    ({"num_features": 2.5}, (TypeError, ValueError), r"num_features must be a positive integer, got 2\.5"),
    ({"eps": -1.0}, ValueError, r"eps must be a finite number >= 0, got -1\.0"),
    ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\], got 1\.5"),
    ({"ddof": 3}, ValueError, r"ddof must be 0 .*1.*, got 3"),
    ({"dtype": np.int32}, TypeError, r"dtype.*int32"),
    ({"small_batch": "ignore"}, ValueError, r"small_batch .*ignore"),
    ({"nonfinite": "ignore"}, ValueError, r"nonfinite .*ignore"),
]


@pytest.mark.parametrize(("options", "exception", "message"), OPTIONS, ids=lambda value: str(value)[:40])
def test_options(options, exception, message):
    """Bad options are refused when the layer is made, not at its first call."""
    with pytest.raises(exception, match=message):
        nbnorm.BatchNorm(**{"num_features": 2, **options})


def full_state(layer):
    """Copy everything a call could change."""
    arrays = {**layer.state_dict(), **{f"grad of {name}": grad for name, grad in layer.grads.items()}}
    return {name: np.array(value) for name, value in arrays.items()}


def assert_unchanged(layer, before):
    """Fail unless the layer is as it was, bit for bit."""
    for name, value in full_state(layer).items():
        assert value.tobytes() == before[name].tobytes(), name


CALLS = [
    (np.ones((4, 3), np.float32), ValueError, r"x has 3 channels|has shape \(2,\), expected \(3,\)|\(4, 3\)"),
    (np.ones((4, 2), np.int32), TypeError, r"x has dtype int32"),
    (np.ones((1, 2), np.float32), ValueError, r"expected more than 1 value per channel.*\(1, 2\)"),
    (np.ones(2, np.float32), ValueError, r"at least 2 dimensions"),
]


@pytest.mark.parametrize(("x", "exception", "message"), CALLS, ids=range(len(CALLS)))
def test_calls(x, exception, message):
    """A refused batch counts for nothing."""
    layer = nbnorm.BatchNorm(2)
    before = full_state(layer)
    with pytest.raises(exception, match=message):
        layer(x)
    assert_unchanged(layer, before)


def test_backward_needs_a_forward(rng):
    """Before any forward; and a bad dy leaves the gradients and the way to a second try."""
    layer = nbnorm.BatchNorm(6)
    x, dy = PLANES.x(rng, np.float32), PLANES.dy(rng, np.float32)
    with pytest.raises(RuntimeError, match="backward called before forward"):
        layer.backward(dy)
    layer(x)
    before = full_state(layer)
    with pytest.raises(ValueError, match=r"dy has shape \(3, 6, 5, 3\), expected \(4, 6, 5, 3\)"):
        layer.backward(dy[:3])
    with pytest.raises(TypeError, match="dy has dtype float64, expected float32"):
        layer.backward(dy.astype(np.float64))
    assert_unchanged(layer, before)
    reference = oracle.batch_norm(x)
    gradients = oracle.differentiate(dy, reference)
    oracle.assert_within(layer.backward(dy), gradients.dx, oracle.dx_tolerance(reference, gradients), "dx")


def changed(**values):
    """Make a function that changes a state dict; None takes a key out."""

    def change(state):
        state.update(values)
        return {name: value for name, value in state.items() if value is not None}

    return change


STATES = [
    ("missing", changed(running_var=None), "running_var"),
    ("unexpected", changed(gamma=np.ones(2, np.float32)), "gamma"),
    ("shape", changed(bias=np.ones(3, np.float32)), r"bias.*\(3,\).*\(2,\)"),
    ("rank", changed(weight=np.ones((2, 1), np.float32)), r"weight.*\(2, 1\).*\(2,\)"),
    ("dtype", changed(weight=np.ones(2, np.complex64)), "weight.*complex64"),
    ("text", changed(bias=np.array(["a", "b"])), "bias.*<U1"),
    ("negative variance", changed(running_var=np.array([1, -1], np.float32)), "running_var must be >= 0"),
    (
        "NaN variance",
        changed(running_var=np.array([1, np.nan], np.float32)),
        "running_var (must be >= 0|contains NaN)",
    ),
    ("NaN mean", changed(running_mean=np.array([np.nan, 1], np.float32)), "running_mean contains NaN"),
    ("NaN weight", changed(weight=np.array([np.nan, 1], np.float32)), "weight contains NaN"),
    ("negative count", changed(num_batches_tracked=np.array(-1)), "num_batches_tracked"),
]


@pytest.mark.parametrize(("change", "message"), [s[1:] for s in STATES], ids=[s[0] for s in STATES])
def test_states(change, message, rng):
    """A load that fails at its last key has not loaded the first."""
    layer = nbnorm.BatchNorm(2)
    layer(rng.standard_normal((4, 2)).astype(np.float32))
    before = full_state(layer)
    other = {name: np.array(value) for name, value in layer.state_dict().items()}
    for name in ("weight", "bias", "running_mean"):
        other[name] += 5
    with pytest.raises((KeyError, TypeError, ValueError), match=message):
        layer.load_state_dict(change(other))
    assert_unchanged(layer, before)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("running_var", [1.0, -1.0], "running_var must be >= 0"),
        ("running_var", [1.0, np.nan], "running_var (must be >= 0|contains NaN)"),
        ("running_mean", [1.0, 2.0, 3.0], r"running_mean has shape \(3,\), expected \(2,\)"),
    ],
)
def test_assigned_statistics(name, value, message):
    """Assigning checks like loading, and copies into the buffer that is there."""
    layer = nbnorm.BatchNorm(2)
    before, buffer = full_state(layer), getattr(layer, name)
    with pytest.raises(ValueError, match=message):
        setattr(layer, name, np.array(value))
    assert_unchanged(layer, before)
    setattr(layer, name, np.array([0.5, 0.25]))
    assert getattr(layer, name) is buffer
    np.testing.assert_array_equal(buffer, [0.5, 0.25])
