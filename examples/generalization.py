"""Does batch norm narrow the gap between training and testing?
============================================================

The statistics of a mini-batch are noise to each image in it: they depend on which others happen to be
there. Noise of that kind can keep a network from learning its training set by heart, and batch norm is said
to regularize. Here is a task in which there is much to gain: only a tenth of the digits to learn from, a
network with far more weights than images, and training until every image is known by heart.

The networks differ in normalization alone; batch norm is tried with small batches (much noise) and large
ones (little).

**What to look at.** All networks reach 100 % on the images they learn from, so the gap is what is missing
to 100 % on the others. **The claim does not show here**: for either batch size the means with and without
batch norm lie within a point of each other, once in favor of the one and once of the other, and the seeds
of any network spread by about a point. What shows is that batch norm gets there in fewer epochs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import nbnorm
from networks import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    Adam,
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

IMAGES = 140
KINDS = {
    "plain, batches of 8": (False, 8, ORANGE),
    "plain, batches of 70": (False, 70, PURPLE),
    "batch norm, batches of 8": (True, 8, BLUE),
    "batch norm, batches of 70": (True, 70, GREEN),
}


def make_network(with_norm: bool, rng: np.random.Generator) -> Network:
    """Two wide hidden layers."""
    layers, inputs = [], 64
    for outputs in (256, 128):
        layers += [Dense(inputs, outputs, rng), *([nbnorm.BatchNorm(outputs)] if with_norm else []), ReLU()]
        inputs = outputs
    return Network([*layers, Dense(inputs, 10, rng)])


def main(argv: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Train; return the accuracies in training and testing, shape (seeds, epochs, 2)."""
    options = parse(__doc__, argv, "generalization", epochs=25, seeds=6)
    x, x_test, labels, labels_test = digits()
    results = {}
    for name, (with_norm, batch_size, _) in KINDS.items():
        curves = []
        for seed in range(options.seeds):
            rng = np.random.default_rng(seed)
            chosen = rng.permutation(len(x))[
                :IMAGES
            ]  # other images for every seed, the same for every network
            network = make_network(with_norm, rng)
            steps = {"epochs": options.epochs, "batch_size": batch_size, "learning_rate": 0.003, "rng": rng}
            curve, per_epoch = [], IMAGES // batch_size
            for step, _ in enumerate(
                fit(network, Adam(network.layers), x[chosen], labels[chosen], **steps), 1
            ):
                if step % per_epoch == 0:
                    known = accuracy(network, x[chosen], labels[chosen])
                    curve.append((known, accuracy(network, x_test, labels_test)))
            curves.append(curve)
        results[name] = np.array(curves)
        known, new = results[name][:, -1].mean(axis=0)
        spread = results[name][:, -1, 1].std()
        print(f"{name:26} training {known:6.1%}   testing {new:.1%} (std over the seeds {100 * spread:.1f})")
    base = results["plain, batches of 8"][:, -1, 1]
    for name in list(KINDS)[1:]:
        gain = 100 * (results[name][:, -1, 1] - base)
        ahead = f"ahead for {np.sum(gain > 0)} of {len(gain)} seeds"
        print(f"{name:26} {gain.mean():+.1f} points on plain, batches of 8; {ahead}")

    figure, (curves_of, last) = panels(f"Learning from {IMAGES} images", 2, width=4.6)
    epochs = np.arange(1, options.epochs + 1)
    for i, (name, (_, _, color)) in enumerate(KINDS.items()):
        mean = results[name].mean(axis=0)
        curves_of.plot(epochs, mean[:, 0], ":", color=color)
        curves_of.plot(epochs, mean[:, 1], color=color, label=name)
        final = results[name][:, -1, 1]
        last.plot(final, np.full(len(final), -i), "o", color=color, alpha=0.5)
        last.plot(final.mean(), -i, "|", color=color, markersize=22, markeredgewidth=3)
    curves_of.set(
        xlabel="epoch", ylabel="accuracy", ylim=(0.6, 1.01), title="dotted: training, line: testing"
    )
    curves_of.legend(frameon=False, fontsize=8)
    last.set(title="testing, last epoch, every seed", xlabel="accuracy", ylim=(-len(KINDS) + 0.5, 0.5))
    last.set_yticks([-i for i in range(len(KINDS))], [name.replace(", ", ",\n") for name in KINDS])
    save(figure, options.output)
    return results


if __name__ == "__main__":
    main()
