"""float16 and bfloat16 in memory, float32 in registers.

Numba computes with neither type, so kernels see float16 arrays as uint16 and bfloat16 arrays as int16. Loads go
through `widen` and stores through `narrow`, which are nothing for float32 and float64, one vector instruction
for float16 (F16C, AVX-512) and a few for bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from nbnorm._math import emitted

_HALF, _FLOAT, _SHORT, _INT = ir.HalfType(), ir.FloatType(), ir.IntType(16), ir.IntType(32)


def stored(x: np.ndarray) -> np.ndarray:
    """View halves as kernels take them: float16 as uint16, bfloat16 as int16."""
    return x.view(np.uint16 if x.dtype == np.float16 else np.int16)


def computing(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type in which arrays of a dtype are computed: float32 for halves."""
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def typed_like(value, kind):
    """Return LLVM's type of one value of a kind, or of as many as a vector has."""
    vector = isinstance(value.type, ir.VectorType)
    return ir.VectorType(kind, value.type.count) if vector else kind


def constant_like(value, kind, number):
    """Return one number of a kind, or as many as a vector has."""
    whole = typed_like(value, kind)
    return ir.Constant(whole, number if whole is kind else [number] * whole.count)


def round_to_bfloat(builder, value):
    """Emit the bits of a float32, or of a vector of them, whose upper half is the nearest bfloat16; ties to even.

    That is half a unit more, less one if the last bit that stays is 0. NaN is cut instead: the sum could carry into its
    sign, and a NaN that arithmetic made is one in its upper half.
    """
    bits = builder.bitcast(value, typed_like(value, _INT))
    shift, one, half = (constant_like(value, _INT, n) for n in (16, 1, 0x7FFF))
    odd = builder.and_(builder.lshr(bits, shift), one)
    rounded = builder.add(bits, builder.add(odd, half))
    is_number = builder.fcmp_ordered("ord", value, value)
    return builder.select(is_number, rounded, bits)


def widen(value):
    """Return an element of an array in the type that is computed with."""
    if isinstance(value, np.uint16):
        return np.float32(value.view(np.float16))
    if isinstance(value, np.int16):
        return (np.uint32(value.view(np.uint16)) << np.uint32(16)).view(np.float32)
    return value


def emit_widened(builder, value, dtype):
    """Emit an element of a type, or a vector of them, in the type that is computed with."""
    if dtype == types.uint16:
        return builder.fpext(builder.bitcast(value, typed_like(value, _HALF)), typed_like(value, _FLOAT))
    if dtype == types.int16:
        word = builder.zext(value, typed_like(value, _INT))
        return builder.bitcast(builder.shl(word, constant_like(value, _INT, 16)), typed_like(value, _FLOAT))
    return value


@emitted(widen)
def _widen(typingctx, value):
    computed = types.float32 if value in (types.uint16, types.int16) else value
    return computed(value), lambda context, builder, signature, args: emit_widened(builder, args[0], value)


def narrow(value, array):
    """Round a computed value to the type in which an array holds it."""
    if array.dtype == np.uint16:
        return np.float16(value).view(np.uint16)
    if array.dtype == np.int16:
        bits = np.float32(value).view(np.uint32)
        if np.isnan(value):
            return np.uint16((bits >> 16) & 0x8000 | 0x7FC0).view(np.int16)
        return np.uint16((int(bits) + 0x7FFF + (int(bits) >> 16 & 1)) >> 16).view(np.int16)
    return array.dtype.type(value)


@emitted(narrow)
def _narrow(typingctx, value, array):
    half, bfloat = array.dtype == types.uint16, array.dtype == types.int16

    def generate(context, builder, signature, args):
        if half:
            return builder.bitcast(builder.fptrunc(args[0], _HALF), _SHORT)
        if bfloat:
            return builder.trunc(builder.lshr(round_to_bfloat(builder, args[0]), _INT(16)), _SHORT)
        return args[0]

    if half or bfloat:
        return array.dtype(types.float32, array), generate
    return value(value, array), generate
