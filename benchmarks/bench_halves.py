"""How long do half types take beside float32, which is twice as many bytes?

python -m benchmarks.bench_halves prints the ratios.
"""

from __future__ import annotations

from benchmarks.common import STAGE, TRAINING, Case, Measured, best, measured, prepare, show

CASES = {
    "batch, channels first": STAGE,
    "batch, channels last": STAGE._replace(channels_last=True),
    "batch, rows": Case("batch", (100352, 64)),
    "layer": Case("layer", (8192, 1024)),
    "layer, past the caches": Case("layer", (32768, 1024)),
    "layer, short rows": Case("layer", (65536, 96)),
    "rms": Case("rms", (8192, 1024)),
    "group": STAGE._replace(norm="group", num_groups=8),
    "instance": STAGE._replace(norm="instance"),
}


class Halves(Measured):
    """Times in those of float32."""

    params = (TRAINING, list(CASES), ["float16", "bfloat16"])
    param_names = ("operation", "case", "dtype")

    def measure(self, operation, name, dtype):
        single, half = (prepare(operation, CASES[name]._replace(dtype=t))[0] for t in ("float32", dtype))
        seconds = best(single, half)
        return (seconds[1] / seconds[0],)

    def setup_cache(self):
        return measured(self)

    def track_ratio(self, measured, *case):
        return measured[case][0]

    track_ratio.unit = "times float32"


if __name__ == "__main__":
    show(Halves)
