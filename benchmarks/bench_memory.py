"""How much memory does a call take beside its results?

python -m benchmarks.bench_memory prints the peaks, in arrays of the size of x.
"""

from __future__ import annotations

import tracemalloc

import numpy as np

import nbnorm
from benchmarks.common import STAGE, Case, Measured, batch, forward, measured, show

CASES = {
    "batch, channels first": STAGE,
    "batch, channels last": STAGE._replace(channels_last=True),
    "layer": Case("layer", (8192, 768)),
    "rms": Case("rms", (8192, 768)),
    "group": STAGE._replace(norm="group", num_groups=32),
    "instance": STAGE._replace(norm="instance"),
}


def pair(case: Case, given: bool):
    """Return a function that runs forward and backward, into given arrays or new ones."""
    b = batch(case)
    backward = getattr(nbnorm, f"{case.norm}_norm_backward")
    into_y, into_dx = {}, {}
    if given:
        into_y, into_dx = {"out": b.out}, {"out": (np.zeros_like(b.x), *map(np.zeros_like, b.parameters))}

    def call():
        y, saved = forward(b)(**into_y)
        return y, backward(b.dy, saved, **into_dx)

    return call


class Traced(Measured):
    """What NumPy allocates: nothing where the arrays are given, y and dx where they are not."""

    params = (list(CASES), ["given", "new"])
    param_names = ("norm", "results")

    def measure(self, name, results):
        call = pair(CASES[name], results == "given")
        call()
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return (peak / batch(CASES[name]).x.nbytes,)

    def setup_cache(self):
        return measured(self)

    def track_peak(self, measured, *case):
        return measured[case][0]

    track_peak.unit = "arrays like x"


class Process:
    """The most memory of a process, that of kernels included: some 100 MB of arrays beside Numba's own."""

    timeout = 600
    params = (list(CASES),)
    param_names = ("norm",)

    def setup(self, name):
        self.call = pair(CASES[name], given=False)

    def peakmem_pair(self, name):
        self.call()


if __name__ == "__main__":
    show(Traced)
