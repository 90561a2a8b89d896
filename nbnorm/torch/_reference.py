"""PyTorch's own operators: what runs where nbnorm does not, and what second derivatives are taken of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nbnorm.torch._kernels import Gradients, Inputs, MaybeTensor, Spec, Statistics

ACTIVATIONS = ("relu", "silu")


def finish(y: Tensor, activation: str | None, residual: MaybeTensor) -> Tensor:
    """Add a residual and apply an activation, each where there is one; y, a norm's new result, may be overwritten."""
    in_place = not torch._C._are_functorch_transforms_active()
    if residual is not None:
        alike = in_place and residual.shape == y.shape and residual.dtype is y.dtype
        y = y.add_(residual) if alike else y + residual
    if activation == "relu":
        return functional.relu(y, inplace=in_place)
    return functional.silu(y) if activation == "silu" else y


def normalize(inputs: Inputs, spec: Spec) -> Tensor:
    """Normalize x by its own statistics."""
    x, weight, bias, _ = inputs
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


def by_constants(inputs: Inputs, statistics: Statistics) -> Tensor:
    """Normalize x channel by channel with a mean and an rstd that are constants."""
    x, weight, bias, _ = inputs
    assert statistics.mean is not None
    shape = (1, -1, *[1] * (x.ndim - 2))
    y = (x - statistics.mean.view(shape)) * statistics.rstd.view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y.to(x.dtype)


def differentiable_backward(
    dy: Tensor, inputs: Inputs, statistics: Statistics, spec: Spec, constant: bool, need: tuple[bool, ...]
) -> Gradients:
    """Return the gradients that `_kernels.backward` returns, as functions of dy and the inputs."""
    if not inputs.x.requires_grad:
        inputs = inputs._replace(x=inputs.x.detach().requires_grad_(need[0]))
    y = by_constants(inputs, statistics) if constant else normalize(inputs, spec)
    y = finish(y, spec.activation, inputs.residual)
    wanted = [t for t, needed in zip(inputs, need, strict=True) if needed and t is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True) if wanted else ())
    dx, dweight, dbias, dresidual = (
        next(found) if needed and t is not None else None for t, needed in zip(inputs, need, strict=True)
    )
    return dx, dweight, dbias, dresidual
