"""What all benchmarks share: shapes, cached inputs, the bytes that must move, and a copy to compare with.

Normalization moves memory, so the yardstick is *copies*: the time of an operation over the time of a parallel
copy of the same tensor, measured in the same process, alternately. Copies stay comparable where other
processes take their share of the machine; seconds do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter

import numpy as np
from numba import njit, prange

SHAPES = {
    "resnet stem": (32, 64, 112, 112),
    "resnet stage 1": (32, 64, 56, 56),
    "resnet stage 1, expanded": (32, 256, 56, 56),
    "resnet stage 2": (32, 512, 28, 28),
    "resnet stage 3": (32, 1024, 14, 14),
    "resnet stage 4": (32, 2048, 7, 7),
    "mobile": (8, 192, 14, 14),
    "yolo, early": (8, 64, 160, 160),
    "yolo, late": (8, 256, 40, 40),
    "volumes": (2, 32, 32, 64, 64),
    "images": (4, 3, 640, 640),
    "tabular, small": (256, 512),
    "tabular": (4096, 128),
    "tabular, long": (65536, 64),
}

# How often an operation must pass over a tensor in main memory: where a slot's arrays wait in the cache for
# the second pass, and where they have to be read again.
PASSES = {"forward": (2, 3), "backward": (3, 5), "inference": (2, 2)}
INPUTS = {"forward": 1, "backward": 2, "inference": 1}
CACHE = 1 << 20  # bytes of a second-level cache

ROUNDS = 50
BURST = 2e-4  # seconds: many calls of microseconds, yet short enough for some bursts to go undisturbed


@dataclass(frozen=True, eq=False)
class Batch:
    """Arguments of batch norm; ``out`` takes y or dx. All pages have been touched."""

    x: np.ndarray
    dy: np.ndarray
    out: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    channel_axis: int


@lru_cache(maxsize=1)  # the largest batch takes 300 MB
def batch(shape: tuple[int, ...], channels_last: bool = False) -> Batch:
    """Random float32 arrays for a shape (N, C, ...), which ``channels_last`` turns into (N, ..., C)."""
    rng = np.random.default_rng(0)
    weight, bias = rng.uniform(0.5, 2, shape[1]), rng.standard_normal(shape[1])
    if channels_last:
        shape = (shape[0], *shape[2:], shape[1])
    x = rng.standard_normal(shape, np.float32) * np.float32(2) + np.float32(1)
    dy = rng.standard_normal(shape, np.float32)
    out = np.full_like(x, np.nan)
    return Batch(x, dy, out, weight.astype(np.float32), bias.astype(np.float32), -1 if channels_last else 1)


def floor_bytes(operation: str, batch: Batch) -> int:
    """Return the bytes that an operation must at least read and write, parameters aside."""
    slot = batch.x.nbytes // batch.weight.size * INPUTS[operation]
    contiguous = batch.channel_axis == 1 and batch.x.ndim > 2
    cached, streamed = PASSES[operation]
    return batch.x.nbytes * (cached if contiguous and slot <= CACHE else streamed)


@njit(parallel=True)
def parallel_copy(source, target):
    """Copy with the threads that nbnorm's kernels use: both pay the same launch and share one bandwidth.

    Not imported from `nbnorm._bench`, which has the like: asv runs this file with versions of the package without it.

    A pool of Python threads takes tens of microseconds to start, which would flatter all that is compared.
    """
    for i in prange(source.size):
        target[i] = source[i]


def interleaved(*calls: Callable[[], object]) -> np.ndarray:
    """Seconds per call, shape (rounds, calls): in every round, each takes its turn for a burst of calls."""
    repeats = []
    for call in calls:
        call()  # compiles
        repeats.append(max(1, round(BURST / min(burst(call, 1) for _ in range(3)))))
    return np.array([[burst(call, n) for call, n in zip(calls, repeats, strict=True)] for _ in range(ROUNDS)])


def burst(call: Callable[[], object], n: int) -> float:
    """Seconds per call over n calls in a row."""
    start = perf_counter()
    for _ in range(n):
        call()
    return (perf_counter() - start) / n


def seconds_and_copies(call: Callable[[], object], x: np.ndarray) -> tuple[float, float]:
    """Return the time of a call in seconds and in copies of ``x``.

    Both are the best of their rounds. Where another process holds a core, a team of threads waits out its
    time slice of milliseconds at every launch; a median of ratios then counts launches instead of bytes.
    """
    source, target = x.reshape(-1), np.zeros(x.size, x.dtype)
    seconds, copy = interleaved(call, lambda: parallel_copy(source, target)).min(axis=0)
    return float(seconds), float(seconds / copy)
