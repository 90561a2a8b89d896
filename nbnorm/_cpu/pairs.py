"""bfloat16 two at a time, as they lie in one word of 32 bits.

Each half of a word becomes a float32 by one operation, and two of these are rounded into one word, where single
elements have to be widened before and packed after (benchmarks/bench_halves.py, group and instance norm). Python,
without the compiler, takes elements one by one and needs none of this.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nbnorm._cpu.halves import round_to_bfloat
from nbnorm._cpu.row_type import Row, data_of, emit_row, size_of

_FLOAT, _WORD = ir.FloatType(), ir.IntType(32)
_SHIFT, _UPPER = _WORD(16), _WORD(0xFFFF0000)


@intrinsic
def words(typingctx, x):
    """View a row as words, wherever in memory it starts; an odd last element is left out."""
    result = Row(types.uint32, x.mutable, aligned=False)

    def generate(context, builder, signature, args):
        word = context.get_data_type(types.uint32)
        data = builder.bitcast(data_of(context, builder, x, args[0]), word.as_pointer())
        size = builder.lshr(size_of(context, builder, x, args[0]), context.get_constant(types.intp, 1))
        return emit_row(context, builder, result, data, size)

    return result(x), generate


@intrinsic
def lower(typingctx, word):
    """Widen the lower half of a word."""

    def generate(context, builder, signature, args):
        return builder.bitcast(builder.shl(args[0], _SHIFT), _FLOAT)

    return types.float32(types.uint32), generate


@intrinsic
def upper(typingctx, word):
    """Widen the upper half of a word."""

    def generate(context, builder, signature, args):
        return builder.bitcast(builder.and_(args[0], _UPPER), _FLOAT)

    return types.float32(types.uint32), generate


@intrinsic
def joined(typingctx, low, high):
    """Round two values into the halves of a word."""

    def generate(context, builder, signature, args):
        low, high = (round_to_bfloat(builder, value) for value in args)
        return builder.or_(builder.lshr(low, _SHIFT), builder.and_(high, _UPPER))

    return types.uint32(types.float32, types.float32), generate
