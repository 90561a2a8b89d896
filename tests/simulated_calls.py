"""The public functions on device arrays in Numba's simulator, CuPy played by fake_cupy; on a GPU by benchmarks/gpu.py.

Run by test_cuda_simulator.py in a process of its own. What the calls compute is compared with the same calls on NumPy
arrays in `PLACES` of shapes and options; what the kernels compute is simulated.py's business.
"""

import sys

import numpy as np
import pytest
from numba import cuda

import fake_cupy
import nbnorm
from nbnorm import _cpu
from nbnorm._cuda.memory import SIMULATED


@pytest.fixture(autouse=True, scope="module")
def _lively():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def cp():
    if not SIMULATED:
        yield pytest.importorskip("cupy")
        return
    with fake_cupy.installed() as module:
        yield module


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def batch(x, *args, **options):
    return nbnorm.batch_norm_forward(x, *args, **options)


def group(x, weight, bias, **options):
    return nbnorm.group_norm_forward(x, 2, weight, bias, **options)


def rms(x, weight, bias, **options):
    return nbnorm.rms_norm_forward(x, weight, **options)


PAIRS = {
    "batch": (batch, nbnorm.batch_norm_backward),
    "instance": (nbnorm.instance_norm_forward, nbnorm.instance_norm_backward),
    "group": (group, nbnorm.group_norm_backward),
    "layer": (nbnorm.layer_norm_forward, nbnorm.layer_norm_backward),
    "rms": (rms, nbnorm.rms_norm_backward),
}
CASES = [
    ("batch", (4, 4, 3, 3), {}),
    ("batch", (3, 4, 70), {"activation": "relu", "residual": True}),
    ("batch", (6, 4), {"mask": (6,)}),
    ("batch", (6, 4), {"virtual_batch_size": 4}),
    ("batch", (6, 4), {"renorm": (1.2, 0.1), "running": True}),
    ("batch", (6, 4), {"running": True, "training": False, "activation": "silu"}),
    ("batch", (6, 4), {"running": True, "nonfinite": "skip"}),
    ("batch", (6, 4), {"running": True, "nonfinite": "raise"}),
    ("instance", (2, 4, 5, 5), {"residual": True}),
    ("instance", (2, 4, 3, 5), {"mask": (2, 3, 5)}),
    ("group", (3, 4, 5), {"mask": (3, 5), "activation": "relu", "residual": True}),
    ("group", (2, 4, 3, 5), {"activation": ("leaky_relu", 0.2)}),
    ("layer", (5, 12), {}),
    ("rms", (5, 12), {}),
]


def on(library, values):
    """Copy values, and what is in tuples of them, to a library."""
    return library.asarray(values.copy("K")) if isinstance(values, np.ndarray) else values


def arguments(norm, shape, options, rng):
    """Draw x, dy and the options of a call."""
    options = dict(options)
    n = shape[-1] if norm in ("layer", "rms") else shape[1]
    positional = [rng.standard_normal(n).astype(np.float32) for _ in range(2)]
    if options.pop("running", False):
        positional += [rng.standard_normal(n).astype(np.float32), rng.uniform(1, 2, n).astype(np.float32)]
    if options.get("residual"):
        options["residual"] = rng.standard_normal(shape).astype(np.float32)
    if "mask" in options:
        options["mask"] = rng.integers(0, 3, options["mask"]).astype(np.float64) + 0.5
    x, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    return x, dy, positional, options


@pytest.mark.parametrize(("norm", "shape", "options"), CASES, ids=str)
def test_same_as_numpy(cp, rng, norm, shape, options, monkeypatch):
    """Every norm and option: results are CuPy's, close to NumPy's, and no kernel of the CPU runs for them."""
    forward, backward = PAIRS[norm]
    x, dy, positional, options = arguments(norm, shape, options, rng)
    expected_buffers = [values.copy() for values in positional]
    expected, saved = forward(x, *expected_buffers, **options)
    expected = [expected, *backward(dy, saved)]

    for name in _cpu.__all__:
        monkeypatch.setattr(_cpu, name, None)
    looks = getattr(cp.ndarray, "looks", 0)
    buffers = [on(cp, values) for values in positional]
    y, saved = forward(on(cp, x), *buffers, **{name: on(cp, value) for name, value in options.items()})
    results = [y, *backward(on(cp, dy), saved)]
    if SIMULATED and "mask" not in options and options.get("nonfinite") != "raise":
        assert cp.ndarray.looks == looks, "the host has waited for the device"
    assert all(isinstance(result, cp.ndarray) for result in results)
    for result, reference in zip(results, expected, strict=True):
        assert result.dtype == reference.dtype
        assert result.strides == reference.strides
        np.testing.assert_allclose(result.get(), reference, rtol=1e-4, atol=1e-5)
    for buffer, reference in zip(buffers, expected_buffers, strict=True):
        np.testing.assert_allclose(buffer.get(), reference, rtol=1e-5, atol=1e-6)
    assert "Saved" in repr(saved)


def test_two_phases(cp, rng):
    """Moments stay on the device, merge there, and give what one call gives."""
    x, dy = rng.standard_normal((2, 8, 4)).astype(np.float32)
    y, saved = nbnorm.batch_norm_forward(on(cp, x))
    dx = nbnorm.batch_norm_backward(on(cp, dy), saved)[0]
    m = nbnorm.Moments.empty(4)
    for part in (x[:3], x[3:]):
        m = m.merge(nbnorm.batch_moments(on(cp, part)))
    assert isinstance(m.mean, cp.ndarray)
    assert isinstance(m.rstd(1e-5), cp.ndarray)
    np.testing.assert_allclose(m.var().get(), x.astype(np.float64).var(axis=0), rtol=1e-6)
    again, part_saved = nbnorm.batch_norm_apply(on(cp, x), m)
    np.testing.assert_allclose(again.get(), y.get(), rtol=1e-5, atol=1e-6)
    sums = nbnorm.batch_norm_grad_sums(on(cp, dy), part_saved)
    found = nbnorm.batch_norm_input_grad(on(cp, dy), part_saved, sums.merge(sums))
    assert isinstance(found, cp.ndarray)
    found = nbnorm.batch_norm_input_grad(on(cp, dy), part_saved, sums)
    np.testing.assert_allclose(found.get(), dx.get(), rtol=1e-4, atol=1e-5)
    running = on(cp, np.zeros(4)), on(cp, np.ones(4))
    nbnorm.update_running_stats(*running, m, momentum=1.0)
    np.testing.assert_array_equal(running[0].get(), m.mean.get())
    y = nbnorm.batch_norm_inference(on(cp, x), *running)
    np.testing.assert_allclose(
        y.get(), (x - running[0].get()) / np.sqrt(running[1].get() + 1e-5), rtol=1e-4, atol=1e-5
    )


def test_parts_of_a_masked_batch(cp, rng):
    """A part divides by the count of the whole batch, which its own mask does not know."""
    x, dy = rng.standard_normal((2, 8, 4)).astype(np.float32)
    mask = rng.integers(0, 3, 8).astype(np.float32)
    mask[[0, -1]] = 2
    dx = nbnorm.batch_norm_backward(dy, nbnorm.batch_norm_forward(x, mask=mask)[1])[0]
    parts = slice(0, 3), slice(3, None)
    first, second = (nbnorm.batch_moments(on(cp, x[part]), mask=on(cp, mask[part])) for part in parts)
    m = first.merge(second)
    records = [nbnorm.batch_norm_apply(on(cp, x[part]), m, mask=on(cp, mask[part]))[1] for part in parts]
    first, second = (
        nbnorm.batch_norm_grad_sums(on(cp, dy[part]), own) for part, own in zip(parts, records, strict=True)
    )
    for part, own in zip(parts, records, strict=True):
        found = nbnorm.batch_norm_input_grad(on(cp, dy[part]), own, first.merge(second))
        np.testing.assert_allclose(found.get(), dx[part], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["F", "last two swapped", "gaps", "layer of another order"])
def test_strides(cp, rng, layout):
    """Any strides; results in the memory order of x."""
    whole = rng.standard_normal((4, 4, 6)).astype(np.float32)
    views = {
        "F": np.asfortranarray(whole),
        "last two swapped": whole.transpose(0, 2, 1),
        "gaps": whole[:, :, ::2],
        "layer of another order": whole.transpose(2, 1, 0),
    }
    x = views[layout]
    forward = nbnorm.layer_norm_forward if layout.startswith("layer") else nbnorm.batch_norm_forward
    backward = nbnorm.layer_norm_backward if layout.startswith("layer") else nbnorm.batch_norm_backward
    expected, saved = forward(x)
    expected_dx = backward(x, saved)[0]
    on_device = cp.asarray(whole).transpose(0, 2, 1) if layout == "last two swapped" else on(cp, x)
    if layout == "gaps":
        on_device = cp.asarray(whole)[:, :, ::2]
    elif layout == "layer of another order":
        on_device = cp.asarray(whole).transpose(2, 1, 0)
    assert on_device.strides == x.strides
    y, saved = forward(on_device)
    dx = backward(on_device, saved)[0]
    assert y.strides == expected.strides
    assert dx.strides == expected_dx.strides
    np.testing.assert_allclose(y.get(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx.get(), expected_dx, rtol=1e-4, atol=1e-4)


def test_out(cp, rng):
    """Buffers are filled and given back; dx may go into dy."""
    x, dy = rng.standard_normal((2, 5, 4)).astype(np.float32)
    expected, saved = nbnorm.batch_norm_forward(x)
    expected_dx = nbnorm.batch_norm_backward(dy, saved)[0]
    out, into = on(cp, np.full_like(x, np.nan)), on(cp, dy)
    y, saved = nbnorm.batch_norm_forward(on(cp, x), out=out)
    assert y is out
    dx = nbnorm.batch_norm_backward(into, saved, out=(into, None, None))[0]
    assert dx is into
    np.testing.assert_allclose(out.get(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx.get(), expected_dx, rtol=1e-4, atol=1e-5)
    buffer = on(cp, x)
    with pytest.raises(ValueError, match="shares memory"):
        nbnorm.batch_norm_forward(buffer, out=buffer)


def test_numba_arrays(cp, rng):
    """Arrays of Numba come and go as such; what is lent is given back."""
    x, dy = rng.standard_normal((2, 5, 4)).astype(np.float32)
    weight = rng.standard_normal(4).astype(np.float32)
    expected, saved = nbnorm.batch_norm_forward(x, weight)
    expected_gradients = nbnorm.batch_norm_backward(dy, saved)
    out = cuda.device_array(x.shape, x.dtype)
    y, saved = nbnorm.batch_norm_forward(cuda.to_device(x), cuda.to_device(weight), out=out)
    assert y is out
    gradients = nbnorm.batch_norm_backward(cuda.to_device(dy), saved)
    np.testing.assert_allclose(y.copy_to_host(), expected, rtol=1e-5, atol=1e-5)
    for found, reference in zip(gradients[:2], expected_gradients[:2], strict=True):
        np.testing.assert_allclose(found.copy_to_host(), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        lambda xp: nbnorm.BatchNorm(4, activation="relu", nonfinite="skip", xp=xp),
        lambda xp: nbnorm.BatchNorm(4, momentum=None, xp=xp),
        lambda xp: nbnorm.LayerNorm(4, xp=xp),
        lambda xp: nbnorm.RMSNorm(4, reuse_buffers=True, xp=xp),
        lambda xp: nbnorm.GroupNorm(2, 4, xp=xp),
        lambda xp: nbnorm.InstanceNorm(4, affine=True, xp=xp),
    ],
    ids=["batch", "cumulative", "layer", "rms", "group", "instance"],
)
def test_layers(cp, rng, layer):
    """A step on the device, then the state back on the host, equal a step on the host."""
    x, dy = rng.standard_normal((2, 3, 4, 5 if "Instance" in repr(layer(np)) else 4)).astype(np.float32)
    there, here = layer(cp), layer(np)
    for one, library in ((there, cp), (here, np)):
        result = one(on(library, x)), one.backward(on(library, dy))
        one.eval()
        evaluated = one(on(library, x))
        results = (*result, evaluated) if library is np else [values.get() for values in (*result, evaluated)]
        if library is cp:
            found = results
    for value, expected in zip(found, results, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)
    assert all(isinstance(gradient, cp.ndarray) for gradient in there.grads.values())
    there.to(np)
    for name, value in here.state_dict().items():
        np.testing.assert_allclose(there.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    for name, value in here.grads.items():
        np.testing.assert_allclose(there.grads[name], value, rtol=1e-4, atol=1e-5)


def test_mixtures_are_refused(cp, rng):
    """Both places are named."""
    x, weight = rng.standard_normal((5, 4)).astype(np.float32), np.ones(4, np.float32)
    with pytest.raises(TypeError, match=r"x is a .*ndarray on device 0, but weight is a NumPy array"):
        nbnorm.batch_norm_forward(on(cp, x), weight)
    with pytest.raises(TypeError, match=r"x is a NumPy array, but weight is a .*on device 0"):
        nbnorm.batch_norm_forward(x, on(cp, weight))
    if SIMULATED:
        with pytest.raises(TypeError, match="on device 1"):
            nbnorm.batch_norm_forward(on(cp, x), cp.ndarray(weight, device=1))
    _, saved = nbnorm.batch_norm_forward(on(cp, x))
    with pytest.raises(TypeError, match="but dy is a NumPy array"):
        nbnorm.batch_norm_backward(x, saved)
    with pytest.raises(TypeError, match=r"out\[0\] is a NumPy array"):
        nbnorm.batch_norm_backward(on(cp, x), saved, out=(x, None, None))
    with pytest.raises(TypeError, match="out is a NumPy array"):
        nbnorm.batch_norm_forward(on(cp, x), out=x)
    with pytest.raises(TypeError, match=r"out is a .*on device 0"):
        nbnorm.batch_norm_forward(x, out=on(cp, x))
    with pytest.raises(TypeError, match="running_mean is a NumPy array"):
        nbnorm.batch_norm_forward(on(cp, x), None, None, np.zeros(4), np.ones(4))
    out = np.full_like(x, 7)
    with pytest.raises(TypeError, match=r"x is a NumPy array, but running_mean is a .*on device 0"):
        nbnorm.batch_norm_forward(x, None, None, on(cp, np.zeros(4)), on(cp, np.ones(4)), out=out)
    assert (out == 7).all()
    with pytest.raises(TypeError, match="int32"):
        nbnorm.batch_norm_forward(on(cp, x.astype(np.int32)))
