"""From the type of an array to its library and the backend that runs it, without importing any of them.

Host code works on NumPy and CuPy arrays alike: both answer to NumPy's own functions. Other arrays on a device, Numba's
for example, come in and go out through `lent`, as CuPy arrays over the same memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache, wraps
from importlib.util import find_spec
from inspect import signature
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
        return _device_backend()
    raise TypeError(f"arrays of type {type_name(x)} are not supported; expected a NumPy or a CuPy array")


@lru_cache(maxsize=1)
def _device_backend() -> ModuleType:
    """Import the CUDA backend, or say what it lacks."""
    try:
        from nbnorm import _cuda
    except ImportError as error:
        raise RuntimeError(str(error)) from error
    _cuda.require_device()
    return _cuda


def library(x: Any) -> Any:
    """Return the module of the functions on a checked array."""
    return np if isinstance(x, np.ndarray) else sys.modules["cupy"]


def lent(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run a public function or method on the device of its array, x or dy, which decides about the library, too.

    Arrays of Numba and others on a device come in as CuPy's, and results go out as Numba's.
    """
    names = list(signature(function).parameters)
    position = int(names[0] == "self")

    @wraps(function)
    def call(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        decides = args[position] if len(args) > position else options.get(names[position])
        if isinstance(decides, np.ndarray):
            return function(*args, **options)
        if is_cupy(decides):
            with decides.device:  # type: ignore[attr-defined]
                return function(*args, **options)
        if not is_foreign(decides):
            return function(*args, **options)
        if "cupy" not in sys.modules and find_spec("cupy") is None:
            raise RuntimeError(
                f"{names[position]} is a {type_name(decides)} on a CUDA device, for which nbnorm needs CuPy: "
                "install nbnorm[cuda12] or nbnorm[cuda13]"
            )
        from nbnorm._cuda import lending

        return lending.call(function, args, options)  # type: ignore[no-any-return]

    return call


def place(x: Any) -> str:
    """Return where an array is, in words."""
    if isinstance(x, np.ndarray):
        return "a NumPy array"
    return f"a {type_name(x)} on device {x.device.id}"
