"""Parts of arrays, borrowed without checks."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nbnorm._cpu.row_type import Row, data_of, emit_row
from nbnorm._math import by_type

LINE = 64  # bytes that go from memory to a cache, or back, together


def row(x, first, n):
    """Neighbours of a line of memory on their own, whose loops start at 0: others do not vectorize.

    Compiled it is a `Row`, which checks nothing and does not keep the memory alive: ``x`` must be without gaps, and an
    argument of the function that calls this.
    """
    assert 0 <= first <= first + n <= x.shape[0], (first, n, x.shape)
    return x[first : first + n]


@by_type(row)
def _row(x, first, n):
    return lambda x, first, n: _borrowed(x, first, n)


def borrowed(x):
    """`row` of all neighbours: what is taken from it counts no references, two locked instructions each time."""
    return row(x, 0, x.shape[0])


@by_type(borrowed)
def _whole(x):
    return lambda x: _borrowed(x, 0, x.shape[0])


@intrinsic
def _borrowed(typingctx, x, first, n):
    result = Row(x.dtype, x.mutable, x.aligned)

    def generate(context, builder, signature, args):
        data = builder.gep(data_of(context, builder, x, args[0]), [args[1]])
        return emit_row(context, builder, result, data, args[2])

    return result(x, types.intp, types.intp), generate


def fetch(x, i):
    """Ask for the line of memory in which an element lies, which is needed soon."""


@by_type(fetch)
def _fetch(x, i):
    return lambda x, i: _fetched(x, i)


@intrinsic
def _fetched(typingctx, x, i):
    def generate(context, builder, signature, args):
        data = builder.gep(data_of(context, builder, x, args[0]), [args[1]])
        address = builder.bitcast(data, ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        prefetch = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(
            builder.module, kind, "llvm.prefetch.p0"
        )
        builder.call(prefetch, [address, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.none(x, types.intp), generate
