"""Loops over neighbours that share their coefficients."""

from __future__ import annotations

from typing import Any

from numba import types

from nbnorm._activation import activate
from nbnorm._cpu.halves import narrow, widen
from nbnorm._cpu.launch import inlined, loop
from nbnorm._cpu.memory import row
from nbnorm._cpu.pairs import joined, lower, upper, words
from nbnorm._cpu.tiles import before_activation, below_activation
from nbnorm._math import by_type, input_gradient, is_none, normalize, rounded, standardize


def apply_segment(x, y, residual, mean_hi, scale, shift, activation):
    """Normalize neighbours that share their coefficients."""
    apply_elements(x, y, residual, mean_hi, scale, shift, activation)


@by_type(apply_segment)
def _apply_segment(x, y, residual, mean_hi, scale, shift, activation):
    return _elements_or_words(x, y, residual, apply_elements, apply_words)


def apply_block(x, y, residual, mean_hi, scale, shift, activation):
    """Normalize the few elements of a block, an even number, which then stay in registers."""
    block_elements(x, y, residual, mean_hi, scale, shift, activation)


@by_type(apply_block)
def _apply_block(x, y, residual, mean_hi, scale, shift, activation):
    return _elements_or_words(x, y, residual, block_elements, block_words)


def _elements_or_words(x, y, residual, elements, pairs):
    """Choose how values of a type are normalized."""
    if x.dtype == y.dtype == types.int16 and is_none(residual):
        return lambda x, y, residual, mean_hi, scale, shift, activation: pairs(
            x, y, mean_hi, scale, shift, activation
        )
    return lambda x, y, residual, mean_hi, scale, shift, activation: elements(
        x, y, residual, mean_hi, scale, shift, activation
    )


def _elements(x, y, residual, mean_hi, scale, shift, activation):
    """Normalize one element after the other."""
    for i in range(x.shape[0]):
        z = before_activation(widen(x[i]), residual, i, mean_hi, scale, shift)
        y[i] = narrow(activate(z, activation), y)


apply_elements, block_elements = loop(_elements), inlined(_elements)


@inlined
def block_words(x, y, mean_hi, scale, shift, activation):
    """Normalize bfloat16, two at a time; an odd last one is left out."""
    x_words: Any = words(x)
    y_words: Any = words(y)
    for i in range(x_words.shape[0]):
        low = normalize(lower(x_words[i]), mean_hi, scale, shift)
        high = normalize(upper(x_words[i]), mean_hi, scale, shift)
        y_words[i] = joined(activate(low, activation), activate(high, activation))


@loop
def apply_words(x, y, mean_hi, scale, shift, activation):
    """`block_words`, and the odd last one."""
    block_words(x, y, mean_hi, scale, shift, activation)
    last = x.shape[0] // 2 * 2
    odd = x.shape[0] - last
    apply_elements(row(x, last, odd), row(y, last, odd), None, mean_hi, scale, shift, activation)


@loop
def fill_counted(x, dy, residual, weights, mean_hi, scale, shift, activation, own_x, dz):
    """Compute dz of one piece and, if there are weights, x as far as it counts.

    What neither counts nor has a gradient may be NaN; it takes part as 0.
    """
    for i in range(x.shape[0]):
        value, d = widen(x[i]), widen(dy[i])
        absent = False
        if weights is not None:
            absent = weights[i] == 0 and d == 0
            own_x[i] = mean_hi if absent else value
        dz[i] = below_activation(d, value, residual, i, mean_hi, scale, shift, activation, absent)


@inlined
def input_grad_segment(
    x, dy, dx, dresidual, residual, weights, mean_hi, hat_scale, slope, offset, gain, scale, shift, activation
):  # fmt: skip
    """Dx, and dz where it is wanted, of neighbours that share their coefficients; no slope: constant statistics."""
    for i in range(x.shape[0]):
        value, d = widen(x[i]), widen(dy[i])
        absent = False
        if weights is not None:
            absent = weights[i] == 0 and d == 0
        d = below_activation(d, value, residual, i, mean_hi, scale, shift, activation, absent)
        if dresidual is not None:
            dresidual[i] = narrow(d, dresidual)
        if slope is None:
            dx[i] = narrow(d * gain, dx)
        elif weights is None:
            dx[i] = narrow(input_gradient(d, standardize(value, mean_hi, hat_scale), slope, offset, gain), dx)
        else:
            w = weights[i]
            x_hat = standardize(value, mean_hi, hat_scale) if w > 0 else rounded(0.0, x)
            dx[i] = narrow(input_gradient(d, x_hat, w * slope, w * offset, gain), dx)
