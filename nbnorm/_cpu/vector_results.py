"""Results of neighbours, written in vectors, for which any number of them is as good as whole vectors.

A loop over elements, as LLVM makes it, goes through four vectors at once, then through half ones, then through what is
left one by one. Here it is one vector after the other, and a mask says which elements of the last one there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from nbnorm._cpu.halves import widen
from nbnorm._cpu.row_type import data_of, size_of
from nbnorm._cpu.vectors import Source, Walk, everywhere
from nbnorm._inner import processor_has
from nbnorm._math import emitted, input_gradient, is_none, normalize, standardize

# Neighbours up to which it pays: planes of 16 to 100 values take 0.78 to 0.95 of the time, of 144 to 256 0.9 to 1, of
# more as long (Emerald Rapids; benchmarks/bench_norms.py, ShortPlanes, before and after).
LONGEST = 256


def in_vectors(x, others):
    """Whether results like x are written in vectors, if ``others``, on which they may depend, are all None."""
    return False


@emitted(in_vectors)
def _in_vectors(typingctx, x, others):
    answer = x.dtype.bitwidth >= 32 and all(map(is_none, others)) and processor_has("avx512f")
    return types.boolean(x, others), lambda context, *_: context.get_constant(types.boolean, answer)


def normalize_vectors(x, y, mean_hi, scale, shift):
    """`normalize` neighbours that share their coefficients; they are `in_vectors`."""
    for i in range(x.shape[0]):
        y[i] = normalize(widen(x[i]), mean_hi, scale, shift)


@emitted(normalize_vectors)
def _normalize_vectors(typingctx, x, y, mean_hi, scale, shift):
    def formula(builder: Any, vectors: list[Any], terms: list[Any]) -> Any:
        (value,), (mean_hi, scale, shift) = vectors, terms
        return _fused(builder, builder.fsub(value, mean_hi), scale, shift)

    return _elementwise([x, y], [mean_hi, scale, shift], formula)


def input_grad_vectors(x, dy, dx, mean_hi, hat_scale, slope, offset, gain):
    """`input_gradient` of neighbours that share their coefficients; they are `in_vectors`."""
    for i in range(x.shape[0]):
        x_hat = standardize(widen(x[i]), mean_hi, hat_scale)
        dx[i] = input_gradient(widen(dy[i]), x_hat, slope, offset, gain)


@emitted(input_grad_vectors)
def _input_grad_vectors(typingctx, x, dy, dx, mean_hi, hat_scale, slope, offset, gain):
    def formula(builder: Any, vectors: list[Any], terms: list[Any]) -> Any:
        (value, d), (mean_hi, hat_scale, slope, offset, gain) = vectors, terms
        x_hat = builder.fmul(builder.fsub(value, mean_hi), hat_scale)
        return _fused(builder, d, gain, _fused(builder, x_hat, slope, offset))

    return _elementwise([x, dy, dx], [mean_hi, hat_scale, slope, offset, gain], formula)


def _fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Emit a * b + c, rounded once where the machine can."""
    product = builder.fmul(a, b, flags=("contract",))
    return builder.fadd(product, c, flags=("contract",))


def _elementwise(rows: list[Any], terms: list[Any], formula: Callable[..., Any]) -> Any:
    """Return the signature, and the code, of what computes the last row by a formula of the others and of terms."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if any(kind.dtype.bitwidth < 32 for kind in rows):  # never reached
            return context.get_dummy_value()
        sources = [
            Source(kind, data_of(context, builder, kind, value))
            for kind, value in zip(rows, args, strict=False)
        ]
        walk = Walk(context, builder, sources, size_of(context, builder, rows[0], args[0]), rows[0].dtype)
        own = [everywhere(builder, value, walk.vector) for value in args[len(rows) :]]
        for place in walk.places():
            place.store(formula(builder, place.load(), own))
        return context.get_dummy_value()

    return types.none(*rows, *terms), generate
