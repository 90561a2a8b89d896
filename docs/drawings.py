"""Pictures of the pages, drawn by matplotlib when the pages are built: nothing to keep in step by hand."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

FOLDER = Path(__file__).parent / "_static"
SLOT_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#999999")
SAMPLES, CHANNELS, SPACE = 3, 4, 3


def norms() -> Figure:
    """Which elements of (N, C, S) share a mean and a variance, for every norm."""
    rules = {
        "batch norm": lambda n, c: c,
        "layer norm over (C, S)": lambda n, c: n,
        "group norm, 2 groups": lambda n, c: 2 * n + c // 2,
        "instance norm": lambda n, c: CHANNELS * n + c,
    }
    figure = Figure(figsize=(10, 1.75), layout="constrained")
    for axes, (name, slot) in zip(figure.subplots(1, len(rules)), rules.items(), strict=True):
        for n in range(SAMPLES):
            for c in range(CHANNELS):
                for s in range(SPACE):
                    number = slot(n, c)
                    color = SLOT_COLORS[number % len(SLOT_COLORS)]
                    alpha = 1.0 if number < len(SLOT_COLORS) else 0.45
                    place = (s + n * (SPACE + 0.8), CHANNELS - 1 - c)
                    axes.add_patch(Rectangle(place, 0.92, 0.92, color=color, alpha=alpha, linewidth=0))
        axes.set(
            xlim=(-0.2, SAMPLES * (SPACE + 0.8)), ylim=(-0.9, CHANNELS + 0.1), aspect="equal", title=name
        )
        for n in range(SAMPLES):
            axes.text(n * (SPACE + 0.8) + SPACE / 2, -0.7, f"sample {n}", ha="center", fontsize=8)
        axes.title.set_fontsize(12)
        axes.axis("off")
    return figure


def view() -> Figure:
    """Three arrays in memory order, and the canonical view that each one becomes."""
    cases = (
        (
            "batch norm, channels first\n(N, C, S) = (3, 4, 6)",
            "(1, outer=3, group=4, inner=6)   planes",
            3,
            4,
            6,
        ),
        (
            "batch norm, channels last\n(N, S, C) = (3, 2, 4)",
            "(1, outer=6, group=4, inner=1)   columns",
            6,
            4,
            1,
        ),
        ("layer norm\n(N, D) = (6, 8)", "(1, outer=1, group=6, inner=8)   rows", 1, 6, 8),
    )
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    for axes, (name, text, outer, group, inner) in zip(figure.subplots(3, 1), cases, strict=True):
        x = 0.0
        for _ in range(outer):
            for g in range(group):
                for _ in range(inner):
                    axes.add_patch(Rectangle((x, 0), 0.9, 1, color=SLOT_COLORS[g % 8], linewidth=0))
                    x += 1
                x += 0.25 if inner > 1 else 0.0
            axes.plot([x - 0.1] * 2, [-0.25, 1.25], color="0.5", linewidth=0.8)
            x += 0.4
        axes.text(0, 1.5, name.replace("\n", "   "), fontsize=12, fontweight="bold", va="bottom")
        axes.text(0, -0.45, f"view {text}", fontsize=11, family="monospace", va="top")
        axes.set(xlim=(-0.5, 88), ylim=(-2.2, 3.2))
        axes.axis("off")
    return figure


def draw(app: object) -> None:
    """Write all pictures before the pages are read."""
    for name, make in {"norms": norms, "view": view}.items():
        make().savefig(FOLDER / f"{name}.svg")


def setup(app) -> dict[str, bool]:
    """Hook into Sphinx."""
    app.connect("builder-inited", draw)
    return {"parallel_read_safe": True}
