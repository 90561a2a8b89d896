"""Train a small network on handwritten digits, with and without batch normalization.
==================================================================================

The question: does batch norm help the network to learn, and does it let it bear a higher learning rate?

The data are 1,797 real 8x8 images, which come with scikit-learn; a quarter is held out for testing. Two
networks learn to read them, in plain NumPy and float32, with mini-batches, cross-entropy and Adam::

    batch norm:  Dense(128, relu) -> batch norm -> Dense(64, relu) -> batch norm -> Dense(10, softmax)
    plain:       Dense(128, relu) ---------------> Dense(64, relu) ---------------> Dense(10, softmax)

All else is equal: the same He-initialized weights, the same mini-batches in the same order, the same Adam,
the same decay of the learning rate. Batch norm normalizes each feature with its mean and variance over the
mini-batch::

    y = (x - mean) / sqrt(var + eps) * weight + bias

and with running averages of the two when the network is tested. With nbnorm this takes three lines::

    bn = nbnorm.BatchNorm(num_features)     # the optimizer reads bn.grads and updates bn.params
    y = bn(x)
    dx = bn.backward(dy)

What to look at: the highest learning rate. There the plain network loses much of its accuracy, how much
depends on the seed, and batch norm stays close to its best. At low learning rates so shallow a network can do
without it. The table tells both, and what batch norm costs::

    python examples/digits.py
    python examples/digits.py --learning-rates 0.01 0.1 --batch-size 32
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from time import perf_counter

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from threadpoolctl import threadpool_limits

import nbnorm
from networks import BLUE, ORANGE, Adam, Dense, Layer, ReLU, cross_entropy, mini_batches
from networks import digits as digits_to_read

HIDDEN_SIZES = (128, 64)
NUM_CLASSES = 10
TARGET_ACCURACY = 0.95
TITLE = "Test accuracy on handwritten digits, with and without batch normalization"
BATCH_NORM, PLAIN = "batch norm", "plain"
COLORS = {BATCH_NORM: BLUE, PLAIN: ORANGE}


@dataclass(frozen=True)
class Config:
    """What to train, and where the figure goes (None: no figure)."""

    epochs: int
    batch_size: int
    learning_rates: tuple[float, ...]
    seeds: int
    output: Path | None


@dataclass(frozen=True)
class Digits:
    """Images of shape (N, 64), pixels from 0 to 1, and labels of shape (N,), integers from 0 to 9."""

    x_train: np.ndarray
    x_test: np.ndarray
    labels_train: np.ndarray
    labels_test: np.ndarray


@dataclass(frozen=True)
class Run:
    """One trained network: its test accuracy after each epoch, and the seconds it took."""

    accuracy: np.ndarray
    seconds: float
    nbnorm_seconds: float


@dataclass(frozen=True)
class Result:
    """One kind of network at one learning rate: a run for each seed."""

    network: str
    learning_rate: float
    runs: list[Run]

    @property
    def accuracy(self) -> np.ndarray:
        """Test accuracy, shape (seeds, epochs)."""
        return np.array([run.accuracy for run in self.runs])

    @property
    def final_accuracy(self) -> np.ndarray:
        """Test accuracy after the last epoch, shape (seeds,)."""
        return self.accuracy[:, -1]

    @property
    def median_accuracy(self) -> float:
        """Median over the seeds of the test accuracy after the last epoch."""
        return float(np.median(self.final_accuracy))

    @property
    def epochs_to_target(self) -> float:
        """Median over the seeds of the first epoch that reaches the target; inf where most never do."""
        reached = self.accuracy >= TARGET_ACCURACY
        return float(np.median(np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, np.inf)))

    @property
    def seconds(self) -> float:
        """Mean duration of a run."""
        return float(np.mean([run.seconds for run in self.runs]))

    @property
    def nbnorm_share(self) -> float:
        """Part of these seconds that was spent in nbnorm, from 0 to 1."""
        return float(np.mean([run.nbnorm_seconds for run in self.runs])) / self.seconds


class Stopwatch:
    """Adds up the seconds spent in its ``with`` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Stopwatch:
        """Start."""
        self.started = perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop."""
        self.seconds += perf_counter() - self.started


class BatchNorm:
    """``nbnorm.BatchNorm``, timed. Without the stopwatch it would be a layer of the network as it is."""

    def __init__(self, num_features: int) -> None:
        self.bn = nbnorm.BatchNorm(num_features)
        self.params, self.grads = self.bn.params, self.bn.grads
        self.stopwatch = Stopwatch()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """``y = (x - mean) / sqrt(var + eps) * weight + bias``."""
        with self.stopwatch:
            return self.bn(x)

    def backward(self, dy: np.ndarray) -> np.ndarray:
        """Differentiate through mean and variance, too."""
        with self.stopwatch:
            return self.bn.backward(dy)


class Network:
    """Layers in a row; the softmax at the end is part of the loss."""

    def __init__(self, num_inputs: int, batch_norm: bool, rng: np.random.Generator) -> None:
        self.layers: list[Layer] = []
        for fan_in, fan_out in pairwise((num_inputs, *HIDDEN_SIZES)):
            self.layers += [Dense(fan_in, fan_out, rng), ReLU()]
            if batch_norm:
                self.layers.append(BatchNorm(fan_out))
        self.layers.append(Dense(HIDDEN_SIZES[-1], NUM_CLASSES, rng))
        self.norms = [layer for layer in self.layers if isinstance(layer, BatchNorm)]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the logits, shape (N, 10), of images of shape (N, 64)."""
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dy: np.ndarray) -> None:
        """Fill the ``grads`` of all layers."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy)

    def train(self) -> None:
        """Normalize with the statistics of each mini-batch from now on."""
        for norm in self.norms:
            norm.bn.train()

    def eval(self) -> None:
        """Normalize with the running statistics from now on."""
        for norm in self.norms:
            norm.bn.eval()


def load() -> Digits:
    """Read the images and hold out a fixed quarter of them, with the same share of every digit."""
    x_train, x_test, labels_train, labels_test = digits_to_read()
    return Digits(x_train, x_test, labels_train, labels_test)


def evaluate(network: Network, digits: Digits) -> float:
    """Return the share of the test images that the network reads correctly."""
    network.eval()
    return float(np.mean(network(digits.x_test).argmax(axis=1) == digits.labels_test))


def train(name: str, learning_rate: float, seed: int, config: Config, digits: Digits) -> Run:
    """Train one network. The learning rate falls from epoch to epoch along half a cosine."""
    rng = np.random.default_rng(seed)
    network = Network(digits.x_train.shape[1], name == BATCH_NORM, rng)
    adam = Adam(network.layers)
    accuracy = []
    with Stopwatch() as stopwatch:
        for epoch in range(config.epochs):
            decay = (1 + math.cos(math.pi * epoch / config.epochs)) / 2
            network.train()
            for rows in mini_batches(len(digits.x_train), config.batch_size, rng):
                logits = network(digits.x_train[rows])
                network.backward(cross_entropy(logits, digits.labels_train[rows])[1])
                adam.step(learning_rate * decay)
            accuracy.append(evaluate(network, digits))
    nbnorm_seconds = sum(norm.stopwatch.seconds for norm in network.norms)
    return Run(np.array(accuracy), stopwatch.seconds, nbnorm_seconds)


def warm_up(config: Config, digits: Digits, console: Console) -> None:
    """Train for one epoch, so that Numba has compiled every kernel before a time is measured."""
    with console.status("Compiling the kernels of nbnorm ..."), Stopwatch() as stopwatch:
        train(BATCH_NORM, config.learning_rates[0], 0, replace(config, epochs=1), digits)
    console.print(f"Warm-up, with compilation by Numba: {stopwatch.seconds:.1f} s (part of no time below).")


def train_all(config: Config, digits: Digits, console: Console) -> list[Result]:
    """Train both networks at every learning rate, lowest first, from every seed."""
    results = [Result(name, rate, []) for rate, name in product(config.learning_rates, COLORS)]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Training", total=len(results) * config.seeds)
        for result, seed in product(results, range(config.seeds)):
            result.runs.append(train(result.network, result.learning_rate, seed, config, digits))
            progress.advance(task)
    return results


def make_table(results: list[Result], digits: Digits) -> Table:
    """Lay out the results, one row for each network and learning rate."""
    table = Table("learning\nrate", "\nnetwork", title=TITLE)
    target = f"epochs\nto {TARGET_ACCURACY:.0%}"
    for header in ("accuracy\nmedian", "\nmin to max", target, "seconds\nper run", "in\nnbnorm"):
        table.add_column(header, justify="right")
    for result in results:
        table.add_row(*table_cells(result), end_section=result.network == PLAIN)
    table.caption = (
        f"Accuracy on {len(digits.x_test)} test images after the last epoch; seeds: {len(results[0].runs)}.\n"
        "In nbnorm: share of the seconds spent in its calls, compilation excluded."
    )
    return table


def table_cells(result: Result) -> list[str]:
    """Format one result; "-" stands where there is nothing to tell."""
    worst, best = 100 * result.final_accuracy.min(), 100 * result.final_accuracy.max()
    epochs = result.epochs_to_target
    return [
        f"{result.learning_rate:g}",
        result.network,
        f"{result.median_accuracy:.1%}",
        f"{worst:.1f} to {best:.1f}%",
        f"{epochs:g}" if math.isfinite(epochs) else "-",
        f"{result.seconds:.2f}",
        f"{result.nbnorm_share:.0%}" if result.network == BATCH_NORM else "-",
    ]


def best_of(results: list[Result], network: str) -> Result:
    """Return the result with the highest median accuracy of one kind of network."""
    return max((r for r in results if r.network == network), key=lambda r: r.median_accuracy)


def findings(results: list[Result]) -> list[str]:
    """Say in two sentences what the numbers say."""
    best, best_plain = best_of(results, BATCH_NORM), best_of(results, PLAIN)
    normalized, plain = results[-2:]
    gaps = 100 * (normalized.final_accuracy - plain.final_accuracy)
    return [
        f"Batch norm reaches a median test accuracy of {best.median_accuracy:.1%} at its best learning rate "
        f"({best.learning_rate:g}), the plain network {best_plain.median_accuracy:.1%} at its best "
        f"({best_plain.learning_rate:g}).",
        f"At the highest learning rate ({plain.learning_rate:g}) batch norm is ahead of the plain network "
        f"for {np.sum(gaps > 0)} of {len(gaps)} seeds, by {gaps.mean():.1f} points on average and "
        f"{gaps.min():.1f} at the least.",
    ]


def draw(results: list[Result], output: Path) -> None:
    """Draw the learning curves, one panel for each learning rate, and save them as PNG."""
    num_panels = len(results) // 2
    figure = Figure(figsize=(max(8, 1 + 2.4 * num_panels), 4.8), layout="constrained")
    panels = figure.subplots(1, num_panels, sharey=True, squeeze=False)[0]
    for axes, normalized, plain in zip(panels, results[::2], results[1::2], strict=True):
        style_panel(axes, f"learning rate {plain.learning_rate:g}")
        draw_curves(axes, plain)
        draw_curves(axes, normalized)
    panels[0].set_ylabel("test accuracy")
    figure.suptitle(TITLE, fontsize=14, fontweight="bold")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        title="line: median over the seeds, band: from the worst seed to the best",
        loc="outside lower center",
        ncols=2,
        reverse=True,
        frameon=False,
    )
    figure.savefig(output, dpi=150, bbox_inches="tight", pad_inches=0.15)


def draw_curves(axes: Axes, result: Result) -> None:
    """Draw the test error after each epoch: the median as a line, the range as a band."""
    error = 1 - result.accuracy
    epochs = np.arange(1, error.shape[1] + 1)
    color = COLORS[result.network]
    axes.fill_between(epochs, error.min(axis=0), error.max(axis=0), color=color, alpha=0.2, linewidth=0)
    axes.plot(epochs, np.median(error, axis=0), "o-", color=color, markersize=4, label=result.network)


def style_panel(axes: Axes, title: str) -> None:
    """Let equal ratios of errors be equal heights, label them as accuracies, mark the target."""
    ticks = np.array([0.1, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99])
    axes.set_yscale("log")
    axes.set_ylim(1, 0.007)
    axes.set_yticks(1 - ticks, [f"{tick:.0%}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    axes.axhline(1 - TARGET_ACCURACY, color="0.3", linewidth=1, linestyle="--")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("epoch")


def at_least(minimum: int) -> Callable[[str], int]:
    """Make a parser for an integer that has a smallest value."""

    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, not {value}")
        return value

    return integer


def learning_rate(text: str) -> float:
    """Parse a learning rate."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, not {text}")
    return value


def png_path(text: str) -> Path:
    """Parse the path of the figure; a typing error should not show up after the training only."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, not {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    return path


def parse(argv: Sequence[str] | None) -> Config:
    """Read the command line; ``None`` means ``sys.argv``."""
    parser = argparse.ArgumentParser(
        description="Train a small network on handwritten digits, with and without batch normalization.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--epochs",
        type=at_least(1),
        default=8,
        metavar="N",
        help="how often each network sees all training images; the learning rate decays over this time",
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(2),
        default=12,
        metavar="N",
        help="images per step, at least 2; small batches mean more steps, which hurt the plain network at a "
        "high learning rate, and noisier statistics for batch norm",
    )
    parser.add_argument(
        "--learning-rates",
        type=learning_rate,
        nargs="+",
        default=[0.001, 0.003, 0.01, 0.03, 0.1],
        metavar="RATE",
        help="where Adam's learning rate starts, one panel of the figure for each; 0.001 is the usual choice",
    )
    parser.add_argument(
        "--seeds",
        type=at_least(1),
        default=3,
        metavar="N",
        help="train from N seeds (0, 1, ...), which set the first weights and the order of the images; "
        "the more seeds, the easier to tell effect from luck",
    )
    parser.add_argument(
        "--output", type=png_path, default="digits.png", metavar="PNG", help="where to save the figure"
    )
    parser.add_argument("--no-plot", action="store_true", help="save no figure")
    options = parser.parse_args(argv)
    return Config(
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rates=tuple(sorted(set(options.learning_rates))),
        seeds=options.seeds,
        output=None if options.no_plot else options.output,
    )


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Train, print the table and what it says, save the figure, return the results."""
    config, digits, console = parse(argv), load(), Console()
    with threadpool_limits(1, user_api="blas"):  # for matrices as small as these, threads double the time
        warm_up(config, digits, console)
        results = train_all(config, digits, console)
    console.print(make_table(results, digits))
    console.print("", *findings(results), sep="\n")
    if config.output:
        draw(results, config.output)
        console.print(f"Learning curves: {config.output}")
    return results


if __name__ == "__main__":
    main()
