"""What the examples share: layers and optimizers in plain NumPy, the digits, and the look of the pictures.

A layer is called with x and returns y, its ``backward`` takes dy, returns dx and fills ``grads``; an optimizer
updates ``params`` in place. The layers of nbnorm are such layers as they are.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

import nbnorm

# One color per kind of network, the same in all pictures (Okabe and Ito's, safe for color-blind eyes).
BLUE, ORANGE, GREEN, PURPLE, GRAY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#666666"

threadpool_limits(1, user_api="blas")  # for matrices as small as these, a team of threads doubles the time


class Layer(Protocol):
    """What all layers have in common."""

    params: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return y; remember what ``backward`` needs."""

    def backward(self, dy: np.ndarray) -> np.ndarray:
        """Return dx; fill ``grads``."""


class Parameters:
    """A layer's arrays and their gradients."""

    def __init__(self, **params: np.ndarray) -> None:
        self.params = {name: value.astype(np.float32) for name, value in params.items()}
        self.grads = {name: np.zeros_like(value) for name, value in self.params.items()}


class Dense(Parameters):
    """A fully connected layer; ``gain`` scales the standard deviation of He et al. (2015)."""

    def __init__(self, num_inputs: int, num_outputs: int, rng: np.random.Generator, gain: float = 1) -> None:
        scale = gain * math.sqrt(2 / num_inputs)
        super().__init__(weight=rng.normal(0, scale, (num_inputs, num_outputs)), bias=np.zeros(num_outputs))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """``y = x @ weight + bias``."""
        self.x = x
        return x @ self.params["weight"] + self.params["bias"]

    def backward(self, dy: np.ndarray) -> np.ndarray:
        """``dx = dy @ weight.T``."""
        rows = (-1, dy.shape[-1])
        self.grads["weight"][:] = self.x.reshape(-1, self.x.shape[-1]).T @ dy.reshape(rows)
        self.grads["bias"][:] = dy.reshape(rows).sum(axis=0)
        return dy @ self.params["weight"].T


class ReLU(Parameters):
    """Rectified linear unit; it has nothing to learn."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """``y = max(x, 0)``."""
        self.y = np.maximum(x, 0)
        return self.y

    def backward(self, dy: np.ndarray) -> np.ndarray:
        """``dx = dy`` where ``x > 0``, else 0."""
        return dy * (self.y > 0)


class Conv(Parameters):
    """A convolution of odd size that keeps the shape: two or three dimensions, channels first or last.

    The weight has shape (O, C, k, k) for channels first, as in PyTorch, and (k, k, C, O) for channels last, as in
    Keras. The windows are copied side by side ("im2col"), which turns the convolution into one matrix product.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        rng: np.random.Generator,
        *,
        size: int = 3,
        ndim: int = 2,
        channel_axis: int = 1,
    ) -> None:
        self.first = channel_axis == 1
        self.outputs, self.size, self.ndim = outputs, size, ndim
        window = (size,) * ndim
        shape = (outputs, channels, *window) if self.first else (*window, channels, outputs)
        weight = rng.normal(0, math.sqrt(2 / (channels * size**ndim)), shape)
        super().__init__(weight=weight, bias=np.zeros(outputs))
        self.offsets = list(product(range(size), repeat=ndim))

    def _matrix(self) -> np.ndarray:
        """The weight as a matrix: (O, C * k * k) or (k * k * C, O)."""
        weight = self.params["weight"]
        return weight.reshape(self.outputs, -1) if self.first else weight.reshape(-1, self.outputs)

    def _windows(self, padded: np.ndarray, space: tuple[int, ...]) -> Iterator[np.ndarray]:
        """The part of the padded array that each element of the weight meets."""
        for offset in self.offsets:
            part = tuple(slice(o, o + n) for o, n in zip(offset, space, strict=True))
            yield padded[(..., *part) if self.first else (slice(None), *part)]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """``y = weight * x + bias``."""
        n, self.space = len(x), x.shape[2:] if self.first else x.shape[1:-1]
        border = [(self.size // 2, self.size // 2)] * self.ndim
        padded = np.pad(x, [(0, 0), (0, 0), *border] if self.first else [(0, 0), *border, (0, 0)])
        self.padded_shape = padded.shape
        windows = list(self._windows(padded, self.space))
        if self.first:
            self.columns = np.stack(windows, axis=2).reshape(n, -1, math.prod(self.space))
            y = self._matrix() @ self.columns + self.params["bias"][:, np.newaxis]
            return y.reshape(n, self.outputs, *self.space)
        self.columns = np.stack(windows, axis=-2).reshape(n * math.prod(self.space), -1)
        y = self.columns @ self._matrix() + self.params["bias"]
        return y.reshape(n, *self.space, self.outputs)

    def backward(self, dy: np.ndarray) -> np.ndarray:
        """Scatter the gradients of the windows back."""
        n, channels = len(dy), self.padded_shape[1 if self.first else -1]
        if self.first:
            flat = dy.reshape(n, self.outputs, -1)
            dweight = np.tensordot(flat, self.columns, ((0, 2), (0, 2)))
            dcolumns = (self._matrix().T @ flat).reshape(n, channels, -1, *self.space)
            dwindows, axes = np.moveaxis(dcolumns, 2, 0), (0, 2)
        else:
            flat = dy.reshape(-1, self.outputs)
            dweight = self.columns.T @ flat
            dwindows = np.moveaxis((flat @ self._matrix().T).reshape(n, *self.space, -1, channels), -2, 0)
            axes = (0,)
        self.grads["weight"][:] = dweight.reshape(self.params["weight"].shape)
        self.grads["bias"][:] = flat.sum(axis=axes)
        dpadded = np.zeros(self.padded_shape, np.float32)
        for target, source in zip(self._windows(dpadded, self.space), dwindows, strict=True):
            target += source
        inside = (slice(self.size // 2, -(self.size // 2) or None),) * self.ndim
        return dpadded[(..., *inside) if self.first else (slice(None), *inside)]


class MaxPool(Parameters):
    """The largest of each block of 2 positions along every spatial axis."""

    def __init__(self, channel_axis: int = 1) -> None:
        super().__init__()
        self.channel_axis = channel_axis

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Shape (N, C, H, W) becomes (N, C, H / 2, W / 2)."""
        channel = self.channel_axis % x.ndim
        shape, self.blocks = [], []
        for axis, n in enumerate(x.shape):
            if axis in (0, channel):
                shape.append(n)
            else:
                shape += [n // 2, 2]
                self.blocks.append(len(shape) - 1)
        self.shape, x = x.shape, x.reshape(shape)
        y = x.max(axis=tuple(self.blocks), keepdims=True)
        self.largest = x == y
        return y.squeeze(tuple(self.blocks))

    def backward(self, dy: np.ndarray) -> np.ndarray:
        """The gradient goes to the largest element."""
        return (np.expand_dims(dy, tuple(self.blocks)) * self.largest).reshape(self.shape)


class MeanPool(Parameters):
    """The mean over all positions: (N, C, H, W) becomes (N, C)."""

    def __init__(self, channel_axis: int = 1) -> None:
        super().__init__()
        self.channel_axis = channel_axis

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """``y = mean(x)``."""
        self.shape = x.shape
        self.axes = tuple(a for a in range(1, x.ndim) if a != self.channel_axis % x.ndim)
        return x.mean(axis=self.axes)

    def backward(self, dy: np.ndarray) -> np.ndarray:
        """Every position gets the same share."""
        dx = np.expand_dims(dy, self.axes) / math.prod(self.shape[a] for a in self.axes)
        return np.broadcast_to(dx, self.shape).astype(np.float32)


class Network:
    """Layers in a row; the softmax at the end is part of the loss."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the logits."""
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dy: np.ndarray) -> np.ndarray:
        """Fill the ``grads`` of all layers."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def train(self, mode: bool = True) -> None:
        """Let batch norm use the statistics of each mini-batch."""
        for layer in self.layers:
            if isinstance(layer, nbnorm.BatchNorm):
                layer.train(mode)

    def eval(self) -> None:
        """Let batch norm use its running statistics."""
        self.train(False)


class SGD:
    """Gradient descent with momentum."""

    def __init__(self, layers: Sequence[Layer], momentum: float = 0.9) -> None:
        self.params = [layer.params[name] for layer in layers for name in layer.params]
        self.grads = [layer.grads[name] for layer in layers for name in layer.params]
        self.velocities = [np.zeros_like(param) for param in self.params]
        self.momentum = momentum

    def step(self, learning_rate: float) -> None:
        """Update all parameters in place."""
        for param, grad, velocity in zip(self.params, self.grads, self.velocities, strict=True):
            velocity *= self.momentum
            velocity += grad
            param -= np.float32(learning_rate) * velocity


class Adam:
    """The optimizer of Kingma and Ba (2015)."""

    beta1, beta2, eps = 0.9, 0.999, 1e-8

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.params = [layer.params[name] for layer in layers for name in layer.params]
        self.grads = [layer.grads[name] for layer in layers for name in layer.params]
        self.m = [np.zeros_like(param) for param in self.params]
        self.v = [np.zeros_like(param) for param in self.params]
        self.steps = 0

    def step(self, learning_rate: float) -> None:
        """Update all parameters in place."""
        self.steps += 1
        m_scale = learning_rate / (1 - self.beta1**self.steps)
        v_scale = 1 / (1 - self.beta2**self.steps)
        for param, grad, m, v in zip(self.params, self.grads, self.m, self.v, strict=True):
            m += (1 - self.beta1) * (grad - m)
            v += (1 - self.beta2) * (grad * grad - v)
            param -= m_scale * m / (np.sqrt(v_scale * v) + self.eps)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean cross-entropy of the softmax and its gradient by the logits, ``(softmax - one_hot) / N``."""
    rows = np.arange(len(labels))
    logits = logits - logits.max(axis=1, keepdims=True)
    exp = np.exp(logits)
    total = exp.sum(axis=1, keepdims=True)
    loss = np.mean(np.log(total[:, 0]) - logits[rows, labels])
    gradient = exp / total
    gradient[rows, labels] -= 1
    return float(loss), gradient / np.float32(len(labels))


def fit(
    network: Network,
    optimizer: SGD | Adam,
    x: np.ndarray,
    labels: np.ndarray,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    rng: np.random.Generator,
) -> Iterator[float]:
    """Train, and yield the loss after each step; the learning rate falls along half a cosine."""
    steps = epochs * max(1, len(x) // batch_size)
    step = 0
    for _ in range(epochs):
        for rows in mini_batches(len(x), batch_size, rng):
            network.train()
            with np.errstate(over="ignore", invalid="ignore"):  # some of these networks are meant to fail
                loss, gradient = cross_entropy(network(x[rows]), labels[rows])
                network.backward(gradient)
                optimizer.step(learning_rate * (1 + math.cos(math.pi * step / steps)) / 2)
            step += 1
            yield loss


def accuracy(network: Network, x: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of images that the network reads correctly in eval mode."""
    network.eval()
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.mean(network(x).argmax(axis=1) == labels))


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images to train and to test on, shape (N, 64), pixels from 0 to 1, and their labels.

    1,797 real 8x8 images, which come with scikit-learn; a fixed quarter is held out, with the same share of
    every digit.
    """
    x, labels = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    return tuple(train_test_split(x, labels, test_size=0.25, stratify=labels, random_state=0))


def mini_batches(num_images: int, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Shuffle the row numbers and cut them into parts of nearly equal size.

    Slices of ``batch_size`` could leave a single image for the last part, and one value has no variance.
    """
    yield from np.array_split(rng.permutation(num_images), max(1, num_images // batch_size))


def parse(doc: str, argv: Sequence[str] | None, name: str, **counts: int) -> argparse.Namespace:
    """Read the command line: some whole numbers, and where the picture goes."""
    title = doc.strip().partition("\n")[
        0
    ]  # empty in the gallery, which runs scripts without their docstrings
    parser = argparse.ArgumentParser(
        description=title, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for option, default in counts.items():
        flag = "--" + option.replace("_", "-")
        parser.add_argument(flag, type=int, default=default, metavar="N", help=option.replace("_", " "))
    parser.add_argument("--output", type=Path, default=Path(f"{name}.png"), help="where to save the picture")
    return parser.parse_args(argv)


def panels(
    title: str, columns: int = 1, width: float = 4.2, height: float = 3.6, **options
) -> tuple[Figure, list[Axes]]:
    """Make a figure with a row of panels in the common style."""
    figure = Figure(figsize=(max(6.0, width * columns), height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False, **options)[0])
    figure.suptitle(title, fontsize=12.5, fontweight="bold")
    for panel in axes:
        panel.grid(axis="y", color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, output: Path) -> None:
    """Write the picture and say where it is."""
    figure.savefig(output, dpi=150, bbox_inches="tight", pad_inches=0.15)
    print(f"Picture: {output}")
