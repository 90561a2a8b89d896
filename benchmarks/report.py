"""Pictures and a table of what `python -m benchmarks.peers --json FILE` has measured.

python -m benchmarks.report FILE [--output FOLDER] [--rst] draws times.png (how many times as fast as the best peer)
and copies.png (time in copies, beside the floor) and prints the table, in Markdown or reStructuredText.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

DIRECTIONS = ("forward", "backward")
# Okabe and Ito's colors, safe for color-blind eyes.
COLORS = {"batch": "#0072b2", "layer": "#009e73", "rms": "#d55e00", "group": "#cc79a7", "instance": "#e69f00"}
FLOOR, GRID = "#222222", "0.9"


def table(rows: list[dict], rst: bool) -> str:
    """Lay out copies and times of every case."""
    lines = [("case", "forward: copies", "x best peer", "backward: copies", "x best peer")]
    for forward, backward in zip(rows[::2], rows[1::2], strict=True):
        cells = [
            (f"{row['copies']:.2f}", f"{row['times']:.2f} ({row['best']})" if row["best"] else "-")
            for row in (forward, backward)
        ]
        lines.append((forward["label"], *cells[0], *cells[1]))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    if rst:
        rule = " ".join("=" * width for width in widths)
        lines = [" ".join(line).rstrip() for line in text]
        return "\n".join([rule, lines[0], rule, *lines[1:], rule])
    ruled = [text[0], ["-" * width for width in widths], *text[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def panels(rows: list[dict], title: str, below: str):
    """Make a figure with a panel for each direction and a line for each case, the first one on top."""
    from matplotlib.figure import Figure

    labels = [row["label"] for row in rows[::2]]
    figure = Figure(figsize=(10, 1.4 + 0.24 * len(labels)), layout="constrained")
    figure.suptitle(title, fontsize=12.5, fontweight="bold")
    figure.supxlabel(below, fontsize=9)
    axes = figure.subplots(1, 2, sharey=True)
    for panel, direction in zip(axes, DIRECTIONS, strict=True):
        panel.set_title(direction, fontsize=11)
        panel.set_yticks(range(len(labels)), labels, fontsize=8)
        panel.set_ylim(len(labels) - 0.4, -0.6)
        panel.grid(axis="x", color=GRID)
        panel.set_axisbelow(True)
        panel.tick_params(axis="y", length=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
    return figure, axes


def bars(panel, rows: list[dict], widths: list[float], texts: list[str], left: float = 0) -> None:
    """Draw a bar for each case in the color of its norm, and a word behind it."""
    for i, (row, width, text) in enumerate(zip(rows, widths, texts, strict=True)):
        panel.barh(i, width - left, left=left, height=0.7, color=COLORS[row["norm"]])
        panel.annotate(
            text, (max(width, left), i), (4, 0), textcoords="offset points", va="center", fontsize=7
        )


def draw_times(rows: list[dict]):
    """How many times as fast as the best peer: bars from 1 on, to the left where the peer is faster."""
    from matplotlib.ticker import NullFormatter

    rows = [row for row in rows if row["best"]]
    figure, axes = panels(
        rows, "How many times as fast as the best peer is nbnorm?", "time of the best peer / time of nbnorm"
    )
    for panel, direction in zip(axes, DIRECTIONS, strict=True):
        own = [row for row in rows if row["direction"] == direction]
        bars(
            panel,
            own,
            [row["times"] for row in own],
            [f"{row['times']:.2f}  {row['best']}" for row in own],
            1,
        )
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        low, high = panel.get_xlim()
        panel.set_xlim(min(low, 0.7), high * 1.5)
        panel.axvline(1, color=FLOOR, linewidth=1)
    return figure


def draw_copies(rows: list[dict]):
    """Time in copies, with a mark at the floor."""
    figure, axes = panels(
        rows,
        "How far is nbnorm from the speed of memory?",
        "time of nbnorm / time of a copy; the mark: what must at least be read and written",
    )
    for panel, direction in zip(axes, DIRECTIONS, strict=True):
        own = [row for row in rows if row["direction"] == direction]
        bars(panel, own, [row["copies"] for row in own], [f"{row['copies']:.2f}" for row in own])
        for i, row in enumerate(own):
            panel.plot([row["floor"]] * 2, [i - 0.42, i + 0.42], color=FLOOR, linewidth=2)
        panel.margins(x=0.12)
    return figure


def main(argv: list[str] | None = None) -> None:
    """Draw and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the pictures")
    parser.add_argument("--rst", action="store_true", help="print reStructuredText instead of Markdown")
    options = parser.parse_args(argv)
    rows = json.loads(options.file.read_text())["rows"]
    options.output.mkdir(parents=True, exist_ok=True)
    for name, draw in (("times", draw_times), ("copies", draw_copies)):
        draw(rows).savefig(options.output / f"{name}.png", dpi=150, bbox_inches="tight", pad_inches=0.15)
    print(table(rows, options.rst))


if __name__ == "__main__":
    main()
