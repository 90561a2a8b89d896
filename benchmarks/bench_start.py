"""How long does a new process wait: for the import, for the first call, for the first call of the next process?

python -m benchmarks.bench_start prints the seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from tempfile import TemporaryDirectory

from benchmarks.common import Measured, measured, show

IMPORT = "from time import perf_counter as now; start = now(); import {}; print(now() - start)"
CALL = """
from time import perf_counter as now
import numpy as np, nbnorm
x, weight = np.ones({shape}, np.float32), np.ones({size}, np.float32)
start = now()
y, saved = nbnorm.{norm}_norm_forward(x, weight)
nbnorm.{norm}_norm_backward(y, saved)
print(now() - start)
"""
# Fewer elements than a team of threads is woken for, and more.
CALLS = {
    "batch, small": CALL.format(norm="batch", shape=(32, 64), size=64),
    "batch": CALL.format(norm="batch", shape=(32, 16, 16, 16), size=16),
    "layer": CALL.format(norm="layer", shape=(512, 256), size=256),
}


def seconds(code: str, cache: str) -> float:
    """Run code in a new process, which keeps compiled kernels in a folder, and return what it prints."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


class Import(Measured):
    """The best of some processes; Numba's own import is most of nbnorm's."""

    params = (["numpy", "numba", "nbnorm"],)
    param_names = ("package",)
    processes = 5

    def measure(self, package):
        with TemporaryDirectory() as cache:
            return (min(seconds(IMPORT.format(package), cache) for _ in range(self.processes)),)

    def setup_cache(self):
        return measured(self)

    def track_seconds(self, measured, package):
        return measured[package,][0]

    track_seconds.unit = "seconds"


class FirstCall(Measured):
    """Forward and backward for the first time: in the first process, which compiles, and in the next."""

    params = (list(CALLS),)
    param_names = ("norm",)

    def measure(self, norm):
        with TemporaryDirectory() as cache:
            return seconds(CALLS[norm], cache), min(seconds(CALLS[norm], cache) for _ in range(3))

    def setup_cache(self):
        return measured(self)

    def track_compiling(self, measured, norm):
        return measured[norm,][0]

    def track_cached(self, measured, norm):
        return measured[norm,][1]

    track_compiling.unit = track_cached.unit = "seconds"


if __name__ == "__main__":
    show(Import, FirstCall)
