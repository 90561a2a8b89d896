"""The functions of `torch.nn.functional`, computed by nbnorm where it can and where that pays.

Tensors on the CPU without any transformation of `torch.func` run here; all others, and those too small to
gain, run PyTorch's own operator, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from nbnorm.torch import _ops, _policy, _reference
from nbnorm.torch._autograd import Normalize
from nbnorm.torch._bridge import DTYPES, strided_on_cpu
from nbnorm.torch._kernels import Inputs, MaybeTensor, Running, Spec, inference, values_per_slot


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
    >>> nbnorm.torch.batch_norm(torch.tensor([[1.0], [3.0]]), None, None, training=True)
    tensor([[-1.0000],
            [ 1.0000]])
    """
    if activation is not None and activation not in _reference.ACTIVATIONS:
        raise ValueError(f"activation must be None, 'relu' or 'silu', got {activation!r}")
    inputs = Inputs(input, weight, bias, residual)
    spec = Spec("batch_norm", 0, eps, activation or "")
    if running_mean is None or running_var is None:
        if training and running_mean is running_var and _runs_here(inputs, spec):
            return _normalize(inputs, spec)
    elif 0.0 <= momentum <= 1.0 and _runs_here(inputs, spec, running_mean, running_var):
        if training:
            tracked = Running(running_mean, running_var, momentum) if momentum else None
            return _normalize(inputs, spec, None, tracked)
        if _traced() or _needs_gradient(inputs):
            return _normalize(inputs, spec, (running_mean, running_var))
        return inference(inputs, running_mean, running_var, spec)
    y = functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _reference.finish(y, activation, residual)


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
    inputs = Inputs(input, weight, bias)
    spec = Spec("layer_norm", len(normalized_shape), eps)
    if _ends_with(input, normalized_shape) and _runs_here(inputs, spec):
        return _normalize(inputs, spec)
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
    inputs = Inputs(input, weight)
    spec = Spec("rms_norm", len(normalized_shape), torch.finfo(input.dtype).eps if eps is None else eps)
    same_type = weight is None or weight.dtype is input.dtype  # PyTorch promotes where they differ
    if same_type and _ends_with(input, normalized_shape) and _runs_here(inputs, spec):
        return _normalize(inputs, spec)
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
    inputs = Inputs(input, weight, bias)
    spec = Spec("group_norm", num_groups, eps)
    if num_groups > 0 and _runs_here(inputs, spec):
        return _normalize(inputs, spec)
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
    inputs = Inputs(input, weight, bias)
    spec = Spec("instance_norm", 0, eps)
    if use_input_stats and running_mean is None and _runs_here(inputs, spec):
        return _normalize(inputs, spec)
    theirs = functional.instance_norm
    return theirs(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _ends_with(x: Tensor, normalized_shape: Sequence[int]) -> bool:
    """Whether the last axes of x are those to be normalized."""
    n = len(normalized_shape)
    return n > 0 and tuple(x.shape[x.ndim - n :]) == tuple(normalized_shape)


def _runs_here(inputs: Inputs, spec: Spec, *statistics: Tensor) -> bool:
    """Whether nbnorm computes this call, rather than PyTorch's own operator."""
    x, *parameters, residual = inputs
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return False
    if not 0.0 < spec.eps < inf:  # PyTorch refuses some of these, in some norms
        return False
    on_cpu = _is_on_cpu if _traced() else strided_on_cpu
    if x.dtype not in DTYPES or not on_cpu(x):
        return False
    for t in (*parameters, *statistics):
        if t is not None and not (on_cpu(t) and (t.dtype is x.dtype or _is_wider(t, x))):
            return False
    if residual is not None and not (
        on_cpu(residual) and residual.dtype is x.dtype and residual.shape == x.shape
    ):
        return False
    return _fits(x, spec) and x.numel() >= _policy.smallest(spec.norm, x, spec.activation)


def _fits(x: Tensor, spec: Spec) -> bool:
    """Whether the shape is one that PyTorch computes as well, and not empty."""
    if spec.norm in ("layer_norm", "rms_norm"):
        return x.numel() > 0
    groups_fit = spec.norm != "group_norm" or x.shape[1] % spec.size == 0
    return x.ndim > 1 and groups_fit and values_per_slot(x.shape, spec) > 1


def _is_on_cpu(t: Tensor) -> bool:
    """Whether a tensor that may be fake is on the CPU."""
    return bool(t.is_cpu)


def _is_wider(parameter: Tensor, x: Tensor) -> bool:
    """Whether x is a half and a parameter float32, which PyTorch allows as well."""
    return parameter.dtype is torch.float32 and x.dtype in (torch.float16, torch.bfloat16)


def _traced() -> bool:
    """Whether somebody wants to see operators rather than their results."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def _needs_gradient(inputs: Inputs) -> bool:
    """Whether autograd will record the call."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def _normalize(
    inputs: Inputs, spec: Spec, constants: tuple[Tensor, Tensor] | None = None, tracked: Running | None = None
) -> Tensor:
    """Take the traced or the eager route."""
    if _traced():
        return _ops.normalize(inputs, spec, constants, tracked)
    y: Tensor = Normalize.apply(*inputs, spec, constants, tracked)
    return y
