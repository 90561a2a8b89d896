"""How a kernel is compiled and started: helpers, reductions, and the serial and parallel twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from nbnorm._cpu.cache import Cache
from nbnorm._cpu.halves import computing, stored
from nbnorm._cpu.team import team
from nbnorm._inner import Called, FourVectors, Inlined, Loop, NarrowLoop, Outer, Wide
from nbnorm._math import inner

# Elements below which waking a team of threads costs more than it saves (benchmarks/bench_batch_norm.py, Small).
PARALLEL_MIN = 32768

_OUTER: dict[str, Any] = {"error_model": "numpy", "no_cfunc_wrapper": True, "nogil": True}
# Threads share loops that say so: otherwise Numba starts a team for every `np.zeros`, too.
_PRANGE: dict[str, bool] = dict.fromkeys(
    ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion"), False
)

helper = inner()
# For what makes arrays of its own; it cannot hand them back to a `helper`, which would not free them.
allocating = inner(_nrt=True)
# All others are for loops over elements of rows (`memory.row`): what one round writes, no other reads or writes.
# Results may lie where an input does, element on element; a loop whose rounds depend on each other is for a helper.
#
# For loops that a kernel needs in several places, and for what rarely runs: taken in everywhere, they were much of
# LLVM's work, and no kernel was faster for it.
called = inner(pipeline_class=Called)
# For a loop over so few elements that handing over its arrays, seven words each, would take as long.
inlined = inner(pipeline_class=Inlined, forceinline=True)
# For loops that are optimized before a kernel takes them in: otherwise some are a tenth slower, some not vectorized.
loop = inner(pipeline_class=Loop)
# Sums side by side: a product and the sum it enters may be rounded once.
contracted = inner(pipeline_class=Loop, fastmath={"contract"})
# The least that lets LLVM vectorize a sum; NaN and Inf keep their meaning. Short segments would notice a call.
_REDUCTION: dict[str, Any] = {"fastmath": {"reassoc", "contract"}, "forceinline": True}
reduction = inner(pipeline_class=Loop, **_REDUCTION)
# Sums whose order must not depend on what is summed: those of a dz that is given, and of one that a loop computes.
four_vector_reduction = inner(pipeline_class=FourVectors, **_REDUCTION)
# For short rows, and for loops that longer ones do not mind in vectors half as wide.
narrow_loop = inner(pipeline_class=NarrowLoop, forceinline=True)
narrow_reduction = inner(pipeline_class=NarrowLoop, **_REDUCTION)


def kernel(body: Callable[..., Any], **options: Any) -> Any:
    """Compile a function that Python calls, once for each signature, and keep the code on disk."""
    compiled = njit(**_OUTER, **options)(body)
    if hasattr(compiled, "_cache"):  # plain Python under NUMBA_DISABLE_JIT=1
        compiled._cache = Cache(compiled)
    return compiled


class Twins:
    """A loop over independent tasks, compiled from one source as a serial and as a parallel kernel.

    Both have the same bits, so the serial one may take over wherever a team of threads does not pay or
    is not safe.
    """

    def __init__(self, body: Callable[..., Any]) -> None:
        self.serial = kernel(body, pipeline_class=Wide)
        self.parallel = kernel(body, parallel=dict(_PRANGE), pipeline_class=Outer)
        self.__name__ = body.__name__
        self.__doc__ = body.__doc__

    def on(self, threads: int) -> Callable[..., Any]:
        """Return the kernel for so many threads."""
        return self._shared if threads > 1 else self.serial

    def _shared(self, *args: Any) -> Any:
        """Run in parallel, if that is safe now."""
        if team.shared:
            return self.parallel(*args)
        leave = team.enter()
        if leave is None:
            return self.serial(*args)
        try:
            return self.parallel(*args)
        finally:
            leave()


def threads_for(work: int) -> int:
    """Return how many threads should share ``work`` elements."""
    return 1 if work < PARALLEL_MIN else team.size()


def shares(tasks: int, chunks: int, threads: int) -> int:
    """Return how many threads should share equal tasks, each whole; 0 where ``chunks`` of them keep more threads busy.

    Dealt out evenly, whole tasks may leave the threads idle for a tenth of the time.
    """
    balanced = tasks >= 0.9 * threads * -(-tasks // threads)
    return min(tasks, threads) if balanced or chunks == 1 else 0


def flat(x: np.ndarray) -> np.ndarray:
    """View a dense array as kernels take it: one dimension in memory order, halves as integers, typed as writable.

    Numba compiles a second kernel for each read-only argument; inputs are never written, so the flag alone
    is not worth one.
    """
    line = x.ravel("K")
    if line.itemsize == 2:
        line = stored(line)
    return line if line.flags.writeable else np.asarray(_Writable(line))


def optional(x: np.ndarray | None) -> np.ndarray | None:
    """View an optional array like x as kernels take it."""
    return None if x is None else flat(x)


def line(parameter: np.ndarray | None) -> np.ndarray | None:
    """View an optional parameter as one dimension in C order, halves widened."""
    if parameter is None or (parameter.ndim == 1 and parameter.itemsize > 2 and parameter.flags.carray):
        return parameter
    return flat(np.ascontiguousarray(parameter, computing(parameter.dtype)))


class _Writable:
    """The memory of a read-only array behind NumPy's array interface, without the flag."""

    def __init__(self, line: np.ndarray) -> None:
        self.line = line
        interface = line.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
