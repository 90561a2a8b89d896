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

**What to look at.** Both layouts learn the same. On the right, the time of one step of training and of one
inference, each part on its own: fusing and folding take away most of what is not convolution. The
convolutions themselves, in plain NumPy, are the lion's share here; they are drawn in gray.
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
)  # fmt: skip

WIDTH = 16


class ConvNet:
    """Convolution, block of two convolutions with a residual connection, pooling, convolution, mean, logits."""

    def __init__(self, channel_axis: int, fused: bool, rng: np.random.Generator) -> None:
        self.axis, self.fused, self.norm_seconds = channel_axis, fused, 0.0
        channels = ((1, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, 2 * WIDTH))
        weights = [Conv(*pair, rng).params["weight"] for pair in channels]
        self.convs = [Conv(*pair, rng, channel_axis=channel_axis) for pair in channels]
        for conv, weight in zip(self.convs, weights, strict=True):  # the same weights in both layouts
            conv.params["weight"][:] = weight if channel_axis == 1 else weight.transpose(2, 3, 1, 0)
        self.norms = [nbnorm.BatchNorm(outputs, channel_axis=channel_axis) for _, outputs in channels]
        self.pool, self.mean = MaxPool(channel_axis), MeanPool(channel_axis)
        self.out = Dense(2 * WIDTH, 10, rng)
        self.layers = [*self.convs, *self.norms, self.out]
        self.training = True

    def norm(self, i: int, x: np.ndarray, residual: np.ndarray | None = None) -> np.ndarray:
        """relu(batch norm(x) + residual), in one call or in three."""
        start, bn = perf_counter(), self.norms[i]
        more = {"activation": "relu", "residual": residual} if self.fused else {}
        y, self.saved[i] = nbnorm.batch_norm_forward(
            x, bn.weight, bn.bias, bn.running_mean, bn.running_var,
            training=self.training, channel_axis=self.axis, **more,
        )  # fmt: skip
        if not self.fused:
            y = np.maximum(y if residual is None else y + residual, 0)
            self.positive[i] = y > 0
        self.norm_seconds += perf_counter() - start
        return y

    def norm_backward(self, i: int, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradients by x and by the residual."""
        start, grads = perf_counter(), self.norms[i].grads
        if not self.fused:
            dy = dy * self.positive[i]
        gradients = nbnorm.batch_norm_backward(dy, self.saved[i])
        dx, grads["weight"][:], grads["bias"][:] = gradients[:3]
        self.norm_seconds += perf_counter() - start
        return dx, gradients[3] if len(gradients) > 3 else dy

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Logits of images of shape (N, 64)."""
        self.saved, self.positive = [None] * 4, [None] * 4
        x = x.reshape(-1, 1, 8, 8) if self.axis == 1 else x.reshape(-1, 8, 8, 1)
        first = self.norm(0, self.convs[0](x))
        inner = self.norm(1, self.convs[1](first))
        block = self.norm(2, self.convs[2](inner), residual=first)
        last = self.norm(3, self.convs[3](self.pool(block)))
        return self.out(self.mean(last))

    def backward(self, dlogits: np.ndarray) -> None:
        """Fill all gradients."""
        dlast = self.mean.backward(self.out.backward(dlogits))
        dblock = self.pool.backward(self.convs[3].backward(self.norm_backward(3, dlast)[0]))
        dinner, dfirst = self.norm_backward(2, dblock)
        dinner = self.norm_backward(1, self.convs[2].backward(dinner))[0]
        dfirst = dfirst + self.convs[1].backward(dinner)
        self.convs[0].backward(self.norm_backward(0, dfirst)[0])


class Folded:
    """The same network for inference: each batch norm has gone into its convolution."""

    def __init__(self, network: ConvNet) -> None:
        self.network, self.convs = network, []
        for conv, bn in zip(network.convs, network.norms, strict=True):
            output_axis = 0 if network.axis == 1 else -1
            alone = Conv(1, conv.outputs, np.random.default_rng(0), channel_axis=network.axis)
            weight, bias = nbnorm.fold_batch_norm(*conv.params.values(), bn, output_axis=output_axis)
            alone.params = {"weight": weight, "bias": bias}
            self.convs.append(alone)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Logits of images of shape (N, 64)."""
        net, convs = self.network, self.convs
        x = x.reshape(-1, 1, 8, 8) if net.axis == 1 else x.reshape(-1, 8, 8, 1)
        first = np.maximum(convs[0](x), 0)
        block = np.maximum(convs[2](np.maximum(convs[1](first), 0)) + first, 0)
        return net.out(net.mean(np.maximum(convs[3](net.pool(block)), 0)))


def step(network: ConvNet, adam: Adam, x: np.ndarray, labels: np.ndarray) -> None:
    """One step of training."""
    network.backward(cross_entropy(network(x), labels)[1])
    adam.step(0.003)


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """The best of several calls."""
    times = []
    for _ in range(repeats):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return 1e3 * min(times)


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Train in both layouts, fused and not; fold; measure. Returns accuracies, bars and the error of folding."""
    options = parse(__doc__, argv, "convolution", epochs=3, repeats=20)
    x, x_test, labels, labels_test = digits()
    curves, bars, errors = {}, {}, []
    for layout, axis in (("channels first", 1), ("channels last", -1)):
        if True:
            rng = np.random.default_rng(0)
            network = ConvNet(axis, fused, rng)
            adam, curve = Adam(network.layers), []
            for _ in range(options.epochs):
                network.training = True
                for rows in mini_batches(len(x), 32, rng):
                    step(network, adam, x[rows], labels[rows])
                network.training = False
                curve.append(float(np.mean(network(x_test).argmax(axis=1) == labels_test)))
            name = f"{layout}, {'fused' if fused else 'separate'}"
            curves[name] = curve
            folded = Folded(network)
            errors.append(float(np.abs(folded(x_test) - network(x_test)).max()))
            network.training = True
            whole, inside = [], []
            for _ in range(options.repeats):
                network.norm_seconds, start = 0.0, perf_counter()
                step(network, adam, x[:128], labels[:128])
                whole.append(1e3 * (perf_counter() - start))
                inside.append(1e3 * network.norm_seconds)
            network.training = False
            infer = milliseconds(lambda net=network: net(x[:128]), options.repeats)
            without = milliseconds(lambda net=folded: net(x[:128]), options.repeats)
            bars[name] = (min(whole), min(inside), infer, without)

    print(f"{'':28}accuracy   step   of it norm, relu, sum   inference   folded    (ms, 128 images)")
    for name, (whole, inside, infer, without) in bars.items():
        print(f"{name:28}{curves[name][-1]:8.1%}{whole:7.1f}{inside:24.1f}{infer:12.1f}{without:9.1f}")
    print(f"folding changes the logits by at most {max(errors):.0e}")

    figure, (axes, training, inference) = panels("Batch norm in a small residual network", 3, width=3.9)
    for (name, curve), color in zip(curves.items(), (ORANGE, BLUE) * 2, strict=True):
        line = "-" if "first" in name else ":"
        axes.plot(range(1, len(curve) + 1), curve, f"o{line}", color=color, label=name, markersize=4)
    axes.set(xlabel="epoch", ylabel="test accuracy", ylim=(None, 1))
    axes.legend(frameon=False, fontsize=7)
    for i, (whole, inside, infer, without) in enumerate(bars.values()):
        training.barh(-i, whole - inside, color=GRAY, alpha=0.5)
        training.barh(-i, inside, left=whole - inside, color=(ORANGE, BLUE)[i % 2])
        inference.barh(-i + 0.2, infer, height=0.38, color=(ORANGE, BLUE)[i % 2])
        inference.barh(-i - 0.2, without, height=0.38, color=GREEN)
    training.set(title="step: norm, relu and sum in color", xlabel="ms for 128 images")
    inference.set(title="inference: with batch norm, folded (green)", xlabel="ms for 128 images")
    for panel in (training, inference):
        panel.set_yticks(
            [-i for i in range(len(bars))], [name.replace(", ", ",\n") for name in bars], fontsize=8
        )
        panel.title.set_fontsize(9)
        panel.grid(visible=False, axis="y")
    save(figure, options.output)
    return {"curves": curves, "bars": bars, "errors": errors}


if __name__ == "__main__":
    main()
