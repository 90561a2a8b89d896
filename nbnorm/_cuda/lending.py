"""Arrays on a device that are not CuPy's: seen as CuPy arrays on the way in, as Numba's on the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from nbnorm._cuda.memory import SIMULATED
from nbnorm._libraries import is_cupy, is_foreign


def call(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Call a function with CuPy arrays over the memory of the arguments; results over theirs."""
    seen: dict[int, Any] = {}
    inside = [_in(arg, seen) for arg in args]
    options = {name: _in(value, seen) for name, value in options.items()}
    (_, first), *_ = seen.values()
    with first.device:
        return _out(function(*inside, **options), seen)


def _in(x: Any, seen: dict[int, Any]) -> Any:
    """View a foreign array, or those of a tuple, as CuPy's, and remember what was lent."""
    if type(x) is tuple:
        return tuple(_in(item, seen) for item in x)
    if not is_foreign(x):
        return x
    import cupy

    view = cupy.asarray(x)
    seen[id(view)] = x, view
    return view


def _out(x: Any, seen: dict[int, Any]) -> Any:
    """Give a result back: the array that was lent, or a new one of Numba's."""
    if type(x) is tuple:
        return tuple(_out(item, seen) for item in x)
    if not is_cupy(x):
        return x
    if id(x) in seen:
        return seen[id(x)][0]
    return cuda.to_device(np.asarray(x.get())) if SIMULATED else cuda.as_cuda_array(x)
