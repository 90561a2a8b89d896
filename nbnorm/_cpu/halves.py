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
from numba.extending import intrinsic

from nbnorm._math import ALLOCATING, by_type

_HALF, _FLOAT, _SHORT, _INT = ir.HalfType(), ir.FloatType(), ir.IntType(16), ir.IntType(32)


def stored(x: np.ndarray) -> np.ndarray:
    """View an array as kernels take it: float16 as uint16, bfloat16 as int16."""
    if x.dtype.itemsize > 2:
        return x
    return x.view(np.uint16 if x.dtype == np.float16 else np.int16)


def computing(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type in which arrays of a dtype are computed: float32 for halves."""
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


@intrinsic
def _half_to_float(typingctx, bits):
    def generate(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], _HALF), _FLOAT)

    return types.float32(types.uint16), generate


@intrinsic
def _float_to_half(typingctx, value):
    def generate(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], _HALF), _SHORT)

    return types.uint16(types.float32), generate


@intrinsic
def _bfloat_to_float(typingctx, bits):
    def generate(context, builder, signature, args):
        return builder.bitcast(builder.shl(builder.zext(args[0], _INT), _INT(16)), _FLOAT)

    return types.float32(types.int16), generate


def round_to_bfloat(builder, value):
    """Emit the bits of a float32 whose upper half is the nearest bfloat16; ties to even.

    That is half a unit more, less one if the last bit that stays is 0. NaN is cut instead: the sum could carry into its
    sign, and a NaN that arithmetic made is one in its upper half.
    """
    bits = builder.bitcast(value, _INT)
    odd = builder.and_(builder.lshr(bits, _INT(16)), _INT(1))
    rounded = builder.add(bits, builder.add(odd, _INT(0x7FFF)))
    is_number = builder.fcmp_ordered("ord", value, value)
    return builder.select(is_number, rounded, bits)


@intrinsic
def _float_to_bfloat(typingctx, value):
    def generate(context, builder, signature, args):
        return builder.trunc(builder.lshr(round_to_bfloat(builder, args[0]), _INT(16)), _SHORT)

    return types.int16(types.float32), generate


def widen(value):
    """Return an element of an array in the type that is computed with."""
    if isinstance(value, np.uint16):
        return np.float32(value.view(np.float16))
    if isinstance(value, np.int16):
        return (np.uint32(value.view(np.uint16)) << np.uint32(16)).view(np.float32)
    return value


@by_type(widen)
def _widen(value):
    if value == types.uint16:
        return lambda value: _half_to_float(value)
    if value == types.int16:
        return lambda value: _bfloat_to_float(value)
    return lambda value: value


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


@by_type(narrow)
def _narrow(value, array):
    if array.dtype == types.uint16:
        return lambda value, array: _float_to_half(value)
    if array.dtype == types.int16:
        return lambda value, array: _float_to_bfloat(value)
    return lambda value, array: value


def scratch(shape, like):
    """Return an uninitialized array of the type that arrays like ``like`` are computed in."""
    return np.empty(shape, np.float64 if like.itemsize == 8 else np.float32)


@by_type(scratch, **ALLOCATING)
def _scratch(shape, like):
    if like.dtype == types.float64:
        return lambda shape, like: np.empty(shape, np.float64)
    return lambda shape, like: np.empty(shape, np.float32)
