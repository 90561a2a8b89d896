"""Sums over neighbours, written in vectors, for which any number of them is as good as whole steps.

Of a loop over elements, LLVM puts the accumulators of whole steps together before it goes through what is left over,
as a loop with accumulators of its own, since single values added to them cost accuracy. Short rows noticed all that:
forward of 24 MB of rows of 32 to 160 values takes 0.70 to 1 of as many copies, of 96 values 0.70 to 0.81
(benchmarks/bench_norms.py, ShortRows, before and after, together with `spans.BUNDLE`; Emerald Rapids).

What vectors hold of as many rows as they have elements is put together side by side: of sixteen in a third of the
steps, few of which wait for another. With AVX-512, in trials, rows of 20 to 192 values took 0.73 to 0.95 of the time in
cache, those of float16 in memory 0.75 to 0.83 (Emerald Rapids).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from nbnorm._cpu.halves import widen
from nbnorm._cpu.memory import row
from nbnorm._cpu.row_type import data_of, element, size_of
from nbnorm._cpu.vectors import Walk, added, everywhere, total, totals, vector_of
from nbnorm._inner import processor_has
from nbnorm._math import emitted, is_none

_SIZE = ir.IntType(64)


def vector_sums(x, shift):
    """Sum of (x - shift) and of (x - shift)**2 over neighbours."""
    d = np.array([widen(value) - shift for value in x], type(shift))
    return np.float64(d.sum()), np.float64((d * d).sum())


@emitted(vector_sums)
def _vector_sums(typingctx, x, shift):
    result = types.UniTuple(types.float64, 2)

    def generate(context, builder, signature, args):
        data, n = data_of(context, builder, x, args[0]), size_of(context, builder, x, args[0])
        walk = Walk(context, builder, x, data, n, shift)
        sums = [cgutils.alloca_once(builder, walk.vector.element) for _ in range(2)]
        with _by_vectors(builder, n, walk.vector) as (many, few):
            with few:
                for place, value in zip(sums, _value_sums(builder, walk, args[1]), strict=True):
                    builder.store(value, place)
            with many:
                for place, vector in zip(sums, _lane_sums(builder, walk, args[1]), strict=True):
                    builder.store(total(builder, vector), place)
        own = [context.cast(builder, builder.load(place), shift, types.float64) for place in sums]
        return context.make_tuple(builder, result, own)

    return result(x, shift), generate


def vector_sums_of_rows(x, first, apart, n, rows, shift, sums, squares):
    """`vector_sums` of rows of ``n`` neighbours that begin ``apart`` elements from each other, with the same bits.

    As many rows as a vector has elements are put together side by side; ``sums``, if they are wanted, and ``squares``
    have room for the rows, rounded up to a multiple of as many: what is behind them is overwritten.
    """
    for k in range(rows):
        own_sum, squares[k] = vector_sums(row(x, first + k * apart, n), shift[k])
        if sums is not None:
            sums[k] = own_sum


@emitted(vector_sums_of_rows)
def _vector_sums_of_rows(typingctx, x, first, apart, n, rows, shift, sums, squares):
    wanted = [i for i, target in enumerate((sums, squares)) if not is_none(target)]

    def generate(context, builder, signature, args):
        _, first, apart, n, rows, shifts, *targets = args
        vector = vector_of(context, shift.dtype)
        lanes, zero = _SIZE(vector.count), ir.Constant(vector, None)
        x_data = data_of(context, builder, x, args[0])
        results = {i: data_of(context, builder, (sums, squares)[i], targets[i]) for i in wanted}

        def start(k):
            data = builder.gep(x_data, [builder.add(first, builder.mul(k, apart))])
            return Walk(context, builder, x, data, n, shift.dtype), element(
                context, builder, shift, shifts, k
            )

        with _by_vectors(builder, n, vector) as (many, few):
            with few, cgutils.for_range(builder, rows) as loop:
                own = _value_sums(builder, *start(loop.index))
                for i, data in results.items():
                    value = context.cast(builder, own[i], shift.dtype, types.float64)
                    builder.store(value, builder.gep(data, [loop.index]))
            with many, cgutils.for_range_slice(builder, _SIZE(0), rows, lanes, _SIZE) as (at, _):
                room = {i: cgutils.alloca_once(builder, vector, lanes) for i in wanted}
                left = builder.sub(rows, at)
                count = builder.select(builder.icmp_signed("<", left, lanes), left, lanes)
                with cgutils.for_range(builder, count) as loop:
                    own = _lane_sums(builder, *start(builder.add(at, loop.index)))
                    for i in wanted:
                        builder.store(own[i], builder.gep(room[i], [loop.index]))
                with cgutils.for_range_slice(builder, count, lanes, _SIZE(1), _SIZE) as (k, _):
                    for i in wanted:
                        builder.store(zero, builder.gep(room[i], [k]))
                for i, data in results.items():
                    vectors = [builder.load(builder.gep(room[i], [_SIZE(k)])) for k in range(vector.count)]
                    _store_wide(builder, totals(builder, vectors), builder.gep(data, [at]))
        return context.get_dummy_value()

    return types.none(x, *[types.intp] * 4, shift, sums, squares), generate


def _by_vectors(builder: Any, n: Any, vector: Any) -> Any:
    """Branch by whether ``n`` elements are as many as a vector has."""
    return builder.if_else(builder.icmp_signed(">=", n, _SIZE(vector.count)))


def _store_wide(builder: Any, vector: Any, data: Any) -> None:
    """Store the elements of a vector as float64."""
    wide = ir.VectorType(ir.DoubleType(), vector.type.count)
    if vector.type != wide:
        vector = builder.fpext(vector, wide)
    builder.store(vector, builder.bitcast(data, wide.as_pointer()), align=8)


def _add(builder: Any, places: Any, d: Any) -> None:
    """Emit that a value, or a vector, and its square are added to sums."""
    square = builder.fmul(d, d, flags=("contract",))
    own, squares = (builder.load(place) for place in places)
    builder.store(builder.fadd(own, d), places[0])
    builder.store(builder.fadd(squares, square, flags=("contract",)), places[1])


def _value_sums(builder: Any, walk: Walk, shift: Any) -> list[Any]:
    """Emit both sums value by value."""
    nothing = ir.Constant(walk.vector.element, 0.0)
    places = [cgutils.alloca_once_value(builder, nothing) for _ in range(2)]
    for value in walk.values():
        _add(builder, places, builder.fsub(value, shift))
    return [builder.load(place) for place in places]


def _lane_sums(builder: Any, walk: Walk, shift: Any) -> list[Any]:
    """Emit a vector for each sum: that of its elements."""
    about = everywhere(builder, shift, walk.vector)
    # Vectors whose accumulators fit into the registers, those of AVX2, too.
    step = 4 if processor_has("avx512f") else 2
    parts = [[cgutils.alloca_once_value(builder, walk.zero) for _ in range(2)] for _ in range(step)]
    for k, values in walk.steps(step):
        _add(builder, parts[k], builder.fsub(values, about))
    with walk.rest() as (values, counted):
        d = builder.select(counted, builder.fsub(values, about), walk.zero)
        _add(builder, parts[-1], d)
    return [added(builder, [builder.load(place) for place in places]) for places in zip(*parts, strict=True)]
