"""What went wrong in other libraries, each test named for the failure; the issue stands next to it."""

import numpy as np
import pytest

import nbnorm
import oracle
from cases import FLOATS

on_floats = pytest.mark.parametrize("dtype", FLOATS, ids=str)
F4 = np.float32


def assert_like_oracle(norm, x, dy, *, groups=2, eps=1e-5):
    """Compare output and dx of a norm with the reference; parameters are there to share compiled kernels."""
    size = x.shape[1] if norm in ("batch", "group") else x.shape[-1]
    weight, bias = np.ones(size, x.dtype), np.zeros(size, x.dtype)
    forward, backward, reference = {
        "batch": (
            lambda: nbnorm.batch_norm_forward(x, weight, bias, eps=eps),
            nbnorm.batch_norm_backward,
            lambda: oracle.batch_norm(x, eps=eps),
        ),
        "layer": (
            lambda: nbnorm.layer_norm_forward(x, weight, bias, eps=eps),
            nbnorm.layer_norm_backward,
            lambda: oracle.layer_norm(x, eps=eps),
        ),
        "rms": (
            lambda: nbnorm.rms_norm_forward(x, weight, eps=eps),
            nbnorm.rms_norm_backward,
            lambda: oracle.layer_norm(x, eps=eps, centered=False),
        ),
        "group": (
            lambda: nbnorm.group_norm_forward(x, groups, weight, bias, eps=eps),
            nbnorm.group_norm_backward,
            lambda: oracle.group_norm(x, groups, eps=eps),
        ),
    }[norm]
    y, saved = forward()
    expected = reference()
    shape = expected.y.shape
    oracle.assert_within(y.reshape(shape), expected.y, oracle.y_tolerance(expected), f"{norm} y")
    gradients = oracle.differentiate(dy.reshape(shape), expected)
    dx = backward(dy, saved)[0].reshape(shape)
    oracle.assert_within(dx, gradients.dx, oracle.dx_tolerance(expected, gradients), f"{norm} dx")
    return y, saved


# ---- cancellation: E[x^2] - E[x]^2, or statistics in the type of x ----

CANCELLATION = {
    # flax 1491, tensorflow 3290, objax 182: a variance below 0, then NaN
    "negative variance of nearly equal values": lambda rng: 1e4 + 1e-3 * rng.standard_normal((64, 6)),
    # mlx 2238
    "NaN for 1450 +- 0.4": lambda rng: 1450 + 0.4 * rng.standard_normal((4, 96)),
    # onnxruntime 28463
    "NaN for 40000 to 40003": lambda rng: np.tile(np.arange(40000.0, 40004), (6, 3)),
    # pytorch 40302
    "variance 0 of 100 +- 0.01": lambda rng: 100 + 0.01 * rng.standard_normal((8, 50)),
    # pytorch 51102
    "standard deviation of thousands for 2000 +- 1": lambda rng: 2000 + rng.standard_normal((8, 500)),
    # pytorch 81090
    "drifting error along a ramp": lambda rng: np.arange(4 * 4096.0).reshape(4, 4096),
    # tt-metal 45968
    "mean 5, spread 0.1": lambda rng: 5 + 0.1 * rng.standard_normal((16, 60)),
}


@on_floats
@pytest.mark.parametrize("norm", ["batch", "layer", "group"])
@pytest.mark.parametrize("name", CANCELLATION)
def test_cancellation(name, norm, dtype, rng):
    """Means much larger than the spread."""
    x = CANCELLATION[name](rng).astype(dtype)
    if norm == "group":
        x = x[:, : x.shape[1] // 2 * 2].reshape(x.shape[0], 2, -1)
    assert_like_oracle(norm, x, rng.standard_normal(x.shape).astype(dtype))


def test_group_norm_of_many_elements_is_off(rng):
    """Pytorch 54293: float32 sums over millions of elements of one group lost the second digit."""
    x = (rng.standard_normal((1, 2, 2**21)) + 3).astype(F4)
    y, saved = nbnorm.group_norm_forward(x, 1)
    assert abs(y.mean(dtype=np.float64)) < 1e-6
    assert abs(y.var(dtype=np.float64) - 1) < 1e-4
    assert abs(saved.mean.item() - x.mean(dtype=np.float64)) < 1e-9


# ---- constant input ----


@on_floats
@pytest.mark.parametrize("value", [0.1, 100.0, 1e10])
def test_constant_channel_is_not_zero(value, dtype):
    """Pytorch 5410 (1e10 in 10 rows gives 113,991 to this day) and 8283, caffe 3963 (100 gives -0.0048)."""
    x = np.full((10, 3), value, dtype)
    for forward in (nbnorm.batch_norm_forward, nbnorm.layer_norm_forward, nbnorm.instance_norm_forward):
        y, saved = forward(x)
        np.testing.assert_array_equal(y, np.zeros_like(x))
        assert np.isfinite(saved.rstd).all()


# ---- eps ----


def test_eval_without_eps_is_refused():
    """Pytorch 173337: a check meant for training refused eps = 0 next to a healthy running variance."""
    x = np.array([[1.0, -2.0], [3.0, 8.0]])
    y = nbnorm.batch_norm_inference(x, [1.0, 2.0], [4.0, 16.0], eps=0)
    np.testing.assert_array_equal(y, [[0, -1], [1, 1.5]])


@pytest.mark.parametrize("eps", [-1, -1e-5])
def test_negative_eps_is_accepted(eps):
    """Pytorch 166756, tvm 12590."""
    for forward in (nbnorm.batch_norm_forward, nbnorm.layer_norm_forward, nbnorm.rms_norm_forward):
        with pytest.raises(ValueError, match="eps must be a finite number >= 0"):
            forward(np.ones((4, 2)), eps=eps)


# ---- overflow and underflow ----


@pytest.mark.parametrize("norm", ["batch", "layer", "rms", "group"])
@pytest.mark.parametrize("scale", [1e30, 1e20, 1e-20, 1e-30])
def test_squares_overflow(norm, scale, rng):
    """Pytorch 178123: finite 1e30 gave zeros or NaN, RMS norm of 1e-30 without eps inf; tt-metal 55159."""
    x = (np.clip(rng.standard_normal((12, 4, 10)), -3, 3) * scale).astype(F4)
    assert_like_oracle(norm, x, rng.standard_normal(x.shape).astype(F4), eps=0.0)


# ---- running statistics ----


def test_nan_batch_poisons_running_statistics_for_ever(rng):
    """Pytorch 88474, 90342: the scaler skips the step, the NaN stays in running_mean; here "skip" leaves it out."""
    layer = nbnorm.BatchNorm(3, nonfinite="skip")
    x = rng.standard_normal((20, 3)).astype(F4)
    layer(x)
    good = layer.running_mean.copy(), layer.running_var.copy()
    layer(np.full((20, 3), np.nan, F4))
    oracle.assert_same_bits(layer.running_mean, good[0])
    oracle.assert_same_bits(layer.running_var, good[1])
    assert layer.skipped_updates == 3
    poisoned = nbnorm.BatchNorm(3)
    poisoned(np.full((20, 3), np.nan, F4))
    assert np.isnan(poisoned.running_mean).all()
    poisoned.reset_running_stats()
    poisoned(x)
    assert np.isfinite(poisoned.running_mean).all()


def test_momentum_is_inverted(rng):
    """Keras 6839, pytorch 41559: 0.1 weighs the new value, not the old one."""
    x = rng.standard_normal((50, 2)) + 10
    mean, var = np.zeros(2), np.ones(2)
    nbnorm.batch_norm_forward(x, None, None, mean, var, momentum=0.1)
    np.testing.assert_allclose(mean, 0.1 * x.mean(axis=0), rtol=1e-14)


def test_one_variance_for_both_purposes(rng):
    """Pytorch 19902, 3122: the biased variance normalizes, the unbiased one is kept."""
    x = rng.standard_normal((5, 2))
    mean, var = np.zeros(2), np.zeros(2)
    y, _ = nbnorm.batch_norm_forward(x, None, None, mean, var, momentum=1, eps=0)
    np.testing.assert_allclose(np.square(y).mean(axis=0), 1, rtol=1e-14)
    np.testing.assert_allclose(var, x.var(axis=0, ddof=1), rtol=1e-14)


def test_negative_running_variance_passes_silently():
    """Pytorch 106605: eval with a negative variance gave numbers; here NaN, and a layer takes none."""
    y = nbnorm.batch_norm_inference(np.ones((2, 2)), np.zeros(2), np.array([-4.0, 4.0]), eps=0)
    np.testing.assert_array_equal(y, [[np.nan, 0.5]] * 2)
    with pytest.raises(ValueError, match="running_var must be >= 0"):
        nbnorm.BatchNorm(2).running_var = [-4.0, 4.0]


def test_unbiased_variance_of_one_value_is_nan():
    """Pytorch 1381: n - 1 = 0 put NaN into running_var."""
    mean, var = np.full(2, 0.5), np.full(2, 2.0)
    nbnorm.update_running_stats(mean, var, nbnorm.batch_moments(np.array([[1.0, 2.0]])))
    np.testing.assert_array_equal(var, 2)
    np.testing.assert_allclose(mean, [0.55, 0.65])


# ---- one value, no value ----


@pytest.mark.parametrize("samples", [1, 3])
def test_single_values_depend_on_the_batch_size(samples, rng):
    """Pytorch 45687, 19250: a slot of one value is its bias, dx is 0, however many samples there are."""
    x, dy = rng.standard_normal((2, samples, 4)).astype(F4)
    weight, bias = rng.standard_normal((2, 4)).astype(F4)
    for forward, backward in (
        (nbnorm.instance_norm_forward, nbnorm.instance_norm_backward),
        (lambda *a: nbnorm.group_norm_forward(a[0], 4, *a[1:]), nbnorm.group_norm_backward),
    ):
        y, saved = forward(x, weight, bias)
        oracle.assert_same_bits(y, np.broadcast_to(bias, x.shape).copy())
        np.testing.assert_array_equal(backward(dy, saved)[0], 0)
    single = x[:, :1]
    y, saved = nbnorm.rms_norm_forward(single, eps=0)
    np.testing.assert_allclose(y, np.sign(single), rtol=1e-6)


def test_empty_batch_makes_running_mean_nan():
    """Pytorch 12013, 39049, 120882, sonnet 125: NaN, a crash, a division by zero."""
    layer = nbnorm.BatchNorm(5)
    for shape in ((0, 5, 9), (4, 5, 0)):
        y = layer(np.empty(shape, F4))
        assert layer.backward(np.empty(shape, F4)).shape == y.shape == shape
    np.testing.assert_array_equal(layer.running_mean, 0)
    assert int(layer.num_batches_tracked) == 0
    assert nbnorm.instance_norm_forward(np.empty((0, 5, 9), F4))[0].shape == (0, 5, 9)


# ---- memory ----


@pytest.mark.parametrize("channels", [3, 6, 48, 65])
def test_channels_last_is_wrong_unless_a_power_of_two(channels, rng):
    """Apex 1768, pytorch 62594, 175189: forward or backward of channels-last memory."""
    values, gradient = rng.standard_normal((2, 3, channels, 5, 4)).astype(F4)
    x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (values, gradient))
    for last, first in (
        (nbnorm.batch_norm_forward(x, channel_axis=-1), nbnorm.batch_norm_forward(values)),
        (nbnorm.group_norm_forward(x, 1, channel_axis=-1), nbnorm.group_norm_forward(values, 1)),
    ):
        np.testing.assert_allclose(np.moveaxis(last[0], -1, 1), first[0], rtol=0, atol=1e-5)
    dx = nbnorm.batch_norm_backward(dy, nbnorm.batch_norm_forward(x, channel_axis=-1)[1])[0]
    expected = nbnorm.batch_norm_backward(gradient, nbnorm.batch_norm_forward(values)[1])[0]
    np.testing.assert_allclose(np.moveaxis(dx, -1, 1), expected, rtol=0, atol=1e-5)


def test_gradient_of_another_layout_is_misread(rng):
    """Pytorch 64039, 115940, 107199: x and dy in different memory orders."""
    x, dy = rng.standard_normal((2, 4, 6, 5, 3)).astype(F4)
    saved = nbnorm.batch_norm_forward(x)[1]
    expected = nbnorm.batch_norm_backward(dy, saved)[0]
    for order in ((0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 2, 3)):
        other = np.ascontiguousarray(dy.transpose(order)).transpose(np.argsort(order))
        oracle.assert_same_bits(nbnorm.batch_norm_backward(other, saved)[0], expected)


def test_more_rows_than_65535(rng):
    """Apex 411, pytorch 184826: layer norm over more rows than a grid has blocks."""
    x, dy = rng.standard_normal((2, 70001, 3)).astype(F4)
    assert_like_oracle("layer", x, dy)


@pytest.mark.parametrize("norm", ["batch", "layer", "rms", "group"])
def test_input_is_changed(norm, rng):
    """FlagGems 6332: x was written to where no running statistics were given; Paddle 21065."""
    x, dy = rng.standard_normal((2, 8, 4, 6)).astype(F4)
    before = x.tobytes(), dy.tobytes()
    assert_like_oracle(norm, x, dy)
    assert (x.tobytes(), dy.tobytes()) == before


def test_dx_over_dy_has_the_wrong_sign(rng):
    """Ggml 1519: the backward pass of RMS norm in place."""
    x, dy = rng.standard_normal((2, 6, 40)).astype(F4)
    saved = nbnorm.rms_norm_forward(x)[1]
    expected = nbnorm.rms_norm_backward(dy, saved)[0]
    into = dy.copy()
    nbnorm.rms_norm_backward(into, saved, out=(into, None))
    oracle.assert_same_bits(into, expected)


def test_running_buffers_alias_parameters():
    """Tt-metal 45578, onnxruntime 29878: the update changed the weight before it was read."""
    block = np.ones((2, 3), F4)
    x = np.arange(12, dtype=F4).reshape(4, 3)
    with pytest.raises(ValueError, match="running_var shares memory with weight"):
        nbnorm.batch_norm_forward(x, block[0], None, block[1], block[0])
    np.testing.assert_array_equal(block, 1)


# ---- several processes ----


def test_uneven_parts_count_the_same(rng):
    """Pytorch 22192, 36382, Paddle 32464: the mean of the means is not the mean."""
    x, dy = rng.standard_normal((2, 30, 4)) + 3
    parts = [
        slice(0, 1),
        slice(1, 22),
        slice(22, 22),
        slice(22, 30),
    ]  # one value, and an empty one: 36530, apex 262
    moments = nbnorm.Moments.empty(4)
    for part in parts:
        moments = moments.merge(nbnorm.batch_moments(x[part]))
    saved = [nbnorm.batch_norm_apply(x[part], moments)[1] for part in parts]
    sums = nbnorm.GradSums(np.zeros(4), np.zeros(4))
    for part, one in zip(parts, saved, strict=True):
        sums = sums.merge(nbnorm.batch_norm_grad_sums(dy[part], one))
    dx = [nbnorm.batch_norm_input_grad(dy[part], one, sums) for part, one in zip(parts, saved, strict=True)]
    whole = nbnorm.batch_norm_backward(dy, nbnorm.batch_norm_forward(x)[1])[0]
    np.testing.assert_allclose(np.concatenate(dx), whole, rtol=1e-12, atol=1e-13)


@on_floats
def test_empty_part_has_another_type(dtype):
    """Pytorch 37198: an empty process sent float32 where the others sent float64, and the gather hung."""
    empty = nbnorm.batch_moments(np.empty((0, 3), dtype))
    assert [empty.mean.dtype, empty.m2.dtype, type(empty.count)] == [np.float64, np.float64, np.float64]
