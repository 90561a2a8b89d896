"""Does what a layer sees hold still while the layers below it learn?
==================================================================

Each layer learns from the outputs of the layer below, which learns too: its input drifts while it tries to
fit it. Ioffe and Szegedy (2015) called this *internal covariate shift* and proposed batch norm as the cure.
This is their figure, drawn for the digits: the distribution of what arrives at one unit in the last hidden
layer, just before the relu, after each step of training.

Two networks of three hidden layers learn from the same weights and batches with the same gradient descent.
The lines are the 15th, 50th and 85th percentile over the images held out, as in the paper.

**What to look at.** In the plain network the percentiles wander by more than twice their distance; with
batch norm they stay where they are, because mean and variance are taken out and only ``bias`` and
``weight``, which learn slowly, can bring them back. That much is certain, for it is what batch norm does.
That it is the *reason* why batch norm helps is doubtful: Santurkar et al. (2018) put the drift back behind
batch norm, and the network still learned as fast. The two networks here end less than a point apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

import nbnorm
from networks import BLUE, ORANGE, SGD, Dense, Network, ReLU, accuracy, digits, fit, panels, parse, save

SIZES = (64, 100, 100, 100)
PERCENTILES = (15, 50, 85)
UNIT = 0


def make_network(with_norm: bool, rng: np.random.Generator) -> Network:
    """Dense, normalization, relu, three times."""
    layers = []
    for inputs, outputs in pairwise(SIZES):
        layers += [Dense(inputs, outputs, rng), *([nbnorm.BatchNorm(outputs)] if with_norm else []), ReLU()]
    return Network([*layers, Dense(SIZES[-1], 10, rng)])


def before_last_relu(network: Network, x: np.ndarray) -> np.ndarray:
    """What the last hidden layer hands to its relu, in training mode, without a trace in the running statistics."""
    for layer in network.layers[:-2]:
        if isinstance(layer, nbnorm.BatchNorm):
            x, _ = nbnorm.batch_norm_forward(x, layer.weight, layer.bias)
        else:
            x = layer(x)
    return x


def main(argv: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Train both networks; return the percentiles of every unit, shape (steps, percentiles, units)."""
    options = parse(__doc__, argv, "drift", epochs=6)
    x, x_test, labels, labels_test = digits()
    results = {}
    for name in ("plain", "batch norm"):
        rng = np.random.default_rng(0)
        network = make_network(name == "batch norm", rng)
        steps = {"epochs": options.epochs, "batch_size": 60, "learning_rate": 0.05, "rng": rng}
        history = [
            np.percentile(before_last_relu(network, x_test), PERCENTILES, axis=0)
            for _ in fit(network, SGD(network.layers), x, labels, **steps)
        ]
        results[name] = np.array(history)
        # How far the median of a unit wanders, in units of the spread that it started with.
        low, median, high = np.moveaxis(results[name], 1, 0)
        wandered = (median.max(axis=0) - median.min(axis=0)) / (high[0] - low[0])
        spread = (high - low).max(axis=0) / (high - low).min(axis=0)
        print(
            f"{name:11} the median of a unit wanders by {np.median(wandered):.2f} of its first spread, the spread "
            f"changes {np.median(spread):.1f}-fold (medians over the units); "
            f"test accuracy {accuracy(network, x_test, labels_test):.1%}"
        )

    figure, axes = panels("What arrives at one unit while the network learns", 2, sharey=True)
    for panel, (name, history), color in zip(axes, results.items(), (ORANGE, BLUE), strict=True):
        low, median, high = history[:, :, UNIT].T
        panel.fill_between(range(len(low)), low, high, color=color, alpha=0.2, linewidth=0)
        panel.plot(median, color=color)
        panel.set(title=name, xlabel="step")
    axes[0].set_ylabel("input of the relu:\n15th, 50th, 85th percentile")
    save(figure, options.output)
    return results


if __name__ == "__main__":
    main()
