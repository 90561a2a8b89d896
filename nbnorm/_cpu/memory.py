"""Parts of arrays, borrowed without checks, and room on the stack."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils

from nbnorm._cpu.row_type import Row, data_of, element, emit_row, size_of
from nbnorm._math import emitted, is_none, nothing

LINE = 64  # bytes that go from memory to a cache, or back, together


def row(x, first, n):
    """Neighbours of a line of memory on their own, whose loops start at 0: others do not vectorize.

    ``first`` is the index of the first, a tuple where there are several dimensions. Compiled this is a `Row`, which
    checks nothing and does not keep the memory alive: ``x`` must be without gaps, and an argument of the function that
    calls this.
    """
    at, *others = first if isinstance(first, tuple) else (first,)
    for length, index in zip(x.shape[1:], others, strict=True):
        at = at * length + index
    assert 0 <= at <= at + n <= x.size, (first, n, x.shape)
    return x.reshape(-1)[at : at + n]


@emitted(row)
def _row(typingctx, x, first, n):
    result, several = Row(x.dtype, x.mutable, x.aligned), isinstance(first, types.BaseTuple)

    def generate(context, builder, signature, args):
        at = args[1]
        if several:
            lengths = cgutils.unpack_tuple(builder, context.make_array(x)(context, builder, args[0]).shape)
            at, *others = cgutils.unpack_tuple(builder, args[1])
            for length, index in zip(lengths[1:], others, strict=True):
                at = builder.add(builder.mul(at, length), index)
        data = builder.gep(data_of(context, builder, x, args[0]), [at])
        return emit_row(context, builder, result, data, args[2])

    index = types.UniTuple(types.intp, first.count) if several else types.intp
    return result(x, index, types.intp), generate


def part(values, first, n):
    """`row` of an optional array."""
    return None if values is None else row(values, first, n)


@emitted(part)
def _part(typingctx, values, first, n):
    return nothing(values, first, n) if is_none(values) else _row(typingctx, values, first, n)


def entry(values, i):
    """Entry of an optional array, of two dimensions a `row`."""
    return None if values is None else values[i]


@emitted(entry)
def _entry(typingctx, values, i):
    if is_none(values):
        return nothing(values, i)
    if getattr(values, "ndim", 1) == 1:
        return values.dtype(values, types.intp), lambda context, builder, signature, args: element(
            context, builder, values, *args
        )
    result = Row(values.dtype, values.mutable, values.aligned)

    def generate(context, builder, signature, args):
        n = builder.extract_value(context.make_array(values)(context, builder, args[0]).shape, 1)
        data = builder.gep(data_of(context, builder, values, args[0]), [builder.mul(args[1], n)])
        return emit_row(context, builder, result, data, n)

    return result(values, types.intp), generate


def borrowed(x):
    """`row` of all neighbours of an optional array: what is taken from it counts no references.

    Those are two locked instructions each time. Nor are there indices from the end to look for.
    """
    return None if x is None else row(x, 0, x.shape[0])


@emitted(borrowed)
def _borrowed(typingctx, x):
    if is_none(x):
        return nothing(x)
    result = Row(x.dtype, x.mutable, x.aligned)

    def generate(context, builder, signature, args):
        data, size = data_of(context, builder, x, args[0]), size_of(context, builder, x, args[0])
        return emit_row(context, builder, result, data, size)

    return result(x), generate


def fetch(x, i):
    """Ask for the line of memory in which an element lies, which is needed soon."""


@emitted(fetch)
def _fetch(typingctx, x, i):
    def generate(context, builder, signature, args):
        data = builder.gep(data_of(context, builder, x, args[0]), [args[1]])
        address = builder.bitcast(data, ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [address, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.none(x, types.intp), generate


def emit_room(context, builder, result, n):
    """Emit a row of ``n`` elements of room on the stack, which begins with a line of memory."""
    element = context.get_data_type(result.dtype)
    with builder.goto_entry_block():
        room = builder.alloca(ir.ArrayType(element, n))
    room.align = LINE
    data = builder.bitcast(room, element.as_pointer())
    return emit_row(context, builder, result, data, context.get_constant(types.intp, n))
