"""Code written in vectors: walks along rows, and sums of what vectors hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils

from nbnorm._cpu.halves import emit_widened

BYTES = 64  # of a vector
VECTOR = BYTES // 4  # values of float32 in one
PART = 16  # bytes of one within which the processor moves elements most easily

_SIZE, _LANE = ir.IntType(64), ir.IntType(32)


def vector_of(context: Any, number: Any) -> Any:
    """Return the type of a vector of numbers."""
    number = context.get_data_type(number)
    return ir.VectorType(number, BYTES // context.get_abi_sizeof(number))


class Source(NamedTuple):
    """Neighbours of a type, from where they begin, and how far it is to the next such row."""

    kind: Any
    data: Any
    stride: Any = None


class Place:
    """Where a vector of each row lies, of which those lanes are ``there`` that a mask says, or all."""

    def __init__(
        self, context: Any, builder: Any, rows: list[Source], at: Any, vector: Any, there: Any
    ) -> None:
        self._builder, self._vector, self._there = builder, vector, there
        self._size = context.get_abi_sizeof(vector.element)
        self._places = [builder.bitcast(builder.gep(row.data, [at]), vector.as_pointer()) for row in rows]

    def load(self) -> list[Any]:
        """Emit the vectors of all rows but the last, which is the result."""
        return [self._load(place) for place in self._places[:-1]]

    def _load(self, place: Any) -> Any:
        """Emit a vector, 0 where it is not there."""
        if self._there is None:
            return self._builder.load(place, align=self._size)
        nothing = ir.Constant(self._vector, None)
        return self._masked("load", self._vector, [place, _LANE(self._size), self._there, nothing])

    def store(self, vector: Any) -> None:
        """Emit the vector of the last row."""
        if self._there is None:
            self._builder.store(vector, self._places[-1], align=self._size)
        else:
            self._masked("store", ir.VoidType(), [vector, self._places[-1], _LANE(self._size), self._there])

    def _masked(self, what: str, result: Any, arguments: list[Any]) -> Any:
        """Emit a load or a store by the mask."""
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        bits = {ir.FloatType(): 32, ir.DoubleType(): 64}[self._vector.element]
        name = f"llvm.masked.{what}.v{self._vector.count}f{bits}.p0"
        return self._builder.call(cgutils.get_or_insert_function(self._builder.module, kind, name), arguments)


class Walk:
    """Code that goes through ``n`` elements of rows side by side, in the type that is computed with.

    There may be some ``segments`` of as many, a stride from each other.

    Attributes
    ----------
    vector : llvmlite type
        That of a vector.
    zero : llvmlite constant
        One of zeros.
    n : llvmlite value
        Elements of a row.
    """

    def __init__(
        self, context: Any, builder: Any, rows: list[Source], n: Any, number: Any, segments: Any = None
    ) -> None:
        self.vector = vector_of(context, number)
        self.zero = ir.Constant(self.vector, None)
        self._context, self._builder, self._lanes = context, builder, self.vector.count
        self._rows, self._segments, self.n = rows, segments, n

    def each(self) -> Iterator[None]:
        """Emit what is done with each segment: all else is within it."""
        if self._segments is None:
            yield
            return
        first, builder = self._rows, self._builder
        with cgutils.for_range(builder, self._segments) as loop:
            self._rows = [
                row._replace(data=builder.gep(row.data, [builder.mul(loop.index, row.stride)]))
                for row in first
            ]
            yield
        self._rows = first

    def values(self) -> Iterator[list[Any]]:
        """Emit what is done with each single value of the rows."""
        with cgutils.for_range(self._builder, self.n) as loop:
            yield [self._load(row, loop.index, None) for row in self._rows]

    def steps(self, count: int) -> Iterator[tuple[int, list[Any]]]:
        """Emit what is done with the vectors at each place of a step, then with those that fill none.

        There are at least as many elements as a vector has, here and for `rest`.
        """
        builder, size = self._builder, count * self._lanes
        over = builder.urem(self.n, _SIZE(size))
        whole = builder.sub(self.n, over)
        with cgutils.for_range_slice(builder, _SIZE(0), whole, _SIZE(size), _SIZE) as (at, _):
            for k in range(count):
                yield k, self._vectors(builder.add(at, _SIZE(k * self._lanes)))
        for k in range(count - 1):
            with builder.if_then(builder.icmp_unsigned(">=", over, _SIZE((k + 1) * self._lanes))):
                yield k, self._vectors(builder.add(whole, _SIZE(k * self._lanes)))

    @contextmanager
    def rest(self) -> Iterator[tuple[list[Any], Any]]:
        """Emit what is done with what fills no vector: the last vectors there are, and which of their lanes count."""
        builder, lanes = self._builder, self._lanes
        left = builder.urem(self.n, _SIZE(lanes))
        with builder.if_then(builder.icmp_unsigned("!=", left, _SIZE(0))):
            lane = ir.Constant(ir.VectorType(_SIZE, lanes), list(range(lanes)))
            first = everywhere(builder, builder.sub(_SIZE(lanes), left), lane.type)
            vectors = self._vectors(builder.sub(self.n, _SIZE(lanes)))
            yield vectors, builder.icmp_unsigned(">=", lane, first)

    def places(self) -> Iterator[Place]:
        """Emit what is done at the place of each vector, then at that of what fills none."""
        builder, lanes = self._builder, self._lanes
        left = builder.urem(self.n, _SIZE(lanes))
        whole = builder.sub(self.n, left)
        with cgutils.for_range_slice(builder, _SIZE(0), whole, _SIZE(lanes), _SIZE) as (at, _):
            yield Place(self._context, builder, self._rows, at, self.vector, None)
        with builder.if_then(builder.icmp_unsigned("!=", left, _SIZE(0))):
            lane = ir.Constant(ir.VectorType(_LANE, lanes), list(range(lanes)))
            end = everywhere(builder, builder.trunc(left, _LANE), lane.type)
            there = builder.icmp_unsigned("<", lane, end)
            yield Place(self._context, builder, self._rows, whole, self.vector, there)

    def _vectors(self, at: Any) -> list[Any]:
        """Emit the vector of neighbours of each row that begins somewhere."""
        return [self._load(row, at, self._lanes) for row in self._rows]

    def _load(self, row: Source, at: Any, lanes: int | None) -> Any:
        """Emit an element of a row, or the vector of neighbours that begins with it."""
        builder, kind = self._builder, row.kind
        element, place = self._context.get_data_type(kind.dtype), builder.gep(row.data, [at])
        if lanes is not None:
            place = builder.bitcast(place, ir.VectorType(element, lanes).as_pointer())
        align = self._context.get_abi_sizeof(element) if kind.aligned else 1
        return emit_widened(builder, builder.load(place, align=align), kind.dtype)


def everywhere(builder: Any, value: Any, kind: Any) -> Any:
    """Emit a vector of equal elements."""
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, value, _LANE(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(_LANE, kind.count), None))


def added(builder: Any, vectors: list[Any]) -> Any:
    """Emit the sum of some vectors, pair by pair."""
    while len(vectors) > 1:
        vectors = [builder.fadd(a, b) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def total(builder: Any, vector: Any) -> Any:
    """Emit the sum of the elements of a vector: halves of it are added until one is left."""
    while vector.type.count > 1:
        half = vector.type.count // 2
        vector = builder.fadd(*_picked(builder, vector, vector, list(range(half)), half))
    return builder.extract_element(vector, _LANE(0))


def totals(builder: Any, vectors: list[Any]) -> Any:
    """Emit the vector of the `total` of as many vectors as each has elements, with the same bits.

    Two vectors become one until one is left: it holds the halves of each, added. As long as halves are as wide as a
    `PART`, those of whole vectors lie side by side, then those within each part; they come in the order that leaves the
    total of the first in the first lane.
    """
    lanes = len(vectors)
    assert lanes == vectors[0].type.count
    part = lanes * PART // BYTES
    vectors = [vectors[i] for first in range(part) for i in range(first, lanes, part)]
    width = lanes
    while width > 1:
        unit = lanes if width > part else part
        lower = [
            source + at + i
            for start in range(0, lanes, unit)
            for source in (0, lanes)
            for at in range(start, start + unit, width)
            for i in range(width // 2)
        ]
        vectors = [
            builder.fadd(*_picked(builder, a, b, lower, width // 2))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        width //= 2
    return vectors[0]


def _picked(builder: Any, a: Any, b: Any, lower: list[int], further: int) -> list[Any]:
    """Emit the vector of some elements of two, and of those ``further`` on."""
    kind = ir.VectorType(_LANE, len(lower))
    return [
        builder.shuffle_vector(a, b, ir.Constant(kind, [i + offset for i in lower]))
        for offset in (0, further)
    ]
