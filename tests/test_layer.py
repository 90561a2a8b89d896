"""The batch norm layer: its state over training steps, its modes, and how it travels."""

import copy
import pickle
import threading
import time

import numpy as np
import pytest

import nbnorm
import oracle
from cases import COLUMNS, PLANES, Case

on_both_kinds = pytest.mark.parametrize("case", [PLANES, COLUMNS], ids=lambda case: case.reason)
NAMES = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def made(case, rng, **options):
    """Make a layer for a case with drawn parameters."""
    layer = nbnorm.BatchNorm(case.shape[case.channel_axis], channel_axis=case.channel_axis, **options)
    weight, bias = case.parameters(rng, layer.params["weight"].dtype)
    layer.params["weight"][:], layer.params["bias"][:] = weight, bias
    return layer


def running_of(layer):
    """Copy the running statistics of a layer."""
    return [layer.state_dict()[name].copy() for name in ("running_mean", "running_var")]


def step(layer, case, rng, dtype=np.float32):
    """Run one training step and return its parts."""
    x, dy = case.x(rng, dtype), case.dy(rng, dtype)
    return x, dy, layer(x), layer.backward(dy)


@on_both_kinds
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.3, "eps": 1e-2, "ddof": 0}], ids=["defaults", "options"]
)
def test_three_steps_and_eval(case, options, rng):
    """Outputs, gradients and running statistics of a short training; parameters change between steps."""
    layer = made(case, rng, **options)
    eps = options.get("eps", 1e-5)
    update = {name: options[name] for name in ("momentum", "ddof") if name in options}
    for _ in range(3):
        old = running_of(layer)
        x, dy, y, dx = step(layer, case, rng)
        reference = oracle.batch_norm(x, layer.params["weight"], layer.params["bias"], eps=eps)
        oracle.assert_within(y, reference.y, oracle.y_tolerance(reference), "y")
        grads = layer.grads["weight"], layer.grads["bias"]
        oracle.assert_gradients(dx, *grads, reference, oracle.differentiate(dy, reference))
        oracle.assert_running(running_of(layer), old, reference, **update)
        for name in ("weight", "bias"):
            layer.params[name] -= 0.1 * layer.grads[name]
    assert int(layer.state_dict()["num_batches_tracked"]) == 3

    x, frozen = case.x(rng, np.float32), running_of(layer)
    y = layer.eval()(x)
    reference = oracle.batch_norm(x, layer.params["weight"], layer.params["bias"], eps=eps, running=frozen)
    oracle.assert_within(y, reference.y, oracle.y_tolerance(reference), "y in eval")
    assert int(layer.state_dict()["num_batches_tracked"]) == 3
    for now, before in zip(running_of(layer), frozen, strict=True):
        oracle.assert_same_bits(now, before)


def test_birth():
    """A new layer is the identity in eval mode but for eps; gradients are zeros, nothing is tracked."""
    layer = nbnorm.BatchNorm(3)
    state = layer.state_dict()
    for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
        oracle.assert_same_bits(state[name], np.full(3, value, np.float32))
    assert int(state["num_batches_tracked"]) == 0
    assert set(layer.params) == set(layer.grads) == {"weight", "bias"}
    for grad in layer.grads.values():
        oracle.assert_same_bits(grad, np.zeros(3, np.float32))


def test_momentum_none_is_the_cumulative_average(rng):
    """After k batches the running statistics are the plain averages of those of the batches."""
    layer = made(PLANES, rng, momentum=None, dtype=np.float64)
    references = [oracle.batch_norm(step(layer, PLANES, rng, np.float64)[0]) for _ in range(4)]
    means = np.mean([r.per_slot("mean") for r in references], axis=0)
    variances = np.mean([r.per_slot("var") * r.count / (r.count - 1) for r in references], axis=0)
    for found, expected in zip(running_of(layer), (means, variances), strict=True):
        np.testing.assert_allclose(found, expected.astype(np.float64), rtol=1e-13, atol=1e-15)


def test_reset_running_stats(rng):
    """Back to birth, also from NaN; parameters stay; the cumulative average starts anew."""
    layer = made(COLUMNS, rng, momentum=None)
    layer(np.full(COLUMNS.shape, np.nan, np.float32))
    assert np.isnan(running_of(layer)[0]).all()
    weight = layer.params["weight"].copy()
    layer.reset_running_stats()
    np.testing.assert_array_equal(running_of(layer), [np.zeros(5), np.ones(5)])
    assert int(layer.state_dict()["num_batches_tracked"]) == 0
    oracle.assert_same_bits(layer.params["weight"], weight)
    x = COLUMNS.x(rng, np.float32)
    layer(x)
    oracle.assert_running(running_of(layer), [np.zeros(5, np.float32)] * 2, oracle.batch_norm(x), momentum=1)


def test_several_calls_in_flight(rng):
    """The same layer twice in one step: each ``saved`` goes with its own backward, in any order."""
    layer = made(PLANES, rng)
    xs, dys = [PLANES.x(rng, np.float32) for _ in range(3)], [PLANES.dy(rng, np.float32) for _ in range(3)]
    flights = [layer.forward(x) for x in xs]
    layer.zero_grad()
    terms = {"weight": 0, "bias": 0}
    for index in (1, 2, 0):
        reference = oracle.batch_norm(xs[index], layer.params["weight"], layer.params["bias"])
        gradients = oracle.differentiate(dys[index], reference)
        y, saved = flights[index]
        oracle.assert_within(y, reference.y, oracle.y_tolerance(reference), "y")
        layer(xs[0])  # what the layer remembers is of no matter to a backward with its own ``saved``
        dx = layer.backward(dys[index], saved, accumulate=True)
        oracle.assert_within(dx, gradients.dx, oracle.dx_tolerance(reference, gradients), "dx")
        terms["weight"], terms["bias"] = terms["weight"] + gradients.dweight, terms["bias"] + gradients.dbias
    for name, expected in terms.items():
        np.testing.assert_allclose(layer.grads[name], expected, rtol=1e-5, atol=1e-4)


def test_mode_is_that_of_forward(rng):
    """Toggling train and eval between forward and backward changes nothing."""
    layer = made(PLANES, rng)
    x, dy = PLANES.x(rng, np.float32), PLANES.dy(rng, np.float32)
    layer(x)
    trained = layer.eval().backward(dy)
    frozen = running_of(layer)
    layer(x)
    evaluated = layer.train().backward(dy)
    for dx, running in ((trained, None), (evaluated, frozen)):
        reference = oracle.batch_norm(x, layer.params["weight"], layer.params["bias"], running=running)
        gradients = oracle.differentiate(dy, reference)
        oracle.assert_within(dx, gradients.dx, oracle.dx_tolerance(reference, gradients), "dx")
    assert np.abs(trained - evaluated).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"affine": False}, []),
        ({"affine": False, "center": True, "scale": True}, []),
        ({"center": False}, ["weight"]),
        ({"scale": False}, ["bias"]),
    ],
    ids=["neither", "affine overrides", "no center", "no scale"],
)
def test_without_parameters(options, names, rng):
    """What the layer does not have appears nowhere, and counts as 1 or 0."""
    layer = nbnorm.BatchNorm(6, **options)
    assert list(layer.params) == list(layer.grads) == names
    assert list(layer.state_dict()) == names + NAMES[2:]
    x, dy, y, dx = step(layer, PLANES, rng)
    reference = oracle.batch_norm(x)
    gradients = oracle.differentiate(dy, reference)
    oracle.assert_within(y, reference.y, oracle.y_tolerance(reference), "y")
    oracle.assert_within(dx, gradients.dx, oracle.dx_tolerance(reference, gradients), "dx")
    for name in names:
        bound = oracle.sum_tolerance(getattr(gradients, f"d{name}_terms"), reference, np.dtype(np.float32))
        oracle.assert_within(layer.grads[name], getattr(gradients, f"d{name}"), bound, name)


def test_without_running_statistics(rng):
    """track_running_stats=False uses the batch in eval mode too, and has no buffers to store."""
    layer = nbnorm.BatchNorm(6, track_running_stats=False)
    assert list(layer.state_dict()) == NAMES[:2]
    x, dy = PLANES.x(rng, np.float32), PLANES.dy(rng, np.float32)
    reference = oracle.batch_norm(x)
    gradients = oracle.differentiate(dy, reference)
    for _ in (layer.train(), layer.eval()):
        oracle.assert_within(layer(x), reference.y, oracle.y_tolerance(reference), "y")
        oracle.assert_within(
            layer.backward(dy), gradients.dx, oracle.dx_tolerance(reference, gradients), "dx"
        )


def test_keep_false_remembers_nothing(rng):
    """The same output and the same update, but backward has nothing to work with."""
    layer, twin = made(PLANES, rng), nbnorm.BatchNorm(6)
    twin.load_state_dict(layer.state_dict())
    x = PLANES.x(rng, np.float32)
    oracle.assert_same_bits(layer(x, keep=False), twin(x))
    oracle.assert_same_bits(running_of(layer)[0], running_of(twin)[0])
    with pytest.raises(RuntimeError, match="backward called before forward"):
        layer.backward(x)


def test_channels_last_layer(rng):
    """channel_axis=-1 equals the transposed input through a channels-first layer."""
    case = Case((4, 5, 3, 6), -1, "channels last")
    layer, twin = made(case, rng), nbnorm.BatchNorm(6)
    twin.load_state_dict(layer.state_dict())
    x, dy, y, dx = step(layer, case, rng)
    oracle.assert_within(np.moveaxis(twin(np.moveaxis(x, -1, 1)), 1, -1), y, 1e-6, "y")
    oracle.assert_within(np.moveaxis(twin.backward(np.moveaxis(dy, -1, 1)), 1, -1), dx, 1e-5, "dx")


def test_state_travels_by_dictionary(rng):
    """PyTorch's names, in its order, and the loaded layer goes on exactly as the first would."""
    layer, twin = made(PLANES, rng), nbnorm.BatchNorm(6)
    step(layer, PLANES, rng)
    state = layer.state_dict()
    assert list(state) == NAMES
    kept = dict(twin.params)
    twin.load_state_dict({name: np.copy(value) for name, value in state.items()})
    assert all(twin.params[name] is kept[name] for name in kept)
    x = PLANES.x(rng, np.float32)
    oracle.assert_same_bits(twin(x), layer(x))
    for name, value in twin.state_dict().items():
        np.testing.assert_array_equal(value, layer.state_dict()[name])


@pytest.mark.parametrize(
    "travel", [lambda layer: pickle.loads(pickle.dumps(layer)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_copies_are_independent(travel, rng):
    """A copy has the same state and mode, and shares nothing with the original."""
    layer = made(PLANES, rng, momentum=0.4, eps=1e-3)
    step(layer, PLANES, rng)
    twin = travel(layer)
    x, dy = PLANES.x(rng, np.float32), PLANES.dy(rng, np.float32)
    state = {name: np.copy(value) for name, value in layer.state_dict().items()}
    y = twin(x)
    dx = twin.backward(dy)
    for name, value in state.items():
        np.testing.assert_array_equal(layer.state_dict()[name], value)
    oracle.assert_same_bits(layer(x), y)
    oracle.assert_same_bits(layer.backward(dy), dx)
    for one, other in zip(running_of(layer), running_of(twin), strict=True):
        oracle.assert_same_bits(one, other)
    twin_in_eval = travel(layer.eval())
    oracle.assert_same_bits(twin_in_eval(x), layer(x))


def test_two_threads_train_one_layer(rng):
    """No update is lost, and every call has its own results.

    The cumulative average does not depend on the order of the batches, so it can be told exactly. Many channels
    make the update as long as the rest of a call: without the layer's lock, 50 of 50 runs of this test failed.
    """
    case = Case((1, 2000, 16), 1, "long updates")
    layer = nbnorm.BatchNorm(2000, momentum=None, dtype=np.float64)
    batches = [[case.x(rng, np.float64) for _ in range(25)] for _ in range(2)]
    dy = np.rint(case.dy(rng, np.float64) * 8)  # integers: their sums are exact in any order
    start, flights = threading.Barrier(2), ([], [])

    def train(mine, results):
        start.wait(timeout=60)
        for x in mine:
            y, saved = layer.forward(x)
            results.append((x, y, layer.backward(dy, saved, accumulate=True)))

    threads = [threading.Thread(target=train, args=both) for both in zip(batches, flights, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert [len(results) for results in flights] == [25, 25]
    assert layer.num_batches_tracked == 50
    means = np.mean([x.mean(axis=(0, 2)) for mine in batches for x in mine], axis=0)
    np.testing.assert_allclose(layer.running_mean, means, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(layer.grads["bias"], 50 * dy.sum(axis=(0, 2)))
    for x, y, dx in [results[i] for results in flights for i in (0, 12, 24)]:
        reference = oracle.batch_norm(x)
        gradients = oracle.differentiate(dy, reference)
        oracle.assert_within(y, reference.y, oracle.y_tolerance(reference), "y")
        oracle.assert_within(dx, gradients.dx, oracle.dx_tolerance(reference, gradients), "dx")


class SlowToAdd(np.ndarray):
    """An array that is read long before it is written."""

    def __iadd__(self, other):
        total = np.array(self) + other
        time.sleep(0.02)
        self[...] = total
        return self


def test_two_threads_accumulate(rng):
    """No gradient is lost; without the lock, one of two that are added at the same time is."""
    layer = nbnorm.BatchNorm(6)
    layer.grads["bias"] = layer.grads["bias"].view(SlowToAdd)
    dy = np.rint(PLANES.dy(rng, np.float32) * 8)
    saved, start = layer.forward(PLANES.x(rng, np.float32))[1], threading.Barrier(2)

    def differentiate():
        start.wait(timeout=60)
        layer.backward(dy, saved, accumulate=True)

    threads = [threading.Thread(target=differentiate) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    np.testing.assert_array_equal(layer.grads["bias"], 2 * dy.sum(axis=(0, 2, 3)))


def test_parameters_may_be_assigned():
    """`bn.weight -= step` updates the array that the optimizer and the layer hold."""
    layer = nbnorm.BatchNorm(3)
    array = layer.params["weight"]
    layer.weight -= 0.25
    layer.bias = [1.0, 2.0, 3.0]
    assert layer.params["weight"] is array
    np.testing.assert_array_equal(array, np.full(3, 0.75, np.float32))
    np.testing.assert_array_equal(layer.params["bias"], np.array([1, 2, 3], np.float32))
    with pytest.raises(AttributeError, match="this layer has no weight to set"):
        nbnorm.BatchNorm(3, affine=False).weight = np.ones(3)


def test_wrong_number_of_channels_names_the_layer():
    """Not the weight, which the user has not given."""
    with pytest.raises(
        ValueError, match=r"BatchNorm expects 3 channels on axis 1, got x with shape \(4, 2\)"
    ):
        nbnorm.BatchNorm(3)(np.ones((4, 2)))
