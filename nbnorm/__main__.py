"""The command line: ``nbnorm info``, ``nbnorm warmup``, ``nbnorm bench``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from math import prod

import numba

from nbnorm import _bench, _catalogue, _peers, _tables, tools

DESCRIPTION = """\
Normalization of NumPy arrays, forward and backward.

  nbnorm info      what runs here: versions, processor, threads
  nbnorm warmup    compile the kernels, and see how long that takes
  nbnorm bench     how fast is it on this machine?

`python -m nbnorm` is the same. Tables are drawn by rich if it is installed (pip install "nbnorm[cli]").
Exit status: 0 if all went well, 1 if something failed, 2 for wrong arguments, 130 after Ctrl-C.
"""
WARMUP = """\
Compile the kernels of some norms and show the seconds that each step took.

Numba compiles a kernel at its first use, for every type of array; the code is kept on disk for the
programs that come after (nbnorm info shows the folder). nbnorm.warmup(...) does the same in a program of your own.

  nbnorm warmup                                       batch norm, float32
  nbnorm warmup --norms layer_norm rms_norm --dtypes float32 float64
  nbnorm warmup --layouts channels_first
"""
BENCH = """\
Measure every norm beside a copy of the same array, and with --peers beside other libraries.

Normalization moves memory, so a copy is the yardstick: forward reads x and writes y, as a copy does, and
needs 1 copy at the least (1.5 where x does not stay in the cache); backward needs 1.5 (2.5). Each result is
checked against plain float64 NumPy first. Keep the machine quiet: the best of many rounds counts.

  nbnorm bench --quick                  a first look: small arrays, few rounds
  nbnorm bench --peers --threads 2      how many times as fast as what is installed of NumPy, PyTorch, oneDNN and JAX
  nbnorm bench --peers torch compile    as PyTorch and its compiler
  nbnorm bench --json > bench.json      for scripts
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    options = _parser().parse_args(argv)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        return 130
    except (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"nbnorm {options.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="nbnorm", description=DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"nbnorm {tools.version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    info = commands.add_parser("info", help="what runs here", description="Show what nbnorm runs on.")
    info.set_defaults(run=_info)

    warmup = commands.add_parser("warmup", help="compile", description=WARMUP, formatter_class=raw)
    warmup.add_argument(
        "--norms", nargs="+", default=["batch_norm"], choices=_catalogue.NORMS, metavar="NORM"
    )
    types = ["float16", "bfloat16", "float32", "float64"]
    warmup.add_argument("--dtypes", nargs="+", default=["float32"], choices=types, metavar="DTYPE")
    layouts = _catalogue.LAYOUTS
    warmup.add_argument("--layouts", nargs="+", default=list(layouts), choices=layouts, metavar="LAYOUT")
    warmup.set_defaults(run=_warmup)

    bench = commands.add_parser("bench", help="measure", description=BENCH, formatter_class=raw)
    bench.add_argument("--quick", action="store_true", help="arrays of an eighth of the size, few rounds")
    bench.add_argument(
        "--peers",
        nargs="*",
        choices=_peers.PEERS,
        metavar="NAME",
        help=f"measure others, too: {', '.join(_peers.PEERS)} (no name: those installed, but for compile)",
    )
    bench.add_argument("--threads", type=_threads, metavar="N", help="threads of Numba (default: all)")
    bench.set_defaults(run=_run_bench)

    for command in (info, warmup, bench):
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _threads(text: str) -> int:
    """Parse a number of threads."""
    number, most = int(text), int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    if not 1 <= number <= most:
        raise argparse.ArgumentTypeError(f"must be from 1 to {most}, got {number}")
    return number


def _info(options: argparse.Namespace) -> int:
    facts = tools.info()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    rows = list(facts["versions"].items())
    for name, value in facts.items():
        if name != "versions":
            text = ", ".join(value) or "none" if isinstance(value, list) else value
            rows.append((name.replace("_", " "), text))
    _tables.columns(rows, "nbnorm runs on").show()
    return 0


def _warmup(options: argparse.Namespace) -> int:
    with _tables.progress(options.json) as progress:
        seconds = tools.warmup(
            options.norms,
            options.dtypes,
            layouts=options.layouts,
            progress=lambda step: progress(f"compiling {step}"),
        )
    if options.json:
        print(json.dumps(seconds, indent=2))
        return 0
    table = _tables.Table("First calls, with compilation", ("call", "seconds"))
    table.rows = [(step, f"{value:.2f}") for step, value in seconds.items()]
    table.rows.append(("all", f"{sum(seconds.values()):.2f}"))
    table.caption = f"cache: {tools.info()['cache']}."
    table.show()
    return 0


def _run_bench(options: argparse.Namespace) -> int:
    if options.threads:
        numba.set_num_threads(options.threads)
    threads = int(numba.get_num_threads())
    peers = {} if options.peers is None else _peers.chosen(options.peers, threads)
    with _tables.progress(options.json) as progress:
        rows = list(_bench.rows(options.quick, peers, progress))
    if options.json:
        print(json.dumps({"info": tools.info(), "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        _bench_table(rows, list(peers)).show()
    return 0


def _bench_table(rows: list[_bench.Row], peers: list[str]) -> _tables.Table:
    """Lay out the measurements."""
    facts = tools.info()
    processor = f"{facts['cpu']} ({facts['cpu_target']})"
    title = f"nbnorm {tools.version()}, float32, {facts['threads']} thread(s) of {processor}"
    headers = ("norm", "shape", "call", "time", "copies", *(f"x {name}" for name in peers))
    table = _tables.Table(title, headers, words=3)
    for row in rows:
        first = row.direction == "forward"
        cells = [row.case.label() if first else "", str(row.case.shape) if first else "", row.direction]
        # A copy of so little is all launch: a multiple of that says nothing.
        cells += [_time(row.seconds), f"{row.copies:.2f}" if prod(row.case.shape) >= _bench.SMALL else "-"]
        cells += [f"{row.peers[name] / row.seconds:.2f}" if name in row.peers else "-" for name in peers]
        table.rows.append(tuple(cells))
    table.caption = "copies: time of the call / time of a parallel copy of x; best of interleaved rounds."
    if peers:
        table.caption += f"\nx {peers[0]}: time of its fastest call / time of nbnorm's."
    return table


def _time(seconds: float) -> str:
    """Write a duration with its unit."""
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


if __name__ == "__main__":
    sys.exit(main())
