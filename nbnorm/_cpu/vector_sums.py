"""Sums over neighbours, written in vectors, for which any number of them is as good as whole steps.

Of a loop over elements, LLVM puts the accumulators of whole steps together before it goes through what is left over,
as a loop with accumulators of its own, since single values added to them cost accuracy. Short rows noticed all that:
forward of 24 MB of rows of 32 to 160 values takes 0.70 to 1 of as many copies, of 96 values 0.70 to 0.81
(benchmarks/bench_norms.py, ShortRows, before and after, together with `spans.BUNDLE`; Emerald Rapids).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from nbnorm._cpu.halves import emit_widened, widen
from nbnorm._cpu.row_type import data_of, size_of
from nbnorm._inner import processor_has
from nbnorm._math import emitted

BYTES = 64  # of a vector

_SIZE, _LANE = ir.IntType(64), ir.IntType(32)


def vector_sums(x, shift):
    """Sum of (x - shift) and of (x - shift)**2 over neighbours."""
    d = np.array([widen(value) - shift for value in x], type(shift))
    return np.float64(d.sum()), np.float64((d * d).sum())


@emitted(vector_sums)
def _vector_sums(typingctx, x, shift):
    result = types.UniTuple(types.float64, 2)

    def generate(context, builder, signature, args):
        walk = Walk(context, builder, x, args[0], shift)
        about = _everywhere(builder, args[1], walk.vector)
        # Vectors whose accumulators fit into the registers, those of AVX2, too.
        step = 4 if processor_has("avx512f") else 2
        nothing = ir.Constant(walk.vector.element, 0.0)
        whole = [cgutils.alloca_once_value(builder, nothing) for _ in range(2)]
        parts = [[cgutils.alloca_once_value(builder, walk.zero) for _ in range(step)] for _ in range(2)]

        def add(places, d):
            square = builder.fmul(d, d, flags=("contract",))
            total, squares = (builder.load(place) for place in places)
            builder.store(builder.fadd(total, d), places[0])
            builder.store(builder.fadd(squares, square, flags=("contract",)), places[1])

        with walk.by_vectors() as (many, few):
            with few:
                for value in walk.values():
                    add(whole, builder.fsub(value, args[1]))
            with many:
                for k, values in walk.steps(step):
                    add((parts[0][k], parts[1][k]), builder.fsub(values, about))
                with walk.rest() as (values, counted):
                    d = builder.select(counted, builder.fsub(values, about), walk.zero)
                    add((parts[0][-1], parts[1][-1]), d)
                for place, vectors in zip(whole, parts, strict=True):
                    builder.store(_sum(builder, vectors), place)
        sums = [context.cast(builder, builder.load(place), shift, types.float64) for place in whole]
        return context.make_tuple(builder, result, sums)

    return result(x, shift), generate


class Walk:
    """Code that goes through a row vector by vector, in the type that is computed with.

    Attributes
    ----------
    vector : llvmlite type
        That of a vector.
    zero : llvmlite constant
        One of zeros.
    """

    def __init__(self, context: Any, builder: Any, row: Any, value: Any, number: Any) -> None:
        number = context.get_data_type(number)
        self._builder, self._lanes = builder, BYTES // context.get_abi_sizeof(number)
        self._dtype, self._element = row.dtype, context.get_data_type(row.dtype)
        self._align = context.get_abi_sizeof(self._element) if row.aligned else 1
        self._data, self._n = data_of(context, builder, row, value), size_of(context, builder, row, value)
        self.vector = ir.VectorType(number, self._lanes)
        self.zero = ir.Constant(self.vector, None)

    def by_vectors(self) -> Any:
        """Branch by whether there are as many values as a vector has; `steps` and `rest` are for that case."""
        return self._builder.if_else(self._builder.icmp_unsigned(">=", self._n, _SIZE(self._lanes)))

    def values(self) -> Iterator[Any]:
        """Emit what is done with each single value."""
        builder = self._builder
        with cgutils.for_range(builder, self._n) as loop:
            value = builder.load(builder.gep(self._data, [loop.index]), align=self._align)
            yield emit_widened(builder, value, self._dtype)

    def steps(self, count: int) -> Iterator[tuple[int, Any]]:
        """Emit what is done with the vector at each place of a step, then with those that fill none."""
        builder, size = self._builder, count * self._lanes
        over = builder.urem(self._n, _SIZE(size))
        whole = builder.sub(self._n, over)
        with cgutils.for_range_slice(builder, _SIZE(0), whole, _SIZE(size), _SIZE) as (at, _):
            for k in range(count):
                yield k, self._load(builder.add(at, _SIZE(k * self._lanes)))
        for k in range(count - 1):
            with builder.if_then(builder.icmp_unsigned(">=", over, _SIZE((k + 1) * self._lanes))):
                yield k, self._load(builder.add(whole, _SIZE(k * self._lanes)))

    @contextmanager
    def rest(self) -> Iterator[tuple[Any, Any]]:
        """Emit what is done with what fills no vector: the last vector there is, and which of its lanes count."""
        builder, lanes = self._builder, self._lanes
        left = builder.urem(self._n, _SIZE(lanes))
        with builder.if_then(builder.icmp_unsigned("!=", left, _SIZE(0))):
            lane = ir.Constant(ir.VectorType(_SIZE, lanes), list(range(lanes)))
            first = _everywhere(builder, builder.sub(_SIZE(lanes), left), lane.type)
            values = self._load(builder.sub(self._n, _SIZE(lanes)))
            yield values, builder.icmp_unsigned(">=", lane, first)

    def _load(self, at: Any) -> Any:
        """Emit the vector of neighbours that begins somewhere."""
        builder, kind = self._builder, ir.VectorType(self._element, self._lanes)
        place = builder.bitcast(builder.gep(self._data, [at]), kind.as_pointer())
        return emit_widened(builder, builder.load(place, align=self._align), self._dtype)


def _everywhere(builder, value, kind):
    """Emit a vector of equal elements."""
    nothing = ir.Constant(kind, ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(nothing, value, _LANE(0)),
        nothing,
        ir.Constant(ir.VectorType(_LANE, kind.count), None),
    )


def _sum(builder, places):
    """Emit the sum of all elements of some vectors; halves are added to halves."""
    vectors = [builder.load(place) for place in places]
    while len(vectors) > 1:
        vectors = [builder.fadd(a, b) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
    (vector,) = vectors
    while vector.type.count > 1:
        half = vector.type.count // 2
        parts = (
            ir.Constant(ir.VectorType(_LANE, half), list(range(first, first + half))) for first in (0, half)
        )
        vector = builder.fadd(*(builder.shuffle_vector(vector, vector, part) for part in parts))
    return builder.extract_element(vector, _LANE(0))
