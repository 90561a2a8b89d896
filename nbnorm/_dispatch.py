"""From the type of an array to the backend that runs it, without importing any array library."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from nbnorm import _cpu


def backend(x: Any) -> ModuleType:
    """Return the backend module for a checked array."""
    if isinstance(x, np.ndarray):
        return _cpu
    raise TypeError(f"arrays of type {type_name(x)} are not supported; expected a NumPy array")


def is_cuda(x: Any) -> bool:
    """Whether the object exposes memory of a CUDA device."""
    return hasattr(x, "__cuda_array_interface__")


def type_name(x: Any) -> str:
    """Return the type's name with its library, as a user writes it: ``torch.Tensor``, ``list``."""
    kind = type(x)
    library = kind.__module__.partition(".")[0]
    return kind.__qualname__ if library == "builtins" else f"{library}.{kind.__qualname__}"
