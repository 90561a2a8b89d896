"""Threads that work together: the only file with shuffles and barriers.

A *team* owns a slot: it is one warp, all warps of a block, or those of several blocks, which the device runs at the
same time as a cluster. Sums run in a fixed order, so that they have the same bits in every thread and in every run.
Inside a warp they are taken in the type of the values, across warps and blocks in float64. The simulator has no
shuffles: there lanes meet at a barrier of their warp, which is small because every lane is a thread of the operating
system. It has no clusters either: there one block stands for all blocks of a team.
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

    def cluster_of(blocks):
        """Make ``blocks`` neighbours of a kernel's blocks a team."""

    def first_warp(warps):
        """Where the warps of the own block begin among those that share its memory: here, all of the team."""
        return cuda.threadIdx.x // WARP // warps * warps

    def cluster_sync():
        """Wait for all threads of the team, and see what they have written."""
        sync()

    def from_block(shared, block, warps, i):
        """Return what another block of the team has in ``shared[i]``, counted from its first warp's room."""
        return shared[2 * block * warps + i]

else:
    from llvmlite import ir
    from numba import types
    from numba.cuda.extending import intrinsic

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

    @intrinsic
    def cluster_of(typingctx, blocks):
        """Make ``blocks`` neighbours of a kernel's blocks a team; to be called by the kernel itself."""
        if not isinstance(blocks, types.IntegerLiteral):
            return None

        def generate(context, builder, signature, args):
            if blocks.literal_value > 1:
                module, number = builder.module, ir.IntType(32)
                for axis, size in (("x", blocks.literal_value), ("y", 1), ("z", 1)):
                    name = ir.MetaDataString(module, f"cluster_dim_{axis}")
                    fact = module.add_metadata((builder.function, name, number(size)))
                    module.add_named_metadata("nvvm.annotations", fact)
            return context.get_dummy_value()

        return types.void(blocks), generate

    @device
    def first_warp(warps):
        """Where the warps of the own block begin among those that share its memory."""
        return 0

    @intrinsic
    def cluster_sync(typingctx):
        """Wait for all threads of the team, and see what they have written.

        Not the ``.aligned`` form, which asks that the threads of a warp come together: after a branch they may not.
        """

        def generate(context, builder, signature, args):
            nothing = ir.FunctionType(ir.VoidType(), [])
            for half in ("arrive.release", "wait.acquire"):
                builder.asm(nothing, f"barrier.cluster.{half};", "~{memory}", [], True)
            return context.get_dummy_value()

        return types.void(), generate

    @intrinsic
    def from_block(typingctx, shared, block, warps, i):
        """Return what another block of the team has in ``shared[i]``, counted from its first warp's room."""

        def generate(context, builder, signature, args):
            own = context.make_array(shared)(context, builder, args[0]).data
            place = builder.ptrtoint(builder.gep(own, [args[3]]), ir.IntType(64))
            function = ir.FunctionType(ir.DoubleType(), [ir.IntType(64), ir.IntType(32)])
            text = "{ .reg .u64 there; mapa.u64 there, $1, $2; ld.f64 $0, [there]; }"
            rank = builder.trunc(args[1], ir.IntType(32))
            return builder.asm(function, text, "=d,l,r,~{memory}", [place, rank], True)

        return types.float64(shared, types.int64, warps, types.int64), generate


@device
def _leave(shared, warp, a, b, own):
    """Let one thread leave two values in the room of a warp, once earlier readers of ``shared`` are done."""
    sync()
    if own:
        shared[2 * warp] = a
        shared[2 * warp + 1] = b


@device
def team_sums(a, b, shared, warps, blocks):
    """Two sums over a team, float64 in every thread; ``shared`` holds `SHARED` float64 of the block."""
    a = np.float64(warp_sum(a))
    b = np.float64(warp_sum(b))
    if warps > 1:
        first = first_warp(warps)
        _leave(shared, cuda.threadIdx.x // WARP, a, b, cuda.threadIdx.x % WARP == 0)
        sync()
        a, b = shared[2 * first], shared[2 * first + 1]
        for w in range(first + 1, first + warps):
            a += shared[2 * w]
            b += shared[2 * w + 1]
        if blocks > 1:
            _leave(shared, first, a, b, cuda.threadIdx.x == first * WARP)
            cluster_sync()
            a, b = from_block(shared, 0, warps, 0), from_block(shared, 0, warps, 1)
            for other in range(1, blocks):
                a += from_block(shared, other, warps, 0)
                b += from_block(shared, other, warps, 1)
            cluster_sync()  # no block leaves, or writes, before all have read
    return a, b


@device
def team_max(a, shared, warps, blocks):
    """Largest value of a team, in every thread; NaN does not count."""
    a = warp_max(a)
    if warps > 1:
        first = first_warp(warps)
        _leave(shared, cuda.threadIdx.x // WARP, a, a, cuda.threadIdx.x % WARP == 0)
        sync()
        for w in range(first, first + warps):
            a = max(a, type(a)(shared[2 * w]))
        if blocks > 1:
            _leave(shared, first, a, a, cuda.threadIdx.x == first * WARP)
            cluster_sync()
            for other in range(blocks):
                a = max(a, type(a)(from_block(shared, other, warps, 0)))
            cluster_sync()
    return a
