"""The reference with options: masks, residuals, activations, batch renormalization, by axes in a wider type.

Built on `oracle.Forward`, so that bounds and comparisons are those of the plain norms.
"""

from dataclasses import dataclass

import numpy as np

import oracle


def activate(z, activation):
    """Return act(z) and act'(z)."""
    name, slope = activation if isinstance(activation, tuple) else (activation, 0.0)
    if name is None:
        return z, np.ones_like(z)
    if name == "silu":
        s = 1 / (1 + np.exp(-z))
        return z * s, s * (1 + z * (1 - s))
    if name == "relu":
        slope = 0.0
    return np.where(z > 0, z, z * slope), np.where(z > 0, 1.0, slope)


@dataclass(frozen=True)
class Optioned:
    """A forward pass with options: the plain one whose y is z, then what comes on top."""

    plain: oracle.Forward
    y: np.ndarray
    z: np.ndarray
    slope: np.ndarray
    weights: np.ndarray
    gain: np.ndarray
    hat: np.ndarray


def forward(
    x,
    weight,
    bias,
    *,
    reduced,
    param,
    eps,
    statistics=None,
    activation=None,
    residual=None,
    mask=None,
    renorm=None,
):
    """Normalize x; ``mask`` broadcasts against it, ``renorm`` = (r, d) along the axes ``param``."""
    f = oracle.normalize(x, weight, bias, reduced=reduced, param=param, eps=eps, statistics=statistics)
    wide = oracle.widen(x)
    weights = (
        np.ones_like(wide)
        if mask is None
        else np.broadcast_to(np.asarray(mask).astype(wide.dtype), wide.shape)
    )
    mean, var, rstd, count = f.mean, f.var, f.rstd, f.count
    if mask is not None and statistics is None:
        counted = np.where(weights > 0, wide, 0)
        count = weights.sum(axis=reduced, keepdims=True)
        safe = np.where(count > 0, count, 1)
        mean = (weights * counted).sum(axis=reduced, keepdims=True) / safe
        var = (weights * np.square(counted - mean)).sum(axis=reduced, keepdims=True) / safe
        rstd = np.where(count > 0, 1 / np.sqrt(var + eps), 0)
    with np.errstate(invalid="ignore"):
        x_hat = np.where(rstd > 0, (wide - mean) * rstd, 0)
    r, d = (oracle.along(values, wide, param, 0) for values in renorm) if renorm else (1.0, 0.0)
    hat = x_hat * r + d
    z = hat * f.weight + f.bias
    if residual is not None:
        z = z + oracle.widen(residual)
    y, slope = activate(z, activation)
    plain = oracle.Forward(
        y, x_hat, mean, var, rstd, count, f.weight, f.bias, f.dtype, reduced, param, statistics is not None
    )
    return Optioned(plain, y, z, slope, weights, np.broadcast_to(r, rstd.shape) * f.weight, hat)


def backward(dy, f):
    """Return the gradients and dresidual."""
    p = f.plain
    dz = np.asarray(dy).astype(p.x_hat.dtype) * f.slope
    others = tuple(axis for axis in range(dz.ndim) if axis not in p.param)
    g = dz * f.gain
    pull = 0
    if not p.constant:
        count = np.where(np.asarray(p.count) > 0, p.count, 1)
        c1 = g.sum(axis=p.reduced, keepdims=True) / count
        c2 = (g * p.x_hat).sum(axis=p.reduced, keepdims=True) / count
        pull = np.where(f.weights > 0, f.weights * (c1 + p.x_hat * c2), 0)
    terms = dz * f.hat
    magnitudes = np.abs(dz) * (1 + np.abs(f.hat))
    sums = [np.sum(t, axis=others) for t in (terms, dz, magnitudes, np.abs(dz))]
    return oracle.Backward(p.rstd * (g - pull), *sums, g), dz
