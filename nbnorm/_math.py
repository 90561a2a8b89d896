"""Each formula once: scalar functions without fastmath, compiled for whichever device calls them.

Statistics and sums are float64; what meets an element has the type that elements are computed in, which is
float64 for float64 arrays and float32 for all others (an array ``like`` stands for it).
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import numpy as np
from numba import njit, types
from numba.core.dispatcher import Dispatcher
from numba.core.typing.templates import infer, infer_global, make_intrinsic_template
from numba.extending import overload

from nbnorm._inner import Inner

# Called by kernels alone: neither Python nor C can. They count no references to arrays, two locked instructions each
# time: only a function that makes arrays does. What is not said here a function would take from the first that calls
# it.
INNER: dict[str, Any] = {
    "error_model": "numpy", "fastmath": False, "forceinline": False, "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True, "pipeline_class": Inner, "_nrt": False,
}  # fmt: skip


def inner(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator for functions that kernels take in, with these options besides `INNER`.

    Numba would compile them once more for every number that is written out where they are called, by position.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = njit(**{**INNER, **options})(function)
        if isinstance(compiled, Dispatcher):  # plain Python under NUMBA_DISABLE_JIT=1
            template = compiled.get_call_template
            compiled.get_call_template = lambda args, kws: template(tuple(map(types.unliteral, args)), kws)
        return compiled

    return decorate


formula = inner()
# Of the shape a * b + c, whose product and sum are rounded once where the machine can, the same way everywhere.
fused_formula = inner(fastmath={"contract"})


def by_type(function: Any) -> Any:
    """Register what chooses a formula by the types of its arguments while kernels compile.

    Python calls the function itself, kernels what the chooser returns.
    """
    return overload(function, jit_options=INNER)  # type: ignore[arg-type]


def emitted(function: Any) -> Any:
    """Register what emits code where kernels call a function, as Numba's `intrinsic` does for one of its own.

    Python calls the function itself. There is nothing to compile first, which takes Numba its time for every type of
    arguments, however short the function.
    """

    def register(definition: Any) -> Any:
        template = make_intrinsic_template(function, definition, function.__name__)
        infer(template)
        infer_global(function, types.Function(template))
        return definition

    return register


def nothing(*arguments: Any) -> Any:
    """Return, for `emitted`, the signature of a function that returns None, and its code."""
    return types.none(*arguments), lambda context, *_: context.get_dummy_value()


def is_none(given: Any) -> bool:
    """Whether an argument, or its type while a kernel compiles, is that of None."""
    return given is None or isinstance(given, types.NoneType | types.Omitted)


def computing_type(like: Any) -> Any:
    """Return Numba's type of what elements of an array, of which the type is given, are computed in."""
    return types.float64 if like.dtype == types.float64 else types.float32


def rounded(value, like):
    """Round to the type in which elements of an array are computed."""
    return np.float64(value) if like.itemsize == 8 else np.float32(value)


@emitted(rounded)
def _rounded(typingctx, value, like):
    result = computing_type(like)

    def generate(context, builder, signature, args):
        return context.cast(builder, args[0], value, result)

    return result(value, like), generate


@formula
def merge(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """Count, mean and m2 of two disjoint sets of values together (Chan, Golub & LeVeque 1979); symmetric."""
    if n_b == 0.0:
        return n_a, mean_a, m2_a
    if n_a == 0.0:
        return n_b, mean_b, m2_b
    n = n_a + n_b
    delta = mean_b - mean_a
    mean = mean_a if delta == 0.0 else (n_a * mean_a + n_b * mean_b) / n
    return n, mean, m2_a + m2_b + delta * delta * (n_a * n_b / n)


@formula
def add(total, rest, term):
    """Sum and what its rounding has left out so far (Knuth's TwoSum, summed as by Neumaier)."""
    new = total + term
    other = new - total
    return new, rest + ((total - (new - other)) + (term - other))


@formula
def accumulate(n_a, mean_a, m2_a, rest, n_b, mean_b, m2_b):
    """`merge` into long sums: the last result is what rounding has left out of m2 so far."""
    n, mean, m2 = merge(n_a, mean_a, 0.0, n_b, mean_b, m2_b)
    m2, rest = add(m2_a, rest, m2)
    return n, mean, m2, rest


@formula
def settled(total, rest):
    """Sum with its rest; the rest of a sum that is not finite means nothing."""
    return total + rest if np.isfinite(rest) else total


@formula
def reciprocal_std(m2, n, eps):
    """1 / sqrt(var + eps) with the biased variance, the one that normalizes; 0 without values."""
    if n == 0.0:
        return 0.0
    var = m2 / n + eps
    return np.nan if var < 0.0 else np.float64(1.0) / np.float64(sqrt(var))


@formula
def affine(mean, rstd, weight, bias, like):
    """Coefficients (mean_hi, scale, shift) of `normalize`.

    ``mean_hi`` is the mean rounded to that type; the bits it lacks go into the shift, so that nothing is
    lost where the mean is much larger than the standard deviation.
    """
    mean_hi = rounded(mean, like)
    scale = rstd * weight
    shift = bias - (mean - mean_hi) * scale
    return mean_hi, rounded(scale, like), rounded(shift, like)


@fused_formula
def normalize(x, mean_hi, scale, shift):
    """(x - mean) * scale + bias, by the coefficients of `affine`."""
    return (x - mean_hi) * scale + shift


@fused_formula
def scaled(x_hat, weight, bias):
    """x_hat * weight + bias, where each element has its own."""
    return x_hat * weight + bias


@formula
def standardize(x, mean_hi, rstd):
    """x_hat, relative to the rounded mean."""
    return (x - mean_hi) * rstd


@formula
def recentered(sum_dz_x_hat, sum_dz, mean, mean_hi, rstd):
    """Sum of dz * x_hat from the sum that was taken relative to the rounded mean."""
    return sum_dz_x_hat - (mean - mean_hi) * rstd * sum_dz


@formula
def gradient_terms(mean, rstd, sum_g, sum_g_x_hat, n, centered, constant, masked, like):
    """Coefficients (slope, offset) of `input_gradient`, and the factor of its gain.

    dx = rstd * (g - c1 - x_hat * c2), where g = dz * weight, and c1 and c2 are the means of g and g * x_hat.
    Constant statistics and those of no value have neither c1 nor c2, and without centering there is no c1. A
    centered slot of one value has dx = 0, exactly; with a mask it may have outputs besides that value.
    """
    factor = rstd
    slope = offset = 0.0
    if centered and not constant and not masked and n == 1.0:
        factor = 0.0
    elif not constant and n > 0.0:
        slope = -rstd * (sum_g_x_hat / n)
        if centered:
            offset = -rstd * (sum_g / n) - (mean - rounded(mean, like)) * rstd * slope
    return rounded(slope, like), rounded(offset, like), factor


@fused_formula
def input_gradient(dz, x_hat, slope, offset, gain):
    """Dx of one element; ``x_hat`` is that of `standardize`."""
    return dz * gain + (x_hat * slope + offset)


@formula
def blend(old, new, momentum):
    """Exponential moving average whose momentum weighs the new value; 1 assigns even next to NaN."""
    return new if momentum == 1.0 else (1.0 - momentum) * old + momentum * new
