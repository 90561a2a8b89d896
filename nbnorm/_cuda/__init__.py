"""The CUDA backend: the verbs of the CPU backend, with the same names and signatures.

A slot that fits into the registers of a team takes one kernel (`rows`); others take one kernel per pass (`planes`,
`columns`), whose partial results are merged in order (`finish`). Nothing waits for the device, and no sum is left to
the order in which threads arrive.
"""

from __future__ import annotations

from numba import cuda

from nbnorm._cuda.backward_pass import backward, grad_sums, input_grad
from nbnorm._cuda.forward_pass import apply, forward, moments
from nbnorm._cuda.memory import SIMULATED
from nbnorm._cuda.statistics import merge_moments, rstd, update_running

__all__ = [
    "apply", "backward", "forward", "grad_sums", "input_grad", "merge_moments", "moments", "rstd", "update_running",
]  # fmt: skip


def require_device() -> None:
    """Raise where there is no driver, or no device for it."""
    if not SIMULATED and not cuda.is_available():
        raise RuntimeError(f"arrays on a CUDA device need a CUDA driver, which failed: {cuda.cuda_error()}")
