"""How far is batch norm from the speed of memory, and do the thresholds of its plan sit where they should?

python -m benchmarks.bench_batch_norm prints one table of all cases.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import product

import numpy as np

import nbnorm

from .common import PASSES, SHAPES, Batch, batch, floor_bytes, seconds_and_copies

CASES = {
    name if len(shape) == 2 else f"{name}, channels {'last' if last else 'first'}": (shape, last)
    for name, shape in SHAPES.items()
    for last in ((False,) if len(shape) == 2 else (False, True))
}
TRAINING = ["forward", "backward"]
EPS = 1e-5


@lru_cache(maxsize=1)
def prepare(
    operation: str, shape: tuple[int, ...], channels_last: bool = False
) -> tuple[Callable[[], object], Batch]:
    """Return the call that is timed, compiled and its result checked, and the arrays that it works on."""
    b = batch(shape, channels_last)
    options = {"eps": EPS, "channel_axis": b.channel_axis, "out": b.out}
    call = partial(nbnorm.batch_norm_forward, b.x, b.weight, b.bias, **options)
    if operation == "backward":
        call = partial(nbnorm.batch_norm_backward, b.dy, call()[1], out=(b.out, None, None))
    elif operation == "inference":
        mean, var, _ = statistics(b)
        call = partial(
            nbnorm.batch_norm_inference, b.x, mean.ravel(), var.ravel(), b.weight, b.bias, **options
        )
    b.out.fill(np.nan)
    call()
    check(operation, b)
    return call, b


def statistics(b: Batch) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Mean and variance in float64, ready to broadcast, and the axes that they are taken over."""
    axes = tuple(axis for axis in range(b.x.ndim) if axis != b.channel_axis % b.x.ndim)
    x = b.x.astype(np.float64)
    return x.mean(axes, keepdims=True), x.var(axes, keepdims=True), axes


def check(operation: str, b: Batch) -> None:
    """Compare y or dx with its formula in plain float64 NumPy."""
    mean, var, axes = statistics(b)
    weight, bias = (np.expand_dims(values.astype(np.float64), axes) for values in (b.weight, b.bias))
    rstd = 1 / np.sqrt(var + EPS)
    x_hat = (b.x - mean) * rstd
    if operation == "backward":
        g = b.dy * weight
        expected = rstd * (g - g.mean(axes, keepdims=True) - x_hat * (g * x_hat).mean(axes, keepdims=True))
    else:
        expected = x_hat * weight + bias
    roundings = 16 if operation == "backward" else 4
    tolerance = roundings * np.finfo(np.float32).eps * max(1, np.abs(expected).max())
    np.testing.assert_allclose(b.out, expected, rtol=0, atol=tolerance)


def measure(operation: str, shape: tuple[int, ...], channels_last: bool = False) -> tuple[float, float]:
    """Return the time of an operation in seconds and in copies."""
    call, b = prepare(operation, shape, channels_last)
    return seconds_and_copies(call, b.x)


class _Measured:
    """Times that ``setup_cache`` took in one process; asv starts one per case, and each would compile."""

    timeout = 600

    def track_seconds(self, measured, *case):
        return measured[case][0]

    def track_copies(self, measured, *case):
        return measured[case][1]

    track_seconds.unit = "seconds"
    track_copies.unit = "copies"


class _Cases(_Measured):
    params = tuple(CASES)
    param_names = ("case",)

    def time_call(self, measured, case):
        prepare(self.operation, *CASES[case])[0]()

    # For the statistics of asv, which tell whether a change is significant.
    time_call.params = ("resnet stage 1, channels first", "resnet stage 1, channels last", "tabular")


class Forward(_Cases):
    """Training, with weight and bias, into a given buffer."""

    operation = "forward"

    def setup_cache(self):
        return {(name,): measure("forward", *case) for name, case in CASES.items()}


class Backward(_Cases):
    """All three gradients, dx into a given buffer."""

    operation = "backward"

    def setup_cache(self):
        return {(name,): measure("backward", *case) for name, case in CASES.items()}


class Inference(_Cases):
    """Given statistics, into a given buffer."""

    operation = "inference"

    def setup_cache(self):
        return {(name,): measure("inference", *case) for name, case in CASES.items()}


class ShortSegments(_Measured):
    """Up to which length are channels-first segments better walked as columns? Tensors of 4.8 MB."""

    params = (TRAINING, [9, 25, 49, 64, 81, 100, 144, 196])
    param_names = ("operation", "segment")

    def setup_cache(self):
        return {(op, n): measure(op, (32, 37500 // n, n)) for op, n in product(*self.params)}


class Columns(_Measured):
    """Up to which width is folding rows worth it? Tensors of 4.8 MB."""

    params = (TRAINING, [3, 16, 64, 96, 192, 384, 768, 1536, 3072])
    param_names = ("operation", "width")

    def setup_cache(self):
        return {(op, n): measure(op, (1_200_000 // n, n)) for op, n in product(*self.params)}


class Small:
    """What does a call cost beside its work, and from which size on does a team of threads pay?

    NBNORM_PARALLEL=0 shows the other side. There is no ``setup``: asv would run it between any two calls and
    take the time of each alone, which is not how microseconds are measured.
    """

    timeout = 600
    number = 1000
    params = (TRAINING, [2048, 16384, 32768, 65536])
    param_names = ("operation", "size")

    def time_call(self, operation, size):
        prepare(operation, (32, size // 32))[0]()  # the look-up takes 0.2 us


def main() -> None:
    """Print time, speed and copies of every case."""
    print(f"{'':53}{'best':>10}{'floor bytes':>14}{'copies':>8}{'floor':>7}")
    for operation, (name, case) in product(PASSES, CASES.items()):
        seconds, ratio = measure(operation, *case)
        b = batch(*case)
        floor = floor_bytes(operation, b)
        print(
            f"{operation:11}{name:42}{seconds * 1e6:7.0f} us{floor / seconds / 1e9:9.1f} GB/s"
            f"{ratio:8.2f}{floor / (2 * b.x.nbytes):7.1f}"
        )


if __name__ == "__main__":
    main()
