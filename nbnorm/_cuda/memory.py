"""Global memory: vectors of 16 bytes where pointers and sizes allow it, single elements elsewhere.

A kernel sees memory as raw addresses and says what lies there by a *kind*, so that float16, bfloat16 and arrays
of any library look the same to it. Values are widened on load to the type of the register array that takes them
and rounded once on store. In the simulator an address is a `Memory`, which checks every index.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numba import config, cuda, types

SIMULATED = bool(config.ENABLE_CUDASIM)
if SIMULATED and not config.DISABLE_JIT:
    # Formulas are compiled without wrappers for Python, from which the simulator calls them.
    raise RuntimeError("Numba's CUDA simulator runs nbnorm with NUMBA_DISABLE_JIT=1 only")
if not SIMULATED and find_spec("numba_cuda") is None:
    raise ImportError("arrays on a CUDA device need numba-cuda: install nbnorm[cuda12] or nbnorm[cuda13]")
FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = range(4)
_KINDS = {"float16": FLOAT16, "bfloat16": BFLOAT16, "float32": FLOAT32, "float64": FLOAT64}
VECTOR_BYTES = 16


@lru_cache(maxsize=64)
def kind_of(dtype: np.dtype[Any]) -> int:
    """Return how a kernel calls a dtype."""
    return _KINDS[dtype.name]


def itemsize(kind: int) -> int:
    """Bytes of one element."""
    return (2, 2, 4, 8)[kind]


def real(kind: int) -> Any:
    """Return the type in which elements are computed: float32 for halves."""
    return np.float64 if kind == FLOAT64 else np.float32


class Memory:
    """An address in the simulator: the elements of an array in memory order."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def part(self, index: int, width: int) -> np.ndarray:
        """Return ``width`` elements; outside of the array is an error here and a crash on a device."""
        if not 0 <= index <= self.values.size - width:
            raise IndexError(f"elements [{index}, {index + width}) of an array of {self.values.size}")
        return self.values[index : index + width]


if SIMULATED:

    def load(values, at, source, index, kind, width):
        """Read ``width`` neighbours at ``index`` into values[at:]."""
        values[at : at + width] = source.part(index, width).astype(values.dtype)

    def store(target, index, values, at, kind, width):
        """Write values[at:at + width] to ``width`` neighbours at ``index``."""
        target.part(index, width)[:] = values[at : at + width]

    def get(source, index, kind):
        """Read one element as float64."""
        return np.float64(source.part(index, 1)[0])

    def put(target, index, value, kind):
        """Write one float64."""
        target.part(index, 1)[0] = value

    def change(values, count, function):
        """Put what a function makes of each of ``count`` register values in its place."""
        for i in range(count):
            values[i] = function(values[i])

else:
    # numba-cuda up to 0.30 looks for a function that NumPy 2.5 has dropped, in one module and at its import only.
    _DROPPED, _has_it = "row_stack", "row_stack" in vars(np)
    if not _has_it:
        setattr(np, _DROPPED, np.vstack)
    try:
        import_module("numba.cuda.np.arrayobj")
    finally:
        if not _has_it:
            delattr(np, _DROPPED)

    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    _HALF, _FLOAT, _DOUBLE, _SHORT, _INT, _LONG = (
        ir.HalfType(), ir.FloatType(), ir.DoubleType(), ir.IntType(16), ir.IntType(32), ir.IntType(64),
    )  # fmt: skip
    _GLOBAL = 1

    def _address(builder, base, index, kind):
        """Return the address of an element as an integer."""
        return builder.add(base, builder.mul(index, _LONG(itemsize(kind))))

    def _pointer(builder, base, index, kind, pointee):
        return builder.inttoptr(_address(builder, base, index, kind), ir.PointerType(pointee, _GLOBAL))

    def _read(builder, base, index, kind, width):
        """Read neighbours, 16 bytes at a time, and yield each in its own type (halves as float)."""
        element = {FLOAT32: _FLOAT, FLOAT64: _DOUBLE}.get(kind, _SHORT)
        pack = max(1, min(width, VECTOR_BYTES // itemsize(kind)))
        for first in range(0, width, pack):
            at = builder.add(index, _LONG(first))
            if pack == 1:
                word = builder.load(_pointer(builder, base, at, kind, element))
                yield _widened(builder, word, kind)
                continue
            # halves travel in pairs: the low one of a 32-bit word comes first
            lanes, lane = (pack, element) if itemsize(kind) > 2 else (pack // 2, _INT)
            vector = builder.load(_pointer(builder, base, at, kind, ir.VectorType(lane, lanes)))
            vector.align = pack * itemsize(kind)
            for i in range(lanes):
                word = builder.extract_element(vector, _INT(i))
                if itemsize(kind) > 2:
                    yield word
                else:
                    yield _widened(builder, builder.trunc(word, _SHORT), kind)
                    yield _widened(builder, builder.trunc(builder.lshr(word, _INT(16)), _SHORT), kind)

    def _widened(builder, word, kind):
        """Return a half in its bits as a float; wider kinds as they are."""
        if kind == FLOAT16:
            return builder.fpext(builder.bitcast(word, _HALF), _FLOAT)
        if kind == BFLOAT16:
            return builder.bitcast(builder.shl(builder.zext(word, _INT), _INT(16)), _FLOAT)
        return word

    def _cast(builder, value, wanted):
        """Convert between float and double."""
        if value.type == wanted:
            return value
        return builder.fpext(value, wanted) if wanted == _DOUBLE else builder.fptrunc(value, wanted)

    def _asm(builder, text, address, words, constraint):
        """Store words past the caches' eviction order: results are not read again by the same kernel."""
        function = ir.FunctionType(ir.VoidType(), [_LONG] + [word.type for word in words])
        builder.asm(function, text, ",".join(["l"] + [constraint] * len(words)), [address, *words], True)

    def _pair(builder, low, high, kind):
        """Round two floats to halves in one word, the first in the low bits."""
        if kind == BFLOAT16:
            function = ir.FunctionType(_INT, [_FLOAT, _FLOAT])
            return builder.asm(function, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [high, low], False)
        bits = [builder.zext(_rounded(builder, value, kind), _INT) for value in (low, high)]
        return builder.or_(bits[0], builder.shl(bits[1], _INT(16)))

    def _rounded(builder, value, kind):
        """Round one float to the bits of a half."""
        if kind == FLOAT16:
            return builder.bitcast(builder.fptrunc(value, _HALF), _SHORT)
        return builder.trunc(_pair(builder, value, value, kind), _SHORT)

    def _write(builder, base, index, kind, values):
        """Write neighbours: 16 bytes at once, or one element."""
        address = _address(builder, base, index, kind)
        values = [_cast(builder, value, _DOUBLE if kind == FLOAT64 else _FLOAT) for value in values]
        if len(values) == 1:
            name, constraint = {FLOAT32: ("f32", "f"), FLOAT64: ("f64", "d")}.get(kind, ("b16", "h"))
            word = values[0] if itemsize(kind) > 2 else _rounded(builder, values[0], kind)
            _asm(builder, f"st.global.cs.{name} [$0], $1;", address, [word], constraint)
            return
        if itemsize(kind) == 2:
            pairs = zip(values[::2], values[1::2], strict=True)
            words, name, constraint = [_pair(builder, *pair, kind) for pair in pairs], "b32", "r"
        else:
            words, name, constraint = values, *(("f32", "f") if kind == FLOAT32 else ("f64", "d"))
        pack = VECTOR_BYTES // max(itemsize(kind), 4)
        for first in range(0, len(words), pack):
            listed = ", ".join(f"${i + 1}" for i in range(pack))
            place = builder.add(address, _LONG(first * max(itemsize(kind), 4)))
            text = f"st.global.cs.v{pack}.{name} [$0], {{{listed}}};"
            _asm(builder, text, place, words[first : first + pack], constraint)

    def _known(*literals):
        """Whether every type is that of a number known when the kernel is compiled."""
        return all(isinstance(literal, types.IntegerLiteral) for literal in literals)

    def _register(context, builder, array_type, array, at, i):
        """Return the pointer to element at + i of a register array."""
        data = context.make_array(array_type)(context, builder, array).data
        return builder.gep(data, [builder.add(at, _LONG(i))])

    @intrinsic
    def load(typingctx, values, at, source, index, kind, width):
        """Read ``width`` neighbours at ``index`` into values[at:]."""
        if not _known(kind, width):
            return None
        what, n = kind.literal_value, width.literal_value

        def generate(context, builder, signature, args):
            wanted = context.get_data_type(values.dtype)
            for i, value in enumerate(_read(builder, args[2], args[3], what, n)):
                builder.store(
                    _cast(builder, value, wanted), _register(context, builder, values, args[0], args[1], i)
                )
            return context.get_dummy_value()

        return types.void(values, types.int64, types.int64, types.int64, kind, width), generate

    @intrinsic
    def store(typingctx, target, index, values, at, kind, width):
        """Write values[at:at + width] to ``width`` neighbours at ``index``."""
        if not _known(kind, width):
            return None
        what, n = kind.literal_value, width.literal_value

        def generate(context, builder, signature, args):
            registers = [_register(context, builder, values, args[2], args[3], i) for i in range(n)]
            _write(builder, args[0], args[1], what, [builder.load(register) for register in registers])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, values, types.int64, kind, width), generate

    @intrinsic
    def get(typingctx, source, index, kind):
        """Read one element as float64."""
        if not _known(kind):
            return None

        def generate(context, builder, signature, args):
            (value,) = _read(builder, args[0], args[1], kind.literal_value, 1)
            return _cast(builder, value, _DOUBLE)

        return types.float64(types.int64, types.int64, kind), generate

    @intrinsic
    def put(typingctx, target, index, value, kind):
        """Write one float64."""
        if not _known(kind):
            return None

        def generate(context, builder, signature, args):
            _write(builder, args[0], args[1], kind.literal_value, [args[2]])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float64, kind), generate

    @intrinsic
    def change(typingctx, values, count, function):
        """Put what a function makes of each of ``count`` register values in its place.

        Written out one by one: of a long function, the compiler would keep a loop, and the array out of registers.
        """
        if not _known(count):
            return None
        own = typingctx.resolve_function_type(function, (values.dtype,), {})

        def generate(context, builder, signature, args):
            call = context.get_function(function, own)
            for i in range(count.literal_value):
                place = _register(context, builder, values, args[0], _LONG(0), i)
                builder.store(call(builder, (builder.load(place),)), place)
            return context.get_dummy_value()

        return types.void(values, count, function), generate


# Threads of a block of independent warps or lanes.
BLOCK = 8 if SIMULATED else 256


def device(function: Any) -> Any:
    """Compile a function that kernels call; only inside of them can register arrays stay in registers."""
    return cuda.jit(device=True)(function) if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


def kernel(threads: int) -> Any:
    """Compile a kernel for blocks of at most so many threads, whose registers must suffice for a block."""
    return cuda.jit if SIMULATED else cuda.jit(launch_bounds=threads)
