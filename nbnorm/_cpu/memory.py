"""Parts of arrays, borrowed without checks."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nbnorm._math import by_type

LINE = 64  # bytes that go from memory to a cache, or back, together


def emit_view(context: Any, builder: Any, result: Any, data: Any, size: Any) -> Any:
    """Emit an array of one dimension over memory that it neither owns nor counts references of."""
    from numba.np.arrayobj import populate_array  # `import numba` does without, and so does ours

    view = context.make_array(result)(context, builder)
    itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(result.dtype)))
    populate_array(view, data=data, shape=[size], strides=[itemsize], itemsize=itemsize, meminfo=None)
    return view._getvalue()


def row(x, first, n):
    """Neighbours of a line of memory as an array of their own, whose loops start at 0: others do not vectorize.

    Compiled it checks nothing and does not keep the memory alive, which is why it costs nothing: ``x`` has to be an
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
    result = types.Array(x.dtype, 1, "C", readonly=not x.mutable)

    def generate(context, builder, signature, args):
        source = context.make_array(x)(context, builder, args[0])
        return emit_view(context, builder, result, builder.gep(source.data, [args[1]]), args[2])

    return result(x, types.intp, types.intp), generate


def fetch(x, i):
    """Ask for the line of memory in which an element lies, which is needed soon."""


@by_type(fetch)
def _fetch(x, i):
    return lambda x, i: _fetched(x, i)


@intrinsic
def _fetched(typingctx, x, i):
    def generate(context, builder, signature, args):
        data = builder.gep(context.make_array(x)(context, builder, args[0]).data, [args[1]])
        address = builder.bitcast(data, ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        prefetch = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(
            builder.module, kind, "llvm.prefetch.p0"
        )
        builder.call(prefetch, [address, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.none(x, types.intp), generate
