"""How much faster does a PyTorch model train with nbnorm's norms, and from which size on does a call pay?

python -m benchmarks.pytorch_models [--only ResNet] [--threads 2] [--rounds 15] [--json FILE] trains copies of each
model in turns, step by step in one process: PyTorch's norms, nbnorm's, nbnorm's with fusion, and none at all, which is
as fast as other norms can make a model. It prints the best time of each and the median over the rounds of the ratio
to PyTorch's step of the same round.

python -m benchmarks.pytorch_models --calls times forward and backward of single modules over sizes instead, which is
what the thresholds of nbnorm/torch/_policy.py stand on.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from random import Random
from statistics import median
from time import perf_counter

with suppress(ImportError):  # asv reads every file of this folder, in environments without PyTorch
    import torch
    from torch import Tensor, nn

    import nbnorm.torch
    from examples.pytorch_resnet import ResNet18
    from nbnorm.torch import _policy

from benchmarks.common import interleaved

Step = Callable[[], object]
WAYS = ("nbnorm", "fused", "no norms")


def mlp() -> nn.Module:
    """Four hidden layers of 1024 with batch norm."""
    sizes = [256, 1024, 1024, 1024, 1024]
    layers = [nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairwise(sizes)]
    return nn.Sequential(*layers, nn.Linear(1024, 10))


def transformer(norm_first: bool = True) -> nn.Module:
    """Four encoder layers of width 256."""
    layer = nn.TransformerEncoderLayer(256, 8, 1024, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def unet() -> nn.Module:
    """Convolutions over volumes with instance norm, as in medical imaging."""
    sizes = [1, 16, 32, 32, 16]
    return nn.Sequential(
        *(
            nn.Sequential(nn.Conv3d(a, b, 3, padding=1), nn.InstanceNorm3d(b, affine=True), nn.LeakyReLU())
            for a, b in pairwise(sizes)
        ),
        nn.Conv3d(16, 1, 1),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "ResNet-18, 16 x 224 x 224": (lambda: ResNet18(), (16, 3, 224, 224), False),
    "ResNet-18, 16 x 224 x 224, channels last": (lambda: ResNet18(), (16, 3, 224, 224), True),
    "U-Net, 1 x 48 x 48 x 48": (unet, (1, 1, 48, 48, 48), False),
    "MLP, 128 rows": (mlp, (128, 256), False),
    "MLP, 1024 rows": (mlp, (1024, 256), False),
    "Transformer, 8 x 128": (transformer, (8, 128, 256), False),
}


def without_norms(model: nn.Module) -> nn.Module:
    """Let every norm of a model hand its input on."""
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    for name, module in list(model.named_modules()):
        if isinstance(module, norms):
            model.set_submodule(name, nn.Identity())
    return model


def training_step(model: nn.Module, x: Tensor) -> Step:
    """Return a step of gradient descent on a model."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def steps(make: Callable[[], nn.Module], shape: tuple[int, ...], channels_last: bool) -> dict[str, Step]:
    """Make a step for each kind of norm, from the same weights, and check that they agree."""
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    if channels_last:
        model, x = (
            model.to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        )
    models = {"PyTorch": model, "nbnorm": copy.deepcopy(model), "fused": copy.deepcopy(model)}
    nbnorm.torch.replace(models["nbnorm"])
    if not nbnorm.torch.replace(models["fused"], fuse=True).fused:
        del models["fused"]
    outputs = [copy.deepcopy(m)(x).detach() for m in models.values()]
    for y in outputs[1:]:
        torch.testing.assert_close(y, outputs[0], rtol=1e-3, atol=1e-3)
    models["no norms"] = without_norms(copy.deepcopy(model))
    return {name: training_step(m, x) for name, m in models.items()}


def compare(calls: dict[str, Step], rounds: int) -> dict[str, tuple[float, float]]:
    """Return the best seconds of each step, and the median of how many times as fast as PyTorch's it is."""
    for call in calls.values():
        call()  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    order = Random(0)
    for _ in range(rounds):
        order.shuffle(names)  # nobody always runs behind the same other
        for name in names:
            start = perf_counter()
            calls[name]()
            seconds[name].append(perf_counter() - start)
    first = seconds["PyTorch"]
    return {
        name: (min(own), median(a / b for a, b in zip(first, own, strict=True)))
        for name, own in seconds.items()
    }


def module_call(module: nn.Module, x: Tensor, dy: Tensor) -> Step:
    """Return a call of a module, forward and backward."""
    x = x.detach().requires_grad_()

    def call() -> None:
        module(x).backward(dy)

    return call


CALLS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], Tensor]]] = {
    "batch, planes of 196": (
        lambda n: nn.BatchNorm2d(64),
        lambda n: torch.randn(max(2, n // 12544), 64, 14, 14),
    ),
    "batch, planes of 49": (
        lambda n: nn.BatchNorm2d(256),
        lambda n: torch.randn(max(2, n // 12544), 256, 7, 7),
    ),
    "batch, channels last": (
        lambda n: nn.BatchNorm2d(64),
        lambda n: torch.randn(max(2, n // 12544), 64, 14, 14).contiguous(memory_format=torch.channels_last),
    ),
    "batch, rows": (lambda n: nn.BatchNorm1d(256), lambda n: torch.randn(max(2, n // 256), 256)),
    "layer": (lambda n: nn.LayerNorm(256), lambda n: torch.randn(max(2, n // 256), 256)),
    "rms": (lambda n: nn.RMSNorm(256), lambda n: torch.randn(max(2, n // 256), 256)),
    "group": (lambda n: nn.GroupNorm(8, 64), lambda n: torch.randn(max(1, n // 12544), 64, 14, 14)),
    "instance": (lambda n: nn.InstanceNorm2d(64), lambda n: torch.randn(max(1, n // 12544), 64, 14, 14)),
}


def print_calls() -> None:
    """Print how many times as fast as PyTorch's a module is, over sizes."""
    sizes = [2**k for k in (*range(13, 25, 2), 24)]
    print(f"{'':22}" + "".join(f"{n:>10}" for n in sizes))
    for name, (make, draw) in CALLS.items():
        ratios = []
        for n in sizes:
            theirs, x = make(n), draw(n)
            ours, dy = copy.deepcopy(theirs), torch.randn_like(x)
            nbnorm.torch.replace(ours)
            best = interleaved(module_call(theirs, x, dy), module_call(ours, x, dy)).min(axis=0)
            ratios.append(best[0] / best[1])
        print(f"{name:22}" + "".join(f"{ratio:9.2f}x" for ratio in ratios), flush=True)


def main(argv: list[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of both libraries")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="run the models whose names contain this")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--calls", action="store_true", help="single modules over sizes instead of models")
    parser.add_argument("--always", action="store_true", help="compute with nbnorm below its thresholds, too")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.always:
        _policy.smallest = lambda *_: 0
    if options.calls:
        print_calls()
        return
    rows = {}
    print(f"{'':44}{'PyTorch':>10}" + "".join(f"{way:>22}" for way in WAYS))
    for name, case in MODELS.items():
        if options.only in name:
            rows[name] = compare(steps(*case), options.rounds)
            found = {way: f"{s * 1e3:9.1f} ms {r:6.3f}x" for way, (s, r) in rows[name].items()}
            cells = "".join(f"{found.get(way, ''):>22}" for way in WAYS)
            print(f"{name:44}{rows[name]['PyTorch'][0] * 1e3:7.1f} ms{cells}", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
