"""Whose array it is, told by looking among the loaded modules: who has an array has imported its library."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def is_cupy(x: Any) -> bool:
    """Whether an array is CuPy's."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def is_cuda(x: Any) -> bool:
    """Whether the object exposes memory of a CUDA device."""
    return hasattr(x, "__cuda_array_interface__")


def is_foreign(x: Any) -> bool:
    """Whether an array is on a device but not CuPy's; the simulator's arrays hide their interface."""
    if isinstance(x, np.ndarray) or is_cupy(x):
        return False
    return is_cuda(x) or type(x).__name__ == "FakeCUDAArray"


def type_name(x: Any) -> str:
    """Return the type's name with its library, as a user writes it: ``torch.Tensor``, ``list``."""
    kind = type(x)
    library = kind.__module__.partition(".")[0]
    return kind.__qualname__ if library == "builtins" else f"{library}.{kind.__qualname__}"
