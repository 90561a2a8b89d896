"""Activation, residual, mask, renormalization and virtual batches through a layer: those of the functions."""

import numpy as np
import pytest

import nbnorm
import oracle
from layer_kinds import CHANNEL_KINDS, SHAPE, drawn

on_kinds = pytest.mark.parametrize("kind", CHANNEL_KINDS, ids=str)
# In one call with a residual and a mask: a layer that lost any of them would give other results.
ACTIVATION = ("leaky_relu", 0.3)


def extras(rng):
    """Draw a residual and a mask."""
    residual = rng.standard_normal(SHAPE).astype(np.float32)
    return {"residual": residual, "mask": rng.random((SHAPE[0], *SHAPE[2:])) < 0.7}


def expected_step(kind, layer, x, dy, **options):
    """Return y and the gradients of the functions with the parameters of a layer."""
    y, saved = kind.forward(x, *layer.params.values(), activation=layer.activation, **options)
    return y, kind.backward(dy, saved)


@on_kinds
@pytest.mark.parametrize("reuse_buffers", [False, True], ids=["new arrays", "reused"])
def test_a_step_equals_the_functions(kind, reuse_buffers, rng):
    """y, dx, dresidual and the parameters' gradients to the last bit, step after step."""
    layer = kind.drawn(SHAPE, rng, activation=ACTIVATION, reuse_buffers=reuse_buffers)
    firsts = []
    for _ in range(2):
        (x, dy), given = drawn(rng), extras(rng)
        expected_y, (expected_dx, *gradients, expected_dresidual) = expected_step(kind, layer, x, dy, **given)
        y, (dx, dresidual) = layer(x, **given), layer.backward(dy)
        oracle.assert_same_bits(y, expected_y, "y")
        oracle.assert_same_bits(dx, expected_dx, "dx")
        oracle.assert_same_bits(dresidual, expected_dresidual, "dresidual")
        for name, gradient in zip(("weight", "bias"), gradients, strict=True):
            oracle.assert_same_bits(layer.grads[name], gradient, name)
        firsts = firsts or [y, dx, dresidual]
        if reuse_buffers:
            assert all(now is first for now, first in zip((y, dx, dresidual), firsts, strict=True))


@on_kinds
def test_buffers_of_both_gradients(kind, rng, poisoned):
    """``out`` is a pair where the result is one."""
    layer, (x, dy), given = kind.drawn(SHAPE, rng, activation=ACTIVATION), drawn(rng), extras(rng)
    layer(x, **given)
    expected = layer.backward(dy)
    buffers = [poisoned(SHAPE, np.float32, layout) for layout in ("F", "gaps inside")]
    found = layer.backward(dy, out=tuple(buffer.out for buffer in buffers))
    for one, buffer, value in zip(found, buffers, expected, strict=True):
        assert one is buffer.out
        oracle.assert_same_bits(one, value)
        buffer.assert_gaps_untouched()
    dx, dresidual = layer.backward(dy, out=(buffers[0].out, None))
    assert dx is buffers[0].out
    oracle.assert_same_bits(dresidual, expected[1])
    with pytest.raises(
        ValueError, match=r"out must be a tuple of 2 arrays or None \(dx, dresidual\), got array"
    ):
        layer.backward(dy, out=dx)


def test_a_residual_is_no_earlier_result(rng):
    """Its memory is about to be written."""
    layer, (x, _) = nbnorm.BatchNorm(6, reuse_buffers=True, activation=ACTIVATION), drawn(rng)
    y = layer(x, **extras(rng))
    with pytest.raises(ValueError, match="residual shares memory with an earlier result of this layer"):
        layer(x, residual=y)


@pytest.mark.parametrize("options", [{"renorm": (1.5, 0.5)}, {"virtual_batch_size": 3}], ids=str)
def test_batch_norm_options(options, rng):
    """Outputs, gradients and running statistics over three steps, and eval, where neither matters."""
    layer = nbnorm.BatchNorm(6, momentum=0.3, **options)
    layer.running_mean, layer.running_var = rng.uniform(0.5, 2, (2, 6))
    running = [layer.running_mean.copy(), layer.running_var.copy()]
    for _ in range(3):
        x, dy = drawn(rng)
        y, saved = nbnorm.batch_norm_forward(x, *layer.params.values(), *running, momentum=0.3, **options)
        oracle.assert_same_bits(layer(x), y)
        oracle.assert_same_bits(layer.backward(dy), nbnorm.batch_norm_backward(dy, saved)[0])
        oracle.assert_same_bits(layer.running_mean, running[0])
        oracle.assert_same_bits(layer.running_var, running[1])
    assert layer.num_batches_tracked == 3
    assert np.abs(y - nbnorm.batch_norm_forward(x, *layer.params.values())[0]).max() > 1e-3
    plain = nbnorm.BatchNorm(6).eval()
    plain.load_state_dict(layer.state_dict())
    oracle.assert_same_bits(layer.eval()(x), plain(x))


FAULTS = [
    (
        {"activation": "tanh"},
        r"activation must be None, 'relu', \('leaky_relu', slope\) or 'silu', got 'tanh'",
    ),
    ({"renorm": 3}, r"renorm must be \(r_max, d_max\)"),
    ({"virtual_batch_size": 0}, "virtual_batch_size must be a positive integer, got 0"),
]


@pytest.mark.parametrize(("options", "message"), FAULTS, ids=[str(fault[0]) for fault in FAULTS])
def test_faults(options, message):
    """Bad options are refused when the layer is made."""
    with pytest.raises(ValueError, match=message):
        nbnorm.BatchNorm(2, **options)


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 2}], ids=str)
def test_reestimate_with_masks(options, rng):
    """Only what counts enters, and virtual batches do not change the whole."""
    layer = nbnorm.BatchNorm(6, activation=ACTIVATION, **options)
    batches = [(drawn(rng)[0] + i, extras(rng)) for i in range(3)]
    nbnorm.reestimate(layer, batches, lambda batch: layer(batch[0], **batch[1]))
    counted = np.concatenate([np.moveaxis(x, 1, -1)[given["mask"]] for x, given in batches], dtype=float)
    np.testing.assert_allclose(layer.running_mean, counted.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(layer.running_var, counted.var(axis=0, ddof=1), rtol=1e-6)
    assert layer.num_batches_tracked == len(batches)
