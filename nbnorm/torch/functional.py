"""The functions of `torch.nn.functional`, computed by nbnorm where it can and where that pays.

Tensors on the CPU without any transformation of `torch.func` run here; all others, and those too small to
gain, run PyTorch's own operator, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from nbnorm.torch import _ops, _policy, _reference
from nbnorm.torch._autograd import Normalize
from nbnorm.torch._bridge import DTYPES, strided_on_cpu
from nbnorm.torch._kernels import MaybeTensor, Running, Spec, inference, values_per_slot

_HALVES = (torch.float16, torch.bfloat16)


def batch_norm(
    input: Tensor,
    running_mean: MaybeTensor,
    running_var: MaybeTensor,
    weight: MaybeTensor = None,
    bias: MaybeTensor = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: MaybeTensor = None,
) -> Tensor:
    """Normalize each channel, as `torch.nn.functional.batch_norm` does.

    Parameters
    ----------
    input : torch.Tensor, shape (N, C, ...)
        In any memory format, which the result keeps.
    running_mean, running_var : torch.Tensor, shape (C,), optional
        Updated in place in training, used instead of the batch's statistics otherwise.
    weight, bias : torch.Tensor, shape (C,), optional
        Scale and shift of each channel.
    training : bool
        Whether the statistics are those of the batch.
    momentum : float
        Weight of the batch in the running statistics.
    eps : float
        Added to the variance.
    activation : {"relu", "silu"}, optional
        Applied last, in the same pass.
    residual : torch.Tensor, optional
        Added to the normalized input, before the activation.

    Returns
    -------
    torch.Tensor
        Like input.

    Examples
    --------
    >>> import torch, nbnorm.torch
    >>> nbnorm.torch.batch_norm(torch.tensor([[1.0], [3.0]]), None, None, training=True, eps=0.0)
    tensor([[-1.],
            [ 1.]])
    """
    if activation is not None or residual is not None:
        y = batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return _reference.finish(y, activation, residual)
    spec = Spec("batch_norm", 0, eps)
    both = running_mean is not None and running_var is not None
    if not ((training or both) and _runs_here(input, weight, bias, spec, running_mean, running_var)):
        return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if training:
        tracked = Running(running_mean, running_var, momentum) if both and momentum else None
        return _normalize(input, weight, bias, spec, None, tracked)
    if _traced() or _needs_gradient(input, weight, bias):
        return _normalize(input, weight, bias, spec, (running_mean, running_var))
    return inference(input, weight, bias, running_mean, running_var, eps)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: MaybeTensor = None,
    bias: MaybeTensor = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize over the trailing axes, as `torch.nn.functional.layer_norm` does.

    Parameters
    ----------
    input : torch.Tensor
        Whose shape ends with normalized_shape.
    normalized_shape : sequence of int
        Sizes of the axes that are normalized.
    weight, bias : torch.Tensor, shape normalized_shape, optional
        Scale and shift of each element.
    eps : float
        Added to the variance.

    Returns
    -------
    torch.Tensor
        Like input.

    Examples
    --------
    >>> import torch, nbnorm.torch
    >>> nbnorm.torch.layer_norm(torch.tensor([[1.0, 3.0]]), [2], eps=0.0)
    tensor([[-1.,  1.]])
    """
    spec = Spec("layer_norm", len(normalized_shape), eps)
    if _ends_with(input, normalized_shape) and _runs_here(input, weight, bias, spec):
        return _normalize(input, weight, bias, spec)
    return functional.layer_norm(input, normalized_shape, weight, bias, eps)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: MaybeTensor = None, eps: float | None = None
) -> Tensor:
    """Divide by the root mean square over the trailing axes, as `torch.nn.functional.rms_norm` does.

    Parameters
    ----------
    input : torch.Tensor
        Whose shape ends with normalized_shape.
    normalized_shape : sequence of int
        Sizes of the axes that are normalized.
    weight : torch.Tensor, shape normalized_shape, optional
        Scale of each element.
    eps : float, optional
        Added to the mean square; None is the machine epsilon of input's type.

    Returns
    -------
    torch.Tensor
        Like input.

    Examples
    --------
    >>> import torch, nbnorm.torch
    >>> nbnorm.torch.rms_norm(torch.tensor([[1.0, 7.0]]), [2], eps=0.0)
    tensor([[0.2000, 1.4000]])
    """
    spec = Spec("rms_norm", len(normalized_shape), torch.finfo(input.dtype).eps if eps is None else eps)
    same_type = weight is None or weight.dtype is input.dtype  # PyTorch promotes where they differ
    if same_type and _ends_with(input, normalized_shape) and _runs_here(input, weight, None, spec):
        return _normalize(input, weight, None, spec)
    return functional.rms_norm(input, normalized_shape, weight, eps)


def group_norm(
    input: Tensor, num_groups: int, weight: MaybeTensor = None, bias: MaybeTensor = None, eps: float = 1e-5
) -> Tensor:
    """Normalize groups of channels of every sample, as `torch.nn.functional.group_norm` does.

    Parameters
    ----------
    input : torch.Tensor, shape (N, C, ...)
        In any memory format, which the result keeps.
    num_groups : int
        A divisor of C.
    weight, bias : torch.Tensor, shape (C,), optional
        Scale and shift of each channel.
    eps : float
        Added to the variance.

    Returns
    -------
    torch.Tensor
        Like input.

    Examples
    --------
    >>> import torch, nbnorm.torch
    >>> nbnorm.torch.group_norm(torch.tensor([[1.0, 3.0, 10.0, 30.0]]), 2, eps=0.0)
    tensor([[-1.,  1., -1.,  1.]])
    """
    spec = Spec("group_norm", num_groups, eps)
    if num_groups > 0 and _runs_here(input, weight, bias, spec):
        return _normalize(input, weight, bias, spec)
    return functional.group_norm(input, num_groups, weight, bias, eps)


def instance_norm(
    input: Tensor,
    running_mean: MaybeTensor = None,
    running_var: MaybeTensor = None,
    weight: MaybeTensor = None,
    bias: MaybeTensor = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize every channel of every sample, as `torch.nn.functional.instance_norm` does.

    Parameters
    ----------
    input : torch.Tensor, shape (N, C, ...)
        In any memory format, which the result keeps.
    running_mean, running_var : torch.Tensor, shape (C,), optional
        With them PyTorch's own operator runs where it updates them.
    weight, bias : torch.Tensor, shape (C,), optional
        Scale and shift of each channel.
    use_input_stats : bool
        False for the running statistics.
    momentum : float
        Weight of the batch in the running statistics.
    eps : float
        Added to the variance.

    Returns
    -------
    torch.Tensor
        Like input.

    Examples
    --------
    >>> import torch, nbnorm.torch
    >>> nbnorm.torch.instance_norm(torch.tensor([[[1.0, 3.0], [10.0, 30.0]]]), eps=0.0)
    tensor([[[-1.,  1.],
             [-1.,  1.]]])
    """
    if not use_input_stats and running_mean is not None:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    spec = Spec("instance_norm", 0, eps)
    if use_input_stats and running_mean is None and _runs_here(input, weight, bias, spec):
        return _normalize(input, weight, bias, spec)
    theirs = functional.instance_norm
    return theirs(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _ends_with(x: Tensor, normalized_shape: Sequence[int]) -> bool:
    """Whether the last axes of x are those to be normalized."""
    n = len(normalized_shape)
    return n > 0 and tuple(x.shape[x.ndim - n :]) == tuple(normalized_shape)


def _runs_here(
    x: Tensor, weight: MaybeTensor, bias: MaybeTensor, spec: Spec, *statistics: MaybeTensor
) -> bool:
    """Whether nbnorm computes this call, rather than PyTorch's own operator."""
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return False
    tracing = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    if not (x.is_cpu if tracing else strided_on_cpu(x)) or x.dtype not in DTYPES:
        return False
    for t in (weight, bias, *statistics):
        if t is not None and not (
            (tracing or strided_on_cpu(t))
            and (t.dtype is x.dtype or (x.dtype in _HALVES and t.dtype is torch.float32))
        ):
            return False
    channels = spec.norm not in ("layer_norm", "rms_norm")
    if x.ndim < 1 + channels or (spec.norm == "group_norm" and x.shape[1] % spec.size):
        return False
    return x.numel() >= _policy.smallest(spec.norm, x) and (
        not channels or values_per_slot(x.shape, spec) > 1
    )


def _traced() -> bool:
    """Whether somebody wants to see operators rather than their results."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def _needs_gradient(x: Tensor, weight: MaybeTensor, bias: MaybeTensor) -> bool:
    """Whether autograd will record the call."""
    return torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )


def _normalize(
    x: Tensor, weight: MaybeTensor, bias: MaybeTensor, spec: Spec,
    constants: tuple[Tensor, Tensor] | None = None, tracked: Running | None = None,
) -> Tensor:  # fmt: skip
    """Take the traced or the eager route."""
    if _traced():
        return _ops.normalize(x, weight, bias, spec, constants, tracked)
    y: Tensor = Normalize.apply(x, weight, bias, spec, constants, tracked)
    return y
