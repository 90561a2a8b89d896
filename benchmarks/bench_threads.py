"""How much faster do more threads make a call, and a copy?

python -m benchmarks.bench_threads prints seconds and efficiency: the time of one thread over that of all together.
"""

from __future__ import annotations

import numba

from benchmarks.common import STAGE, TRAINING, Call, Case, Measured, best, copy_of, measured, prepare, show

MOST = numba.config.NUMBA_NUM_THREADS
COUNTS = sorted({*(2**i for i in range(MOST.bit_length())), MOST})
CASES = {
    "batch, channels first": STAGE,
    "batch, channels last": STAGE._replace(channels_last=True),
    "layer": Case("layer", (8192, 768)),
    "group": Case("group", (8, 128, 32, 32), num_groups=32),
}


def with_threads(threads: int, call: Call) -> Call:
    """Return a call that sets its number of threads first."""

    def alone():
        numba.set_num_threads(threads)
        call()

    return alone


class Threads(Measured):
    """Batch and layer norm of 26 MB, group norm of 4 MB, and copies of the same arrays."""

    params = (["copy", *TRAINING], list(CASES), COUNTS)
    param_names = ("operation", "case", "threads")

    def measure(self, operation, name, threads):
        call, b = prepare("forward" if operation == "copy" else operation, CASES[name])
        call = copy_of(b.x) if operation == "copy" else call
        one, many = best(with_threads(1, call), with_threads(threads, call))
        numba.set_num_threads(MOST)
        return many, one / (threads * many)

    def setup_cache(self):
        return measured(self)

    def track_seconds(self, measured, *case):
        return measured[case][0]

    def track_efficiency(self, measured, *case):
        return measured[case][1]

    track_seconds.unit = "seconds"
    track_efficiency.unit = "of one thread's work, for each"


if __name__ == "__main__":
    show(Threads)
