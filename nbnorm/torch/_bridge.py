"""Tensors as NumPy arrays and back, without a copy, and PyTorch's number of threads for our kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import numba
import numpy as np
import torch

try:
    import ml_dtypes
except ImportError:  # NumPy has no bfloat16 of its own
    ml_dtypes = None

Array = np.ndarray
Result = TypeVar("Result")

DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float16: np.dtype(np.float16),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}
"""The tensor types that nbnorm computes on, with NumPy's names for them."""
if ml_dtypes is not None:
    DTYPES[torch.bfloat16] = np.dtype(ml_dtypes.bfloat16)

_MAX_THREADS = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def array(tensor: torch.Tensor) -> Array:
    """View a CPU tensor as an array."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy()
        return bits.view(DTYPES[torch.bfloat16])
    view: Array = tensor.numpy()
    return view


def optional(tensor: torch.Tensor | None) -> Array | None:
    """View a tensor that may be missing as an array."""
    return None if tensor is None else array(tensor)


def tensor(values: Array) -> torch.Tensor:
    """View an array as a tensor."""
    if values.dtype.kind == "f":
        return torch.from_numpy(values)
    return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)


def result(values: Array, like: torch.Tensor) -> torch.Tensor:
    """Return a new array as a tensor in the layout that PyTorch gives results like another tensor.

    It is none of PyTorch's views, which would forbid ``y.relu_()``, and copied only if PyTorch orders axes otherwise.
    NumPy's memory is as good as PyTorch's, and large blocks are better: NumPy asks Linux for pages of 2 MB, so that
    touching new memory is a matter of a few faults instead of 256 per MB.
    """
    y = tensor(values)
    if y.stride() == like.stride() and not y._is_view():
        return y
    strides = torch.empty_like(like, device="meta").stride()
    if any(n > 1 and a != b for n, a, b in zip(like.shape, y.stride(), strides, strict=True)):
        return torch.empty_like(like).copy_(y)
    return y.new_empty(0).set_(y.untyped_storage(), 0, like.shape, strides)


def strided_on_cpu(x: Any) -> bool:
    """Whether the memory of a tensor may be handed to NumPy: no subclass, no other device, no lazy negation."""
    return (type(x) is torch.Tensor or type(x) is torch.nn.Parameter) and (
        x.is_cpu and x.layout is torch.strided and not x.is_neg()
    )


def with_torch_threads(call: Callable[..., Result]) -> Callable[..., Result]:
    """Run a function with as many threads as PyTorch uses, and leave Numba's setting as it was."""

    @wraps(call)
    def limited(*args: Any) -> Result:
        threads = min(torch.get_num_threads(), _MAX_THREADS)
        before = numba.get_num_threads()
        if threads == before:
            return call(*args)
        numba.set_num_threads(threads)
        try:
            return call(*args)
        finally:
            numba.set_num_threads(before)

    return limited
