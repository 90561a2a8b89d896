"""What surely passes all checks, seen at a glance: NumPy's own arrays, each the owner of its memory where it matters.

Most arguments are such, and small calls notice the rest (benchmarks/small_call.py); what is not is left to `_checks`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

PARAMETERS = (np.dtype(np.float32), np.dtype(np.float64))


def fitting(value: Any, like: Any) -> bool:
    """Whether a result buffer surely passes `out`, seen at a glance."""
    return (
        type(value) is type(like) is np.ndarray
        and value.shape == like.shape
        and value.dtype == like.dtype
        and value.flags.behaved
    )


def fitting_pair(
    running_mean: Any, running_var: Any, channels: int, x: Any, weight: Any, bias: Any, residual: Any, out: Any
) -> bool:  # fmt: skip
    """Whether running statistics surely pass all checks beside arrays that are `owners`, seen at a glance."""
    return (
        type(running_mean) is type(running_var) is np.ndarray
        and running_mean.base is running_var.base is None
        and running_mean is not running_var
        and running_mean.shape == running_var.shape == (channels,)
        and running_mean.dtype in PARAMETERS
        and running_var.dtype in PARAMETERS
        and running_mean.flags.behaved
        and running_var.flags.behaved
        and not (running_mean is x or running_mean is weight or running_mean is bias)
        and not (running_var is x or running_var is weight or running_var is bias)
        and not (running_mean is residual or running_mean is out)
        and not (running_var is residual or running_var is out)
    )


def fitting_gradients(dx: Any, dweight: Any, dbias: Any, x: Any, weight: Any, bias: Any) -> bool:
    """Whether results surely pass `out` and share no memory with each other or with parameters, seen at a glance.

    Written out: small calls notice loops and sets (benchmarks/small_call.py, checks of backward).
    """
    return (
        type(dx) is type(dweight) is type(dbias) is type(x) is type(weight) is type(bias) is np.ndarray
        and dx.base is dweight.base is dbias.base is x.base is weight.base is bias.base is None
        and dx.shape == x.shape
        and dweight.shape == weight.shape
        and dbias.shape == bias.shape
        and dx.dtype is x.dtype
        and dweight.dtype is weight.dtype
        and dbias.dtype is bias.dtype
        and dx.flags.behaved
        and dweight.flags.behaved
        and dbias.flags.behaved
        and not (dx is dweight or dx is dbias or dweight is dbias)
        and not (dx is weight or dweight is weight or dbias is weight)
        and not (dx is bias or dweight is bias or dbias is bias)
    )


def owners(*arrays: Any) -> bool:
    """Whether arrays are NumPy's own, each the owner of its memory, as far as they are there."""
    for array in arrays:
        if array is not None and (type(array) is not np.ndarray or array.base is not None):
            return False
    return True


def apart(value: Any, *others: Any) -> bool:
    """Whether an array surely shares no memory with others, seen at a glance: each of them owns its own."""
    return value is not None and owners(value, *others) and not any(other is value for other in others)


def distinct(*arrays: Any) -> bool:
    """Whether arrays surely share no memory with each other, seen at a glance: `apart` for all pairs."""
    seen: set[int] = set()
    given = 0
    for array in arrays:
        if array is not None:
            if type(array) is not np.ndarray or array.base is not None:
                return False
            seen.add(id(array))
            given += 1
    return len(seen) == given
