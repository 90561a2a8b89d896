"""float16 and bfloat16: conversions as NumPy and ml_dtypes do them, every norm within the promises."""

import numpy as np
import pytest

import nbnorm
import oracle
import reference
from nbnorm._cpu.halves import narrow, stored, widen
from nbnorm._cpu.launch import kernel
from nbnorm._cpu.memory import LINE
from nbnorm._cpu.stores import BLOCK, block_like, store_block

ml_dtypes = pytest.importorskip("ml_dtypes")
HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
on_halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


@kernel
def _convert(x, y):
    for i in range(x.shape[0]):
        y[i] = narrow(widen(x[i]), y)


@kernel
def _convert_in_blocks(x, y):
    block = block_like(y)
    whole = block.shape[0]
    for first in range(0, x.shape[0] - whole + 1, whole):
        for i in range(whole):
            block[i] = narrow(x[first + i], block)
        store_block(block, y, first, first // whole % 2 == 0)


@on_halves
def test_every_value_is_widened_as_by_numpy(dtype):
    """All 65,536 values, there and back."""
    halves = np.arange(65536, dtype=np.uint16).view(dtype)
    wide, back = np.empty(65536, np.float32), np.empty(65536, dtype)
    _convert(stored(halves), wide)
    wanted = halves.astype(np.float32)
    numbers = ~np.isnan(wanted)
    oracle.assert_same_bits(wide[numbers], wanted[numbers])
    assert np.isnan(wide[~numbers]).all()
    _convert(wide, stored(back))
    oracle.assert_same_bits(back[numbers], halves[numbers])
    assert np.isnan(back[~numbers].astype(np.float32)).all()


def aligned(size, dtype):
    """Return room that begins with a line of memory."""
    room = np.empty(size + LINE, dtype)
    return room[-room.ctypes.data % LINE // room.itemsize :][:size]


@on_halves
def test_rounding_is_that_of_numpy(dtype, rng):
    """One by one and in blocks: random floats, all midpoints between halves and their neighbours; ties to even."""
    halves = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float32)
    ordered = np.unique(halves[np.isfinite(halves)]).astype(np.float64)
    middles = ((ordered[1:] + ordered[:-1]) / 2).astype(np.float32)
    random = rng.integers(0, 2**32, 2**18, dtype=np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        values = np.concatenate(
            [
                random,
                middles,
                np.nextafter(middles, np.float32(np.inf)),
                np.nextafter(middles, np.float32(-np.inf)),
            ]
        )
        values = values[~np.isnan(values)]
        wanted = values.astype(dtype)
    found = np.empty(values.size, dtype)
    _convert(values, stored(found))
    oracle.assert_same_bits(found, wanted)
    size = values.size // BLOCK * BLOCK
    for order in (slice(None), rng.permutation(size)):  # many a block without a subnormal, and with some
        found = aligned(size, dtype)
        _convert_in_blocks(values[:size][order], stored(found))
        oracle.assert_same_bits(found, wanted[:size][order])


@on_halves
@pytest.mark.parametrize("shape", [(3, 8, 20, 20), (300, 200)], ids=str)
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_results_are_those_of_float32_rounded(norm, shape, dtype, rng):
    """Whatever rounds them, one by one or in blocks, also where a weight makes many results subnormal."""
    forward, backward = (getattr(nbnorm, f"{norm}_norm_{direction}") for direction in ("forward", "backward"))
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    features = shape[1] if norm == "batch" else shape[-1]
    weight = rng.choice([1.0, 1e-39], features, p=[0.9, 0.1]).astype(np.float32)
    y, saved = forward(x, weight, 0 * weight)
    wide, saved_wide = forward(x.astype(np.float32), weight, 0 * weight)
    oracle.assert_same_bits(y, wide.astype(dtype))
    dx = backward(dy, saved)[0]
    oracle.assert_same_bits(dx, backward(dy.astype(np.float32), saved_wide)[0].astype(dtype))


@on_halves
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("parameters", [np.float32, None], ids=["float32 weight", "half weight"])
@pytest.mark.parametrize("shape", [(6, 4, 9, 8), (70, 6)], ids=str)
def test_batch_norm(shape, parameters, offset, dtype, rng, device):
    """Output, statistics and gradients of batch norm; weights in float32 or in the half type."""
    x = (rng.standard_normal(shape) * 1.5 + offset).astype(dtype)
    dy = rng.standard_normal(shape).astype(dtype)
    weight = rng.uniform(0.5, 2, shape[1]).astype(parameters or dtype)
    bias = rng.standard_normal(shape[1]).astype(parameters or dtype)
    y, saved = nbnorm.batch_norm_forward(x, weight, bias)
    dx, dweight, dbias = nbnorm.batch_norm_backward(dy, saved)
    assert {y.dtype, dx.dtype} == {dtype}
    assert {dweight.dtype, dbias.dtype} == {weight.dtype}
    forward = oracle.batch_norm(x, weight.astype(np.float32), bias.astype(np.float32))
    gradients = oracle.differentiate(dy, forward)
    oracle.assert_forward(y, saved, forward)
    oracle.assert_gradients(dx, dweight, dbias, forward, gradients)


@on_halves
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_rows(norm, dtype, rng, device):
    """Output and gradients of layer and RMS norm."""
    x, dy = ((rng.standard_normal((33, 257)) * 1.5 + 0.3).astype(dtype) for _ in range(2))
    weight = rng.uniform(0.5, 2, 257).astype(np.float32)
    y, saved = getattr(nbnorm, f"{norm}_norm_forward")(x, weight)
    dx, dweight = getattr(nbnorm, f"{norm}_norm_backward")(dy, saved)[:2]
    centered = norm == "layer"
    forward = oracle.layer_norm(x, weight, eps=1e-5 if centered else 1e-6, centered=centered)
    gradients = oracle.differentiate(dy, forward)
    oracle.assert_within(y, forward.y, oracle.y_tolerance(forward), "y")
    oracle.assert_within(dx, gradients.dx, oracle.dx_tolerance(forward, gradients), "dx")
    bound = 4 * oracle.eps(np.float32) * (gradients.dweight_terms + gradients.dbias_terms)
    oracle.assert_within(dweight, gradients.dweight, bound, "dweight")


@on_halves
def test_nan_stays_nan_whatever_its_bits(dtype):
    """Quiet, signalling, with all bits set: none of them carries into the sign or becomes infinite."""
    x = np.array([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], dtype)
    weight = np.array([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001, 0x3F800000], np.uint32)
    y, _ = nbnorm.layer_norm_forward(x, weight.view(np.float32))
    np.testing.assert_array_equal(np.isnan(y.astype(np.float32)), [[True] * 5 + [False]])


@on_halves
def test_other_norms_and_layouts(dtype, rng, device):
    """Group and instance norm, inference, an array with gaps: equal to batch norm's kernels on a reshaped array."""
    x = (rng.standard_normal((2, 6, 10)) * 2 + 1).astype(dtype)
    for y, _ in (nbnorm.instance_norm_forward(x), nbnorm.group_norm_forward(x, 6)):
        wanted = oracle.group_norm(x, 6)
        oracle.assert_within(y.reshape(2, 6, 1, 10), wanted.y, oracle.y_tolerance(wanted), "y")
    y, _ = nbnorm.batch_norm_forward(x[:, ::2])
    oracle.assert_same_bits(y, nbnorm.batch_norm_forward(np.ascontiguousarray(x[:, ::2]))[0])
    inferred = nbnorm.batch_norm_inference(x, np.ones(6, np.float32), np.full(6, 4.0, np.float32))
    wanted = oracle.batch_norm(x, running=(np.ones(6), np.full(6, 4.0)))
    oracle.assert_within(inferred, wanted.y, oracle.y_tolerance(wanted), "y")


def test_float16_at_its_end(rng):
    """Values near 60000 have squares far beyond float16: statistics are wider."""
    x = (rng.uniform(50000, 60000, (8, 3, 16))).astype(np.float16)
    y, saved = nbnorm.batch_norm_forward(x)
    wanted = oracle.batch_norm(x)
    oracle.assert_forward(y, saved, wanted)


def test_relu_of_halves_is_that_of_the_rounded_norm(rng):
    """Without a residual there is one rounding, before or after relu alike."""
    x = rng.standard_normal((6, 4, 9, 8)).astype(np.float16)
    plain, _ = nbnorm.batch_norm_forward(x)
    fused, _ = nbnorm.batch_norm_forward(x, activation="relu")
    np.testing.assert_array_equal(fused, np.maximum(plain, np.float16(0)))


def test_residual_of_halves(rng):
    """Sum, activation and gradients of a residual in half precision."""
    x, dy, residual = (rng.standard_normal((6, 4, 9, 8)).astype(np.float16) for _ in range(3))
    y, saved = nbnorm.batch_norm_forward(x, residual=residual, activation="relu")
    dx, _, _, dresidual = nbnorm.batch_norm_backward(dy, saved)
    reduced, param = oracle.axes_but(4, 1)
    wanted = reference.forward(
        x, None, None, reduced=reduced, param=param, eps=1e-5, activation="relu", residual=residual
    )
    gradients, dz = reference.backward(dy, wanted)
    oracle.assert_within(y, wanted.y, oracle.y_tolerance(wanted.plain), "y")
    oracle.assert_within(dx, gradients.dx, oracle.dx_tolerance(wanted.plain, gradients), "dx")
    np.testing.assert_array_equal(dresidual, dz)


@pytest.mark.parametrize("dtype", ["longdouble", "float8_e4m3fn"])
def test_types_that_are_not_supported(dtype):
    """Wider than float64, narrower than the halves."""
    dtype = np.dtype(getattr(np, dtype, None) or getattr(ml_dtypes, dtype))
    message = f"x: dtype {dtype} is not supported; supported: float16, bfloat16, float32, float64"
    with pytest.raises(TypeError, match=message):
        nbnorm.batch_norm_forward(np.ones((4, 3)).astype(dtype))
