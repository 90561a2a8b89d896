"""What a backend is told besides the arrays and the view: what follows x_hat, and what counts."""

from __future__ import annotations

from typing import Any, NamedTuple


class Epilogue(NamedTuple):
    """y = act(x_hat * weight + bias + residual), of which each may be None.

    Attributes
    ----------
    weight, bias : array or None
        With one entry per parameter of the view.
    residual : array or None
        Like x, in its memory order.
    activation : scalar or None
        Its type selects the formula, see `nbnorm._activation`.
    """

    weight: Any = None
    bias: Any = None
    residual: Any = None
    activation: Any = None


class Mask(NamedTuple):
    """Weights of the positions that share parameters, for each sample whose statistics are its own.

    Attributes
    ----------
    weights : array, shape (rows, positions)
        In the type that x is computed in; slot k takes row k // period, element (outer r, inner i) of it takes
        position r * run + i % run.
    counts : array, shape (rows,)
        Number of values that count in a slot, a sum of weights in float64.
    """

    weights: Any
    counts: Any
