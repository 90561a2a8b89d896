"""Bad arguments of the backward calls, and parts of a batch that do not fit together."""

import numpy as np
import pytest
from numpy.exceptions import AxisError

import nbnorm
from refusals import Fault, assert_refused, read_only, some

F4, F8 = np.float32, np.float64


def backward_arguments():
    """Arguments of a correct backward call."""
    x = np.arange(8, dtype=F4).reshape(4, 2) ** 2
    saved = nbnorm.batch_norm_forward(x, np.array([1, 2], F4), np.array([3, 4], F8))[1]
    return {
        "dy": x[::-1].copy(),
        "saved": saved,
        "out": (np.full((4, 2), 9, F4), np.full(2, 9, F4), np.full(2, 9, F8)),
    }


def out_at(index, value):
    """Replace one entry of ``out``."""
    return lambda a: {"out": tuple(value if i == index else entry for i, entry in enumerate(a["out"]))}


BACKWARD_FAULTS = [
    Fault("dy shape", some(dy=np.ones((4, 3), F4)), ValueError, r"dy has shape \(4, 3\), expected \(4, 2\)"),
    Fault("dy dtype", some(dy=np.ones((4, 2), F8)), TypeError, r"dy has dtype float64, expected float32"),
    Fault("dy int", some(dy=np.ones((4, 2), np.int8)), TypeError, r"dy has dtype int8"),
    Fault("dy masked", some(dy=np.ma.ones((4, 2), F4)), TypeError, r"masked arrays are not supported"),
    Fault("dy None", some(dy=None), TypeError, r"dy must be a real floating array, got dtype object"),
    Fault("need unknown", some(need=("dx", "dy")), ValueError, r"need.*'dy'"),
    Fault("out too short", lambda a: {"out": a["out"][:2]}, ValueError, r"out must be a tuple of 3"),
    Fault("out no tuple", lambda a: {"out": a["out"][0]}, (TypeError, ValueError), r"out must be a tuple"),
    Fault("dx shape", out_at(0, np.ones((2, 4), F4)), ValueError, r"shape \(2, 4\), expected \(4, 2\)"),
    Fault("dx dtype", out_at(0, np.ones((4, 2), F8)), TypeError, r"dtype float64, expected float32"),
    Fault("dx read-only", out_at(0, read_only(np.ones((4, 2), F4))), ValueError, r"read-only"),
    Fault("dweight shape", out_at(1, np.ones(3, F4)), ValueError, r"shape \(3,\), expected \(2,\)"),
    Fault("dweight dtype", out_at(1, np.ones(2, F8)), TypeError, r"dtype float64, expected float32"),
    Fault("dbias dtype", out_at(2, np.ones(2, F4)), TypeError, r"dtype float32, expected float64"),
    Fault("dbias read-only", out_at(2, read_only(np.ones(2, F8))), ValueError, r"read-only"),
]


@pytest.mark.parametrize("fault", BACKWARD_FAULTS, ids=str)
def test_backward(fault):
    """A bad dy or a bad buffer is refused before any gradient is written."""
    arguments = backward_arguments()
    arguments.update(fault.change(arguments))
    buffers = arguments["out"] if isinstance(arguments["out"], tuple) else ()
    assert_refused(nbnorm.batch_norm_backward, arguments, fault, buffers)


M2, M3 = (
    nbnorm.Moments(np.float64(4), np.ones(2), np.ones(2)),
    nbnorm.Moments(np.float64(4), np.ones(3), np.ones(3)),
)
PART_FAULTS = [
    (lambda: M2.merge(M3), ValueError, r"3.*2|2.*3"),
    (
        lambda: nbnorm.GradSums(np.ones(2), np.ones(2)).merge(nbnorm.GradSums(np.ones(3), np.ones(3))),
        ValueError,
        r"3.*2|2.*3",
    ),
    (lambda: nbnorm.batch_norm_apply(np.ones((4, 2), F4), M3), ValueError, r"3.*expected.*2"),
    (
        lambda: nbnorm.batch_norm_input_grad(
            *[backward_arguments()[n] for n in ("dy", "saved")], nbnorm.GradSums(np.ones(3), np.ones(3))
        ),
        ValueError,
        r"3.*expected.*2",
    ),
    (
        lambda: nbnorm.update_running_stats(np.ones(2), np.ones(2), M3),
        ValueError,
        r"\(2,\).*\(3,\)|\(3,\).*\(2,\)",
    ),
    (
        lambda: nbnorm.update_running_stats(np.ones(2), np.ones(2), M2, momentum=2),
        ValueError,
        r"momentum .*got 2",
    ),
    (lambda: nbnorm.Moments.from_dict({"count": 1.0, "mean": [0.0]}), (KeyError, ValueError), r"m2"),
    (lambda: nbnorm.batch_moments(np.ones((4, 2), np.int32)), TypeError, r"x has dtype int32"),
    (lambda: nbnorm.batch_moments(np.ones((4, 2)), channel_axis=2), AxisError, r"axis 2 is out of bounds"),
]


@pytest.mark.parametrize(("call", "exception", "message"), PART_FAULTS, ids=range(len(PART_FAULTS)))
def test_parts(call, exception, message):
    """Parts that do not fit together."""
    with pytest.raises(exception, match=message):
        call()
