"""The array libraries whose memory is on a device: CuPy, Numba, and Numba's simulator.

Each library is looked up among the loaded modules: who holds one of its arrays has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from nbnorm._cuda.memory import SIMULATED, Memory
from nbnorm._libraries import is_cupy


def empty(shape: int | tuple[int, ...], dtype: Any, like: Any) -> Any:
    """Return a new array of the library and on the device of another one."""
    if is_cupy(like):
        cupy = sys.modules["cupy"]
        with like.device:
            return cupy.empty(shape, dtype)
    with device_of(like):
        return cuda.device_array(shape, dtype)


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


def address(x: Any) -> Any:
    """Return what a kernel takes for an argument: where an array starts, 0 for None, numbers as they are."""
    if isinstance(x, (int, float)):
        return x
    if SIMULATED:
        return None if x is None else Memory(_elements(x))
    if x is None:
        return 0
    if is_cupy(x):
        return int(x.data.ptr)
    return int(x.__cuda_array_interface__["data"][0] or 0)


def _elements(x: Any) -> np.ndarray:
    """View an array of the simulator as one dimension in memory order."""
    values = np.asarray(getattr(x, "_ary", x))
    line = values.ravel("K")
    if values.size and not np.shares_memory(line, values):
        raise ValueError("an array with gaps has come to a kernel")
    return line


def is_aligned(*xs: Any) -> bool:
    """Whether vectors of 16 bytes may be read from the start of every array; None is."""
    if SIMULATED:
        return True
    return all(address(x) % 16 == 0 for x in xs)


@contextmanager
def device_of(x: Any) -> Iterator[Any]:
    """Make the device of an array the current one; gives the stream on which to start kernels."""
    if SIMULATED:
        yield 0
    elif is_cupy(x):
        cupy = sys.modules["cupy"]
        with x.device, cuda.gpus[x.device.id]:
            yield _external_stream(int(cupy.cuda.get_current_stream().ptr))
    else:
        yield 0


@lru_cache(maxsize=64)
def _external_stream(pointer: int) -> Any:
    """Return Numba's view of a stream of another library."""
    return cuda.external_stream(pointer) if pointer else cuda.default_stream()
