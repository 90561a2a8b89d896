"""Threads that work together: the only file with shuffles and barriers.

A *team* owns a slot: it is one warp, or all warps of a block. Sums run in a fixed order, so that they have the
same bits in every thread and in every run. Inside a warp they are taken in the type of the values, across warps
in float64. The simulator has no shuffles: there lanes meet at a barrier of their warp, which is small because
every lane is a thread of the operating system.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
from numba import cuda

from nbnorm._cuda.memory import SIMULATED, device

WARP = 4 if SIMULATED else 32
# Room that a block needs to share two sums of each of its warps.
SHARED = 2 * (1024 // 32)

if SIMULATED:
    from numba.cuda.simulator.kernelapi import FakeCUDAShared

    class _Warp:
        """Where the lanes of one warp leave their values."""

        def __init__(self) -> None:
            self.barrier = threading.Barrier(WARP)
            self.values: list[Any] = [None] * WARP

    _lock = threading.Lock()

    def _shared_array(self, shape, dtype, alignment=None):
        """Give all threads of a block the same memory; the simulator's own makes two where two ask at once."""
        caller = sys._getframe(1)
        place = caller.f_code, caller.f_lineno
        with _lock:
            if place not in self._allocations:
                self._allocations[place] = np.empty(shape, dtype)
            return self._allocations[place]

    FakeCUDAShared.array = _shared_array  # type: ignore[method-assign]

    def _gather(value):
        """Return the values of all lanes and the own lane."""
        thread: Any = threading.current_thread()
        warp_index, lane = divmod(thread.thread_id, WARP)
        with _lock:
            warps = thread._manager.__dict__.setdefault("nbnorm_warps", {})
            warp = warps.setdefault(warp_index, _Warp())
        warp.values[lane] = value
        warp.barrier.wait()
        values = list(warp.values)
        warp.barrier.wait()
        return values, lane

    def warp_sum(value):
        """Sum over the lanes of a warp, in every lane."""
        values, lane = _gather(value)
        step = WARP // 2
        while step:
            values = [values[i] + values[i ^ step] for i in range(WARP)]
            step //= 2
        return values[lane]

    def warp_max(value):
        """Largest value of the lanes of a warp, in every lane; NaN does not count."""
        result = value
        for other in _gather(value)[0]:
            result = max(other, result)
        return result

    def from_lane(value, lane):
        """Return the value that another lane of the warp has."""
        return _gather(value)[0][lane]

    def sync():
        """Wait for all threads of the block."""
        threading.current_thread().syncthreads()

else:
    _ALL = 0xFFFFFFFF

    @device
    def warp_sum(value):
        """Sum over the lanes of a warp, in every lane."""
        value += cuda.shfl_xor_sync(_ALL, value, 16)
        value += cuda.shfl_xor_sync(_ALL, value, 8)
        value += cuda.shfl_xor_sync(_ALL, value, 4)
        value += cuda.shfl_xor_sync(_ALL, value, 2)
        value += cuda.shfl_xor_sync(_ALL, value, 1)
        return value

    @device
    def warp_max(value):
        """Largest value of the lanes of a warp, in every lane; NaN does not count."""
        value = max(value, cuda.shfl_xor_sync(_ALL, value, 16))
        value = max(value, cuda.shfl_xor_sync(_ALL, value, 8))
        value = max(value, cuda.shfl_xor_sync(_ALL, value, 4))
        value = max(value, cuda.shfl_xor_sync(_ALL, value, 2))
        value = max(value, cuda.shfl_xor_sync(_ALL, value, 1))
        return value

    @device
    def from_lane(value, lane):
        """Return the value that another lane of the warp has."""
        return cuda.shfl_sync(_ALL, value, lane)

    @device
    def sync():
        """Wait for all threads of the block."""
        cuda.syncthreads()


@device
def team_sums(a, b, shared, warps):
    """Two sums over a team, float64 in every thread; ``shared`` holds `SHARED` float64 of the block."""
    a = np.float64(warp_sum(a))
    b = np.float64(warp_sum(b))
    if warps > 1:
        thread = cuda.threadIdx.x
        sync()  # earlier readers of ``shared`` are done
        if thread % WARP == 0:
            shared[2 * (thread // WARP)] = a
            shared[2 * (thread // WARP) + 1] = b
        sync()
        a = shared[0]
        b = shared[1]
        for w in range(1, warps):
            a += shared[2 * w]
            b += shared[2 * w + 1]
    return a, b


@device
def team_max(a, shared, warps):
    """Largest value of a team, in every thread; NaN does not count."""
    a = warp_max(a)
    if warps > 1:
        thread = cuda.threadIdx.x
        sync()
        if thread % WARP == 0:
            shared[thread // WARP] = a
        sync()
        for w in range(warps):
            a = max(a, type(a)(shared[w]))
    return a
