"""From the type of an array to its library and the backend that runs it, without importing any of them.

Host code works on NumPy and CuPy arrays alike: both answer to NumPy's own functions. Other arrays on a device, Numba's
for example, come in and go out through `lent`, as CuPy arrays over the same memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import numpy as np

from nbnorm import _cpu
from nbnorm._libraries import is_cupy, is_foreign, type_name

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def backend(x: Any) -> ModuleType:
    """Return the backend module for a checked array."""
    if isinstance(x, np.ndarray):
        return _cpu
    if is_cupy(x):
        from nbnorm import _cuda

        return _cuda
    raise TypeError(f"arrays of type {type_name(x)} are not supported; expected a NumPy or a CuPy array")


def library(x: Any) -> Any:
    """Return the module of the functions on a checked array."""
    return np if isinstance(x, np.ndarray) else sys.modules["cupy"]


def lent(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a public function take arrays of Numba and others on a device, and give results as Numba's.

    The library of the first argument decides.
    """

    @wraps(function)
    def call(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        if not args or not is_foreign(args[0]):
            return function(*args, **options)
        from nbnorm._cuda import lending

        return lending.call(function, args, options)  # type: ignore[no-any-return]

    return call


def place(x: Any) -> str:
    """Return where an array is, in words."""
    if isinstance(x, np.ndarray):
        return "a NumPy array"
    return f"a {type_name(x)} on device {x.device.id}"
