"""The array libraries whose memory is on a device: CuPy, Numba, and Numba's simulator.

Each library is looked up among the loaded modules: who holds one of its arrays has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from nbnorm._cuda.memory import SIMULATED, Memory
from nbnorm._libraries import is_cupy


def empty(shape: int | tuple[int, ...], dtype: Any, like: Any) -> Any:
    """Return a new array of the library of another one, on the current device."""
    return sys.modules["cupy"].empty(shape, dtype) if is_cupy(like) else cuda.device_array(shape, dtype)


def zeros(shape: int | tuple[int, ...], dtype: Any, like: Any) -> Any:
    """Return a new array of zeros of the library and on the device of another one."""
    result = empty(shape, dtype, like)
    if is_cupy(result):
        result.fill(0)
    else:
        result.copy_to_device(np.zeros(shape, dtype))
    return result


def total(x: Any) -> Any:
    """Return the sum of an array, on its device; of one of Numba's, which cannot add, the array."""
    return x.sum() if is_cupy(x) else x


def addresses(args: Iterable[Any], like: Any) -> list[Any]:
    """Return what a kernel takes for arguments: where arrays of the kind of ``like`` start, 0 for None, numbers."""
    if SIMULATED:
        return [arg if arg is None or type(arg) in (int, float) else Memory(_elements(arg)) for arg in args]
    start = _cupy_start if is_cupy(like) else _start
    return [0 if arg is None else arg if type(arg) in (int, float) else start(arg) for arg in args]


def _cupy_start(x: Any) -> int:
    return x.data.ptr


def _start(x: Any) -> int:
    return int(x.__cuda_array_interface__["data"][0] or 0)


def _elements(x: Any) -> np.ndarray:
    """View an array of the simulator as one dimension in memory order."""
    values = np.asarray(getattr(x, "_ary", x))
    line = values.ravel("K")
    if values.size and not np.shares_memory(line, values):
        raise ValueError("an array with gaps has come to a kernel")
    return line


def is_aligned(xs: Iterable[Any], like: Any) -> bool:
    """Whether vectors of 16 bytes may be read from the start of every array of the kind of ``like``; None is."""
    return SIMULATED or not any(start % 16 for start in addresses(xs, like))


def stream_for(x: Any) -> Any:
    """Return the stream on which to start kernels: CuPy's current one, or Numba's default."""
    if SIMULATED or not is_cupy(x):
        return 0
    return _external_stream(x.device.id, int(sys.modules["cupy"].cuda.get_current_stream().ptr))


@lru_cache(maxsize=64)
def _external_stream(device: int, pointer: int) -> Any:
    """Return Numba's view of a stream of another library; Numba works in the context that CuPy has made current."""
    return cuda.external_stream(pointer) if pointer else cuda.default_stream()
