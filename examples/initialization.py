"""How much does the scale of the first weights matter?
====================================================

Without normalization, the first weights of a network have to be drawn with care: if they are too small, the
signal fades from layer to layer, and if they are too large it explodes; either way there is nothing to
learn from. He et al. (2015) give the standard deviation that keeps the signal of a relu network: sqrt(2 /
inputs).

Batch norm divides the scale out again, so it should matter little. Here networks with three hidden layers
learn to read the digits, from weights that are 0.01 to 30 times as large as He's, with and without batch
norm: same batches, same gradient descent with momentum.

**What to look at.** The plain network learns in a window around 1 and nowhere else. With batch norm every
network learns most of the task, over a range of more than 1 to 1000. It is best near He's scale all the
same, for a reason that the formula shows: where y does not depend on the scale of the weights, the gradient
is *divided* by it. One and the same learning rate throws small weights about and hardly turns large ones.
"Less sensitive", then, and not "insensitive".
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

import nbnorm
from networks import BLUE, ORANGE, SGD, Dense, Network, ReLU, accuracy, digits, fit, panels, parse, save

SCALES = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
SIZES = (64, 128, 128, 128)


def make_network(with_norm: bool, scale: float, rng: np.random.Generator) -> Network:
    """Dense layers whose first weights are ``scale`` times as large as usual; the last layer is as usual."""
    layers = []
    for inputs, outputs in pairwise(SIZES):
        layers.append(Dense(inputs, outputs, rng, gain=scale))
        if with_norm:
            layers.append(nbnorm.BatchNorm(outputs))
        layers.append(ReLU())
    return Network([*layers, Dense(SIZES[-1], 10, rng)])


def main(argv: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Train every network from every seed; return the test accuracies, shape (scales, seeds)."""
    options = parse(__doc__, argv, "initialization", epochs=4, seeds=3)
    x, x_test, labels, labels_test = digits()
    results = {name: np.zeros((len(SCALES), options.seeds)) for name in ("plain", "batch norm")}
    for name, found in results.items():
        for i, scale in enumerate(SCALES):
            for seed in range(options.seeds):
                rng = np.random.default_rng(seed)
                network = make_network(name == "batch norm", scale, rng)
                sgd = SGD(network.layers)
                steps = {"epochs": options.epochs, "batch_size": 32, "learning_rate": 0.05, "rng": rng}
                for _ in fit(network, sgd, x, labels, **steps):
                    pass
                found[i, seed] = accuracy(network, x_test, labels_test)

    print("scale of the weights   " + "".join(f"{scale:>8g}" for scale in SCALES))
    for name, found in results.items():
        print(f"{name:22} " + "".join(f"{value:8.1%}" for value in np.median(found, axis=1)))

    figure, (axes,) = panels("Scale of the first weights and test accuracy", width=6.5)
    for (name, found), color in zip(results.items(), (ORANGE, BLUE), strict=True):
        axes.fill_between(SCALES, found.min(axis=1), found.max(axis=1), color=color, alpha=0.2, linewidth=0)
        axes.plot(SCALES, np.median(found, axis=1), "o-", color=color, label=name)
    axes.set(xscale="log", ylim=(0, 1), ylabel="test accuracy")
    axes.set_xlabel("standard deviation of the first weights / that of He et al.")
    axes.set_xticks(SCALES, [f"{scale:g}" for scale in SCALES])
    axes.axhline(0.1, color="0.6", linewidth=1, linestyle=":")
    axes.text(SCALES[0], 0.115, "guessing", color="0.4", fontsize=8)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 0.2))
    save(figure, options.output)
    return results


if __name__ == "__main__":
    main()
