"""Blocks of results: room for one, and how one goes to memory.

In memory, a block is as many bytes as loops over elements take in one step: those of one line are not vectorized. It
begins as values in the type of the result or, where the processor rounds vectors of them (`bfloats`), in float32.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types

from nbnorm._cpu.bfloats import emit_rounded, rounded_at_once
from nbnorm._cpu.memory import LINE, emit_room
from nbnorm._cpu.row_type import Row, data_of
from nbnorm._cpu.vectors import VECTOR
from nbnorm._math import emitted

BLOCK = 4 * LINE


def rounded_in_blocks(y):
    """Whether results like y are rounded block by block, as far as there are blocks, also in the caches."""
    return False


@emitted(rounded_in_blocks)
def _rounded_in_blocks(typingctx, y):
    answer = rounded_at_once(y.dtype)
    return types.boolean(y), lambda context, *_: context.get_constant(types.boolean, answer)


def block_like(y):
    """Return room for a block of a result like y, as it is computed."""
    return seam_like(y)


@emitted(block_like)
def _block_like(typingctx, y):
    return _room(y, types.float32 if rounded_at_once(y.dtype) else y.dtype)


def seam_like(y):
    """Return room for a block of y."""
    return np.empty(BLOCK // y.itemsize, y.dtype)


@emitted(seam_like)
def _seam_like(typingctx, y):
    return _room(y, y.dtype)


def _room(y, dtype):
    """Return the signature, and the code, of room for as many values of a type as a block of y has."""
    result = Row(dtype, True, y.aligned)

    def generate(context, builder, signature, args):
        size = context.get_abi_sizeof(context.get_data_type(y.dtype))
        return emit_room(context, builder, result, BLOCK // size)

    return result(y), generate


def _neighbours(builder, data, kind, count):
    """Emit where each of some neighbours of a kind lies."""
    first = builder.bitcast(data, kind.as_pointer())
    return [builder.gep(first, [ir.IntType(64)(i)]) for i in range(count)]


def _store(builder, parts, data, align, past):
    """Emit stores of neighbouring parts."""
    for part, place in zip(parts, _neighbours(builder, data, parts[0].type, len(parts)), strict=True):
        store = builder.store(part, place, align=align)
        if past:
            store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))


def store_block(block, y, first, past):
    """Store a block, past the caches if that is wanted: then it begins with a line of memory."""
    y[first : first + block.shape[0]] = block


@emitted(store_block)
def _store_block(typingctx, block, y, first, past):
    rounded = block.dtype != y.dtype

    def generate(context, builder, signature, args):
        # As much as one vector becomes, half a line of halves: a whole line would be put together from two in memory.
        size = LINE if y.dtype.bitwidth > 16 else LINE // 2
        kind = ir.VectorType(ir.FloatType(), VECTOR) if rounded else ir.VectorType(ir.IntType(8), size)
        places = _neighbours(builder, data_of(context, builder, block, args[0]), kind, BLOCK // size)
        parts = [builder.load(place, align=size) for place in places]
        target = builder.gep(data_of(context, builder, y, args[1]), [args[2]])
        if rounded:
            parts = emit_rounded(builder, parts)
            with builder.if_else(args[3]) as (beyond, within):
                with beyond:
                    _store(builder, parts, target, size, True)
                with within:
                    _store(builder, parts, target, 1, False)
        else:  # which is written in blocks only past the caches
            _store(builder, parts, target, size, True)
        return context.get_dummy_value()

    return types.none(block, y, types.intp, types.boolean), generate
