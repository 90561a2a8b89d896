"""What all benchmarks share: cases, cached inputs, checked calls, and a copy to compare with.

Normalization moves memory, so the yardstick is *copies*: the time of an operation over the time of a parallel
copy of the same tensor, measured in the same process, alternately. Copies stay comparable where other
processes take their share of the machine; seconds do not.

asv runs these files with older versions of the package, too: of nbnorm they use public names only.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from itertools import product
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

import nbnorm

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import oracle
import reference

EPS = 1e-5
TRAINING = ["forward", "backward"]

# How often an operation must pass over a tensor in main memory: where a slot's arrays wait in the cache for
# the second pass, and where they have to be read again.
PASSES = {"forward": (2, 3), "backward": (3, 5), "inference": (2, 2)}
INPUTS = {"forward": 1, "backward": 2, "inference": 1}
CACHE = 1 << 20  # bytes of a second-level cache

ROUNDS = 50
BURST = 2e-4  # seconds: many calls of microseconds, yet short enough for some bursts to go undisturbed
CHECKED = 1 << 20  # elements

Call = Callable[[], Any]


class Case(NamedTuple):
    """A norm on an array of shape (N, C, ...), which lies in memory as (N, ..., C) if channels are last."""

    norm: str
    shape: tuple[int, ...]
    channels_last: bool = False
    num_groups: int = 1
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.norm} {self.shape}{' channels last' if self.channels_last else ''}"

    @property
    def by_channel(self) -> bool:
        """Whether the parameters belong to channels, not to elements of a sample."""
        return self.norm not in ("layer", "rms")

    @property
    def channel_axis(self) -> int:
        """The axis of the channels in memory."""
        return len(self.shape) - 1 if self.channels_last or not self.by_channel else 1

    @property
    def slots(self) -> int:
        """How many means there are."""
        samples, channels = self.shape[:2]
        if not self.by_channel:
            return prod(self.shape[:-1])
        return {"batch": channels, "group": samples * self.num_groups, "instance": samples * channels}[
            self.norm
        ]


BATCHES = {
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
STAGE = Case("batch", BATCHES["resnet stage 1"])


def both_layouts(shape: tuple[int, ...]) -> Iterator[Case]:
    """Batch norm channels first and, where the array has more than channels, last."""
    yield Case("batch", shape)
    if len(shape) > 2:
        yield Case("batch", shape, channels_last=True)


@dataclass(frozen=True, eq=False)
class Batch:
    """Arguments of a norm; ``out`` takes y or dx. All pages have been touched."""

    case: Case
    x: np.ndarray
    dy: np.ndarray
    out: np.ndarray
    parameters: tuple[np.ndarray, ...]


@lru_cache(maxsize=1)  # the largest batch takes 3 GB
def batch(case: Case) -> Batch:
    """Return the arguments of a case, which are drawn once."""
    return draw(case)


def draw(case: Case) -> Batch:
    """Draw random arrays for a case; the means are not 0 and the weights not 1, or a wrong formula could pass."""
    rng = np.random.default_rng(0)
    shape = (case.shape[0], *case.shape[2:], case.shape[1]) if case.channels_last else case.shape
    size = shape[case.channel_axis]
    parameters = [rng.uniform(0.5, 2, size), rng.standard_normal(size)][: 1 if case.norm == "rms" else 2]
    x = rng.standard_normal(shape, np.float32)
    x *= 2
    x += 1
    dtype = np.dtype(import_module("ml_dtypes").bfloat16 if case.dtype == "bfloat16" else case.dtype)
    x = x.astype(dtype, copy=False)
    dy = rng.standard_normal(shape, np.float32).astype(dtype, copy=False)
    return Batch(case, x, dy, np.full_like(x, np.nan), tuple(p.astype(np.float32) for p in parameters))


@lru_cache(maxsize=1)
def prepare(
    operation: str, case: Case, activation: str | None = None, with_residual: bool = False
) -> tuple[Call, Batch]:
    """Return the call that is timed, compiled and its result checked, and the arrays that it works on."""
    b = batch(case)
    residual = np.roll(b.dy, 1) if with_residual else None
    options = {
        name: value
        for name, value in (("activation", activation), ("residual", residual))
        if value is not None
    }
    if operation == "inference":
        statistics = tuple(np.full_like(b.parameters[0], value) for value in (1.5, 3.0))
        call = partial(
            nbnorm.batch_norm_inference, b.x, *statistics, *b.parameters, **forward(b).keywords, out=b.out
        )
    else:
        statistics = None
        call = partial(forward(b), **options, out=b.out)
    if operation == "backward":
        y, saved = call()
        others = [None] * len(b.parameters), [np.empty_like(y)] * with_residual
        differentiate = getattr(nbnorm, f"{case.norm}_norm_backward")
        call = partial(differentiate, b.dy, saved, out=(b.out, *others[0], *others[1]))
    b.out.fill(np.nan)
    call()
    check(operation, b, statistics, **options)
    return call, b


def forward(b: Batch) -> Call:
    """Return the call of a norm on a batch."""
    case = b.case
    groups = (case.num_groups,) if case.norm == "group" else ()
    options = {"eps": EPS} | ({"channel_axis": case.channel_axis} if case.by_channel else {})
    return partial(getattr(nbnorm, f"{case.norm}_norm_forward"), b.x, *groups, *b.parameters, **options)


def check(
    operation: str,
    b: Batch,
    statistics: tuple[np.ndarray, np.ndarray] | None = None,
    activation: str | None = None,
    residual: np.ndarray | None = None,
) -> None:
    """Compare y or dx with the oracle of the tests; of large arrays, slots at equal distances.

    Of few where there is an activation: among millions of values, one is so near to 0 that its sign is rounding.
    """
    case = b.case
    step = max(1, b.x.size // (CHECKED if activation is None else CHECKED // 16))
    axis = case.channel_axis if case.norm == "batch" else 0
    some = (*[slice(None)] * axis, slice(None, None, step))
    arrays = [a if a is None else a[some] for a in (b.x, b.dy, b.out, residual)]
    weight, bias = (*b.parameters, None)[:2]
    axes = {"reduced": (b.x.ndim - 1,), "param": (b.x.ndim - 1,)}
    if case.norm == "batch":
        weight, bias = weight[::step], bias[::step]
        statistics = statistics and tuple(values[::step] for values in statistics)
        axes["reduced"], axes["param"] = oracle.axes_but(b.x.ndim, axis)
    elif case.by_channel:
        channels, groups = case.channel_axis, case.slots // case.shape[0]
        arrays = [a if a is None else oracle.grouped(a, groups, channels) for a in arrays]
        axes["reduced"] = tuple(i for i in range(b.x.ndim + 1) if i not in (0, channels))
        axes["param"] = channels, channels + 1
    x, dy, out, residual = arrays
    if case.norm == "rms":
        plain = oracle.normalize(x, weight, eps=EPS, centered=False, **axes)
        gradients = oracle.differentiate(dy, plain)
    else:
        options = {"statistics": statistics, "activation": activation, "residual": residual}
        whole = reference.forward(x, weight, bias, eps=EPS, **axes, **options)
        plain, gradients = whole.plain, reference.backward(dy, whole)[0]
    if operation == "backward":
        oracle.assert_within(out, gradients.dx, oracle.dx_tolerance(plain, gradients), f"dx of {case}")
    else:
        oracle.assert_within(out, plain.y, oracle.y_tolerance(plain), f"y of {case}")


def floor(operation: str, case: Case) -> float:
    """Return the copies that the bytes which must at least be read and written take, parameters aside."""
    slot = prod(case.shape) * 4 // case.slots * INPUTS[operation]
    contiguous = not case.channels_last and (case.norm != "batch" or len(case.shape) > 2)
    cached, streamed = PASSES[operation]
    return (cached if contiguous and slot <= CACHE else streamed) / 2


@njit(parallel=True)
def parallel_copy(source, target):
    """Copy with the threads that nbnorm's kernels use: both pay the same launch and share one bandwidth.

    Not imported from `nbnorm._bench`, which has the like: asv runs this file with versions of the package without it.

    A pool of Python threads takes tens of microseconds to start, which would flatter all that is compared.
    """
    for i in prange(source.size):
        target[i] = source[i]


def copy_of(x: np.ndarray) -> Call:
    """Return a parallel copy of an array as a call."""
    source = x.reshape(-1).view(f"u{x.itemsize}")
    return partial(parallel_copy, source, np.zeros_like(source))


def interleaved(*calls: Call) -> np.ndarray:
    """Seconds per call, shape (rounds, calls): in every round, each takes its turn for a burst of calls."""
    repeats = [max(1, round(BURST / min(burst(call, 1) for _ in range(3)))) for call in calls]
    return np.array([[burst(call, n) for call, n in zip(calls, repeats, strict=True)] for _ in range(ROUNDS)])


def burst(call: Call, n: int) -> float:
    """Seconds per call over n calls in a row, behind one that wakes the threads and brings its arrays near."""
    call()
    start = perf_counter()
    for _ in range(n):
        call()
    return (perf_counter() - start) / n


def best(*calls: Call) -> list[float]:
    """Seconds per call, the best of interleaved rounds.

    Where another process holds a core, a team of threads waits out its time slice of milliseconds at every
    launch; a median then counts launches instead of bytes.
    """
    return interleaved(*calls).min(axis=0).tolist()


def measure(operation: str, case: Case) -> tuple[float, float]:
    """Return the time of an operation in seconds and in copies of its x."""
    call, b = prepare(operation, case)
    seconds, copy = best(call, copy_of(b.x))
    return seconds, seconds / copy


class Measured(ABC):
    """Numbers that ``setup_cache`` takes in one process; asv starts one per case, and each would compile.

    asv tells caches apart by the line of their function: each class needs one of its own, which returns `measured`.
    """

    timeout = 1200

    @abstractmethod
    def measure(self, *case: Any) -> tuple[float, ...]:
        """Return the numbers of one case."""


class Timed(Measured):
    """Times in seconds and in copies."""

    def track_seconds(self, measured, *case):
        return measured[case][0]

    def track_copies(self, measured, *case):
        return measured[case][1]

    track_seconds.unit = "seconds"
    track_copies.unit = "copies"


def measured(benchmark: Measured) -> dict[tuple[Any, ...], tuple[float, ...]]:
    """Measure every combination of the parameters."""
    return {case: benchmark.measure(*case) for case in product(*benchmark.params)}


def show(*classes: type) -> None:
    """Print what classes of benchmarks measure: each file does so if it is run by hand."""
    for benchmark in (make() for make in classes):
        tracks = [name for name in dir(benchmark) if name.startswith("track_")]
        words = [name.removeprefix("track_").replace("_", " ") for name in tracks]
        print(
            f"\n{type(benchmark).__name__}: {type(benchmark).__doc__}\n{'':56}"
            + "".join(f"{w:>12}" for w in words)
        )
        numbers = benchmark.setup_cache()
        for case in product(*benchmark.params):
            values = "".join(f"{getattr(benchmark, name)(numbers, *case):12.4g}" for name in tracks)
            print(f"{', '.join(map(str, case)):56}{values}", flush=True)
