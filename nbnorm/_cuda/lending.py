"""Arrays on a device that are not CuPy's: seen as CuPy arrays on the way in, as Numba's on the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from nbnorm._cuda.memory import SIMULATED
from nbnorm._libraries import is_cupy, is_foreign, type_name


def call(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Call a function with CuPy arrays over the memory of the arguments; results over theirs."""
    seen: dict[int, Any] = {}
    inside = [_in(arg, seen) for arg in args]
    result = function(*inside, **{name: _in(value, seen) for name, value in options.items()})
    return _out(result, seen)


def _in(x: Any, seen: dict[int, Any]) -> Any:
    """View a foreign array, or those of a tuple, as CuPy's, and remember what was lent."""
    if isinstance(x, tuple) and not hasattr(x, "_fields"):
        return tuple(_in(item, seen) for item in x)
    if not is_foreign(x):
        return x
    view = _cupy_for(x).asarray(x)
    seen[id(view)] = x, view
    return view


def _out(x: Any, seen: dict[int, Any]) -> Any:
    """Give a result back: the array that was lent, or a new one of Numba's."""
    if isinstance(x, tuple):
        return tuple(_out(item, seen) for item in x)
    if not is_cupy(x):
        return x
    if id(x) in seen:
        return seen[id(x)][0]
    return cuda.to_device(np.asarray(x.get())) if SIMULATED else cuda.as_cuda_array(x)


def _cupy_for(x: Any) -> Any:
    """Import CuPy, whose functions run on the device what surrounds the kernels."""
    try:
        import cupy
    except ImportError:
        raise RuntimeError(
            f"{type_name(x)} is on a CUDA device, for which nbnorm needs CuPy: install nbnorm[cuda12] or nbnorm[cuda13]"
        ) from None
    return cupy
