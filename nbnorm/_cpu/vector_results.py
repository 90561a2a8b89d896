"""Results of neighbours, written in vectors, for which any number of them is as good as whole vectors.

A loop over elements, as LLVM makes it, goes through four vectors at once, then through half ones, then through what is
left one by one. Here it is one vector after the other, and a mask says which elements of the last one there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from nbnorm._activation import activate, activation_gradient
from nbnorm._cpu.halves import widen
from nbnorm._cpu.row_type import data_of, size_of
from nbnorm._cpu.vector_terms import emit_fused, emit_rectified
from nbnorm._cpu.vectors import Source, Walk, everywhere
from nbnorm._inner import processor_has
from nbnorm._math import emitted, input_gradient, normalize, standardize

# Neighbours up to which it pays: planes of 16 to 100 values take 0.78 to 0.95 of the time, of 144 to 256 0.9 to 1, of
# more as long (Emerald Rapids; benchmarks/bench_norms.py, ShortPlanes, before and after).
LONGEST = 256


def in_vectors(x):
    """Whether results like x are written in vectors, as far as these know what they depend on (`by_vectors`)."""
    return False


@emitted(in_vectors)
def _in_vectors(typingctx, x):
    answer = x.dtype.bitwidth >= 32 and processor_has("avx512f")
    return types.boolean(x), lambda context, *_: context.get_constant(types.boolean, answer)


def normalize_vectors(x, y, mean_hi, scale, shift, activation):
    """`normalize` and activate neighbours that share their coefficients; they are `in_vectors`."""
    for i in range(x.shape[0]):
        y[i] = activate(normalize(widen(x[i]), mean_hi, scale, shift), activation)


@emitted(normalize_vectors)
def _normalize_vectors(typingctx, x, y, mean_hi, scale, shift, activation):
    def formula(builder: Any, vectors: list[Any], terms: list[Any]) -> Any:
        (value,), (mean_hi, scale, shift) = vectors, terms
        z = emit_fused(builder, builder.fsub(value, mean_hi), scale, shift)
        return emit_rectified(builder, activation, z, z)

    return _elementwise([x, y], [mean_hi, scale, shift], [activation], formula)


def input_grad_vectors(x, dy, dx, mean_hi, hat_scale, slope, offset, gain, scale, shift, activation):
    """`input_gradient` of neighbours that share their coefficients; they are `in_vectors`."""
    for i in range(x.shape[0]):
        value = widen(x[i])
        dz = activation_gradient(widen(dy[i]), normalize(value, mean_hi, scale, shift), activation)
        dx[i] = input_gradient(dz, standardize(value, mean_hi, hat_scale), slope, offset, gain)


@emitted(input_grad_vectors)
def _input_grad_vectors(
    typingctx, x, dy, dx, mean_hi, hat_scale, slope, offset, gain, scale, shift, activation
):  # fmt: skip
    def formula(builder: Any, vectors: list[Any], terms: list[Any]) -> Any:
        (value, d), (mean_hi, hat_scale, slope, offset, gain, scale, shift) = vectors, terms
        deviation = builder.fsub(value, mean_hi)
        dz = emit_rectified(builder, activation, d, emit_fused(builder, deviation, scale, shift))
        x_hat = builder.fmul(deviation, hat_scale)
        return emit_fused(builder, dz, gain, emit_fused(builder, x_hat, slope, offset))

    terms = [mean_hi, hat_scale, slope, offset, gain, scale, shift]
    return _elementwise([x, dy, dx], terms, [activation], formula)


def _elementwise(rows: list[Any], terms: list[Any], rest: list[Any], formula: Callable[..., Any]) -> Any:
    """Return the signature, and the code, of what computes the last row by a formula of the others and of terms.

    ``rest`` are types of further arguments.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if any(kind.dtype.bitwidth < 32 for kind in rows):  # never reached
            return context.get_dummy_value()
        sources = [
            Source(kind, data_of(context, builder, kind, value))
            for kind, value in zip(rows, args, strict=False)
        ]
        walk = Walk(context, builder, sources, size_of(context, builder, rows[0], args[0]), rows[0].dtype)
        own = [everywhere(builder, value, walk.vector) for value in args[len(rows) :][: len(terms)]]
        for place in walk.places():
            place.store(formula(builder, place.load(), own))
        return context.get_dummy_value()

    return types.none(*rows, *terms, *rest), generate
