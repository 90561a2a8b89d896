"""The traced route: operators that torch.compile, torch.export and dispatch modes see as one step.

Operators take and return plain values and tensors that are never missing: an empty one stands for None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbnorm.torch import _kernels, _reference
from nbnorm.torch._kernels import Running, Spec, Statistics


def _given(value: Tensor | None, like: Tensor) -> Tensor:
    """Return a tensor for one that may be missing."""
    return like.new_empty(0) if value is None else value


def _statistics(mean: Tensor, rstd: Tensor) -> Statistics:
    """Return the record of the operators: no mean where it is empty and rstd is not."""
    return Statistics(mean if mean.shape == rstd.shape else None, rstd, None)


@torch.library.custom_op("nbnorm::forward", mutates_args=())
def forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, mean: torch.Tensor | None,
    var: torch.Tensor | None, norm: str, size: int, eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return y, mean, rstd and m2; the statistics are x's own unless a mean and a variance are given."""
    constants = None if mean is None or var is None else (mean, var)
    y, statistics = _kernels.forward(x, weight, bias, Spec(norm, size, eps), constants)
    rstd = statistics.rstd
    return y, _given(statistics.mean, rstd), rstd, _given(statistics.m2, rstd)


@forward.register_fake
def _(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, norm: str, size: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = _kernels.statistics_shape(x.shape, Spec(norm, size, eps))
    rstd = x.new_empty(shape, dtype=torch.float64)
    own = norm == "batch_norm" and mean is None
    found_mean = rstd.new_empty(0) if norm == "rms_norm" else torch.empty_like(rstd)
    return torch.empty_like(x), found_mean, rstd, torch.empty_like(rstd) if own else rstd.new_empty(0)


@torch.library.custom_op("nbnorm::backward", mutates_args=())
def backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
    mean: torch.Tensor, rstd: torch.Tensor, norm: str, size: int, eps: float, constant: bool, need: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of x, weight and bias, an empty tensor for one that is not needed."""
    spec, statistics = Spec(norm, size, eps), _statistics(mean, rstd)
    gradients = _kernels.backward(dy, x, weight, bias, statistics, spec, constant, tuple(need))
    dx, dweight, dbias = (_given(gradient, x) for gradient in gradients)
    return dx, dweight, dbias


@backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Any, bias: Any, mean: Any, rstd: Any, norm: Any, size: Any, eps: Any, constant: Any,
    need: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        torch.empty_like(like) if needed else x.new_empty(0)
        for like, needed in zip((x, weight, bias), need, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what backward needs."""
    x, weight, bias, mean, _, *spec = inputs
    ctx.spec, ctx.constant = Spec(*spec), mean is not None
    ctx.save_for_backward(x, weight, bias, *output[1:3])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Gradients of `forward`; if they are to be differentiated again, by PyTorch's own operators."""
    rest = (None,) * 5
    if dy is None:
        return None, None, None, *rest
    x, weight, bias, mean, rstd = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        given = (dy, x, weight, bias, _statistics(mean, rstd), ctx.spec, ctx.constant, need)
        return *_reference.differentiable_backward(*given), *rest
    gradients = backward(dy, x, weight, bias, mean, rstd, *ctx.spec, ctx.constant, list(need))
    return *(gradient if needed else None for gradient, needed in zip(gradients, need, strict=True)), *rest


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
    x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: Spec, constants: tuple[Tensor, Tensor] | None,
    tracked: Running | None,
) -> Tensor:  # fmt: skip
    """`_autograd.Normalize.apply` as operators."""
    mean, var = constants or (None, None)
    y, batch_mean, _, m2 = forward(x, weight, bias, mean, var, *spec)
    if tracked is not None:
        count = float(_kernels.values_per_slot(x.shape, spec))
        update_running_(tracked.mean, tracked.var, batch_mean.detach(), m2.detach(), count, tracked.momentum)
    return y
