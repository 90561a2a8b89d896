"""PyTorch's own operators: what runs where nbnorm does not, and what second derivatives are taken of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nbnorm.torch._kernels import MaybeTensor, Spec, Statistics


def normalize(x: Tensor, weight: MaybeTensor, bias: MaybeTensor, spec: Spec) -> Tensor:
    """Normalize x by its own statistics."""
    if spec.norm == "batch_norm":
        return functional.batch_norm(x, None, None, weight, bias, training=True, eps=spec.eps)
    if spec.norm == "group_norm":
        return functional.group_norm(x, spec.size, weight, bias, spec.eps)
    if spec.norm == "instance_norm":
        return functional.instance_norm(x, weight=weight, bias=bias, eps=spec.eps)
    normalized = x.shape[x.ndim - spec.size :]
    if spec.norm == "layer_norm":
        return functional.layer_norm(x, normalized, weight, bias, spec.eps)
    return functional.rms_norm(x, normalized, weight, spec.eps)


def by_constants(x: Tensor, weight: MaybeTensor, bias: MaybeTensor, statistics: Statistics) -> Tensor:
    """Normalize x channel by channel with a mean and an rstd that are constants."""
    assert statistics.mean is not None
    shape = (1, -1, *[1] * (x.ndim - 2))
    y = (x - statistics.mean.view(shape)) * statistics.rstd.view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y.to(x.dtype)


def differentiable_backward(
    dy: Tensor, x: Tensor, weight: MaybeTensor, bias: MaybeTensor, statistics: Statistics, spec: Spec, constant: bool,
    need: tuple[bool, bool, bool],
) -> tuple[MaybeTensor, MaybeTensor, MaybeTensor]:  # fmt: skip
    """Return the gradients that `_kernels.backward` returns, as functions of dy, x and the parameters."""
    if not x.requires_grad:
        x = x.detach().requires_grad_(need[0])
    y = by_constants(x, weight, bias, statistics) if constant else normalize(x, weight, bias, spec)
    inputs = [t for t, needed in zip((x, weight, bias), need, strict=True) if needed and t is not None]
    found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
    dx, dweight, dbias = (next(found) if needed else None for needed in need)
    return dx, dweight, dbias


ACTIVATIONS = {"relu": functional.relu, "silu": functional.silu}


def finish(y: Tensor, activation: str | None, residual: MaybeTensor) -> Tensor:
    """Add a residual and apply an activation, each where there is one."""
    if residual is not None:
        y = y + residual
    return y if activation is None else ACTIVATIONS[activation](y)
