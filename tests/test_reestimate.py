"""Population statistics: those of all the data together, in batches of any sizes."""

import numpy as np
import pytest

import nbnorm
import oracle
from cases import PLANES
from test_layer_faults import assert_unchanged, full_state

SIZES = (7, 2, 1, 12)


def batches_of(rng, channels=6, sizes=SIZES):
    """Draw batches whose means differ, so that weights by count are seen."""
    return [rng.standard_normal((n, channels, 5, 3)) + i for i, n in enumerate(sizes)]


def batch_of(norm, x):
    """Return mean and variance of all the data in float64."""
    reference = oracle.batch_norm(x)
    return reference.per_slot("mean"), reference.per_slot("var") * reference.count / (
        reference.count - norm.ddof
    )


def assert_running(layer, x):
    """Fail unless the running statistics are those of x."""
    for found, expected in zip((layer.running_mean, layer.running_var), batch_of(layer, x), strict=True):
        np.testing.assert_allclose(found, expected.astype(float), rtol=1e-13)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_one_layer(ddof, training, rng):
    """As if in one batch, whatever was there; mode, parameters and gradients stay."""
    layer = nbnorm.BatchNorm(6, ddof=ddof, momentum=0.3, dtype=np.float64).train(training)
    layer.weight, layer.running_mean, layer.running_var = rng.uniform(0.5, 2, (3, 6))
    layer.grads["bias"][...] = 7
    weight, batches = layer.weight.copy(), batches_of(rng)
    assert nbnorm.reestimate(layer, iter(batches), lambda x: layer(x, keep=False)) is None
    assert_running(layer, np.concatenate(batches))
    assert layer.num_batches_tracked == len(SIZES)
    assert layer.training is training
    oracle.assert_same_bits(layer.weight, weight)
    assert (layer.grads["bias"] == 7).all()


def test_a_network(rng):
    """The second layer meets what the first makes of each batch by the batch's statistics; one is met twice."""
    first, second = (nbnorm.BatchNorm(6, dtype=np.float64).eval() for _ in range(2))
    first.bias = rng.standard_normal(6)
    batches, met = batches_of(rng), []

    def run(x):
        hidden = np.tanh(first(x))
        met.append(hidden)
        met.append(second(hidden))
        second(met[-1])

    nbnorm.reestimate([first, second, first], batches, run)
    assert_running(first, np.concatenate(batches))
    assert_running(second, np.concatenate(met))
    assert (first.num_batches_tracked, second.num_batches_tracked) == (len(SIZES), 2 * len(SIZES))
    normalized = oracle.batch_norm(batches[0], None, first.bias).y
    np.testing.assert_allclose(met[0], np.tanh(normalized).astype(float), rtol=1e-10, atol=1e-12)
    assert not first.training
    assert not second.training


def test_channels_last_and_the_next_batches(rng):
    """The layer's axis counts; a cumulative average goes on from the batches that were measured."""
    layer = nbnorm.BatchNorm(6, channel_axis=-1, momentum=None, dtype=np.float64)
    batches = batches_of(rng)
    nbnorm.reestimate(layer, [np.moveaxis(x, 1, -1) for x in batches], layer)
    assert_running(layer, np.concatenate(batches))
    mean, more = layer.running_mean.copy(), PLANES.x(rng, np.float64)
    layer(np.moveaxis(more, 1, -1))
    expected = mean + (more.mean(axis=(0, 2, 3)) - mean) / (len(SIZES) + 1)
    np.testing.assert_allclose(layer.running_mean, expected, rtol=1e-12)


def test_an_exception_changes_nothing(rng):
    """Neither statistics nor modes; afterwards the layers track again."""
    layers = [nbnorm.BatchNorm(6, dtype=np.float64).eval(), nbnorm.BatchNorm(6, dtype=np.float64)]
    for layer in layers:
        layer.running_mean = rng.standard_normal(6)
    before = [full_state(layer) for layer in layers]
    batches = batches_of(rng)

    def run(x):
        for layer in layers:
            layer(x)
        if len(x) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nbnorm.reestimate(layers, batches, run)
    for layer, state in zip(layers, before, strict=True):
        assert_unchanged(layer, state)
    assert [layer.training for layer in layers] == [False, True]
    layers[1](batches[0])
    assert layers[1].num_batches_tracked == 1


def test_the_last_layer_fails(rng):
    """A layer without values is an error, and the one before it is as it was."""
    layers = [nbnorm.BatchNorm(6, dtype=np.float64), nbnorm.BatchNorm(6)]
    before = full_state(layers[0])
    with pytest.raises(
        ValueError, match=r"BatchNorm\(6\) has met no values: batches were empty, or run did not"
    ):
        nbnorm.reestimate(layers, batches_of(rng), layers[0])
    with pytest.raises(ValueError, match="has met no values"):
        nbnorm.reestimate(layers[0], [np.zeros((0, 6))], layers[0])
    assert_unchanged(layers[0], before)


def test_nonfinite_batches(rng):
    """As in an update: into the channel, or left out of it."""
    batches = batches_of(rng)
    batches[1][0, 2, 0, 0] = np.nan
    for nonfinite, kept in (("propagate", False), ("skip", True)):
        layer = nbnorm.BatchNorm(6, nonfinite=nonfinite, dtype=np.float64)
        nbnorm.reestimate(layer, batches, layer)
        assert np.isnan(layer.running_mean[2]) != kept
        assert (layer.running_mean[2] == 0) == kept
        assert layer.skipped_updates == 0
        np.testing.assert_allclose(layer.running_mean[3], np.concatenate(batches)[:, 3].mean(), rtol=1e-12)


def test_faults():
    """Only layers that keep running statistics can be measured."""
    with pytest.raises(TypeError, match=r"every layer must be a nbnorm\.BatchNorm, got nbnorm\.LayerNorm"):
        nbnorm.reestimate([nbnorm.LayerNorm(3)], [], print)
    with pytest.raises(ValueError, match="keeps no running statistics"):
        nbnorm.reestimate(nbnorm.BatchNorm(3, track_running_stats=False), [], print)
