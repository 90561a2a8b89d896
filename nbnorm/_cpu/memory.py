"""What kernels do with memory beside loading and storing: rows of an array, and lines fetched ahead of their use."""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from nbnorm._math import INNER, by_type

# Bytes of a cache line, on all processors that matter here.
LINE = 64


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


@intrinsic
def _borrowed(typingctx, x, first, n):
    result = types.Array(x.dtype, 1, "C", readonly=not x.mutable)

    def generate(context, builder, signature, args):
        source = context.make_array(x)(context, builder, args[0])
        target = context.make_array(result)(context, builder)
        itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(x.dtype)))
        data = builder.gep(source.data, [args[1]])
        populate_array(
            target, data=data, shape=[args[2]], strides=[itemsize], itemsize=itemsize, meminfo=None
        )
        return impl_ret_borrowed(context, builder, result, target._getvalue())

    return result(x, types.intp, types.intp), generate


def fetch(x, first, n):
    """Ask for the lines of ``n`` neighbours, to be read later; they may lie past the end."""


@by_type(fetch)
def _fetch(x, first, n):
    return lambda x, first, n: _each_line(x, first, n, False)


def claim(x, first, n):
    """Ask for the lines of ``n`` neighbours, to be written later; they may lie past the end."""


@by_type(claim)
def _claim(x, first, n):
    return lambda x, first, n: _each_line(x, first, n, True)


@njit(**INNER)
def _each_line(x, first, n, writing):
    step = LINE // x.itemsize
    for i in range(first, first + n, step):
        if writing:
            _prefetch_write(x, i)
        else:
            _prefetch_read(x, i)


def _prefetch(for_writing):
    """Return the processor's hint for one line, which never faults, to bring it into the second-level cache."""

    @intrinsic
    def prefetch(typingctx, x, i):
        def generate(context, builder, signature, args):
            data = builder.gep(context.make_array(x)(context, builder, args[0]).data, [args[1]])
            byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
            function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
            builder.call(function, [builder.bitcast(data, byte), word(for_writing), word(2), word(1)])
            return context.get_dummy_value()

        return types.void(x, types.intp), generate

    return prefetch


_prefetch_read, _prefetch_write = _prefetch(0), _prefetch(1)
