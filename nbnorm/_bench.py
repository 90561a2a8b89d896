"""The table of ``nbnorm bench``, which tells how far each norm is from the speed of memory here.

Normalization moves memory, so the unit is the *copy*: the time of a call over the time of a parallel copy of the
same tensor. Every result is compared with plain float64 NumPy before the first timing; the calls then take
turns, in bursts, and the best burst of each counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, sleep
from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from nbnorm._catalogue import NORMS
from nbnorm._cpu.launch import PARALLEL_MIN
from nbnorm._expressions import Expression, expression

EPS = 1e-5
DIRECTIONS = ("forward", "backward")
BURST = 2e-4  # seconds: many calls of microseconds, yet short enough for some bursts to go undisturbed
PAUSE = 2e-3  # seconds: a team of OpenMP spins for about a millisecond before it sleeps
LONGEST = 2.0  # seconds that a call may take in all its rounds but the first few
SMALL = PARALLEL_MIN  # elements
ROUNDS = {True: 10, False: 50}  # quick or not
FEWEST = 5  # rounds
ROUNDINGS = 64
PLAIN_ROUNDINGS = 1 << 14  # NumPy and PyTorch add up long columns in float32 as they come

Call = Callable[[], Any]
Calls = Mapping[
    str, Sequence[Call]
]  # by direction; several where a library has several ways, the fastest counts
Array = np.ndarray


class Case(NamedTuple):
    """A norm on an array of some shape."""

    norm: str
    shape: tuple[int, ...]
    channel_axis: int = 1
    num_groups: int = 1

    def label(self) -> str:
        """Name the case in a table."""
        return f"{self.norm.removesuffix('_norm')}{', channels last' if self.channel_axis == -1 else ''}"

    def smaller(self) -> Case:
        """Return the case with an eighth of the samples."""
        return self._replace(shape=(max(1, self.shape[0] // 8), *self.shape[1:]))

    def expression(self) -> Expression:
        """Return its formula."""
        return expression(self.norm, self.shape, self.channel_axis, self.num_groups, EPS)


CASES = (
    Case("batch_norm", (32, 64, 56, 56)),
    Case("batch_norm", (32, 56, 56, 64), channel_axis=-1),
    Case("batch_norm", (65536, 64)),
    Case("batch_norm", (256, 64)),
    Case("layer_norm", (8192, 1024)),
    Case("rms_norm", (8192, 1024)),
    Case("group_norm", (32, 64, 56, 56), num_groups=32),
    Case("instance_norm", (32, 64, 56, 56)),
)


@dataclass(frozen=True)
class Row:
    """The best time of a call, in copies too, and those of peers, with the median of their rounds over ours."""

    case: Case
    direction: str
    seconds: float
    copies: float
    peers: dict[str, float]
    medians: dict[str, float]


@dataclass(frozen=True, eq=False)
class Batch:
    """Random arguments of a case, in float32."""

    case: Case
    x: Array
    dy: Array
    parameters: tuple[Array, ...]


Peers = Mapping[str, Callable[[Batch], Calls]]


def rows(quick: bool, peers: Peers, progress: Callable[[str], object]) -> Iterator[Row]:
    """Check and measure case by case."""
    for case in CASES:
        case = case.smaller() if quick else case
        progress(f"{case.label()} {case.shape}")
        yield from measure(make_batch(case), ROUNDS[quick], peers)


def make_batch(case: Case) -> Batch:
    """Draw the arguments; the means are not 0 and the weights not 1, or a wrong formula could pass."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(case.shape, np.float32) * np.float32(2) + np.float32(1)
    norm = NORMS[case.norm]
    parameters = [rng.uniform(0.5, 2, p.shape).astype(p.dtype) for p in norm.parameters(x, case.channel_axis)]
    return Batch(case, x, rng.standard_normal(case.shape, np.float32), tuple(parameters))


def measure(batch: Batch, rounds: int, peers: Peers) -> list[Row]:
    """Return the rows of one case, forward and backward; a peer that lacks the case is left out of them."""
    calls: dict[str, Calls] = {"nbnorm": our_calls(batch)}
    calls |= {name: make(batch) for name, make in peers.items()}
    expected = reference(batch)
    for name, ways in calls.items():
        check(name, ways, expected, ROUNDINGS if name == "nbnorm" else PLAIN_ROUNDINGS)
    del expected
    source, target = batch.x.reshape(-1), np.zeros(batch.x.size, batch.x.dtype)
    calls["nbnorm"] = {"copy": [lambda: parallel_copy(source, target)], **calls["nbnorm"]}
    seconds = times(calls, rounds)
    copy = min(seconds["nbnorm", "copy"][0])
    found = []
    for direction in DIRECTIONS:
        (ours,) = seconds["nbnorm", direction]
        theirs = {name: seconds[name, direction] for name in peers if (name, direction) in seconds}
        found.append(
            Row(
                batch.case,
                direction,
                min(ours),
                min(ours) / copy,
                {name: min(map(min, ways)) for name, ways in theirs.items()},
                {name: min(_median_ratio(way, ours) for way in ways) for name, ways in theirs.items()},
            )
        )
    return found


def _median_ratio(others: list[float], ours: list[float]) -> float:
    """Return the median over rounds of how long another call took beside ours."""
    return float(np.median([theirs / own for theirs, own in zip(others, ours, strict=False)]))


def our_calls(batch: Batch) -> Calls:
    """Forward into a given y and backward into given gradients."""
    case, norm = batch.case, NORMS[batch.case.norm]
    options: dict[str, Any] = {"channel_axis": case.channel_axis, "num_groups": case.num_groups, "eps": EPS}
    y, saved = norm.forward(batch.x, *batch.parameters, **options)
    gradients = norm.backward_call(batch.dy, saved)
    return {
        "forward": [lambda: norm.forward(batch.x, *batch.parameters, **options, out=y)],
        "backward": [lambda: norm.backward_call(batch.dy, saved, out=gradients)],
    }


def reference(batch: Batch) -> dict[str, Array]:
    """Y and dx in float64."""
    formula = batch.case.expression()
    x, dy, weight, *bias = (a.astype(np.float64) for a in (batch.x, batch.dy, *batch.parameters))
    y, *statistics = formula.forward(x, weight, *bias)
    return {"forward": y, "backward": formula.backward(dy, x, weight, *statistics)[0]}


def check(who: str, calls: Calls, expected: dict[str, Array], roundings: int) -> None:
    """Stop if y or dx, the first result of a call, is wrong: a fast wrong number is worth nothing."""
    for direction, right in expected.items():
        bound = roundings * np.finfo(np.float32).eps * max(1.0, float(np.abs(right).max()))
        for call in calls.get(direction, ()):
            error = float(np.abs(_like(call()[0], right) - right).max())
            if not error <= bound:
                raise ArithmeticError(f"{who}, {direction}: off by {error:.2e}, allowed are {bound:.2e}")


def _like(found: Any, right: Array) -> Array:
    """Return an array of any library in NumPy's, with the shape that is right."""
    array = np.asarray(found.to_dense() if hasattr(found, "to_dense") else found)
    if array.shape != right.shape and array.shape[0] == right.shape[0]:  # PyTorch's channels come first
        array = np.moveaxis(array, 1, -1)
    return array.reshape(right.shape)


@njit(parallel=True)
def parallel_copy(source, target):  # type: ignore[no-untyped-def]
    """Copy with the threads that the kernels use: both pay the same launch and share one bandwidth."""
    for i in prange(source.size):
        target[i] = source[i]


def times(calls: Mapping[str, Calls], rounds: int) -> dict[tuple[str, str], list[list[float]]]:
    """Seconds per call in every round, for each way of each direction of each library.

    In every round, each call takes its turn for a burst, and between libraries there is a pause, in which the threads
    of the last one fall asleep. Who needs seconds has fewer rounds.
    """
    everything = {
        (who, direction): [(way, *_plan(way, rounds)) for way in ways]
        for who, directions in calls.items()
        for direction, ways in directions.items()
    }
    seconds: dict[tuple[str, str], list[list[float]]] = {
        key: [[] for _ in ways] for key, ways in everything.items()
    }
    for turn in range(rounds):
        last = None
        for (who, direction), ways in everything.items():
            for found, (call, repeats, turns) in zip(seconds[who, direction], ways, strict=True):
                if turn >= turns:
                    continue
                if who != last:
                    sleep(PAUSE)
                last = who
                found.append(burst(call, repeats))
    return seconds


def _plan(call: Call, rounds: int) -> tuple[int, int]:
    """Return how many calls make a burst, and in how many rounds."""
    once = min(burst(call, 1) for _ in range(3))
    return max(1, round(BURST / once)), min(rounds, max(FEWEST, round(LONGEST / once)))


def burst(call: Call, n: int) -> float:
    """Seconds per call over n calls in a row, behind one that wakes the threads and brings its arrays near."""
    call()
    start = perf_counter()
    for _ in range(n):
        call()
    return (perf_counter() - start) / n
