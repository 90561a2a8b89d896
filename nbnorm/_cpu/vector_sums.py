"""Sums over neighbours, written in vectors, for which any number of them is as good as whole steps.

Of a loop over elements, LLVM puts the accumulators of whole steps together before it goes through what is left over,
as a loop with accumulators of its own, since single values added to them cost accuracy. Short rows noticed all that:
forward of 24 MB of rows of 32 to 160 values takes 0.70 to 1 of as many copies, of 96 values 0.70 to 0.81
(benchmarks/bench_norms.py, ShortRows, before and after, together with `spans.BUNDLE`; Emerald Rapids).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from nbnorm._cpu.halves import widen
from nbnorm._cpu.row_type import data_of, size_of
from nbnorm._cpu.vector_terms import emit_fused, emit_rectified
from nbnorm._cpu.vectors import Source, Walk, added, everywhere, total
from nbnorm._inner import processor_has
from nbnorm._math import emitted

_SIZE = ir.IntType(64)


def vector_sums(x, shift):
    """Sum of (x - shift) and of (x - shift)**2 over neighbours."""
    d = np.array([widen(value) - shift for value in x], type(shift))
    return np.float64(d.sum()), np.float64((d * d).sum())


@emitted(vector_sums)
def _vector_sums(typingctx, x, shift):
    result = types.UniTuple(types.float64, 2)

    def generate(context, builder, signature, args):
        source = Source(x, data_of(context, builder, x, args[0]))
        walk = Walk(context, builder, [source], size_of(context, builder, x, args[0]), shift)
        sums = [cgutils.alloca_once(builder, walk.vector.element) for _ in range(2)]

        def keep(k: int, value: Any) -> None:
            builder.store(total(builder, value) if value.type == walk.vector else value, sums[k])

        emit_sums(builder, walk, shifted(builder, args[1]), keep)
        own = [context.cast(builder, builder.load(place), shift, types.float64) for place in sums]
        return context.make_tuple(builder, result, own)

    return result(x, shift), generate


Terms = Callable[[list[Any], Any], tuple[Any, Any, Any]]  # what is summed, and the factors of what else is


def shifted(builder: Any, shift: Any) -> Terms:
    """Return what emits the deviation from a shift, whose square is summed, too."""

    def terms(vectors: list[Any], counted: Any) -> tuple[Any, Any, Any]:
        (x,) = vectors
        d = _counting(builder, counted, builder.fsub(x, _like(builder, shift, x)))
        return d, d, d

    return terms


def gradients(builder: Any, mean_hi: Any, rstd: Any, scale: Any, shift: Any, activation: Any) -> Terms:
    """Return what emits dz, whose product with x_hat is summed, too; scale and shift are z's below an activation."""

    def terms(vectors: list[Any], counted: Any) -> tuple[Any, Any, Any]:
        x, dy = vectors
        own_rstd, own_scale, own_shift = (_like(builder, value, x) for value in (rstd, scale, shift))
        deviation = builder.fsub(x, _like(builder, mean_hi, x))
        dz = emit_rectified(builder, activation, dy, emit_fused(builder, deviation, own_scale, own_shift))
        x_hat = builder.fmul(deviation, own_rstd)
        dz, x_hat = _counting(builder, counted, dz), _counting(builder, counted, x_hat)
        return dz, dz, x_hat

    return terms


def _like(builder: Any, value: Any, x: Any) -> Any:
    """Emit a value, or a vector of it where x is one."""
    return everywhere(builder, value, x.type) if isinstance(x.type, ir.VectorType) else value


def _counting(builder: Any, counted: Any, vector: Any) -> Any:
    """Emit a vector whose lanes that do not count, if there are such, are 0."""
    return vector if counted is None else builder.select(counted, vector, ir.Constant(vector.type, None))


def emit_sums(builder: Any, walk: Walk, terms: Terms, keep: Callable[[int, Any], None]) -> None:
    """Emit both sums of a row, vectors of those of their elements, or values where it does not fill one."""
    enough = builder.icmp_signed(">=", walk.n, _SIZE(walk.vector.count))
    with builder.if_else(enough) as (many, few):
        with few:
            nothing = ir.Constant(walk.vector.element, 0.0)
            sums = [cgutils.alloca_once_value(builder, nothing) for _ in range(2)]
            places = [cgutils.alloca_once_value(builder, nothing) for _ in range(2)]
            for _ in walk.each():
                for place in places:  # one chain of additions for each segment
                    builder.store(nothing, place)
                for values in walk.values():
                    _add(builder, places, *terms(values, None))
                for place, own in zip(sums, places, strict=True):
                    builder.store(builder.fadd(builder.load(place), builder.load(own)), place)
            for k, place in enumerate(sums):
                keep(k, builder.load(place))
        with many:
            # Vectors whose accumulators fit into the registers, those of AVX2, too.
            step = 4 if processor_has("avx512f") else 2
            parts = [[cgutils.alloca_once_value(builder, walk.zero) for _ in range(2)] for _ in range(step)]
            for _ in walk.each():
                for k, vectors in walk.steps(step):
                    _add(builder, parts[k], *terms(vectors, None))
                with walk.rest() as (vectors, counted):
                    _add(builder, parts[-1], *terms(vectors, counted))
            for k, places in enumerate(zip(*parts, strict=True)):
                keep(k, added(builder, [builder.load(place) for place in places]))


def _add(builder: Any, places: Any, value: Any, factor: Any, other: Any) -> None:
    """Emit that a value, or a vector, and a product are added to sums."""
    product = builder.fmul(factor, other, flags=("contract",))
    own, products = (builder.load(place) for place in places)
    builder.store(builder.fadd(own, value), places[0])
    builder.store(builder.fadd(products, product, flags=("contract",)), places[1])
