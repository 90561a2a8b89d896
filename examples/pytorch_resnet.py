"""Train a ResNet-18 in PyTorch on a CPU, once with its own batch norm and once with nbnorm's.

The question: what does one line, `nbnorm.torch.replace(model)`, change? The losses should stay the same,
and a training step should take less time.

The data are made up: stripes in ten directions, with a random phase, width, color and noise; the network
has to tell the direction. Two copies of one network start from the same weights and see the same batches.
They take turns step by step, so that whatever else happens on the machine happens to both.

    python examples/pytorch_resnet.py
    python examples/pytorch_resnet.py --size 224 --channels-last --steps 10
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import nbnorm.torch

CLASSES = 10
WARM_UP = 2  # steps whose time does not count: the first ones compile nbnorm's kernels
COLORS = {"PyTorch": "#d55e00", "nbnorm": "#0072b2", "nbnorm, fused": "#009e73"}


class BasicBlock(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet18(nn.Module):
    """The network of He et al., Deep Residual Learning for Image Recognition (2015), with 18 layers."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        sizes = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(BasicBlock(inside, outside, stride), BasicBlock(outside, outside, 1))
                for inside, outside, stride in sizes
            )
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.stages(x))
        return self.fc(torch.flatten(x, 1))


def stripes(images: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw images of shape (images, 3, size, size) and their labels, which are directions."""
    labels = torch.randint(CLASSES, (images,), generator=generator)
    angle = (labels / CLASSES * math.pi).view(-1, 1, 1)
    phase, width = torch.rand(2, images, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    along = x * torch.cos(angle) + y * torch.sin(angle)
    wave = torch.sin(2 * math.pi * ((4 + 4 * width) * along + phase))
    color = torch.rand(images, 3, 1, 1, generator=generator)
    noise = torch.randn(images, 3, size, size, generator=generator)
    return color * wave.unsqueeze(1) + 0.5 * noise, labels


@dataclass
class Run:
    """A network in training: its losses and the seconds of its steps."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float]
    seconds: list[float]

    @property
    def step(self) -> float:
        """Median time of a step in seconds."""
        return float(np.median(self.seconds[WARM_UP:]))

    def train_on(self, images: Tensor, labels: Tensor) -> None:
        """Take one step of gradient descent."""
        start = perf_counter()
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.seconds.append(perf_counter() - start)
        self.losses.append(loss.item())


def make_runs(channels_last: bool, rate: float) -> list[Run]:
    """Make copies of one network, all but the first with nbnorm in it."""
    torch.manual_seed(0)
    original = ResNet18()
    if channels_last:
        original = original.to(memory_format=torch.channels_last)
    models = {
        "PyTorch": original,
        "nbnorm": copy.deepcopy(original),
        "nbnorm, fused": copy.deepcopy(original),
    }
    print(nbnorm.torch.replace(models["nbnorm"]))
    print(nbnorm.torch.replace(models["nbnorm, fused"], fuse=True))
    return [
        Run(name, model, torch.optim.SGD(model.parameters(), rate, momentum=0.9), [], [])
        for name, model in models.items()
    ]


def train(runs: Sequence[Run], steps: int, batch_size: int, size: int, channels_last: bool) -> None:
    """Train all networks on the same batches, in turns."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        images, labels = stripes(batch_size, size, generator)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        for run in runs:
            run.train_on(images, labels)
        losses = "  ".join(f"{run.losses[-1]:.6f} {run.seconds[-1] * 1e3:7.0f} ms" for run in runs)
        print(f"step {step:3d}  {losses}", flush=True)


def report(runs: Sequence[Run]) -> None:
    """Print how the losses and the times compare."""
    first = runs[0]
    for run in runs:
        apart = max(abs(a - b) / abs(b) for a, b in zip(run.losses, first.losses, strict=True))
        print(
            f"{run.name:15s} {run.step * 1e3:7.1f} ms per step, {first.step / run.step:5.2f} times as fast as PyTorch, "
            f"losses differ by {apart:.1e} at most"
        )


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draw the losses over one another, and the times of the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, times = figure.subplots(1, 2)
    for i, run in enumerate(runs):
        losses.plot(run.losses, color=COLORS[run.name], label=run.name, linewidth=5 - 2 * i)
        times.barh(run.name, run.step * 1e3, color=COLORS[run.name])
        times.text(run.step * 1e3, i, f"  {run.step * 1e3:.0f} ms", va="center")
    losses.set(xlabel="step", ylabel="loss", title="The same losses")
    losses.legend(frameon=False)
    times.set(xlabel="median time of a training step in ms", title="ResNet-18 on a CPU")
    times.margins(x=0.2)
    times.invert_yaxis()
    for axes in (losses, times):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    print(f"figure: {path}")


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Train, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=96, help="height and width of the images")
    parser.add_argument("--learning-rate", type=float, default=0.001)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("pytorch_resnet.png"))
    parser.add_argument("--no-plot", action="store_true")
    options = parser.parse_args(argv)
    if options.steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}, not {options.steps}")
    runs = make_runs(options.channels_last, options.learning_rate)
    train(runs, options.steps, options.batch_size, options.size, options.channels_last)
    report(runs)
    if not options.no_plot:
        plot(runs, options.output)
    return runs


if __name__ == "__main__":
    main()
