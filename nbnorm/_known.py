"""Calls of a known kind: what one of them has shown, the next ones with such arrays are not asked again.

Training loops repeat their calls, and small ones notice what it takes to check and to plan them
(benchmarks/small_call.py). Nearly all checks, and the whole plan, depend on the types and layouts of NumPy's arrays
alone. What is left are values, such as eps, and memory: arrays are seen to be apart from a buffer for y only where each
owns its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nbnorm._glance import owners
from nbnorm._view import View

Key = tuple[Any, ...]

# Kinds that are remembered; then all are forgotten, since a program with so many gains little by it.
MOST = 4096


class Kind(NamedTuple):
    """What the forward calls of a kind have in common.

    Attributes
    ----------
    view : View
        How x is walked as it lies in memory.
    shape : tuple of int
        Shape of the statistics.
    values : float
        Number of values that share a mean and a variance.
    activation : scalar or None
        As in `Epilogue`.
    """

    view: View
    shape: tuple[int, ...]
    values: np.float64
    activation: Any


_kinds: dict[Key, Kind] = {}


def find(
    family: str, axis: Any, groups: Any, activation: Any, x: Any, weight: Any, bias: Any, out: Any
) -> tuple[Key | None, Kind | None]:
    """Return by what a call is known, None if it is left to the checks, and its kind if there has been one before.

    A ``family`` of calls are those with the same checks. An activation in a tuple is left to them, as it may have True
    for 1.
    """
    if not (
        type(x) is np.ndarray
        and (x.base is None or (out is None and x.flags.aligned))
        and (type(axis) is int or (type(axis) is tuple and all(type(i) is int for i in axis)))
        and (groups is None or type(groups) is int)
        and (activation is None or type(activation) is str)
    ):
        return None, None
    of_weight = of_bias = None
    if weight is not None:
        if not (
            type(weight) is np.ndarray and (weight.base is None or (out is None and weight.flags.aligned))
        ):
            return None, None
        of_weight = weight.shape, weight.dtype
    if bias is not None:
        if not (type(bias) is np.ndarray and (bias.base is None or (out is None and bias.flags.aligned))):
            return None, None
        of_bias = bias.shape, bias.dtype
    if out is not None and not (
        type(out) is np.ndarray
        and out.base is None
        and out.shape == x.shape
        and out.strides == x.strides
        and out.dtype is x.dtype
        and out.flags.writeable
        and not (out is x or out is weight or out is bias)
    ):
        return None, None
    key = family, axis, groups, activation, x.shape, x.strides, x.dtype, of_weight, of_bias
    return key, _kinds.get(key)


def owned(x: Any, weight: Any, bias: Any, out: Any) -> bool:
    """Whether the arrays of a known call all own their memory: beside a buffer, `find` knows no others."""
    return out is not None or owners(x, weight, bias)


def note(key: Key, kind: Kind) -> None:
    """Remember the kind of calls whose x, weight and bias pass all checks, and have a view, as they are."""
    if len(_kinds) >= MOST:
        _kinds.clear()
    _kinds[key] = kind
