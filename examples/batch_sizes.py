"""How small may a batch be, and what helps below that?
====================================================

Mean and variance of a small batch are poor estimates, and they are what a network with batch norm trains
on; in testing it meets the running averages instead, which are good ones. The smaller the batch, the wider
this gap. Four remedies, all one keyword or one name away:

* group norm takes its statistics within each sample; batches mean nothing to it;
* batch renormalization (``renorm=``) pulls the output in training towards that of testing;
* with batches of one, ``small_batch="running"`` trains on the running statistics;
* the other way round, ghost batch norm (``virtual_batch_size=``) lets small groups within a *large* batch
  have statistics of their own, for the noise that is said to help.

All see each image of the digits twice; the learning rate grows with the batch size.

**What to look at.** From 8 images on, batch norm is the best of all here. With 4 it is level with the
others, with 2 it falls apart, and with 1 it has nothing to normalize: every output is ``bias``, and the
network guesses. Group norm does not care. Renormalization saves most of what batch norm loses at 2, and
with the running statistics a network learns from batches of 1. That ghost batches *improve* large batches
**does not show**: for 16 and more they are level with batch norm or a little behind. The losses at 128 are
those of few steps, not of normalization: the plain network has them, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.ticker import NullLocator

import nbnorm
from networks import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SGD,
    Dense,
    Network,
    ReLU,
    accuracy,
    digits,
    fit,
    panels,
    parse,
    save,
)

SIZES = (64, 128, 64)
BATCHES = (1, 2, 4, 8, 16, 32, 128)
KINDS = {
    "plain": (None, ORANGE, "-"),
    "batch norm": (lambda n: nbnorm.BatchNorm(n, small_batch="zero"), BLUE, "-"),
    "batch renorm": (
        lambda n: nbnorm.BatchNorm(n, renorm=(3, 5), small_batch="running", momentum=0.02),
        GREEN,
        "-",
    ),
    "ghost batch norm, 8": (
        lambda n: nbnorm.BatchNorm(n, virtual_batch_size=8, small_batch="zero"),
        BLUE,
        ":",
    ),
    "group norm": (lambda n: nbnorm.GroupNorm(8, n), PURPLE, "-"),
}


def make_network(norm, rng: np.random.Generator) -> Network:
    """Two hidden layers."""
    layers = []
    for inputs, outputs in pairwise(SIZES):
        layers += [Dense(inputs, outputs, rng), *([norm(outputs)] if norm else []), ReLU()]
    return Network([*layers, Dense(SIZES[-1], 10, rng)])


def main(argv: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Train; return the test accuracies, shape (batch sizes, seeds)."""
    options = parse(__doc__, argv, "batch_sizes", epochs=2, seeds=2, smallest=1)
    x, x_test, labels, labels_test = digits()
    batches = [size for size in BATCHES if size >= options.smallest]
    results = {}
    for name, (norm, *_) in KINDS.items():
        found = np.zeros((len(batches), options.seeds))
        for i, size in enumerate(batches):
            for seed in range(options.seeds):
                rng = np.random.default_rng(seed)
                network = make_network(norm, rng)
                rate = min(0.002 * size, 0.1)
                steps = {"epochs": options.epochs, "batch_size": size, "learning_rate": rate, "rng": rng}
                for _ in fit(network, SGD(network.layers), x, labels, **steps):
                    pass
                found[i, seed] = accuracy(network, x_test, labels_test)
        results[name] = found

    print("images in a batch    " + "".join(f"{size:>8}" for size in batches))
    for name, found in results.items():
        print(f"{name:21}" + "".join(f"{value:8.1%}" for value in found.mean(axis=1)))

    figure, (axes,) = panels("Batch size and test accuracy", width=6.5)
    for name, (_, color, line) in KINDS.items():
        error = 1 - results[name].mean(axis=1)
        axes.plot(batches, error, f"o{line}", color=color, label=name, markersize=5)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, batches)
    ticks = np.array([0.1, 0.5, 0.8, 0.9, 0.95, 0.98])
    axes.set(xlabel="images in a batch", ylabel="test accuracy", yscale="log", ylim=(1, 0.015))
    axes.set_yticks(1 - ticks, [f"{tick:.0%}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    save(figure, options.output)
    return results


if __name__ == "__main__":
    main()
