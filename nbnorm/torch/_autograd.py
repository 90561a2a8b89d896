"""The eager route: an autograd function, which costs a third of a custom operator's call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbnorm.torch import _kernels, _reference
from nbnorm.torch._kernels import MaybeTensor, Running, Spec, Statistics

# Gradients beyond those of x, weight and bias: the other arguments of `Normalize.apply` have none.
_REST = (None,) * 3


class Normalize(torch.autograd.Function):
    """Any of the norms, on tensors that nbnorm can compute on."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: MaybeTensor, bias: MaybeTensor, spec: Spec,
        constants: tuple[Tensor, Tensor] | None, tracked: Running | None,
    ) -> Tensor:  # fmt: skip
        """Normalize, and keep what backward needs: of x nothing, if only its own gradient is asked for."""
        y, statistics = _kernels.forward(x, weight, bias, spec, constants, tracked)
        ctx.spec, ctx.constant = spec, constants is not None
        kept = None if ctx.constant and not ctx.needs_input_grad[1] else x
        ctx.save_for_backward(kept, weight, bias, *statistics)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[MaybeTensor, ...]:
        """Differentiate; if the result is to be differentiated again, by PyTorch's own operators."""
        x, weight, bias, *statistics = ctx.saved_tensors
        run = _reference.differentiable_backward if torch.is_grad_enabled() else _kernels.backward
        # With constant statistics dx does not depend on x, and dy stands in for its shape.
        given = (dy, dy if x is None else x, weight, bias, Statistics(*statistics))
        return *run(*given, ctx.spec, ctx.constant, ctx.needs_input_grad[:3]), *_REST
