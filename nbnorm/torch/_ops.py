"""The traced route: operators that torch.compile, torch.export and dispatch modes see as one step.

Operators take and return plain values and tensors that are never missing: an empty one stands for None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbnorm.torch import _kernels, _reference
from nbnorm.torch._kernels import Inputs, Running, Spec, Statistics


def _given(value: Tensor | None, like: Tensor) -> Tensor:
    """Return a tensor for one that may be missing."""
    return like.new_empty(0) if value is None else value


def _statistics(mean: Tensor, rstd: Tensor) -> Statistics:
    """Return the record of the operators: no mean where it is empty and rstd is not."""
    return Statistics(mean if mean.shape == rstd.shape else None, rstd)


@torch.library.custom_op("nbnorm::forward", mutates_args=())
def forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, residual: torch.Tensor | None,
    mean: torch.Tensor | None, var: torch.Tensor | None, norm: str, size: int, eps: float, activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return y, mean, rstd and m2; the statistics are x's own unless a mean and a variance are given."""
    constants = None if mean is None or var is None else (mean, var)
    spec = Spec(norm, size, eps, activation)
    y, statistics = _kernels.forward(Inputs(x, weight, bias, residual), spec, constants)
    rstd = statistics.rstd
    return y, _given(statistics.mean, rstd), rstd, _given(statistics.m2, rstd)


@forward.register_fake
def _(
    x: Tensor, weight: Any, bias: Any, residual: Any, mean: Any, var: Any, norm: str, size: int, eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = _kernels.statistics_shape(x.shape, Spec(norm, size, eps))
    rstd = x.new_empty(shape, dtype=torch.float64)
    own = norm == "batch_norm" and mean is None
    found_mean = rstd.new_empty(0) if norm == "rms_norm" else torch.empty_like(rstd)
    return torch.empty_like(x), found_mean, rstd, torch.empty_like(rstd) if own else rstd.new_empty(0)


@torch.library.custom_op("nbnorm::backward", mutates_args=())
def backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
    residual: torch.Tensor | None, mean: torch.Tensor, rstd: torch.Tensor, norm: str, size: int, eps: float,
    activation: str, constant: bool, need: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of x, weight, bias and residual, an empty tensor for one that is not needed."""
    inputs, spec = Inputs(x, weight, bias, residual), Spec(norm, size, eps, activation)
    gradients = _kernels.backward(dy, inputs, _statistics(mean, rstd), spec, constant, tuple(need))
    dx, dweight, dbias, dresidual = (_given(gradient, x) for gradient in gradients)
    return dx, dweight, dbias, dresidual


@backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Any, bias: Any, residual: Any, mean: Any, rstd: Any, norm: Any, size: Any, eps: Any,
    activation: Any, constant: Any, need: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    likes = (x, weight, bias, x)  # dresidual has the memory order of x
    return tuple(
        torch.empty_like(like) if needed else x.new_empty(0) for like, needed in zip(likes, need, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what backward needs."""
    x, weight, bias, residual, mean, _, *spec = inputs
    ctx.spec, ctx.constant = Spec(*spec), mean is not None
    ctx.save_for_backward(x, weight, bias, residual if ctx.spec.activation else None, *output[1:3])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Gradients of `forward`; if they are to be differentiated again, by PyTorch's own operators."""
    rest = (None,) * 6
    if dy is None:
        return (None,) * 4 + rest
    *tensors, mean, rstd = ctx.saved_tensors
    need = ctx.needs_input_grad[:4]
    own = *need[:3], need[3] and bool(ctx.spec.activation)
    gradients: tuple[Tensor | None, ...] = (None,) * 4
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        given = Inputs(*tensors), _statistics(mean, rstd), ctx.spec, ctx.constant
        gradients = _reference.differentiable_backward(dy, *given, own)
    elif any(own):
        found = backward(dy, *tensors, mean, rstd, *ctx.spec, ctx.constant, list(own))
        gradients = tuple(g if needed else None for g, needed in zip(found, own, strict=True))
    dresidual = dy.clone() if need[3] and not ctx.spec.activation else gradients[3]
    return *gradients[:3], dresidual, *rest


forward.register_autograd(_differentiate, setup_context=_setup_context)


@torch.library.custom_op("nbnorm::update_running_", mutates_args=("running_mean", "running_var"))
def update_running_(
    running_mean: torch.Tensor, running_var: torch.Tensor, mean: torch.Tensor, m2: torch.Tensor, count: float,
    momentum: float,
) -> None:  # fmt: skip
    """Let the moments of a batch enter the running statistics."""
    _kernels.update_running(Running(running_mean, running_var, momentum), count, mean, m2)


@update_running_.register_fake
def _(running_mean: Any, running_var: Any, mean: Any, m2: Any, count: Any, momentum: Any) -> None:
    return None


def normalize(
    inputs: Inputs, spec: Spec, constants: tuple[Tensor, Tensor] | None, tracked: Running | None
) -> Tensor:
    """`_autograd.Normalize.apply` as operators."""
    y, batch_mean, _, m2 = forward(*inputs, *(constants or (None, None)), *spec)
    if tracked is not None:
        count = float(_kernels.values_per_slot(inputs.x.shape, spec))
        update_running_(tracked.mean, tracked.var, batch_mean.detach(), m2.detach(), count, tracked.momentum)
    return y
