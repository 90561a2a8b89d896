"""Can batch norm learn from one sample at a time?
===============================================

A robot, a sensor or a stream of clicks delivers one sample after the other. One sample has no variance, so
batch norm in training refuses it, and rightly: normalized by itself every sample becomes ``bias``. There
are three ways out:

* ``small_batch="running"``: normalize by the running statistics, and let each sample move these a little.
  Backward takes them as constants. The momentum has to be small, for a single sample tells little: 0.01
  here.
* A norm that needs no batch: layer norm takes its statistics over the features of the sample.
* No normalization.

The stream are the digits, each image once, in random order; after the first half the camera changes: the
images turn dark and low in contrast. Each image is read before the network learns from it, so the accuracy
shown is that on new images at each time.

**What to look at.** The running statistics do their job: the network with batch norm learns from single
samples, and faster than the other two. When the camera changes it pays for that: its statistics are those
of the old camera, half of the images are misread, and about 1 / momentum samples pass before the statistics
have followed. Layer norm hardly notices the change, for it takes brightness and contrast out of each image
by itself. If your stream has such jumps, try it first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

import nbnorm
from networks import (
    BLUE,
    GREEN,
    ORANGE,
    SGD,
    Dense,
    Network,
    ReLU,
    cross_entropy,
    digits,
    panels,
    parse,
    save,
)

SIZES = (64, 100, 100)
LEARNING_RATE = 0.003


def online_batch_norm(num_features: int) -> nbnorm.BatchNorm:
    """Batch norm that accepts a single sample."""
    return nbnorm.BatchNorm(num_features, small_batch="running", momentum=0.01)


KINDS = {
    "plain": (None, ORANGE),
    "batch norm, running": (online_batch_norm, BLUE),
    "layer norm": (nbnorm.LayerNorm, GREEN),
}


def make_network(norm, rng: np.random.Generator) -> Network:
    """Two hidden layers; the pixels are normalized, too."""
    layers = [norm(SIZES[0])] if norm else []
    for inputs, outputs in pairwise(SIZES):
        layers += [Dense(inputs, outputs, rng), *([norm(outputs)] if norm else []), ReLU()]
    return Network([*layers, Dense(SIZES[-1], 10, rng)])


def stream(rng: np.random.Generator, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Every image once, in random order; from the middle on they are dark and low in contrast."""
    x, x_test, labels, labels_test = digits()
    x, labels = np.concatenate([x, x_test]), np.concatenate([labels, labels_test])
    order = rng.permutation(len(x))[:samples]
    x, labels = x[order].copy(), labels[order]
    x[len(x) // 2 :] = 0.1 + 0.25 * x[len(x) // 2 :]
    return x, labels


def main(argv: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Learn from the stream; return for each sample whether it was read correctly, shape (seeds, samples)."""
    options = parse(__doc__, argv, "online", samples=1797, seeds=5)
    results = {}
    for name, (norm, _) in KINDS.items():
        read = []
        for seed in range(options.seeds):
            rng = np.random.default_rng(seed)
            x, labels = stream(rng, options.samples)
            network = make_network(norm, rng)
            sgd, right = SGD(network.layers), []
            for i in range(len(x)):
                logits = network(x[i : i + 1])
                right.append(logits.argmax() == labels[i])
                network.backward(cross_entropy(logits, labels[i : i + 1])[1])
                sgd.step(LEARNING_RATE)
            read.append(right)
        results[name] = np.array(read, float)

    window = max(1, options.samples // 18)
    middle = options.samples // 2
    times = {"before the change": middle, "just after it": middle + window, "at the end": options.samples}
    print(f"accuracy over {window} samples  " + "".join(f"{when:>20}" for when in times))
    for name, read in results.items():
        values = [read[:, end - window : end].mean() for end in times.values()]
        print(f"{name:27}" + "".join(f"{value:20.1%}" for value in values))

    figure, (axes,) = panels("Learning from one sample at a time", width=7)
    for name, (_, color) in KINDS.items():
        sums = np.cumsum(np.pad(results[name].mean(axis=0), (1, 0)))
        moving = (sums[window:] - sums[:-window]) / window
        axes.plot(np.arange(window, len(sums)), moving, color=color, label=name)
    axes.axvline(middle, color="0.4", linestyle="--", linewidth=1)
    axes.text(middle, 0.02, " the camera changes", color="0.4", fontsize=9)
    axes.set(xlabel="samples seen", ylabel=f"accuracy on the last {window}", ylim=(0, 1))
    axes.legend(frameon=False, loc="lower right")
    save(figure, options.output)
    return results


if __name__ == "__main__":
    main()
