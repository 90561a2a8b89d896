"""bfloat16 rounded by the processor, where it can: an instruction for a vector instead of seven.

It takes what is below 2**-126 for 0. A block in which there is such a value is rounded as `halves` does it. Forward,
layer and RMS norm take 0.72 to 0.88 of the time, batch norm 0.8 to 1 (benchmarks/bench_halves.py, before and after,
together with what is streamed since; Zen 4).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba import types
from numba.core.cgutils import get_or_insert_function

from nbnorm._cpu.halves import constant_like, round_to_bfloat, typed_like
from nbnorm._cpu.vectors import VECTOR
from nbnorm._inner import processor_has

_INT, _SHORT = ir.IntType(32), ir.IntType(16)
_SUBNORMAL = 0x20  # of the classes that the instruction knows


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's type, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def rounded_at_once(dtype: Any) -> bool:
    """Whether values of a type, as kernels see it, are what the processor rounds to."""
    return dtype == types.int16 and processor_rounds()


@lru_cache(maxsize=1)
def processor_rounds() -> bool:
    """Whether the processor that Numba compiles for rounds to bfloat16; LLVM has another type for it before 16."""
    return llvm_version_info >= (16,) and processor_has("avx512bf16", "avx512dq")


def emit_rounded(builder: Any, vectors: list[Any]) -> list[Any]:
    """Emit the bits of bfloat16 that are nearest to vectors of float32; ties to even."""
    floats = vectors[0].type
    class_of = ir.FunctionType(ir.VectorType(ir.IntType(1), VECTOR), [floats, _INT])
    conversion = ir.FunctionType(ir.VectorType(_BFloat(), VECTOR), [floats])
    subnormal = get_or_insert_function(builder.module, class_of, "llvm.x86.avx512.fpclass.ps.512")
    nearest = get_or_insert_function(builder.module, conversion, "llvm.x86.avx512bf16.cvtneps2bf16.512")
    found = builder.call(subnormal, [vectors[0], _INT(_SUBNORMAL)])
    for vector in vectors[1:]:
        found = builder.or_(found, builder.call(subnormal, [vector, _INT(_SUBNORMAL)]))
    any_found = builder.icmp_unsigned("!=", builder.bitcast(found, _SHORT), _SHORT(0))
    shorts = typed_like(vectors[0], _SHORT)
    with builder.if_else(any_found, likely=False) as (by_halves, by_processor):
        with by_halves:
            shift = constant_like(vectors[0], _INT, 16)
            exact = [builder.trunc(builder.lshr(round_to_bfloat(builder, v), shift), shorts) for v in vectors]
            exact_end = builder.block
        with by_processor:
            quick = [builder.bitcast(builder.call(nearest, [v]), shorts) for v in vectors]
            quick_end = builder.block
    results = []
    for ends in zip(exact, quick, strict=True):
        results.append(builder.phi(shorts))
        for value, end in zip(ends, (exact_end, quick_end), strict=True):
            results[-1].add_incoming(value, end)
    return results
