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
        step = 4 if processor_has("avx512f") else 2  # vectors whose accumulators fit into the registers
        totals, squares = (
            [cgutils.alloca_once_value(builder, walk.zero) for _ in range(step)] for _ in range(2)
        )

        def add(k, d):
            square = builder.fmul(d, d, flags=("contract",))
            builder.store(builder.fadd(builder.load(totals[k]), d), totals[k])
            builder.store(builder.fadd(builder.load(squares[k]), square, flags=("contract",)), squares[k])

        for k, values in walk.steps(step):
            add(k, builder.fsub(values, about))
        with walk.rest() as (values, counted):
            add(step - 1, builder.select(counted, builder.fsub(values, about), walk.zero))
        return context.make_tuple(builder, result, [_sum(builder, sums) for sums in (totals, squares)])

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
        """Emit what is done with the values that fill no vector, which of its lanes are these being the second thing.

        They are the end of the last vector there is, or if there is none, the beginning of room for one.
        """
        builder, lanes = self._builder, self._lanes
        left = builder.urem(self._n, _SIZE(lanes))
        lane = ir.Constant(ir.VectorType(_SIZE, lanes), list(range(lanes)))
        with builder.if_then(builder.icmp_unsigned("!=", left, _SIZE(0))):
            many = builder.icmp_unsigned(">=", self._n, _SIZE(lanes))
            with builder.if_else(many) as (by_vector, by_value):
                with by_vector:
                    last = self._load(builder.sub(self._n, _SIZE(lanes)))
                    last_end = builder.block
                with by_value:
                    only = self._load_few()
                    only_end = builder.block
            values = builder.phi(self.vector)
            values.add_incoming(last, last_end)
            values.add_incoming(only, only_end)
            first = builder.select(many, builder.sub(_SIZE(lanes), left), _SIZE(0))
            end = builder.select(many, _SIZE(lanes), left)
            bounds = (_everywhere(builder, bound, lane.type) for bound in (first, end))
            beyond, before = (builder.icmp_unsigned("<", lane, bound) for bound in bounds)
            yield values, builder.and_(before, builder.not_(beyond))

    def _load(self, at: Any, data: Any = None) -> Any:
        """Emit the vector of neighbours that begins somewhere."""
        builder, kind = self._builder, ir.VectorType(self._element, self._lanes)
        place = builder.gep(self._data if data is None else data, [at])
        values = builder.load(builder.bitcast(place, kind.as_pointer()), align=self._align)
        return emit_widened(builder, values, self._dtype)

    def _load_few(self) -> Any:
        """Emit a vector of all values, if they are fewer than it has, and zeros."""
        builder, kind = self._builder, ir.ArrayType(self._element, self._lanes)
        room = cgutils.alloca_once(builder, kind)
        builder.store(ir.Constant(kind, None), room)
        first = builder.bitcast(room, self._element.as_pointer())
        with cgutils.for_range(builder, self._n) as loop:
            value = builder.load(builder.gep(self._data, [loop.index]), align=self._align)
            builder.store(value, builder.gep(first, [loop.index]))
        return self._load(_SIZE(0), first)


def _everywhere(builder, value, kind):
    """Emit a vector of equal elements."""
    nothing = ir.Constant(kind, ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(nothing, value, _LANE(0)),
        nothing,
        ir.Constant(ir.VectorType(_LANE, kind.count), None),
    )


def _sum(builder, places):
    """Emit the sum of all elements of some vectors in float64; halves are added to halves."""
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
    value = builder.extract_element(vector, _LANE(0))
    return value if value.type == ir.DoubleType() else builder.fpext(value, ir.DoubleType())
