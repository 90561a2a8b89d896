"""How does batch norm sit in a convolutional network, fast?
=========================================================

A small residual network reads the digits: a convolution, a residual block of two, a pooling, a last
convolution. Three things are worth knowing when you write such a network by hand:

* **Layouts.** Channels first, (N, C, H, W), and channels last, (N, H, W, C), differ by ``channel_axis``
  alone. The numbers are the same.
* **Fusing.** ``activation="relu"`` and ``residual=`` do in one pass over memory what would take three, and
  backward needs no mask: it recomputes the sign. In float32 the fused relu gives the bits of the separate
  one.
* **Folding.** After training, `nbnorm.fold_batch_norm` moves each batch norm into the convolution in front
  of it.

**What to look at.** Both layouts learn the same: the curves lie on each other until roundings, which
differ, have grown. Folding changes the logits in the last digits only and takes the time of the norms away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np

import nbnorm
from networks import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    Adam,
    Conv,
    Dense,
    MaxPool,
    MeanPool,
    cross_entropy,
    digits,
    mini_batches,
    panels,
    parse,
    save,
)

WIDTH = 16


class ConvNet:
    """Convolution, block of two convolutions with a residual connection, pooling, convolution, mean, logits."""

    def __init__(self, channel_axis: int, rng: np.random.Generator) -> None:
        self.axis = channel_axis
        channels = ((1, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, 2 * WIDTH))
        weights = [Conv(*pair, rng).params["weight"] for pair in channels]
        self.convs = [Conv(*pair, rng, channel_axis=channel_axis) for pair in channels]
        for conv, weight in zip(self.convs, weights, strict=True):  # the same weights in both layouts
            conv.params["weight"][:] = weight if channel_axis == 1 else weight.transpose(2, 3, 1, 0)
        self.norms = [
            nbnorm.BatchNorm(outputs, channel_axis=channel_axis, activation="relu") for _, outputs in channels
        ]
        self.pool, self.mean = MaxPool(channel_axis), MeanPool(channel_axis)
        self.out = Dense(2 * WIDTH, 10, rng)
        self.layers = [*self.convs, *self.norms, self.out]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Logits of images of shape (N, 64); the residual goes into the batch norm that ends the block."""
        (conv0, conv1, conv2, conv3), (norm0, norm1, norm2, norm3) = self.convs, self.norms
        x = x.reshape(-1, 1, 8, 8) if self.axis == 1 else x.reshape(-1, 8, 8, 1)
        first = norm0(conv0(x))
        block = norm2(conv2(norm1(conv1(first))), residual=first)
        return self.out(self.mean(norm3(conv3(self.pool(block)))))

    def backward(self, dlogits: np.ndarray) -> None:
        """Fill all gradients."""
        (conv0, conv1, conv2, conv3), (norm0, norm1, norm2, norm3) = self.convs, self.norms
        dblock = self.pool.backward(
            conv3.backward(norm3.backward(self.mean.backward(self.out.backward(dlogits))))
        )
        dinner, dfirst = norm2.backward(dblock)
        dfirst = dfirst + conv1.backward(norm1.backward(conv2.backward(dinner)))
        conv0.backward(norm0.backward(dfirst))

    def train(self, mode: bool = True) -> None:
        """Use the statistics of each batch, or the running ones."""
        for norm in self.norms:
            norm.train(mode)


class Folded:
    """The same network for inference: each batch norm has gone into its convolution."""

    def __init__(self, network: ConvNet) -> None:
        self.network, self.convs = network, []
        for conv, bn in zip(network.convs, network.norms, strict=True):
            output_axis = 0 if network.axis == 1 else -1
            plain = nbnorm.BatchNorm(conv.outputs)  # folding takes the norm without its relu, which stays
            plain.load_state_dict(bn.state_dict())
            alone = Conv(1, conv.outputs, np.random.default_rng(0), channel_axis=network.axis)
            weight, bias = nbnorm.fold_batch_norm(*conv.params.values(), plain, output_axis=output_axis)
            alone.params = {"weight": weight, "bias": bias}
            self.convs.append(alone)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Logits of images of shape (N, 64)."""
        net, convs = self.network, self.convs
        x = x.reshape(-1, 1, 8, 8) if net.axis == 1 else x.reshape(-1, 8, 8, 1)
        first = np.maximum(convs[0](x), 0)
        block = np.maximum(convs[2](np.maximum(convs[1](first), 0)) + first, 0)
        return net.out(net.mean(np.maximum(convs[3](net.pool(block)), 0)))


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """The best of several calls."""
    times = []
    for _ in range(repeats):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return 1e3 * min(times)


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Train in both layouts, fold, measure; return accuracies, times and the error of folding."""
    options = parse(__doc__, argv, "convolution", epochs=4, repeats=20)
    x, x_test, labels, labels_test = digits()
    curves, times, errors = {}, {}, []
    for layout, axis in (("channels first", 1), ("channels last", -1)):
        rng = np.random.default_rng(0)
        network = ConvNet(axis, rng)
        adam, curve = Adam(network.layers), []
        for _ in range(options.epochs):
            network.train()
            for rows in mini_batches(len(x), 32, rng):
                network.backward(cross_entropy(network(x[rows]), labels[rows])[1])
                adam.step(0.003)
            network.train(False)
            curve.append(float(np.mean(network(x_test).argmax(axis=1) == labels_test)))
        folded = Folded(network)
        curves[layout] = curve
        errors.append(float(np.abs(folded(x_test) - network(x_test)).max()))
        times[layout] = [
            milliseconds(lambda call=call: call(x[:128]), options.repeats) for call in (network, folded)
        ]

    print(f"{'':16}accuracy   inference   folded   (ms for 128 images)")
    for layout, (with_norm, without) in times.items():
        print(f"{layout:16}{curves[layout][-1]:8.1%}{with_norm:12.1f}{without:9.1f}")
    print(f"folding changes the logits by at most {max(errors):.0e}")

    figure, (axes, bars) = panels("Batch norm in a small residual network", 2)
    for (layout, curve), color, line in zip(curves.items(), (ORANGE, BLUE), "-:", strict=True):
        axes.plot(range(1, len(curve) + 1), curve, f"o{line}", color=color, label=layout, markersize=4)
    axes.set(xlabel="epoch", ylabel="test accuracy", ylim=(None, 1), title="both layouts learn the same")
    axes.set_xticks(range(1, options.epochs + 1))
    axes.legend(frameon=False)
    for k, (name, color) in enumerate((("with batch norm", GRAY), ("folded", GREEN))):
        values = [pair[k] for pair in times.values()]
        bars.bar(np.arange(len(times)) + 0.4 * k, values, width=0.38, color=color, label=name)
    bars.set_xticks(np.arange(len(times)) + 0.2, list(times))
    bars.set(title="inference", ylabel="ms for 128 images")
    bars.legend(frameon=False)
    save(figure, options.output)
    return {"curves": curves, "times": times, "errors": errors}


if __name__ == "__main__":
    main()
