"""Memory of a kernel's own, which Numba counts and frees: arrays in C order, uninitialized.

Numba's `np.empty` is four functions deep, each compiled for every number of dimensions and turned into machine code of
its own; this is code in place (`emitted`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.np.arrayobj import populate_array

from nbnorm._cpu.row_type import element_size
from nbnorm._math import computing_type, emitted, is_none, nothing


def scratch(shape, like):
    """Return an array of the type that arrays like ``like`` are computed in."""
    return np.empty(shape, np.float64 if like.itemsize == 8 else np.float32)


@emitted(scratch)
def _scratch(typingctx, shape, like):
    return _array(shape, computing_type(like), like)


def wide(shape):
    """Return an array of float64."""
    return np.empty(shape)


@emitted(wide)
def _wide(typingctx, shape):
    return _array(shape, types.float64)


def room(shape, x, weights, activation):
    """Room for what a mask, or an activation, makes of x and dy, None without one."""
    return None if weights is None and activation is None else scratch(shape, x)


@emitted(room)
def _room(typingctx, shape, x, weights, activation):
    if is_none(weights) and is_none(activation):
        return nothing(shape, x, weights, activation)
    return _array(shape, computing_type(x), x, weights, activation)


def _array(shape: Any, dtype: Any, *others: Any) -> Any:
    """Return the signature of a function of a shape and others that makes an array, and what emits its code."""
    several = isinstance(shape, types.BaseTuple)
    result = types.Array(dtype, shape.count if several else 1, "C")

    def generate(context, builder, signature, args):
        sizes = cgutils.unpack_tuple(builder, args[0]) if several else [args[0]]
        itemsize = element_size(context, result)
        strides = [itemsize]
        for size in reversed(sizes):
            strides.insert(0, builder.mul(strides[0], size))
        align = context.get_constant(types.uint32, context.get_preferred_array_alignment(dtype))
        memory = context.nrt.meminfo_alloc_aligned(builder, strides[0], align)
        data = builder.bitcast(
            context.nrt.meminfo_data(builder, memory), context.get_data_type(dtype).as_pointer()
        )
        array = context.make_array(result)(context, builder)
        populate_array(array, data=data, shape=sizes, strides=strides[1:], itemsize=itemsize, meminfo=memory)
        return array._getvalue()

    return result(types.UniTuple(types.intp, shape.count) if several else types.intp, *others), generate
