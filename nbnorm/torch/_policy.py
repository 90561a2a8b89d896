"""From which size on nbnorm is worth its call; below, PyTorch's own operator runs.

A call takes some 50 microseconds more of Python here, and for channels last and rows of features PyTorch's batch norm
is the faster one in itself, until a result takes more than 32 MB (NEW_MEMORY values of float32): the C library then
gets new memory from the system each time, in small pages for PyTorch, and touching it takes longer than computing.
`python -m benchmarks.pytorch_models --calls --always`
prints what these numbers stand on: ratios of single modules, forward and backward.
"""

from __future__ import annotations

from math import inf, prod

import torch

NEW_MEMORY = 2**23

SMALLEST: dict[str, float] = {
    "batch_norm": 2**19,
    "instance_norm": 2**19,
    "rms_norm": 2**15,
    "layer_norm": NEW_MEMORY,
    "group_norm": NEW_MEMORY,
}
"""Least number of elements for nbnorm, channels first; those of instance and RMS norm by Zen 5."""

SMALLEST_IN_COLUMNS: dict[str, float] = {
    **SMALLEST,
    "batch_norm": NEW_MEMORY,
    "instance_norm": inf,
    "group_norm": inf,
}
"""The same for channels last, for planes of fewer values than were measured and for none."""

SMALLEST_WITH_ACTIVATION = 2**21
"""The same for batch norm in columns that an activation follows, since PyTorch takes a pass of its own for that.

ResNet-18, channels last and fused, took 0.97 of the time that it took with 2**23, with 2**19 to 2**21 alike, and 1.05
with 2**17, in trials (Emerald Rapids; on Zen 5 2**20 took 1.01, 2**21 as long as 2**23).
"""

FEWEST = 49
"""Values of a plane, from which on it is one."""


def smallest(norm: str, x: torch.Tensor, activation: str) -> float:
    """Return the least number of elements for nbnorm."""
    if x.ndim > 2 and prod(x.shape[2:]) >= FEWEST and x.is_contiguous():
        return SMALLEST[norm]
    return SMALLEST_WITH_ACTIVATION if activation else SMALLEST_IN_COLUMNS[norm]
