"""The norms as expressions of whole arrays, which NumPy, JAX and PyTorch read alike.

In float64 they are what ``nbnorm bench`` checks results against, in float32 what it compares with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # of any of these libraries


class Expression(NamedTuple):
    """A norm over the axes ``reduced`` of x in ``shape``, with parameters of the shape ``along``."""

    shape: tuple[int, ...]
    reduced: tuple[int, ...]
    along: tuple[int, ...]
    centered: bool
    eps: float

    def forward(
        self, x: Array, weight: Array, bias: Array | None = None
    ) -> tuple[Array, Array | None, Array]:
        """Return y, mean (None without centering) and rstd."""
        whole, x = x.shape, x.reshape(self.shape)
        mean = x.mean(self.reduced, keepdims=True) if self.centered else None
        deviation = x if mean is None else x - mean
        rstd = 1 / ((deviation * deviation).mean(self.reduced, keepdims=True) + self.eps) ** 0.5
        y = deviation * (rstd * weight.reshape(self.along))
        if bias is not None:
            y = y + bias.reshape(self.along)
        return y.reshape(whole), mean, rstd

    def backward(
        self, dy: Array, x: Array, weight: Array, mean: Array | None, rstd: Array
    ) -> tuple[Array, Array, Array | None]:
        """Return dx, dweight and dbias (None without centering)."""
        whole, x, dy = x.shape, x.reshape(self.shape), dy.reshape(self.shape)
        x_hat = (x if mean is None else x - mean) * rstd
        g = dy * weight.reshape(self.along)
        dx = g - x_hat * (g * x_hat).mean(self.reduced, keepdims=True)
        if mean is not None:
            dx = dx - g.mean(self.reduced, keepdims=True)
        samples = tuple(axis for axis, n in enumerate(self.along) if n == 1)
        dbias = None if mean is None else dy.sum(samples)
        return (dx * rstd).reshape(whole), (dy * x_hat).sum(samples), dbias


def expression(
    norm: str, shape: tuple[int, ...], channel_axis: int, num_groups: int, eps: float
) -> Expression:
    """Return the expression of a norm for arrays of a shape; its name is that of `nbnorm._catalogue.NORMS`."""
    ndim, last = len(shape), len(shape) - 1
    if norm in ("layer_norm", "rms_norm"):
        return Expression(shape, (last,), (*[1] * last, shape[last]), norm == "layer_norm", eps)
    channels = channel_axis % ndim
    along = tuple(n if axis == channels else 1 for axis, n in enumerate(shape))
    if norm == "batch_norm":
        return Expression(shape, tuple(axis for axis in range(ndim) if axis != channels), along, True, eps)
    # Groups of channels get an axis of their own; a group per channel is instance norm.
    groups = shape[channels] if norm == "instance_norm" else num_groups

    def split(sizes: tuple[int, ...], *parts: int) -> tuple[int, ...]:
        return (*sizes[:channels], *parts, *sizes[channels + 1 :])

    parts = groups, shape[channels] // groups
    return Expression(
        split(shape, *parts),
        tuple(axis for axis in range(1, ndim + 1) if axis != channels),
        split(along, *parts),
        True,
        eps,
    )
