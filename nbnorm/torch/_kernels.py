"""What the operators do with tensors: call nbnorm's functions on their memory, gradients not yet thought of.

The record between the two passes is tensors only, so that PyTorch can keep, offload or recompute it; the
plan, which is cached, is made anew for the backward pass.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nbnorm import _layout, functional, norms, running
from nbnorm._view import View, batch_view, group_view, trailing_view
from nbnorm.moments import Moments
from nbnorm.saved import Saved
from nbnorm.torch._bridge import array, optional, tensor, with_torch_threads

MaybeTensor: TypeAlias = Tensor | None


class Spec(NamedTuple):
    """Which norm: ``size`` is the number of groups, or of normalized axes, where there are such."""

    norm: str
    size: int
    eps: float


class Statistics(NamedTuple):
    """What normalized x, in float64; ``mean`` is missing for RMS norm, ``m2`` but for batch norm's training."""

    mean: MaybeTensor
    rstd: Tensor
    m2: MaybeTensor


class Running(NamedTuple):
    """Running statistics, and the weight of a new batch in them."""

    mean: Tensor
    var: Tensor
    momentum: float


@with_torch_threads
def inference(
    x: Tensor, weight: MaybeTensor, bias: MaybeTensor, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """Normalize by given statistics; nothing is kept."""
    y = torch.empty_like(x)
    given = array(mean), array(var), optional(weight), optional(bias)
    functional.batch_norm_inference(array(x), *given, eps=eps, out=array(y))
    return y


@with_torch_threads
def forward(
    x: Tensor, weight: MaybeTensor, bias: MaybeTensor, spec: Spec, constants: tuple[Tensor, Tensor] | None = None,
    tracked: Running | None = None,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    """Normalize by x's own statistics, which enter ``tracked``, or by the constant mean and variance."""
    y = torch.empty_like(x)
    arrays, out = (array(x), optional(weight), optional(bias)), array(y)
    if spec.norm == "layer_norm":
        saved = norms.layer_norm_forward(*arrays, axis=_axes(spec), eps=spec.eps, out=out)[1]
    elif spec.norm == "rms_norm":
        saved = norms.rms_norm_forward(*arrays[:2], axis=_axes(spec), eps=spec.eps, out=out)[1]
    elif spec.norm == "group_norm":
        saved = norms.group_norm_forward(arrays[0], spec.size, *arrays[1:], eps=spec.eps, out=out)[1]
    elif spec.norm == "instance_norm":
        saved = norms.instance_norm_forward(*arrays, eps=spec.eps, out=out)[1]
    elif constants is not None:
        mean, var = array(constants[0]), array(constants[1])
        saved = functional.batch_norm_forward(*arrays, mean, var, training=False, eps=spec.eps, out=out)[1]
    else:
        saved = functional.batch_norm_forward(*arrays, eps=spec.eps, out=out)[1]
        if tracked is not None and saved.moments is not None:
            _blend(tracked, saved.moments)
    means, m2 = (None if values is None else tensor(values) for values in (saved.mean, saved.m2))
    return y, Statistics(means, tensor(saved.rstd), m2)


def _axes(spec: Spec) -> tuple[int, ...]:
    """Axes that layer and RMS norm normalize."""
    return tuple(range(-spec.size, 0))


def update_running(tracked: Running, count: float, mean: Tensor, m2: Tensor) -> None:
    """Let the moments of a batch enter the running statistics."""
    _blend(tracked, Moments(count, array(mean), array(m2)))


def _blend(tracked: Running, moments: Moments) -> None:
    """Update running statistics of any type; autograd is told that they changed."""
    buffers = tracked[:2]
    wide = [b if b.dtype in (torch.float32, torch.float64) else b.float() for b in buffers]
    running.update_running_stats(array(wide[0]), array(wide[1]), moments, tracked.momentum)
    for buffer, updated in zip(buffers, wide, strict=True):
        if buffer is updated:
            torch.autograd.graph.increment_version(buffer)
        else:
            buffer.copy_(updated)


@with_torch_threads
def backward(
    dy: Tensor, x: Tensor, weight: MaybeTensor, bias: MaybeTensor, statistics: Statistics, spec: Spec, constant: bool,
    need: tuple[bool, bool, bool],
) -> tuple[MaybeTensor, MaybeTensor, MaybeTensor]:  # fmt: skip
    """Return the gradients of x, weight and bias, None for those not needed."""
    saved = _record(x, weight, bias, statistics, spec, constant)
    names = [name for name, needed in zip(("dx", "dweight", "dbias"), need, strict=True) if needed]
    dx = torch.empty_like(x) if need[0] else None
    into = (optional(dx), None, None)
    if spec.norm == "rms_norm":
        gradients = norms.rms_norm_backward(array(dy), saved, need=names, out=into[:2])
    else:
        call = functional if spec.norm == "batch_norm" else norms
        gradients = getattr(call, f"{spec.norm}_backward")(array(dy), saved, need=names, out=into)
    dweight, dbias = (None if g is None else tensor(g) for g in (*gradients[1:], None)[:2])
    return dx, dweight, dbias


def _record(
    x: Tensor, weight: MaybeTensor, bias: MaybeTensor, statistics: Statistics, spec: Spec, constant: bool
) -> Saved:
    """Rebuild what the forward call would have handed to its backward call."""
    packed, view, order = plan(array(x), spec)
    mean = None if statistics.mean is None else array(statistics.mean)
    rstd, m2 = array(statistics.rstd), optional(statistics.m2)
    parameters = optional(weight), optional(bias)
    count = np.float64(view.values)
    return Saved(spec.norm, packed, *parameters, mean, rstd, count, m2, constant, view, order)


def plan(x: np.ndarray, spec: Spec) -> tuple[np.ndarray, View, tuple[int, ...] | None]:
    """Plan as the forward call did; x is packed again if it was packed there."""
    if spec.norm == "batch_norm":
        return _layout.plan(x, partial(batch_view, channel_axis=1))
    if spec.norm in ("layer_norm", "rms_norm"):
        return _layout.plan(x, partial(trailing_view, normalized=spec.size), range(x.ndim))
    groups = spec.size or x.shape[1]
    return _layout.plan(x, partial(group_view, channel_axis=1, num_groups=groups), range(x.ndim))


def statistics_shape(shape: torch.Size, spec: Spec) -> tuple[int, ...]:
    """Shape of mean and rstd."""
    if spec.norm == "batch_norm":
        return (shape[1],)
    if spec.norm in ("layer_norm", "rms_norm"):
        return tuple(shape[: len(shape) - spec.size])
    return (shape[0], spec.size or shape[1])


def values_per_slot(shape: torch.Size, spec: Spec) -> int:
    """Return how many values share a mean; 0 for an empty tensor."""
    slots = prod(statistics_shape(shape, spec))
    return prod(shape) // slots if slots else 0
