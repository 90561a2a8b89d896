"""What share of a training step does normalization take, and what does fusing save?
=================================================================================

Normalization computes next to nothing and moves everything: it reads and writes the whole activation,
forward and backward. So its share of a step depends on what stands beside it. Here are three networks, each
with every kind of layer timed on its own: a small dense network (32 images, 128 features), a wide one (512
images, 1024 features) and a convolutional one (32 images, 16 channels of 16 x 16).

Each is measured with a relu of its own behind batch norm, and with ``activation="relu"``, which does both
in one pass. Everything has one thread.

**What to look at.** In the small network half of the step goes into batch norm: that is the price of calls,
some tens of microseconds each, which hardly depends on the size. In the others it is a few per cent, for
matrix products in plain NumPy take long. Fusing saves the relu a pass forward and a pass backward; of a
small network that is nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from time import perf_counter

import numba
import numpy as np

import nbnorm
from networks import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    SGD,
    Conv,
    Dense,
    MeanPool,
    ReLU,
    cross_entropy,
    panels,
    parse,
    save,
)

NETWORKS = {"small dense": (32, 128), "wide dense": (512, 1024), "convolutional": (32, 16)}
PARTS = {
    "products and the rest": GRAY,
    "batch norm": BLUE,
    "relu": ORANGE,
    "batch norm + relu": GREEN,
    "optimizer": PURPLE,
}


def make_layers(name: str, fused: bool, rng: np.random.Generator) -> list[tuple[str, object]]:
    """Three hidden layers, each with the name of the part that its time counts for."""
    width = NETWORKS[name][1]
    layers, channels = [], 3 if name == "convolutional" else width
    for _ in range(3):
        product = Conv(channels, width, rng) if name == "convolutional" else Dense(channels, width, rng)
        layers.append(("products and the rest", product))
        if fused:
            layers.append(("batch norm + relu", nbnorm.BatchNorm(width, activation="relu")))
        else:
            layers += [("batch norm", nbnorm.BatchNorm(width)), ("relu", ReLU())]
        channels = width
    if name == "convolutional":
        layers.append(("products and the rest", MeanPool()))
    return [*layers, ("products and the rest", Dense(width, 10, rng))]


def measure(name: str, fused: bool, repeats: int) -> dict[str, float]:
    """Milliseconds of every part, from the fastest of several steps."""
    rng = np.random.default_rng(0)
    samples, width = NETWORKS[name]
    shape = (samples, 3, 16, 16) if name == "convolutional" else (samples, width)
    x, labels = rng.standard_normal(shape, np.float32), rng.integers(0, 10, samples)
    layers = make_layers(name, fused, rng)
    sgd, best = SGD([layer for _, layer in layers]), None
    for _ in range(repeats + 1):  # the first one compiles
        parts, value = defaultdict(float), x
        for part, layer in layers:
            start = perf_counter()
            value = layer(value)
            parts[part] += 1e3 * (perf_counter() - start)
        gradient = cross_entropy(value, labels)[1]
        for part, layer in reversed(layers):
            start = perf_counter()
            gradient = layer.backward(gradient)
            parts[part] += 1e3 * (perf_counter() - start)
        start = perf_counter()
        sgd.step(0.01)
        parts["optimizer"] += 1e3 * (perf_counter() - start)
        best = parts if best is None else {part: min(best[part], parts[part]) for part in parts}
    return best


def main(argv: Sequence[str] | None = None) -> dict[tuple[str, bool], dict[str, float]]:
    """Measure every network, separate and fused."""
    options = parse(__doc__, argv, "step_share", repeats=30)
    threads = numba.get_num_threads()
    numba.set_num_threads(1)  # as few as the matrix products have, see networks.py
    results = {
        (name, fused): measure(name, fused, options.repeats) for name in NETWORKS for fused in (False, True)
    }
    numba.set_num_threads(threads)

    for (name, fused), parts in results.items():
        total = sum(parts.values())
        shares = ", ".join(f"{part} {value / total:.0%}" for part, value in parts.items())
        print(f"{name:14} {'fused' if fused else 'separate':9} {total:8.2f} ms: {shares}")
    for name in NETWORKS:
        before = results[name, False]["batch norm"] + results[name, False]["relu"]
        after = results[name, True]["batch norm + relu"]
        print(f"{name:14} fusing takes {before:.2f} ms to {after:.2f} ms ({1 - after / before:+.0%} saved)")

    figure, axes = panels("Where the time of a training step goes", len(NETWORKS), width=3.6, height=3.2)
    for panel, name in zip(axes, NETWORKS, strict=True):
        for i, fused in enumerate((False, True)):
            left = 0.0
            for part, color in PARTS.items():
                value = results[name, fused].get(part, 0.0)
                panel.barh(-i, value, left=left, color=color, label=part)
                left += value
        panel.set_yticks([0, -1], ["separate", "fused"])
        panel.set(title=name, xlabel="ms")
        panel.grid(visible=False, axis="y")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles[: len(PARTS)],
        labels[: len(PARTS)],
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=8,
    )
    save(figure, options.output)
    return results


if __name__ == "__main__":
    main()
