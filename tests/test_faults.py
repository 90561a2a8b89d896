"""Bad arguments of the forward calls: the exception, what its message names, and that nothing was written."""

import re

import numpy as np
import pytest
from numpy.exceptions import AxisError

import nbnorm
from refusals import Fault, assert_refused, read_only, some

F4, F8 = np.float32, np.float64


class FakeCudaArray:
    """Looks like an array on a GPU and has nothing behind it."""

    __cuda_array_interface__ = {"shape": (4, 2), "typestr": "<f4", "data": (0, False), "version": 3}  # noqa: RUF012
    shape, dtype, ndim = (4, 2), np.dtype(F4), 2


def training_arguments():
    """Arguments of a correct call with every buffer in place: x (4, 2), two channels."""
    x = np.arange(8, dtype=F4).reshape(4, 2) ** 2
    return {
        "x": x,
        "weight": np.array([1, 2], F4),
        "bias": np.array([3, 4], F4),
        "running_mean": np.array([5, 6], F4),
        "running_var": np.array([7, 8], F4),
        "out": np.full((4, 2), 9, F4),
    }


X_FAULTS = [
    Fault("x None", some(x=None), TypeError, r"x must be a real floating array, got dtype object"),
    Fault("x text", some(x="batch"), TypeError, r"x .*dtype.* <U5"),
    Fault("x object dtype", some(x=np.array([[1.0, None]])), TypeError, r"x .*dtype object"),
    Fault(
        "x int",
        some(x=np.ones((4, 2), np.int32)),
        TypeError,
        r"x has dtype int32; cast to float32 or float64",
    ),
    Fault("x list of text", some(x=[["a", "b"]]), TypeError, r"x .*<U1"),
    Fault(
        "x bool", some(x=np.ones((4, 2), bool)), TypeError, r"x has dtype bool; cast to float32 or float64"
    ),
    Fault("x complex", some(x=np.ones((4, 2), np.complex64)), TypeError, r"x .*complex64"),
    Fault("x datetime", some(x=np.zeros((4, 2), "M8[s]")), TypeError, r"x .*datetime64\[s\]"),
    Fault("x strings", some(x=np.full((4, 2), "a")), TypeError, r"x .*<U1"),
    Fault("x structured", some(x=np.zeros((4, 2), [("a", F4)])), TypeError, r"x .*\('a', '<f4'\)"),
    Fault(
        "x longdouble",
        some(x=np.ones((4, 2), np.longdouble)),
        TypeError,
        rf"dtype {np.dtype(np.longdouble)} is not supported.*float32, float64",
    ),
    Fault(
        "x masked",
        some(x=np.ma.masked_array(np.ones((4, 2), F4), False)),
        TypeError,
        r"x: masked arrays are not supported; fill or index first",
    ),
    Fault("x on a GPU", some(x=FakeCudaArray()), RuntimeError, r"x is .*CUDA device"),
    Fault("x 0-d", some(x=np.array(1, F4)), ValueError, r"at least 2 dimensions \(N, C, \.\.\.\), got 0"),
    Fault("x 1-d", some(x=np.ones(4, F4)), ValueError, r"at least 2 dimensions \(N, C, \.\.\.\), got 1"),
    Fault("axis 4", some(channel_axis=4), AxisError, r"axis 4 is out of bounds for array of dimension 2"),
    Fault("axis -3", some(channel_axis=-3), AxisError, r"axis -3 is out of bounds for array of dimension 2"),
    Fault("axis no integer", some(channel_axis=1.5), TypeError, r"channel_axis.*1\.5|channel_axis.*float"),
    Fault("eps negative", some(eps=-1.0), ValueError, r"eps must be a finite number >= 0, got -1\.0"),
    Fault("eps NaN", some(eps=np.nan), ValueError, r"eps must be a finite number >= 0, got nan"),
    Fault("eps inf", some(eps=np.inf), ValueError, r"eps must be a finite number >= 0, got inf"),
]
PARAMETER_FAULTS = [
    Fault(
        "weight too long",
        some(weight=np.ones(3, F4)),
        ValueError,
        r"weight has shape \(3,\), expected \(2,\) = number of channels \(axis 1 of x with shape \(4, 2\)\)",
    ),
    Fault(
        "weight 2-d",
        some(weight=np.ones((2, 1), F4)),
        ValueError,
        r"weight has shape \(2, 1\), expected \(2,\)",
    ),
    Fault("weight 0-d", some(weight=np.float32(1)), ValueError, r"weight has shape \(\), expected \(2,\)"),
    Fault("bias too short", some(bias=np.ones(1, F4)), ValueError, r"bias has shape \(1,\), expected \(2,\)"),
    Fault("weight int", some(weight=np.ones(2, np.int64)), TypeError, r"weight .*int64"),
    Fault("bias complex", some(bias=np.ones(2, complex)), TypeError, r"bias .*complex128"),
    Fault(
        "weight masked",
        some(weight=np.ma.masked_array([1.0, 2.0])),
        TypeError,
        r"masked arrays are not supported",
    ),
    Fault(
        "weight on a GPU", some(weight=FakeCudaArray()), (RuntimeError, TypeError), r"weight is .*CUDA device"
    ),
]
OUT_FAULTS = [
    Fault(
        "out shape", some(out=np.ones((2, 2), F4)), ValueError, r"out has shape \(2, 2\), expected \(4, 2\)"
    ),
    Fault("out rank", some(out=np.ones(4, F4)), ValueError, r"out has shape \(4,\), expected \(4, 2\)"),
    Fault("out dtype", some(out=np.ones((4, 2), F8)), TypeError, r"out has dtype float64, expected float32"),
    Fault("out read-only", some(out=read_only(np.ones((4, 2), F4))), ValueError, r"out.*read-only"),
    Fault("out list", some(out=[[0.0, 0.0]] * 4), TypeError, r"out.*list"),
]
STATISTICS_FAULTS = [
    Fault(
        "mean shape", some(running_mean=np.ones(3, F4)), ValueError, r"mean has shape \(3,\), expected \(2,\)"
    ),
    Fault(
        "var shape",
        some(running_var=np.ones((1, 2), F4)),
        ValueError,
        r"var has shape \(1, 2\), expected \(2,\)",
    ),
    Fault("var dtype", some(running_var=np.ones(2, np.int32)), TypeError, r"var .*int32"),
]
TRAINING_FAULTS = [
    Fault("mean without var", some(running_var=None), ValueError, r"running_mean.*without running_var"),
    Fault("var without mean", some(running_mean=None), ValueError, r"running_var.*without running_mean"),
    Fault("mean half", some(running_mean=np.ones(2, np.float16)), TypeError, r"running_mean .*float16"),
    Fault("mean list", some(running_mean=[0.0, 0.0]), TypeError, r"running_mean.*list"),
    Fault("var masked", some(running_var=np.ma.ones(2, F4)), TypeError, r"running_var.*MaskedArray"),
    Fault(
        "mean read-only",
        some(running_mean=read_only(np.ones(2, F4))),
        ValueError,
        r"running_mean is read-only",
    ),
    Fault(
        "var read-only", some(running_var=read_only(np.ones(2, F4))), ValueError, r"running_var is read-only"
    ),
    Fault(
        "var is weight",
        lambda a: {"running_var": a["weight"]},
        ValueError,
        r"running_var shares memory with weight",
    ),
    Fault(
        "mean is bias",
        lambda a: {"running_mean": a["bias"][::-1]},
        ValueError,
        r"running_mean shares memory with bias",
    ),
    Fault(
        "mean in x", lambda a: {"running_mean": a["x"][0]}, ValueError, r"running_mean shares memory with x"
    ),
    Fault(
        "var in out",
        lambda a: {"running_var": a["out"][3]},
        ValueError,
        r"running_var shares memory with out",
    ),
    Fault(
        "mean is var",
        lambda a: {"running_mean": a["running_var"]},
        ValueError,
        r"running_(mean|var) shares memory with running_(mean|var)",
    ),
    Fault("momentum 1.5", some(momentum=1.5), ValueError, r"momentum must be in \[0, 1\], got 1\.5"),
    Fault("momentum -0.1", some(momentum=-0.1), ValueError, r"momentum must be in \[0, 1\], got -0\.1"),
    Fault("momentum NaN", some(momentum=np.nan), ValueError, r"momentum must be in \[0, 1\], got nan"),
    Fault("momentum None", some(momentum=None), ValueError, r"momentum must be in \[0, 1\], got None"),
    Fault("momentum text", some(momentum="fast"), ValueError, r"momentum must be in \[0, 1\], got '?fast"),
    Fault("ddof 2", some(ddof=2), ValueError, r"ddof must be 0 .*1.*, got 2"),
    Fault("small_batch unknown", some(small_batch="ignore"), ValueError, r"small_batch .*ignore"),
    Fault("nonfinite unknown", some(nonfinite="ignore"), ValueError, r"nonfinite .*ignore"),
    Fault(
        "out is x", lambda a: {"out": a["x"]}, ValueError, r"out shares memory with x, which backward needs"
    ),
    Fault(
        "one value per channel",
        some(x=np.ones((1, 2), F4), out=None),
        ValueError,
        r"expected more than 1 value per channel when training, got input shape \(1, 2\)",
    ),
    Fault(
        "nonfinite raise",
        some(x=np.array([[1, np.nan], [2, 3]], F4), out=np.ones((2, 2), F4), nonfinite="raise"),
        FloatingPointError,
        r"channel.* 1|\[1\]",
    ),
    Fault(
        "nonfinite raise, no room",
        some(x=np.array([[1, 1e30], [2, 3]], F4), out=np.ones((2, 2), F4), nonfinite="raise"),
        FloatingPointError,
        r"running_var|channel.* 1|\[1\]",
    ),
]
EVAL_FAULTS = [
    Fault(
        "no statistics",
        some(running_mean=None, running_var=None),
        ValueError,
        r"running_mean and running_var are required when training=False",
    ),
    Fault("no variance", some(running_var=None), ValueError, r"running_mean and running_var"),
    Fault(
        "out is x", lambda a: {"out": a["x"]}, ValueError, r"out shares memory with x, which backward needs"
    ),
    Fault("out is x reversed", lambda a: {"out": a["x"][::-1]}, ValueError, r"out shares memory with x"),
]
COMMON = [*X_FAULTS, *PARAMETER_FAULTS, *OUT_FAULTS, *STATISTICS_FAULTS]


def forward(**arguments):
    """Call in training."""
    return nbnorm.batch_norm_forward(**arguments)


def in_eval(**arguments):
    """Call in eval mode."""
    return nbnorm.batch_norm_forward(training=False, **arguments)


def inference(running_mean, running_var, **arguments):
    """Call without a backward pass; the statistics have shorter names there."""
    return nbnorm.batch_norm_inference(mean=running_mean, var=running_var, **arguments)


def apply(running_mean, running_var, **arguments):
    """Call with moments, which stand for the statistics."""
    return nbnorm.batch_norm_apply(m=nbnorm.Moments(np.float64(4), np.ones(2), np.ones(2)), **arguments)


TABLE = [
    (call, fault)
    for call, faults in (
        (forward, COMMON + TRAINING_FAULTS),
        (in_eval, COMMON + EVAL_FAULTS),
        (inference, COMMON),
        (apply, X_FAULTS + PARAMETER_FAULTS + OUT_FAULTS),
    )
    for fault in faults
]


@pytest.mark.parametrize(("call", "fault"), TABLE, ids=[f"{call.__name__}: {fault}" for call, fault in TABLE])
def test_calls(call, fault):
    """Every entry point refuses in the same words, before anything is written."""
    arguments = training_arguments()
    arguments.update(fault.change(arguments))
    assert_refused(call, arguments, fault)


def test_the_correct_call_is_correct():
    """What the table changes is a call that works, so it is the change that is refused."""
    for call in (forward, in_eval, inference, apply):
        arguments = training_arguments()
        call(**arguments)
        assert not (arguments["out"] == 9).any()


def test_partial_overlap_of_out_and_x():
    """Training and eval need x after the call, so no overlap is accepted, not even of one element."""
    block = np.arange(10, dtype=F4).reshape(5, 2)
    for arguments in ({}, {"running_mean": np.ones(2, F4), "running_var": np.ones(2, F4), "training": False}):
        before = block.copy()
        with pytest.raises(ValueError, match="out shares memory with x, which backward needs"):
            nbnorm.batch_norm_forward(block[:3], out=block[2:], **arguments)
        np.testing.assert_array_equal(block, before)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "int4"])
def test_narrow_types_of_ml_dtypes(name):
    """Eight bits are for storage; the message names the type."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with pytest.raises(TypeError, match=rf"x.*{name}"):
        nbnorm.batch_norm_forward(np.ones((4, 2)).astype(getattr(ml_dtypes, name)))


def test_torch_tensor():
    """A tensor is named, and so is the way to an array."""
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"x .*Tensor.*\.numpy\(\)"):
        nbnorm.batch_norm_forward(torch.ones(4, 2))


def test_messages_hold_no_names_of_the_machinery():
    """A wrong argument is told in the words of the caller, not in those of the compiler."""
    for bad in (None, "a", [["b"]], np.ones((2, 2), complex), np.ones((2, 2), object)):
        with pytest.raises(TypeError) as caught:
            nbnorm.batch_norm_forward(bad)
        assert not re.search(
            "numba|nopython|dispatcher", f"{type(caught.value)} {caught.value}", re.IGNORECASE
        )
