"""Layer norm or RMS norm in a Transformer, and where?
===================================================

A Transformer block is attention and a small network, each with a residual connection around it. Its
inventors put layer norm *behind* the sum (post-norm); today it is mostly put *in front of* attention and
network (pre-norm), and often replaced by RMS norm, which leaves out the mean, the bias and half of the
arithmetic. All four combinations and no norm at all learn here to read the digits as sequences of eight
tokens, the rows of the images, with four blocks.

The block is written out, forward and backward, in plain NumPy: one head of attention, 32 features. Tokens
are the *last but one* axis, features the last one, which layer and RMS norm work on by default.

**What to look at.** Where each curve breaks down. Post-norm is the best at low learning rates and learns
nothing at 0.01 and above: the known reason why it is trained with a warm-up. Pre-norm falls off gently.
Between layer and RMS norm there is no difference to speak of: that is why the simpler one won. But that a
Transformer *needs* a norm **does not show** with four blocks and weights drawn with care: without one it
does as well, and bears high learning rates best.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import nbnorm
from networks import (
    BLUE,
    GREEN,
    ORANGE,
    Adam,
    Dense,
    Network,
    Parameters,
    ReLU,
    accuracy,
    digits,
    fit,
    panels,
    parse,
    save,
)

FEATURES = 32
RATES = (0.001, 0.003, 0.01, 0.03)
KINDS = {
    "pre, layer norm": ("pre", nbnorm.LayerNorm, BLUE, "-"),
    "pre, RMS norm": ("pre", nbnorm.RMSNorm, GREEN, "-"),
    "post, layer norm": ("post", nbnorm.LayerNorm, BLUE, ":"),
    "post, RMS norm": ("post", nbnorm.RMSNorm, GREEN, ":"),
    "no norm": ("none", None, ORANGE, "-"),
}


class Attention(Parameters):
    """One head of self-attention; x has shape (N, tokens, features)."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Dense(FEATURES, FEATURES, rng, gain=0.7) for _ in range(4))
        self.parts = (self.q, self.k, self.v, self.o)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Each token gathers the values of the tokens that its query finds."""
        q, k, self.values = self.q(x) / np.float32(FEATURES**0.5), self.k(x), self.v(x)
        scores = q @ k.swapaxes(1, 2)
        exp = np.exp(scores - scores.max(axis=-1, keepdims=True))
        self.weights = exp / exp.sum(axis=-1, keepdims=True)
        self.queries, self.keys = q, k
        return self.o(self.weights @ self.values)

    def backward(self, dy: np.ndarray) -> np.ndarray:
        """Back through the values, the softmax and the scores."""
        dy = self.o.backward(dy)
        dweights = dy @ self.values.swapaxes(1, 2)
        dscores = self.weights * (dweights - (dweights * self.weights).sum(axis=-1, keepdims=True))
        dx = self.v.backward(self.weights.swapaxes(1, 2) @ dy)
        dx = dx + self.q.backward(dscores @ self.keys / np.float32(FEATURES**0.5))
        return dx + self.k.backward(dscores.swapaxes(1, 2) @ self.queries)


class Residual(Parameters):
    """``x + inner(norm(x))`` (pre-norm), ``norm(x + inner(x))`` (post-norm) or ``x + inner(x)``."""

    def __init__(self, place: str, norm: type | None, inner: Sequence) -> None:
        super().__init__()
        before = [norm(FEATURES)] if place == "pre" else []
        self.inner = Network([*before, *inner])
        self.after = Network([norm(FEATURES)] if place == "post" else [])
        self.parts = (*self.inner.layers, *self.after.layers)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Add what the inner layers make of x."""
        return self.after(x + self.inner(x))

    def backward(self, dy: np.ndarray) -> np.ndarray:
        """The gradient takes both ways."""
        dy = self.after.backward(dy)
        return dy + self.inner.backward(dy)


class Mean(Parameters):
    """The mean over the tokens."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(N, tokens, features) becomes (N, features)."""
        self.shape = x.shape
        return x.mean(axis=1)

    def backward(self, dy: np.ndarray) -> np.ndarray:
        """Every token gets the same share."""
        return np.repeat(dy[:, np.newaxis] / np.float32(self.shape[1]), self.shape[1], axis=1)


class Tokens(Parameters):
    """Rows of an image as tokens, with a learned position."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__(position=rng.normal(0, 0.3, (8, FEATURES)))
        self.embed = Dense(8, FEATURES, rng)
        self.parts = (self.embed,)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(N, 64) becomes (N, 8, features)."""
        return self.embed(x.reshape(-1, 8, 8)) + self.params["position"]

    def backward(self, dy: np.ndarray) -> np.ndarray:
        """Nobody asks for the gradient of the pixels, but it comes for free."""
        self.grads["position"][:] = dy.sum(axis=0)
        return self.embed.backward(dy).reshape(len(dy), 64)


def make_network(place: str, norm: type | None, depth: int, rng: np.random.Generator) -> Network:
    """Tokens, blocks of attention and a small network, a last norm for pre-norm, logits."""
    layers = [Tokens(rng)]
    for _ in range(depth):
        layers.append(Residual(place, norm, [Attention(rng)]))
        layers.append(
            Residual(place, norm, [Dense(FEATURES, 64, rng), ReLU(), Dense(64, FEATURES, rng, gain=0.7)])
        )
    last = [norm(FEATURES)] if place == "pre" else []
    return Network([*layers, *last, Mean(), Dense(FEATURES, 10, rng, gain=0.7)])


def all_layers(layers: Sequence) -> list:
    """Layers and the layers in them, for the optimizer."""
    return [found for layer in layers for found in (layer, *all_layers(getattr(layer, "parts", ())))]


def main(argv: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Train; return the test accuracies, shape (rates, seeds)."""
    options = parse(__doc__, argv, "transformer", epochs=5, depth=4, seeds=2)
    x, x_test, labels, labels_test = digits()
    results = {}
    for name, (place, norm, *_) in KINDS.items():
        found = np.zeros((len(RATES), options.seeds))
        for i, rate in enumerate(RATES):
            for seed in range(options.seeds):
                rng = np.random.default_rng(seed)
                network = make_network(place, norm, options.depth, rng)
                adam = Adam(all_layers(network.layers))
                for _ in fit(
                    network,
                    adam,
                    x,
                    labels,
                    epochs=options.epochs,
                    batch_size=32,
                    learning_rate=rate,
                    rng=rng,
                ):
                    pass
                found[i, seed] = accuracy(network, x_test, labels_test)
        results[name] = found

    print("learning rate      " + "".join(f"{rate:>8g}" for rate in RATES))
    for name, found in results.items():
        print(f"{name:19}" + "".join(f"{value:8.1%}" for value in found.mean(axis=1)))

    figure, (axes,) = panels(f"Norms in a Transformer of {options.depth} blocks", width=6.5)
    for name, (_, _, color, line) in KINDS.items():
        axes.plot(RATES, results[name].mean(axis=1), f"o{line}", color=color, label=name)
    axes.set(xscale="log", ylim=(0, 1), xlabel="learning rate of Adam", ylabel="test accuracy")
    axes.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    save(figure, options.output)
    return results


if __name__ == "__main__":
    main()
