"""What the operators do with tensors: call nbnorm's functions on their memory, gradients not yet thought of.

The record between the two passes is tensors only, so that PyTorch can keep, offload or recompute it; the
plan, which is cached, is made anew for the backward pass.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nbnorm import _call, functional, group_norms, layer_norms, running
from nbnorm.moments import Moments
from nbnorm.saved import Saved
from nbnorm.torch._bridge import array, optional, result, tensor, with_torch_threads

MaybeTensor: TypeAlias = Tensor | None


class Spec(NamedTuple):
    """Which norm: ``size`` is the number of groups, or of normalized axes, where there are such; then what follows."""

    norm: str
    size: int
    eps: float
    activation: str = ""


class Inputs(NamedTuple):
    """The tensors that a call has gradients of."""

    x: Tensor
    weight: MaybeTensor = None
    bias: MaybeTensor = None
    residual: MaybeTensor = None


class Statistics(NamedTuple):
    """What normalized x, in float64; ``mean`` is missing for RMS norm, ``m2`` but behind batch norm's forward pass."""

    mean: MaybeTensor
    rstd: Tensor
    m2: MaybeTensor = None


class Running(NamedTuple):
    """Running statistics, and the weight of a new batch in them."""

    mean: Tensor
    var: Tensor
    momentum: float


Gradients: TypeAlias = tuple[MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]


@with_torch_threads
def inference(inputs: Inputs, mean: Tensor, var: Tensor, spec: Spec) -> Tensor:
    """Normalize by given statistics; nothing is kept."""
    x, weight, bias, residual = map(optional, inputs)
    y = functional.batch_norm_inference(
        x, array(mean), array(var), weight, bias, eps=spec.eps, activation=spec.activation or None, residual=residual
    )  # fmt: skip
    return result(y, inputs.x)


@with_torch_threads
def forward(
    inputs: Inputs, spec: Spec, constants: tuple[Tensor, Tensor] | None = None, tracked: Running | None = None
) -> tuple[Tensor, Statistics]:
    """Normalize by x's own statistics, which enter ``tracked``, or by the constant mean and variance."""
    x, weight, bias, residual = map(optional, inputs)
    eps = spec.eps
    if spec.norm == "layer_norm":
        y, saved = layer_norms.layer_norm_forward(x, weight, bias, axis=_axes(spec), eps=eps)
    elif spec.norm == "rms_norm":
        y, saved = layer_norms.rms_norm_forward(x, weight, axis=_axes(spec), eps=eps)
    elif spec.norm == "group_norm":
        y, saved = group_norms.group_norm_forward(x, spec.size, weight, bias, eps=eps)
    elif spec.norm == "instance_norm":
        y, saved = group_norms.instance_norm_forward(x, weight, bias, eps=eps)
    else:
        given = (None, None) if constants is None else map(array, constants)
        y, saved = functional.batch_norm_forward(
            x, weight, bias, *given, training=constants is None, eps=eps, activation=spec.activation or None,
            residual=residual,
        )  # fmt: skip
        if tracked is not None and saved.moments is not None:
            _blend(tracked, saved.moments)
    mean, m2 = (None if values is None else tensor(values) for values in (saved.mean, saved.m2))
    return result(y, inputs.x), Statistics(mean, tensor(saved.rstd), m2)


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
    dy: Tensor, inputs: Inputs, statistics: Statistics, spec: Spec, constant: bool, need: tuple[bool, ...]
) -> Gradients:
    """Return the gradients of the inputs, None for those not needed.

    Without an activation the gradient of a residual is dy itself, and the residual is not in the inputs.
    """
    saved = _record(inputs, statistics, spec, constant)
    options: dict[str, Any] = {}  # by default all gradients are returned, which is seen at a glance
    if not all(needed or value is None for needed, value in zip(need, inputs, strict=True)):
        options["need"] = [name for name, needed in zip(_GRADIENTS, need, strict=True) if needed]
    dx, dweight, *rest = _BACKWARD[spec.norm](array(dy), saved, **options)
    dbias, dresidual = (*rest, None, None)[:2]
    return (
        None if dx is None else result(dx, inputs.x),
        None if dweight is None else tensor(dweight),
        None if dbias is None else tensor(dbias),
        result(dresidual, inputs.x) if need[3] and dresidual is not None else None,
    )


_GRADIENTS = ("dx", "dweight", "dbias", "dresidual")
_BACKWARD: dict[str, Any] = {
    "batch_norm": functional.batch_norm_backward,
    "layer_norm": layer_norms.layer_norm_backward,
    "rms_norm": layer_norms.rms_norm_backward,
    "group_norm": group_norms.group_norm_backward,
    "instance_norm": group_norms.instance_norm_backward,
}


def _record(inputs: Inputs, statistics: Statistics, spec: Spec, constant: bool) -> Saved:
    """Rebuild what the forward call handed out; x is packed again if it was packed there."""
    x, weight, bias, residual = map(optional, inputs)
    common = (weight, bias, spec.eps)
    if spec.norm == "batch_norm":
        options = _call.options_of(spec.activation or None, residual)
        call = _call.batch_call(spec.norm, x, *common, 1, None, options)
    elif spec.norm in ("layer_norm", "rms_norm"):
        call, _ = _call.trailing_call(spec.norm, x, _axes(spec), *common, None)
    else:
        call, _ = _call.group_call(spec.norm, x, spec.size or None, *common, 1, None)
    mean, rstd = optional(statistics.mean), array(statistics.rstd)
    return _call.save(call, spec.norm, mean, rstd, np.float64(call.view.values), None, constant)


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
