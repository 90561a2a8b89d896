"""Activations that are computed along with a norm: y = act(z), and dz = dy * act'(z) from the same z.

Kernels get an activation as one scalar whose *type* selects the formula when they are compiled: None, a bool
for relu, a float (the slope) for leaky_relu, an int for silu.
"""

from __future__ import annotations

from math import factorial
from typing import Any

import numpy as np
from numba import types

from nbnorm._math import by_type, formula, is_none


def marker(name: str | None, slope: float, double: bool) -> Any:
    """Return the scalar that stands for an activation in kernels that compute in float64, or in float32."""
    slope_type = np.float64 if double else np.float32
    return {None: None, "relu": True, "leaky_relu": slope_type(slope), "silu": 1}[name]


@formula
def rectify(z):
    """Relu; NaN stays NaN."""
    return type(z)(0) if z <= 0 else z


@formula
def rectify_gradient(dy, z):
    """Gradient of relu, 0 at 0."""
    return type(dy)(0) if z <= 0 else dy


@formula
def leak(z, slope):
    """Leaky relu."""
    return z if z > 0 else z * slope


@formula
def leak_gradient(dy, z, slope):
    """Gradient of leaky relu, the slope at 0."""
    return dy if z > 0 else dy * slope


def exp_negative(x):
    """e**x for x <= 0 within 2 units in the last place; what would be subnormal is 0."""
    return np.exp(x) if not x < (-87.0 if x.itemsize == 4 else -708.0) else x.dtype.type(0)


@by_type(exp_negative)
def _exp_negative(x):
    """Polynomial of e**r, r = x - n ln 2, times 2**n by its bits: all of it vectorizes, which libm's exp does not.

    Adding 1.5 * 2**23 (float32) or 1.5 * 2**52 rounds to an integer, n, and leaves it in the last bits.
    """
    if x == types.float64:
        kind, magic, low, degree, power = np.float64, 1.5 * 2.0**52, -708.0, 13, _power_64
        ln2 = (np.float64(0.6931471803691238), np.float64(1.9082149292705877e-10))
    else:
        kind, magic, low, degree, power = np.float32, 1.5 * 2.0**23, -87.0, 7, _power_32
        ln2 = (np.float32(0.693359375), np.float32(-2.12194440e-4))
    terms = tuple(kind(1.0 / factorial(k)) for k in range(degree, -1, -1))
    magic, low, log2_e, zero = kind(magic), kind(low), kind(1.4426950408889634), kind(0.0)

    def exp(x):
        shifted = x * log2_e + magic
        n = shifted - magic
        r = (x - n * ln2[0]) - n * ln2[1]
        value = terms[0]
        for term in terms[1:]:
            value = value * r + term
        return zero if x < low else value * power(shifted)

    return exp


@formula
def _power_32(shifted):
    """2**n from a float32 whose last bits are n."""
    return np.int32((np.float32(shifted).view(np.int32) + np.int32(127)) << np.int32(23)).view(np.float32)


@formula
def _power_64(shifted):
    """2**n from a float64 whose last bits are n."""
    return np.int64((np.float64(shifted).view(np.int64) + np.int64(1023)) << np.int64(52)).view(np.float64)


@formula
def sigmoid(z):
    """1 / (1 + e**-z), by an exponential that cannot overflow."""
    e = exp_negative(-abs(z))
    one = type(z)(1)
    return (one if z >= 0 else e) / (one + e)


@formula
def swish(z):
    """Silu: z * sigmoid(z)."""
    return z * sigmoid(z)


@formula
def swish_gradient(dy, z):
    """Gradient of silu."""
    s = sigmoid(z)
    one = type(z)(1)
    return dy * (s * (one + z * (one - s)))


def activate(z, activation):
    """act(z)."""
    return _activate(z, activation)(z, activation)


@by_type(activate)
def _activate(z, activation):
    return _of_type(
        activation,
        lambda z, activation: z,
        lambda z, activation: rectify(z),
        lambda z, activation: leak(z, activation),
        lambda z, activation: swish(z),
    )


def activation_gradient(dy, z, activation):
    """dz = dy * act'(z)."""
    return _activation_gradient(dy, z, activation)(dy, z, activation)


@by_type(activation_gradient)
def _activation_gradient(dy, z, activation):
    return _of_type(
        activation,
        lambda dy, z, activation: dy,
        lambda dy, z, activation: rectify_gradient(dy, z),
        lambda dy, z, activation: leak_gradient(dy, z, activation),
        lambda dy, z, activation: swish_gradient(dy, z),
    )


def _of_type(activation: Any, identity: Any, relu: Any, leaky_relu: Any, silu: Any) -> Any:
    """Choose by an activation, or by its Numba type."""
    if is_none(activation):
        return identity
    if isinstance(activation, (bool, types.Boolean)):
        return relu
    return leaky_relu if isinstance(activation, (float, np.floating, types.Float)) else silu
