"""Which norm for scans in three dimensions?
=========================================

Volumes take so much memory that batches are small, and scanners differ in brightness and contrast. Here
small synthetic scans of 10 x 10 x 10 voxels hold a vessel somewhere in noise, and each comes from a scanner
with a gain and an offset of its own. A network of two 3-D convolutions says which way the vessel runs:
along the first, the second or the third axis.

The data are arrays of shape (N, C, D, H, W): all norms of nbnorm take any number of axes. Compared are
batch norm, instance norm (each channel of each scan by itself), group norm and no norm, with batches of 4
scans.

**What to look at.** The scans on the left, one of each kind, then the accuracy on scans from new scanners.
The network without a norm does not learn at all in this time: it would have to find out first that
brightness means nothing. Instance norm takes the scanner out of each scan before anything is learned, and
is ahead from the first epoch on. Group norm follows; batch norm, whose batches of 4 mix scanners, comes
last of the three.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import nbnorm
from networks import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    Adam,
    Conv,
    Dense,
    MaxPool,
    MeanPool,
    Network,
    ReLU,
    accuracy,
    fit,
    panels,
    parse,
    save,
)

SIDE = 10
CLASSES = ("first", "second", "third")
KINDS = {
    "plain": (None, ORANGE),
    "batch norm": (nbnorm.BatchNorm, BLUE),
    "group norm": (lambda channels: nbnorm.GroupNorm(4, channels), PURPLE),
    "instance norm": (lambda channels: nbnorm.InstanceNorm(channels, affine=True), GREEN),
}


def scans(number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a vessel in it, seen by scanners of different gain and offset; shape (N, 1, D, H, W)."""
    labels = rng.integers(0, len(CLASSES), number)
    grid = np.stack(np.meshgrid(*[np.arange(SIDE)] * 3, indexing="ij")).astype(np.float32)
    x = rng.normal(0, 0.3, (number, 1, SIDE, SIDE, SIDE)).astype(np.float32)
    for scan, label in zip(x, labels, strict=True):
        center = rng.uniform(3, SIDE - 4, (3, 1, 1, 1))
        distance = np.abs(grid - center)
        across = np.delete(distance, label, axis=0)
        scan[0, ((across**2).sum(axis=0) < 1.6**2) & (distance[label] < 4)] += 2
    gain, offset = rng.uniform(0.3, 3, number), rng.normal(0, 2, number)
    shape = (number, 1, 1, 1, 1)
    return (x * gain.reshape(shape) + offset.reshape(shape)).astype(np.float32), labels


def make_network(norm, rng: np.random.Generator) -> Network:
    """Convolution, norm, relu, pooling; convolution, norm, relu, mean over the volume; logits."""
    layers, channels = [], 1
    for outputs, pool in ((8, MaxPool()), (16, MeanPool())):
        layers.append(Conv(channels, outputs, rng, ndim=3))
        layers += [*([norm(outputs)] if norm else []), ReLU(), pool]
        channels = outputs
    return Network([*layers, Dense(channels, len(CLASSES), rng)])


def main(argv: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Train; return the accuracy on new scans after each epoch, shape (seeds, epochs)."""
    options = parse(__doc__, argv, "volumes", epochs=6, scans=240, seeds=2)
    rng = np.random.default_rng(0)
    x, labels = scans(options.scans, rng)
    x_test, labels_test = scans(options.scans, rng)
    results = {}
    for name, (norm, _) in KINDS.items():
        curves = []
        for seed in range(options.seeds):
            rng = np.random.default_rng(seed)
            network, curve = make_network(norm, rng), []
            steps = {"epochs": options.epochs, "batch_size": 4, "learning_rate": 0.01, "rng": rng}
            for step, _ in enumerate(fit(network, Adam(network.layers), x, labels, **steps), 1):
                if step % (len(x) // 4) == 0:
                    curve.append(accuracy(network, x_test, labels_test))
            curves.append(curve)
        results[name] = np.array(curves)
        by_epoch = " ".join(f"{value:6.1%}" for value in results[name].mean(axis=0))
        print(f"{name:14} accuracy on new scans, epoch by epoch: {by_epoch}")

    figure, axes = panels(
        "Vessels in noisy volumes from different scanners", 4, width=2.6, width_ratios=(1, 1, 1, 2.2)
    )
    for panel, (label, name) in zip(axes, enumerate(CLASSES), strict=False):
        scan = x_test[labels_test == label][0, 0]
        panel.imshow(scan.max(axis=1), cmap="gray")
        panel.set_title(f"along the {name} axis", fontsize=9)
        panel.axis("off")
    for name, (_, color) in KINDS.items():
        axes[-1].plot(
            np.arange(1, options.epochs + 1), results[name].mean(axis=0), "o-", color=color, label=name
        )
    axes[-1].axhline(1 / len(CLASSES), color=GRAY, linestyle=":", linewidth=1)
    axes[-1].set(xlabel="epoch", ylabel="accuracy on new scans", ylim=(0, 1))
    axes[-1].legend(frameon=False, fontsize=8, loc="lower right")
    save(figure, options.output)
    return results


if __name__ == "__main__":
    main()
