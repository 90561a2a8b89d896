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

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from nbnorm._cpu import row_type
from nbnorm._cpu.halves import widen
from nbnorm._cpu.memory import emit_room
from nbnorm._cpu.row_type import data_of, size_of
from nbnorm._cpu.vectors import BYTES, Row, Walk, added, everywhere, total, totals, vector_of
from nbnorm._inner import processor_has
from nbnorm._math import computing_type, emitted, standardize

ROWS = BYTES // 4  # that are put together, as many as the widest vectors have elements
HELD = ROWS * ROWS  # elements of the room for what vectors hold of one of their sums

_SIZE = ir.IntType(64)


def vector_sums(x, shift):
    """Sum of (x - shift) and of (x - shift)**2 over neighbours."""
    d = np.array([widen(value) - shift for value in x], type(shift))
    return np.float64(d.sum()), np.float64((d * d).sum())


@emitted(vector_sums)
def _vector_sums(typingctx, x, shift):
    result = types.UniTuple(types.float64, 2)

    def generate(context, builder, signature, args):
        walk = _walk(context, builder, x, args[0], shift)
        sums = [cgutils.alloca_once(builder, walk.vector.element) for _ in range(2)]

        def keep(k: int, value: Any) -> None:
            builder.store(total(builder, value) if value.type == walk.vector else value, sums[k])

        _emit_sums(builder, walk, _shifted(builder, args[1]), keep)
        own = [context.cast(builder, builder.load(place), shift, types.float64) for place in sums]
        return context.make_tuple(builder, result, own)

    return result(x, shift), generate


def held_like(x):
    """Return room for what vectors hold of two sums of `ROWS` rows."""
    return np.zeros(2 * HELD, np.float64 if x.itemsize == 8 else np.float32)


@emitted(held_like)
def _held_like(typingctx, x):
    result = row_type.Row(computing_type(x), True)
    return result(x), lambda context, builder, *_: emit_room(context, builder, result, 2 * HELD)


def hold_sums(x, stride, segments, shift, held, k):
    """Keep what vectors hold of the `vector_sums` of row ``k`` of `ROWS`.

    It is some segments together, of which x is the first and the next begin a stride behind.
    """
    own_x = _segments(x, stride, segments)
    _hold(held, k, vector_sums(own_x, shift))


@emitted(hold_sums)
def _hold_sums(typingctx, x, stride, segments, shift, held, k):
    def generate(context, builder, signature, args):
        own_x, stride, segments, shift, *place = args
        rows = [Row(x, data_of(context, builder, x, own_x), stride)]
        walk = Walk(context, builder, rows, size_of(context, builder, x, own_x), signature.args[3], segments)
        _emit_sums(builder, walk, _shifted(builder, shift), _keeper(context, builder, walk, held, *place))
        return context.get_dummy_value()

    index = types.intp
    return types.none(x, index, index, shift, held, index), generate


def hold_grad_sums(x, x_stride, dz, dz_stride, segments, mean_hi, rstd, held, k):
    """Keep what vectors hold of the sums of dz and of dz * x_hat; x_hat relative to the rounded mean.

    They are those of some segments together, of which x and dz are the first and the next begin a stride behind.
    """
    own_x, own_dz = _segments(x, x_stride, segments), _segments(dz, dz_stride, segments)
    _hold(held, k, (own_dz.sum(), (own_dz * standardize(own_x, mean_hi, rstd)).sum()))


@emitted(hold_grad_sums)
def _hold_grad_sums(typingctx, x, x_stride, dz, dz_stride, segments, mean_hi, rstd, held, k):
    def generate(context, builder, signature, args):
        own_x, x_stride, own_dz, dz_stride, segments, mean_hi, rstd, *place = args
        rows = [
            Row(x, data_of(context, builder, x, own_x), x_stride),
            Row(dz, data_of(context, builder, dz, own_dz), dz_stride),
        ]
        n = size_of(context, builder, x, own_x)
        walk = Walk(context, builder, rows, n, signature.args[5], segments)
        keep = _keeper(context, builder, walk, held, *place)
        _emit_sums(builder, walk, _gradients(builder, mean_hi, rstd), keep)
        return context.get_dummy_value()

    index = types.intp
    return types.none(x, index, dz, index, index, mean_hi, rstd, held, index), generate


def held_totals(held, which, rows, sums):
    """Totals of one of the sums of some rows, with the bits of one by one.

    ``sums`` has room for them, rounded up to a multiple of `ROWS`: what is behind them is overwritten.
    """
    sums[:rows] = held.reshape(2, ROWS, -1)[which, :rows].sum(axis=1)


@emitted(held_totals)
def _held_totals(typingctx, held, which, rows, sums):
    def generate(context, builder, signature, args):
        vector = vector_of(context, held.dtype)
        lanes = _SIZE(vector.count)
        data = _held_vectors(context, builder, held, args[0], vector, args[1])
        target = data_of(context, builder, sums, args[3])
        with cgutils.for_range_slice(builder, _SIZE(0), args[2], lanes, _SIZE) as (at, _):
            first = builder.gep(data, [at])
            vectors = [builder.load(builder.gep(first, [_SIZE(k)]), align=BYTES) for k in range(vector.count)]
            _store_wide(builder, totals(builder, vectors), builder.gep(target, [at]))
        return context.get_dummy_value()

    return types.none(held, types.intp, types.intp, sums), generate


def _segments(x: Any, stride: int, segments: int) -> Any:
    """Return the values of some segments, of which x is the first."""
    line, n = np.lib.stride_tricks.as_strided, x.shape[0]
    own = line(x, (segments, n), (stride * x.itemsize, x.itemsize))
    return np.array([widen(value) for value in own.reshape(-1)])


def _hold(held: Any, k: int, sums: Any) -> None:
    """Keep the sums of a row in the first elements of its vectors."""
    for room, value in zip(held.reshape(2, ROWS, -1), sums, strict=True):
        room[k], room[k, 0] = 0.0, value


def _walk(context: Any, builder: Any, x: Any, value: Any, number: Any) -> Walk:
    """Return the walk along a row."""
    data, n = data_of(context, builder, x, value), size_of(context, builder, x, value)
    return Walk(context, builder, [Row(x, data)], n, number)


def _held_vectors(context: Any, builder: Any, held: Any, value: Any, vector: Any, which: Any) -> Any:
    """Emit where the vectors of one of the sums begin."""
    data = builder.gep(data_of(context, builder, held, value), [builder.mul(which, _SIZE(HELD))])
    return builder.bitcast(data, vector.as_pointer())


def _keeper(
    context: Any, builder: Any, walk: Walk, held: Any, room: Any, k: Any
) -> Callable[[int, Any], None]:
    """Return what emits that one of the sums of row ``k`` is kept: a vector, or a value as the first of one."""

    def keep(which: int, value: Any) -> None:
        if value.type != walk.vector:
            value = builder.insert_element(walk.zero, value, ir.IntType(32)(0))
        data = _held_vectors(context, builder, held, room, walk.vector, _SIZE(which))
        builder.store(value, builder.gep(data, [k]), align=BYTES)

    return keep


def _store_wide(builder: Any, vector: Any, data: Any) -> None:
    """Store the elements of a vector as float64."""
    wide = ir.VectorType(ir.DoubleType(), vector.type.count)
    if vector.type != wide:
        vector = builder.fpext(vector, wide)
    builder.store(vector, builder.bitcast(data, wide.as_pointer()), align=8)


Terms = Callable[[list[Any], Any], tuple[Any, Any, Any]]  # what is summed, and the factors of what else is


def _shifted(builder: Any, shift: Any) -> Terms:
    """Return what emits the deviation from a shift, whose square is summed, too."""

    def terms(vectors: list[Any], counted: Any) -> tuple[Any, Any, Any]:
        (x,) = vectors
        d = _counting(builder, counted, builder.fsub(x, _like(builder, shift, x)))
        return d, d, d

    return terms


def _gradients(builder: Any, mean_hi: Any, rstd: Any) -> Terms:
    """Return what emits dz, whose product with x_hat is summed, too."""

    def terms(vectors: list[Any], counted: Any) -> tuple[Any, Any, Any]:
        x, dz = vectors
        x_hat = builder.fmul(builder.fsub(x, _like(builder, mean_hi, x)), _like(builder, rstd, x))
        dz, x_hat = _counting(builder, counted, dz), _counting(builder, counted, x_hat)
        return dz, dz, x_hat

    return terms


def _like(builder: Any, value: Any, x: Any) -> Any:
    """Emit a value, or a vector of it where x is one."""
    return everywhere(builder, value, x.type) if isinstance(x.type, ir.VectorType) else value


def _counting(builder: Any, counted: Any, vector: Any) -> Any:
    """Emit a vector whose lanes that do not count, if there are such, are 0."""
    return vector if counted is None else builder.select(counted, vector, ir.Constant(vector.type, None))


def _emit_sums(builder: Any, walk: Walk, terms: Terms, keep: Callable[[int, Any], None]) -> None:
    """Emit both sums of a row, vectors of those of their elements, or values where it does not fill one."""
    enough = builder.icmp_signed(">=", walk.n, _SIZE(walk.vector.count))
    with builder.if_else(enough) as (many, few):
        with few:
            nothing = ir.Constant(walk.vector.element, 0.0)
            places = [cgutils.alloca_once_value(builder, nothing) for _ in range(2)]
            for _ in walk.each():
                for values in walk.values():
                    _add(builder, places, *terms(values, None))
            for k, place in enumerate(places):
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
