"""The eager route: an autograd function, which costs a third of a custom operator's call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbnorm.torch import _kernels, _reference
from nbnorm.torch._kernels import Inputs, MaybeTensor, Running, Spec, Statistics


class Normalize(torch.autograd.Function):
    """Any of the norms, on tensors that nbnorm can compute on."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: MaybeTensor, bias: MaybeTensor, residual: MaybeTensor, spec: Spec,
        constants: tuple[Tensor, Tensor] | None, tracked: Running | None,
    ) -> Tensor:  # fmt: skip
        """Normalize, and keep what backward needs."""
        y, statistics = _kernels.forward(Inputs(x, weight, bias, residual), spec, constants, tracked)
        ctx.spec, ctx.constant = spec, constants is not None
        # With constant statistics dx does not depend on x, unless an activation's argument is computed again.
        without_x = ctx.constant and not ctx.needs_input_grad[1] and not spec.activation
        kept = None if without_x else x, weight, bias, residual if spec.activation else None
        ctx.save_for_backward(*kept, statistics.mean, statistics.rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[MaybeTensor, ...]:
        """Differentiate; if the result is to be differentiated again, by PyTorch's own operators."""
        x, weight, bias, residual, mean, rstd = ctx.saved_tensors
        inputs = Inputs(dy if x is None else x, weight, bias, residual)  # dy stands in for the shape of x
        need = ctx.needs_input_grad[:4]
        own = *need[:3], need[3] and bool(ctx.spec.activation)
        run = _reference.differentiable_backward if torch.is_grad_enabled() else _kernels.backward
        gradients = (None,) * 4
        if any(own):
            gradients = run(dy, inputs, Statistics(mean, rstd), ctx.spec, ctx.constant, own)
        dresidual = dy if need[3] and not ctx.spec.activation else gradients[3]
        return *gradients[:3], dresidual, None, None, None
