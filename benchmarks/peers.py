"""How fast is nbnorm beside other libraries, on the same arrays, in the same process, with the same threads?

python -m benchmarks.peers [--threads 2] [--norms batch layer] [--only "(32, 64, 56, 56)"] [--peers torch jax]
[--json FILE] prints for each case the time of a copy, that of nbnorm in copies, and how many times as fast as the
best peer it is, both at the best of interleaved rounds; then the geometric means, and the cases where the median
over the rounds is below 0.97. benchmarks/report.py draws what --json keeps.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import groupby
from statistics import geometric_mean

import numba

import nbnorm

with suppress(ImportError):  # asv reads every file of this folder, with versions that lack them
    from nbnorm import _bench, _peers

from benchmarks.common import BATCHES, Case, both_layouts, floor

ENOUGH = 0.97
OTHERS = [
    *(Case("layer", shape) for shape in [(2048, 768), (8192, 1024), (512, 4096), (128, 50257), (65536, 96)]),
    *(Case("rms", shape) for shape in [(2048, 4096), (16384, 512)]),
    *(Case("group", shape, num_groups=32) for shape in [(8, 128, 32, 32), (2, 320, 64, 64)]),
    *(Case("instance", shape) for shape in [(8, 64, 64, 64), (2, 32, 256, 256)]),
]
CASES = [*(case for shape in BATCHES.values() for case in both_layouts(shape)), *OTHERS]


def compare(case: Case, rounds: int, peers: _bench.Peers) -> Iterator[dict]:
    """Return the numbers of a case, forward and backward."""
    shape = (case.shape[0], *case.shape[2:], case.shape[1]) if case.channels_last else case.shape
    channel_axis = -1 if case.channels_last else 1
    arrays = _bench.make_batch(_bench.Case(f"{case.norm}_norm", shape, channel_axis, case.num_groups))
    for row in _bench.measure(arrays, rounds, peers):
        yield {
            "label": str(case),
            "norm": case.norm,
            **asdict(row),
            "floor": floor(row.direction, case),
            "best": min(row.peers, key=row.peers.get, default=None),
            "times": min(row.peers.values(), default=float("nan")) / row.seconds,
            "median": min(row.medians.values(), default=float("nan")),
        }


def show(rows: list[dict]) -> None:
    """Print a line for a case."""
    first = rows[0]
    cells = [f"{r['copies']:7.2f} {r['times']:6.2f}x {r['best'] or '-':8}" for r in rows]
    print(
        f"{first['label']:42}{first['seconds'] / first['copies'] * 1e3:9.3f} | {' | '.join(cells)}",
        flush=True,
    )


def summarize(rows: list[dict]) -> None:
    """Print geometric means, and where a peer is faster."""
    rows = sorted((row for row in rows if row["peers"]), key=lambda row: (row["norm"], row["direction"]))
    for (norm, direction), group in groupby(rows, key=lambda row: (row["norm"], row["direction"])):
        times = [row["times"] for row in group]
        print(
            f"{norm:9}{direction:9} geometric mean {geometric_mean(times):6.2f}x, lowest {min(times):5.2f}x"
        )
    for row in (row for row in rows if row["median"] < ENOUGH):
        print(
            f"below {ENOUGH}: {row['label']} {row['direction']}, median {row['median']:.2f}x, best {row['times']:.2f}x"
        )


def machine() -> dict:
    """Return `nbnorm.info` without what tells where it is installed and how the host is called."""
    facts = {**nbnorm.info(), "platform": f"{platform.system()} {platform.machine()}"}
    return {name: fact for name, fact in facts.items() if name != "cache"}


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    norms = sorted({case.norm for case in CASES})
    most = numba.config.NUMBA_NUM_THREADS
    parser.add_argument("--threads", type=int, default=most, help="threads of all libraries")
    parser.add_argument("--rounds", type=int, default=50, help="turns of each call")
    parser.add_argument("--norms", nargs="+", choices=norms, default=norms, metavar="NORM")
    parser.add_argument("--only", default="", help="the cases whose labels contain this")
    parser.add_argument(
        "--peers",
        nargs="*",
        default=[],
        choices=_peers.PEERS,
        metavar="NAME",
        help="default: those installed, but for compile",
    )
    parser.add_argument("--json", help="file for the numbers")
    options = parser.parse_args(argv)
    numba.set_num_threads(options.threads)
    peers = _peers.chosen(options.peers, options.threads)
    print(f"beside {', '.join(peers)}; {options.threads} thread(s)")
    print(f"{'':42}{'copy ms':>9} | forward: copies, x best peer | backward: copies, x best peer")
    rows = []
    for case in CASES:
        if case.norm in options.norms and options.only in str(case):
            rows += (found := list(compare(case, options.rounds, peers)))
            show(found)
    summarize(rows)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"info": machine(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
