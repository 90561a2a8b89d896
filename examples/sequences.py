"""What does padding do to batch norm, and how does a mask undo it?
================================================================

Sequences of different lengths are padded to make one array of them. The padding is no data, but batch norm
counts it: the more padding, the closer the mean comes to its value and the further off is the variance.
With ``mask=`` only what counts enters the statistics, and even NaN in the padding does no harm.

The sequences are the digits, row by row, cut off after five to eight rows. Each batch is padded with zeros
to a length of its own, as if the longest sequence in it decided: at random from 8 to at most 8, 16, 32 or
64. Each row goes through a dense layer, batch norm and relu, the rows of a digit are averaged (without the
padding, in both networks), and a second layer names the digit. In inference, sequences come as they are,
without padding.

**What to look at.** On the right: without a mask, the running variance is that of a mixture of rows and
padding, less than a third of the true one where there is much padding; with the mask it is right. The
picture on the left is a surprise: the accuracy **does not suffer**. This network is trained long enough to
make up for wrong statistics by other weights. What a mask buys is that a sequence is normalized in the same
way, however it happens to be padded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import nbnorm
from networks import BLUE, ORANGE, Adam, Dense, cross_entropy, digits, mini_batches, panels, parse, save

FEATURES = 32
LENGTHS = (8, 16, 32, 64)


class Rows:
    """Dense, batch norm with or without mask, relu, mean over the rows that count, dense."""

    def __init__(self, masked: bool, rng: np.random.Generator) -> None:
        self.masked = masked
        self.embed, self.out = Dense(16, FEATURES, rng), Dense(FEATURES, 10, rng)
        self.bn = nbnorm.BatchNorm(FEATURES, channel_axis=-1, activation="relu")
        self.layers = (self.embed, self.bn, self.out)

    def __call__(self, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Logits of padded sequences (N, T, 16); the mask (N, T) is True where there is a row."""
        y = self.bn(self.embed(x), mask=mask if self.masked and self.bn.training else None)
        self.share = (mask / mask.sum(axis=1, keepdims=True)).astype(np.float32)[:, :, np.newaxis]
        return self.out((y * self.share).sum(axis=1))

    def backward(self, dlogits: np.ndarray) -> None:
        """Fill the gradients."""
        dy = self.out.backward(dlogits)[:, np.newaxis] * self.share
        self.embed.backward(self.bn.backward(dy))


def sequences(images: np.ndarray, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut images after five to eight rows and pad them; each row says where it is, too. Returns x and mask."""
    rows = images.reshape(-1, 8, 8)
    where = np.broadcast_to(np.eye(8, dtype=np.float32), rows.shape)
    x = np.zeros((len(rows), length, 16), np.float32)
    x[:, :8] = np.concatenate([rows, where], axis=2)
    mask = np.arange(length) < rng.integers(5, 9, (len(rows), 1))
    x[~mask] = 0
    return x, mask


def train(masked: bool, length: int, epochs: int, seed: int) -> tuple[float, float]:
    """Return the test accuracy and how far the running variance is from that of the rows alone (a factor)."""
    x, x_test, labels, labels_test = digits()
    rng = np.random.default_rng(seed)
    (x, mask), (x_test, mask_test) = sequences(x, rng, length), sequences(x_test, rng, 8)
    network = Rows(masked, rng)
    adam = Adam(network.layers)
    for _ in range(epochs):
        for rows in mini_batches(len(x), 32, rng):
            longest = rng.integers(8, length + 1)
            logits = network(x[rows, :longest], mask[rows, :longest])
            network.backward(cross_entropy(logits, labels[rows])[1])
            adam.step(0.005)
    network.bn.eval()
    true = nbnorm.batch_moments(network.embed(x[mask]), channel_axis=-1).var()
    factor = float(np.median(network.bn.running_var / true))
    return float(np.mean(network(x_test, mask_test).argmax(axis=1) == labels_test)), factor


def nan_does_no_harm() -> bool:
    """Whether statistics with a mask are the same with zeros and with NaN in the padding."""
    x, mask = sequences(digits()[0][:100], np.random.default_rng(0), 16)
    statistics = []
    for padding in (0, np.nan):
        x[~mask] = padding
        saved = nbnorm.batch_norm_forward(x, channel_axis=-1, mask=mask)[1]
        statistics.append((saved.mean, saved.rstd))
    return np.array_equal(statistics[0], statistics[1])


def main(argv: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Train with and without mask; return accuracies and factors, shape (2, lengths)."""
    options = parse(__doc__, argv, "sequences", epochs=4, seeds=2, longest=64)
    lengths = [length for length in LENGTHS if length <= options.longest]
    results = {}
    for name, masked in (("without mask", False), ("with mask", True)):
        found = [
            [train(masked, length, options.epochs, s) for s in range(options.seeds)] for length in lengths
        ]
        results[name] = np.mean(found, axis=1).T
        accuracies, factors = results[name]
        print(f"padded to at most      {''.join(f'{length:>8}' for length in lengths)}")
        print(f"{name:13} accuracy {''.join(f'{value:8.1%}' for value in accuracies)}")
        print(f"{name:13} variance {''.join(f'{value:8.2f}' for value in factors)}   times that of the rows")
    print("NaN in the padding changes the statistics:", "no" if nan_does_no_harm() else "yes")

    figure, (axes, variance) = panels("Padded sequences, with and without a mask", 2)
    for (name, (accuracies, factors)), color in zip(results.items(), (ORANGE, BLUE), strict=True):
        axes.plot(lengths, accuracies, "o-", color=color, label=name)
        variance.plot(lengths, factors, "o-", color=color, label=name)
    axes.set(ylabel="test accuracy", ylim=(0, 1))
    variance.set(ylabel="running variance /\nvariance of the rows", ylim=(0, None))
    for panel in (axes, variance):
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, lengths)
        panel.set_xlabel("padded in training to at most")
    axes.legend(frameon=False, loc="lower left")
    save(figure, options.output)
    return results


if __name__ == "__main__":
    main()
