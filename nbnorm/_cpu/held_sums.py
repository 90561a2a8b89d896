"""Sums of rows side by side: what vectors hold of sixteen rows, or twice eight of float64, is put together at once.

That takes a third of the steps, few of which wait for another. With AVX-512, in trials, forward of rows
of 20 to 192 values took 0.73 to 0.95 of the time in cache, those of float16 in memory 0.75 to 0.83 (Emerald Rapids).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from nbnorm._cpu.halves import widen
from nbnorm._cpu.memory import emit_room
from nbnorm._cpu.row_type import Row, data_of, element, size_of
from nbnorm._cpu.vector_sums import Terms, emit_sums, gradients, shifted, vector_sums
from nbnorm._cpu.vectors import BYTES, VECTOR, Source, Walk, totals, vector_of
from nbnorm._math import computing_type, emitted, normalize, standardize

ROWS = VECTOR  # that are put together
HELD = ROWS * VECTOR  # elements of the room for what vectors hold of one of their sums

_SIZE, _LANE = ir.IntType(64), ir.IntType(32)


def held_like(x):
    """Return room for what vectors hold of two sums of `ROWS` rows."""
    return np.zeros(2 * HELD, np.float64 if x.itemsize == 8 else np.float32)


@emitted(held_like)
def _held_like(typingctx, x):
    result = Row(computing_type(x), True)
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
        own_x, stride, segments, own_shift, *place = args
        source = Source(x, data_of(context, builder, x, own_x), stride)
        walk = Walk(context, builder, [source], size_of(context, builder, x, own_x), shift, segments)
        _emit_held(context, builder, walk, shifted(builder, own_shift), held, *place)
        return context.get_dummy_value()

    index = types.intp
    return types.none(x, index, index, shift, held, index), generate


def hold_grad_sums(x, x_stride, dy, dy_stride, segments, n, terms, activation, held, k):
    """Keep what vectors hold of the sums of dz and of dz * x_hat of some runs, from row ``k`` of `ROWS` on.

    These are neighbours of ``n`` elements. Rows of ``terms`` have for each of them the rounded mean, to which x_hat is
    relative, rstd, and scale and shift of z, which only an activation asks for. The sums of a run are those of some
    segments together, of which x and dy are the first and the next begin a stride behind.
    """
    for i, (mean_hi, rstd, scale, shift) in enumerate(zip(*terms, strict=True)):
        own_x = _segments(x[i * n : (i + 1) * n], x_stride, segments)
        own_dy = _segments(dy[i * n : (i + 1) * n], dy_stride, segments)
        z = normalize(own_x, mean_hi, scale, shift)
        dz = own_dy if activation is None else np.where(z <= 0, 0, own_dy)
        _hold(held, k + i, (dz.sum(), (dz * standardize(own_x, mean_hi, rstd)).sum()))


@emitted(hold_grad_sums)
def _hold_grad_sums(typingctx, x, x_stride, dy, dy_stride, segments, n, terms, activation, held, k):
    def generate(context, builder, signature, args):
        own_x, x_stride, own_dy, dy_stride, segments, n, own_terms, _, room, k = args
        first, first_dy = data_of(context, builder, x, own_x), data_of(context, builder, dy, own_dy)
        rows = cgutils.unpack_tuple(builder, own_terms)
        with cgutils.for_range(builder, size_of(context, builder, terms[0], rows[0])) as loop:
            i, at = loop.index, [builder.mul(loop.index, n)]
            own = [element(context, builder, kind, value, i) for kind, value in zip(terms, rows, strict=True)]
            sources = [
                Source(x, builder.gep(first, at), x_stride), Source(dy, builder.gep(first_dy, at), dy_stride)
            ]  # fmt: skip
            walk = Walk(context, builder, sources, n, terms[0].dtype, segments)
            of_run = gradients(builder, *own, activation)
            _emit_held(context, builder, walk, of_run, held, room, builder.add(k, i))
        return context.get_dummy_value()

    index = types.intp
    return types.none(x, index, dy, index, index, index, terms, activation, held, index), generate


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
    strides = stride * x.itemsize, x.itemsize
    own = np.lib.stride_tricks.as_strided(x, (segments, x.shape[0]), strides)
    return np.array([widen(value) for value in own.reshape(-1)])


def _hold(held: Any, k: int, sums: Any) -> None:
    """Keep the sums of a row in the first elements of its vectors."""
    for room, value in zip(held.reshape(2, ROWS, -1), sums, strict=True):
        room[k], room[k, 0] = 0.0, value


def _held_vectors(context: Any, builder: Any, held: Any, value: Any, vector: Any, which: Any) -> Any:
    """Emit where the vectors of one of the sums begin."""
    data = builder.gep(data_of(context, builder, held, value), [builder.mul(which, _SIZE(HELD))])
    return builder.bitcast(data, vector.as_pointer())


def _emit_held(context: Any, builder: Any, walk: Walk, terms: Terms, held: Any, room: Any, k: Any) -> None:
    """Emit both sums of row ``k``, each kept as a vector."""

    def keep(which: int, value: Any) -> None:
        if value.type != walk.vector:  # where there are few values, the first element is their sum
            value = builder.insert_element(walk.zero, value, _LANE(0))
        data = _held_vectors(context, builder, held, room, walk.vector, _SIZE(which))
        builder.store(value, builder.gep(data, [k]), align=BYTES)

    emit_sums(builder, walk, terms, keep)


def _store_wide(builder: Any, vector: Any, data: Any) -> None:
    """Store the elements of a vector as float64."""
    wide = ir.VectorType(ir.DoubleType(), vector.type.count)
    if vector.type != wide:
        vector = builder.fpext(vector, wide)
    builder.store(vector, builder.bitcast(data, wide.as_pointer()), align=8)
