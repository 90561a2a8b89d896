"""Does time grow with the size alone, from a kilobyte to a gigabyte?

python -m benchmarks.bench_sizes prints seconds and copies. The largest array needs 7 GB of free memory, of which
it uses 5; where there are less, its numbers are NaN.
"""

from __future__ import annotations

from itertools import product
from math import nan
from pathlib import Path

from benchmarks.common import TRAINING, Case, Timed, measure, measured, show

CASES = {
    "batch, channels first": lambda n: Case("batch", (n // 1024, 16, 16)),
    "batch, channels last": lambda n: Case("batch", (n // 1024, 16, 16), channels_last=True),
    "layer": lambda n: Case("layer", (n // 1024, 256)),
}
SIZES = {
    f"{4**i:4} {unit}": 4**i << shift for (unit, shift), i in product([("KB", 10), ("MB", 20)], range(5))
}
SIZES["   1 GB"] = 1 << 30


def free_memory() -> int:
    """Return the bytes that may be had without swapping; without Linux, none."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


class Sizes(Timed):
    """Bytes of x."""

    params = (TRAINING, list(CASES), list(SIZES))
    param_names = ("operation", "case", "size")

    def measure(self, operation, name, size):
        if 7 * SIZES[size] > free_memory():
            return nan, nan
        return measure(operation, CASES[name](SIZES[size]))

    def setup_cache(self):
        return measured(self)


if __name__ == "__main__":
    show(Sizes)
