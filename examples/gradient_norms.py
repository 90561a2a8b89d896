"""What happens to the gradient on its way through twenty layers?
==============================================================

In a deep network the gradient is multiplied by a matrix at each layer on its way back. If each matrix
shrinks it a little, the first layers get next to nothing; if each enlarges it a little, they get far too
much. Batch norm rescales at each layer, so the gradient should arrive everywhere at the same size.

The networks have 20 hidden layers of 100 relu units. Their weights are drawn at half, equal to and twice
the standard deviation of He et al. (2015). The picture shows, before any training, the norm of the gradient
of the loss by the output of each layer's matrix product; the last hidden layer counts as 1.

**What to look at.** Without normalization a scale that is off by two halves or doubles the gradient at
every layer: half a million-fold over all of them. With batch norm the three panels are the same, for the
scale cancels between one layer's matrix and the next layer's division. But flat is not what batch norm
makes it: towards the first layers the gradient *grows*, by about a fifth at every layer (and once more at
the first one, whose inputs are pixels and smaller than what batch norm hands on). That is known (Yang et
al. 2019, "A mean field theory of batch normalization"), and the plain network with He's weights, in the
middle, has the flatter line. Deep networks with batch norm have residual connections besides, which tame
it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import nbnorm
from networks import BLUE, ORANGE, Dense, Network, ReLU, cross_entropy, digits, panels, parse, save

SCALES = (0.5, 1, 2)
WIDTH = 100


def make_network(with_norm: bool, scale: float, depth: int, rng: np.random.Generator) -> Network:
    """``depth`` hidden layers and one for the logits."""
    layers, inputs = [], 64
    for _ in range(depth):
        layers.append(Dense(inputs, WIDTH, rng, gain=scale))
        if with_norm:
            layers.append(nbnorm.BatchNorm(WIDTH))
        layers.append(ReLU())
        inputs = WIDTH
    return Network([*layers, Dense(WIDTH, 10, rng)])


def gradient_norms(network: Network, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Norm of the gradient by the output of each hidden layer's matrix product, first layer first."""
    _, dy = cross_entropy(network(x), labels)
    norms = []
    for layer in reversed(network.layers):
        if isinstance(layer, Dense):
            norms.append(float(np.linalg.norm(dy)))
        dy = layer.backward(dy)
    return np.array(norms[:0:-1])


def main(argv: Sequence[str] | None = None) -> dict[tuple[str, float], np.ndarray]:
    """Measure at the first weights; return the norms, shape (seeds, layers)."""
    options = parse(__doc__, argv, "gradient_norms", depth=20, seeds=10)
    x, _, labels, _ = digits()
    results = {}
    for scale in SCALES:
        for name in ("plain", "batch norm"):
            rngs = [np.random.default_rng(seed) for seed in range(options.seeds)]
            networks = [make_network(name == "batch norm", scale, options.depth, rng) for rng in rngs]
            norms = np.array([gradient_norms(n, x[:256], labels[:256]) for n in networks])
            results[name, scale] = norms / norms[:, -1:]

    print("gradient at the first layer / gradient at the last hidden layer, median over the seeds")
    for (name, scale), norms in results.items():
        ratio = np.median(norms[:, 0])
        per_layer = ratio ** (1 / max(1, options.depth - 1))
        print(f"{name:11} weights x {scale:<4g} {ratio:10.3g}   or {per_layer:.2f} per layer")

    figure, axes = panels("Gradients before training, layer by layer", len(SCALES), width=3.6, sharey=True)
    layers = np.arange(1, options.depth + 1)
    for panel, scale in zip(axes, SCALES, strict=True):
        for name, color in (("plain", ORANGE), ("batch norm", BLUE)):
            norms = results[name, scale]
            panel.fill_between(
                layers, norms.min(axis=0), norms.max(axis=0), color=color, alpha=0.2, linewidth=0
            )
            panel.plot(layers, np.median(norms, axis=0), color=color, label=name)
        panel.set(yscale="log", title=f"weights {scale:g} times He's", xlabel="layer")
        panel.set_xlim(1, options.depth)
    axes[0].set_ylabel("norm of the gradient\n(last hidden layer = 1)")
    axes[1].legend(frameon=False)
    save(figure, options.output)
    return results


if __name__ == "__main__":
    main()
