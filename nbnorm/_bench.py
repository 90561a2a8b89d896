"""The quick table of ``nbnorm bench``, which tells how far each norm is from the speed of memory here.

Normalization moves memory, so the unit is the *copy*: the time of a call over the time of a parallel copy of the
same tensor. Every result is compared with plain float64 NumPy before the first timing; the calls then take
turns, in bursts, and the best burst of each counts.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from nbnorm._catalogue import NORMS
from nbnorm._cpu.launch import PARALLEL_MIN

EPS = 1e-5
BURST = 2e-4  # seconds: many calls of microseconds, yet short enough for some bursts to go undisturbed
SMALL = PARALLEL_MIN  # elements
ROUNDS = {True: 10, False: 50}  # quick or not

Call = Callable[[], Any]
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
    """The best time of a call, in copies too, and how many times as long PyTorch takes (None: not asked)."""

    case: Case
    direction: str
    seconds: float
    copies: float
    torch: float | None


@dataclass(frozen=True, eq=False)
class Batch:
    """Random arguments of a case, in float32."""

    case: Case
    x: Array
    dy: Array
    parameters: tuple[Array, ...]


def rows(quick: bool, peers: bool, progress: Callable[[str], object]) -> Iterator[Row]:
    """Check and measure case by case."""
    for case in CASES:
        case = case.smaller() if quick else case
        progress(f"{case.label()} {case.shape}")
        yield from measure(make_batch(case), ROUNDS[quick], peers and has_torch())


def has_torch() -> bool:
    """Whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def make_batch(case: Case) -> Batch:
    """Draw the arguments; the means are not 0 and the weights not 1, or a wrong formula could pass."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(case.shape, np.float32) * np.float32(2) + np.float32(1)
    norm = NORMS[case.norm]
    parameters = [rng.uniform(0.5, 2, p.shape).astype(p.dtype) for p in norm.parameters(x, case.channel_axis)]
    return Batch(case, x, rng.standard_normal(case.shape, np.float32), tuple(parameters))


def measure(batch: Batch, rounds: int, peers: bool) -> list[Row]:
    """Return the rows of one case, forward and backward."""
    calls = our_calls(batch)
    expected = reference(batch)
    check("nbnorm", calls, expected)
    source, target = batch.x.reshape(-1), np.zeros(batch.x.size, batch.x.dtype)
    everything = {"copy": lambda: parallel_copy(source, target), **calls}
    if peers:
        others = torch_calls(batch)
        check("PyTorch", others, expected)
        everything |= {f"torch {name}": call for name, call in others.items()}
    seconds = dict(zip(everything, best(list(everything.values()), rounds), strict=True))
    found = []
    for name in calls:
        torch = seconds[f"torch {name}"] / seconds[name] if peers else None
        found.append(Row(batch.case, name, seconds[name], seconds[name] / seconds["copy"], torch))
    return found


def our_calls(batch: Batch) -> dict[str, Call]:
    """Forward into a given y and backward into given gradients."""
    case, norm = batch.case, NORMS[batch.case.norm]
    options: dict[str, Any] = {"channel_axis": case.channel_axis, "num_groups": case.num_groups, "eps": EPS}
    y, saved = norm.forward(batch.x, *batch.parameters, **options)
    gradients = norm.backward_call(batch.dy, saved)
    return {
        "forward": lambda: norm.forward(batch.x, *batch.parameters, **options, out=y)[0],
        "backward": lambda: norm.backward_call(batch.dy, saved, out=gradients)[0],
    }


def torch_calls(batch: Batch) -> dict[str, Call]:
    """PyTorch on the same memory: its function without a graph, and its backward on a graph that is kept."""
    torch = importlib.import_module("torch")
    functional, case = torch.nn.functional, batch.case
    x = torch.from_numpy(batch.x)
    x = x.movedim(-1, 1) if case.channel_axis == -1 and case.norm == "batch_norm" else x
    dy = torch.from_numpy(batch.dy)
    dy = dy.movedim(-1, 1) if x.shape != dy.shape else dy
    parameters = [torch.from_numpy(values) for values in batch.parameters]
    last = (batch.x.shape[-1],)
    calls: dict[str, Callable[..., Any]] = {
        "batch_norm": lambda x, *wb: functional.batch_norm(x, None, None, *wb, training=True, eps=EPS),
        "layer_norm": lambda x, *wb: functional.layer_norm(x, last, *wb, eps=EPS),
        "rms_norm": lambda x, w: functional.rms_norm(x, last, w, eps=EPS),
        "group_norm": lambda x, *wb: functional.group_norm(x, case.num_groups, *wb, eps=EPS),
        "instance_norm": lambda x, w, b: functional.instance_norm(x, weight=w, bias=b, eps=EPS),
    }
    call = calls[case.norm]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, *parameters)]
    y = call(*leaves)

    def forward() -> Any:
        with torch.no_grad():
            return call(x, *parameters)

    return {"forward": forward, "backward": lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)[0]}


def reference(batch: Batch) -> dict[str, Array]:
    """Y and dx in float64, by axes."""
    case, norm = batch.case, NORMS[batch.case.norm]
    channels = case.channel_axis % batch.x.ndim if norm.by_channel else batch.x.ndim - 1
    shape = list(batch.x.shape)
    axes = tuple(range(1, len(shape)))
    if case.norm == "batch_norm":
        axes = tuple(axis for axis in range(len(shape)) if axis != channels)
    elif norm.by_channel:  # groups of channels get an axis of their own; a group per channel is instance norm
        groups = case.num_groups if norm.with_groups else shape[channels]
        shape[channels : channels + 1] = [groups, shape[channels] // groups]
        axes = tuple(axis for axis in range(1, len(shape)) if axis != channels)
    else:
        axes = (channels,)
    x, dy = (values.astype(np.float64).reshape(shape) for values in (batch.x, batch.dy))
    ndim = batch.x.ndim
    along = [-1 if axis == channels else 1 for axis in range(ndim)]
    weight, *bias = (
        np.broadcast_to(p.astype(np.float64).reshape(along), batch.x.shape).reshape(shape)
        for p in batch.parameters
    )
    centered = case.norm != "rms_norm"
    deviation = x - x.mean(axes, keepdims=True) if centered else x
    rstd = 1 / np.sqrt((deviation**2).mean(axes, keepdims=True) + EPS)
    x_hat, g = deviation * rstd, dy * weight
    dx = g - x_hat * (g * x_hat).mean(axes, keepdims=True)
    if centered:
        dx -= g.mean(axes, keepdims=True)
    y = x_hat * weight + (bias[0] if bias else 0)
    return {name: value.reshape(batch.x.shape) for name, value in (("forward", y), ("backward", dx * rstd))}


def check(who: str, calls: dict[str, Call], expected: dict[str, Array]) -> None:
    """Stop if a result is wrong: a fast wrong number is worth nothing."""
    for name, call in calls.items():
        found = np.asarray(call())
        right = expected[name]
        if found.shape != right.shape:  # PyTorch's channels come first
            found = np.moveaxis(found, 1, -1)
        bound = 64 * np.finfo(np.float32).eps * max(1.0, float(np.abs(right).max()))
        error = float(np.abs(found - right).max())
        if not error <= bound:
            raise ArithmeticError(f"{who}, {name}: off by {error:.2e}, allowed are {bound:.2e}")


@njit(parallel=True)
def parallel_copy(source, target):  # type: ignore[no-untyped-def]
    """Copy with the threads that the kernels use: both pay the same launch and share one bandwidth."""
    for i in prange(source.size):
        target[i] = source[i]


def best(calls: list[Call], rounds: int) -> list[float]:
    """Seconds per call, the best of some rounds; in every round, each takes its turn for a burst of calls."""
    repeats = [max(1, round(BURST / min(burst(call, 1) for _ in range(3)))) for call in calls]
    times = [[burst(call, n) for call, n in zip(calls, repeats, strict=True)] for _ in range(rounds)]
    return [min(column) for column in zip(*times, strict=True)]


def burst(call: Call, n: int) -> float:
    """Seconds per call over n calls in a row."""
    start = perf_counter()
    for _ in range(n):
        call()
    return (perf_counter() - start) / n


def set_torch_threads(threads: int) -> None:
    """Give PyTorch as many threads as Numba has."""
    importlib.import_module("torch").set_num_threads(threads)
