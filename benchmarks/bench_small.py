"""What does a call of each norm cost beside its work? Arrays of 2048 elements, the pages of `out` given.

python -m benchmarks.bench_small prints the microseconds.
"""

from __future__ import annotations

from benchmarks.common import TRAINING, Case, best, prepare

CASES = {
    "batch": Case("batch", (32, 64)),
    "batch, planes": Case("batch", (4, 8, 8, 8)),
    "layer": Case("layer", (32, 64)),
    "rms": Case("rms", (32, 64)),
    "group": Case("group", (4, 8, 8, 8), num_groups=4),
    "instance": Case("instance", (4, 8, 8, 8)),
}


class Calls:
    """Microseconds; without ``setup``, see `bench_batch_norm.Small`."""

    timeout = 600
    number = 1000
    params = (TRAINING, list(CASES))
    param_names = ("operation", "norm")

    def time_call(self, operation, norm):
        prepare(operation, CASES[norm])[0]()


def main() -> None:
    """Print a line for each norm."""
    print(f"{'':16}" + "".join(f"{operation:>14}" for operation in TRAINING))
    for norm, case in CASES.items():
        seconds = [best(prepare(operation, case)[0])[0] for operation in TRAINING]
        print(f"{norm:16}" + "".join(f"{s * 1e6:11.1f} us" for s in seconds), flush=True)


if __name__ == "__main__":
    main()
