"""Batch norm against the reference: every row of the table, then the arguments one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nbnorm
import oracle
from cases import CASES, COLUMNS, FLOATS, PLANES, Case

on_all_cases = pytest.mark.parametrize("case", CASES, ids=str)
on_floats = pytest.mark.parametrize("dtype", FLOATS, ids=str)
on_both_kinds = pytest.mark.parametrize("case", [PLANES, COLUMNS], ids=lambda case: case.reason)


def frozen(*arrays):
    """Return the bits of arrays, to be compared after a call."""
    return [array.tobytes() for array in arrays]


def assert_like(result, x):
    """Fail unless the result is a plain native array in the memory order of x, apart from x."""
    twin = np.empty_like(x)
    assert type(result) is np.ndarray
    assert (result.shape, result.dtype) == (x.shape, x.dtype.newbyteorder("="))
    strides = [[step for step, n in zip(a.strides, a.shape, strict=True) if n > 1] for a in (result, twin)]
    assert strides[0] == strides[1]
    assert not np.shares_memory(result, x)


@on_all_cases
@on_floats
def test_forward(case, dtype, rng, device):
    """Output, statistics and running statistics in training; the arguments stay as they were."""
    x, (weight, bias) = device.put(case.x(rng, dtype)), case.parameters(rng, dtype)
    old = case.running(rng)
    running = [array.copy() for array in old]
    before = frozen(x, weight, bias)
    y, saved = nbnorm.batch_norm_forward(
        x, weight, bias, *running, channel_axis=case.channel_axis, **case.options
    )
    assert frozen(x, weight, bias) == before
    assert_like(y, x)
    reference = oracle.batch_norm(x, weight, bias, channel_axis=case.channel_axis, **case.options)
    oracle.assert_forward(y, saved, reference, **case.options)
    assert saved.count == reference.count
    oracle.assert_within(
        saved.moments.var(), reference.per_slot("var"), oracle.var_tolerance(reference), "variance"
    )
    oracle.assert_running(running, old, reference)


@on_all_cases
@on_floats
def test_backward(case, dtype, rng, device):
    """The three gradients of a random dy, twice with the same bits from the same ``saved``."""
    x, dy = device.put(case.x(rng, dtype)), device.put(case.dy(rng, dtype))
    weight, bias = case.parameters(rng, dtype)
    saved = nbnorm.batch_norm_forward(x, weight, bias, channel_axis=case.channel_axis, **case.options)[1]
    before = frozen(x, dy, weight, bias)
    found = nbnorm.batch_norm_backward(dy, saved)
    assert frozen(x, dy, weight, bias) == before
    assert_like(found[0], x)
    assert found[1].dtype == found[2].dtype == dtype
    reference = oracle.batch_norm(x, weight, bias, channel_axis=case.channel_axis, **case.options)
    oracle.assert_gradients(*found, reference, oracle.differentiate(dy, reference))
    for again, once in zip(nbnorm.batch_norm_backward(dy, saved), found, strict=True):
        oracle.assert_same_bits(again, once)


@on_all_cases
@on_floats
def test_inference(case, dtype, rng, device):
    """Given statistics: the call without a backward pass, and eval mode, whose backward has constants."""
    x, dy = device.put(case.x(rng, dtype)), device.put(case.dy(rng, dtype))
    (weight, bias), running = case.parameters(rng, dtype), case.running(rng)
    options = {"channel_axis": case.channel_axis, **case.options}
    before = frozen(x, dy, *running)
    y = nbnorm.batch_norm_inference(x, *running, weight, bias, **options)
    in_eval, saved = nbnorm.batch_norm_forward(x, weight, bias, *running, training=False, **options)
    found = nbnorm.batch_norm_backward(dy, saved)
    assert frozen(x, dy, *running) == before
    assert_like(y, x)
    assert_like(found[0], x)
    reference = oracle.batch_norm(x, weight, bias, running=running, **options)
    oracle.assert_within(y, reference.y, oracle.y_tolerance(reference), "y")
    oracle.assert_same_bits(in_eval, y)
    oracle.assert_gradients(*found, reference, oracle.differentiate(dy, reference))


@on_both_kinds
@on_floats
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("momentum", [0, 0.1, 1])
@pytest.mark.parametrize("buffer_dtype", FLOATS, ids=str)
def test_running_statistics(case, dtype, ddof, momentum, buffer_dtype, rng):
    """Momentum weighs the new value: 0 keeps every bit, 1 assigns the batch statistics rounded once."""
    x, parameters = case.x(rng, dtype), case.parameters(rng, dtype)
    old = case.running(rng, buffer_dtype)
    running = [array.copy() for array in old]
    saved = nbnorm.batch_norm_forward(x, *parameters, *running, momentum=momentum, ddof=ddof)[1]
    reference = oracle.batch_norm(x, *parameters)
    oracle.assert_running(running, old, reference, momentum=momentum, ddof=ddof)
    exact = {0: old, 1: (saved.moments.mean, saved.moments.var(ddof))}.get(momentum)
    if exact:
        oracle.assert_same_bits(running[0], exact[0].astype(buffer_dtype))
        oracle.assert_same_bits(running[1], exact[1].astype(buffer_dtype))


def test_running_statistics_of_different_types(rng):
    """A float32 mean next to a float64 variance: each is rounded to its own type."""
    x = COLUMNS.x(rng, np.float32)
    old = np.full(5, 0.1, np.float32), np.full(5, 0.1, np.float64)
    running = [array.copy() for array in old]
    nbnorm.batch_norm_forward(x, None, None, *running)
    oracle.assert_running(running, old, oracle.batch_norm(x))


def test_eval_keeps_a_snapshot_of_the_statistics(rng):
    """Backward in eval mode uses the statistics of its forward, whatever happened to the buffers since."""
    x, dy = PLANES.x(rng, np.float32), PLANES.dy(rng, np.float32)
    (weight, bias), running = PLANES.parameters(rng, np.float32), PLANES.running(rng, np.float64)
    reference = oracle.batch_norm(x, weight, bias, running=[array.copy() for array in running])
    y, saved = nbnorm.batch_norm_forward(x, weight, bias, *running, training=False)
    running[0][:], running[1][:] = 99, 77
    oracle.assert_forward(y, saved, reference)
    assert saved.moments is None
    oracle.assert_gradients(
        *nbnorm.batch_norm_backward(dy, saved), reference, oracle.differentiate(dy, reference)
    )


@on_both_kinds
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("present", ["", "weight", "bias"], ids=["neither", "weight", "bias"])
def test_absent_parameters(case, training, present, rng):
    """None stands for 1 or 0, and its gradient is None."""
    x, dy = case.x(rng, np.float32), case.dy(rng, np.float32)
    weight, bias = (
        array if name in present.split() else None
        for name, array in zip(("weight", "bias"), case.parameters(rng, np.float32), strict=True)
    )
    running = None if training else case.running(rng)
    y, saved = nbnorm.batch_norm_forward(x, weight, bias, *(running or ()), training=training)
    reference = oracle.batch_norm(x, weight, bias, running=running)
    oracle.assert_within(y, reference.y, oracle.y_tolerance(reference), "y")
    dx, dweight, dbias = nbnorm.batch_norm_backward(dy, saved)
    assert ((dweight is None), (dbias is None)) == ((weight is None), (bias is None))
    gradients = oracle.differentiate(dy, reference)
    oracle.assert_within(dx, gradients.dx, oracle.dx_tolerance(reference, gradients), "dx")
    for name, found in (("dweight", dweight), ("dbias", dbias)):
        if found is not None:
            bound = oracle.sum_tolerance(getattr(gradients, f"{name}_terms"), reference, found.dtype)
            oracle.assert_within(found, getattr(gradients, name), bound, name)


@on_both_kinds
@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype", "bias_dtype"),
    [
        ("float32", "float64", "float64"),
        ("float64", "float32", "float32"),
        ("float32", "float64", "float32"),
    ],
)
def test_parameters_of_another_type(case, x_dtype, weight_dtype, bias_dtype, rng):
    """The result has the type of x, each parameter gradient that of its parameter."""
    x, dy = case.x(rng, x_dtype), case.dy(rng, x_dtype)
    weight, bias = case.parameters(rng, np.float64)
    weight, bias = weight.astype(weight_dtype), bias.astype(bias_dtype)
    y, saved = nbnorm.batch_norm_forward(x, weight, bias)
    reference = oracle.batch_norm(x, weight, bias)
    oracle.assert_forward(y, saved, reference)
    dx, dweight, dbias = nbnorm.batch_norm_backward(dy, saved)
    assert [array.dtype for array in (y, dx, dweight, dbias)] == [x_dtype, x_dtype, weight_dtype, bias_dtype]
    oracle.assert_gradients(dx, dweight, dbias, reference, oracle.differentiate(dy, reference))


def test_saved_is_frozen_and_readable(rng):
    """What backward needs is there to be read and cannot be replaced."""
    x = PLANES.x(rng, np.float32)
    saved = nbnorm.batch_norm_forward(x, *PLANES.parameters(rng, np.float32))[1]
    assert isinstance(saved.count, np.float64)
    assert saved.count == 60
    assert saved.mean.shape == saved.rstd.shape == (6,)
    assert saved.moments.count == 60
    each = 6 * 8  # mean, rstd and m2 are float64; weight and bias are float32
    assert saved.nbytes == x.nbytes + 3 * each + 2 * each // 2
    running = np.zeros(6), np.ones(6)
    with_renorm = nbnorm.batch_norm_forward(x, None, None, *running, renorm=(3.0, 5.0))[1]
    assert with_renorm.nbytes == x.nbytes + 5 * each  # and r and d, which stand for weight and bias
    oracle.assert_same_bits(saved.rstd, saved.moments.rstd(1e-5))
    with pytest.raises(AttributeError):
        saved.mean = None


@st.composite
def strided_inputs(draw):
    """Draw a view: some shape, its axes in some order in memory, some of them with steps or backwards."""
    shape = draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3, -1, -2])) for _ in shape]
    block = np.full([shape[axis] * abs(steps[axis]) for axis in order], np.nan, np.float32)
    view = block.transpose(np.argsort(order))[tuple(slice(None, None, step) for step in steps)]
    axis = draw(st.integers(-len(shape), len(shape) - 1).filter(lambda a: view.size // shape[a] > 1))
    values = np.random.default_rng(draw(st.integers(0, 999))).standard_normal(view.shape)
    view[...] = values
    return view, axis


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(strided_inputs())
def test_any_strides(drawn):
    """Forward and backward of an arbitrary view; dy is dense, so mostly laid out unlike x."""
    x, axis = drawn
    case = Case(x.shape, axis, "drawn")
    generator = np.random.default_rng(x.size)
    dy, (weight, bias) = case.dy(generator, np.float32), case.parameters(generator, np.float32)
    y, saved = nbnorm.batch_norm_forward(x, weight, bias, channel_axis=axis)
    reference = oracle.batch_norm(x, weight, bias, channel_axis=axis)
    assert_like(y, x)
    oracle.assert_forward(y, saved, reference)
    found = nbnorm.batch_norm_backward(dy, saved)
    assert_like(found[0], x)
    oracle.assert_gradients(*found, reference, oracle.differentiate(dy, reference))
