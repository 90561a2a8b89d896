"""What z and dz are made of, written in vectors: without an activation or by relu, which is a comparison."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from nbnorm._math import emitted, is_none


def by_vectors(activation, others):
    """Whether vectors know an activation, and there are none of the ``others`` on which z or dz may depend."""
    return isinstance(activation, bool | None) and all(other is None for other in others)


@emitted(by_vectors)
def _by_vectors(typingctx, activation, others):
    answer = (is_none(activation) or activation == types.boolean) and all(map(is_none, others))
    return types.boolean(activation, others), lambda context, *_: context.get_constant(types.boolean, answer)


def emit_fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Emit a * b + c, rounded once where the machine can."""
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def emit_rectified(builder: Any, activation: Any, value: Any, z: Any) -> Any:
    """Emit y or dz of z or dy: with an activation, which is relu then, 0 where z is not positive; NaN of z counts."""
    if is_none(activation):
        return value
    nothing = ir.Constant(z.type, None if isinstance(z.type, ir.VectorType) else 0.0)
    return builder.select(builder.fcmp_ordered("<=", z, nothing), nothing, value)
