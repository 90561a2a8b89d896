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

HUGE_PAGES = 1 << 22
"""Bytes from which on NumPy asks for huge pages."""

_MAX_THREADS = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def array(tensor: torch.Tensor) -> Array:
    """View a CPU tensor as an array."""
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


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """Return an uninitialized tensor in the layout of another one; a large one in memory that NumPy has allocated.

    NumPy asks Linux for pages of 2 MB, PyTorch does not: touching new memory for the first time is then a matter of a
    few faults instead of 256 per MB.
    """
    if x.numel() * x.element_size() < HUGE_PAGES:
        return torch.empty_like(x)
    strides = torch.empty_like(x, device="meta").stride()
    memory = torch.from_numpy(np.empty(x.numel() * x.element_size(), np.uint8)).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(memory, 0, x.shape, strides)  # a view would forbid y.relu_()


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
