"""How far is batch norm from the speed of memory, and do the thresholds of its plan sit where they should?

python -m benchmarks.bench_batch_norm prints one table of all cases.
"""

from __future__ import annotations

from itertools import product
from math import prod

from benchmarks.common import (
    BATCHES,
    PASSES,
    TRAINING,
    Case,
    Timed,
    both_layouts,
    floor,
    measure,
    measured,
    prepare,
)

CASES = {
    name if len(shape) == 2 else f"{name}, channels {'last' if case.channels_last else 'first'}": case
    for name, shape in BATCHES.items()
    for case in both_layouts(shape)
}


class _Cases(Timed):
    params = (list(CASES),)
    param_names = ("case",)

    def measure(self, name):
        return measure(self.operation, CASES[name])

    def time_call(self, measured, name):
        prepare(self.operation, CASES[name])[0]()

    # For the statistics of asv, which tell whether a change is significant.
    time_call.params = (["resnet stage 1, channels first", "resnet stage 1, channels last", "tabular"],)


class Forward(_Cases):
    """Training, with weight and bias, into a given buffer."""

    operation = "forward"

    def setup_cache(self):
        return measured(self)


class Backward(_Cases):
    """All three gradients, dx into a given buffer."""

    operation = "backward"

    def setup_cache(self):
        return measured(self)


class Inference(_Cases):
    """Given statistics, into a given buffer."""

    operation = "inference"

    def setup_cache(self):
        return measured(self)


class ShortSegments(Timed):
    """Up to which length are channels-first segments better walked as columns? Tensors of 4.8 MB."""

    params = (TRAINING, [9, 25, 49, 64, 81, 100, 144, 196])
    param_names = ("operation", "segment")

    def measure(self, operation, segment):
        return measure(operation, Case("batch", (32, 37500 // segment, segment)))

    def setup_cache(self):
        return measured(self)


class Columns(Timed):
    """Up to which width is folding rows worth it? Tensors of 4.8 MB."""

    params = (TRAINING, [3, 16, 64, 96, 192, 384, 768, 1536, 3072])
    param_names = ("operation", "width")

    def measure(self, operation, width):
        return measure(operation, Case("batch", (1_200_000 // width, width)))

    def setup_cache(self):
        return measured(self)


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
        prepare(operation, Case("batch", (32, size // 32)))[0]()  # the look-up takes a microsecond


def main() -> None:
    """Print time, speed and copies of every case."""
    print(f"{'':53}{'best':>10}{'floor bytes':>14}{'copies':>8}{'floor':>7}")
    for operation, (name, case) in product(PASSES, CASES.items()):
        seconds, ratio = measure(operation, case)
        least = floor(operation, case)
        speed = least * 2 * 4 * prod(case.shape) / seconds / 1e9
        print(f"{operation:11}{name:42}{seconds * 1e6:7.0f} us{speed:9.1f} GB/s{ratio:8.2f}{least:7.1f}")


if __name__ == "__main__":
    main()
