"""How fast is nbnorm beside PyTorch, on the same arrays, in the same process, with the same threads?

python -m benchmarks.peers [--threads 2] [--json FILE] prints, for each shape, the time in copies of the tensor
and how many times faster nbnorm is than PyTorch's eager operator, the faster of its plain and `out=` calls.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import numba
import numpy as np

import nbnorm

from .common import SHAPES, batch, interleaved, parallel_copy

Calls = dict[str, Callable[[], object]]


def torch_calls(x: np.ndarray, dy: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> Calls:
    """PyTorch's batch norm, forward and backward, with new results and with given ones."""
    import torch

    aten = torch.ops.aten
    tx, tdy, tw, tb = (torch.from_numpy(array) for array in (x, dy, weight, bias))
    channels = weight.size
    running = torch.zeros(channels), torch.ones(channels)
    _, mean, rstd = aten.native_batch_norm(tx, tw, tb, *running, True, 0.1, 1e-5)
    results = (torch.empty_like(tx), torch.empty_like(mean), torch.empty_like(rstd))
    gradients = (torch.empty_like(tx), torch.empty(channels), torch.empty(channels))
    forward = (tx, tw, tb, *running, True, 0.1, 1e-5)
    backward = (tdy, tx, tw, *running, mean, rstd, True, 1e-5, [True, True, True])
    names = ("out", "save_mean", "save_invstd"), ("out0", "out1", "out2")
    into = dict(zip(names[0], results, strict=True)), dict(zip(names[1], gradients, strict=True))
    return {
        "forward plain": lambda: aten.native_batch_norm(*forward),
        "forward out": lambda: aten.native_batch_norm.out(*forward, **into[0]),
        "backward plain": lambda: aten.native_batch_norm_backward(*backward),
        "backward out": lambda: aten.native_batch_norm_backward.out(*backward, **into[1]),
    }


def nbnorm_calls(x: np.ndarray, dy: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> Calls:
    """Batch norm of nbnorm, forward with running statistics and backward with all gradients, into given arrays."""
    running = np.zeros_like(weight), np.ones_like(weight)
    y, saved = nbnorm.batch_norm_forward(x, weight, bias, *running)
    dx, dweight, dbias = nbnorm.batch_norm_backward(dy, saved)
    return {
        "forward": lambda: nbnorm.batch_norm_forward(x, weight, bias, *running, out=y),
        "backward": lambda: nbnorm.batch_norm_backward(dy, saved, out=(dx, dweight, dbias)),
    }


def agree(x: np.ndarray, dy: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> None:
    """Check that both libraries compute the same before they are timed."""
    import torch

    tx, tdy, tw, tb = (torch.from_numpy(array) for array in (x, dy, weight, bias))
    ty, mean, rstd = torch.native_batch_norm(tx, tw, tb, None, None, True, 0.1, 1e-5)
    tdx, tdweight, tdbias = torch.ops.aten.native_batch_norm_backward(
        tdy, tx, tw, None, None, mean, rstd, True, 1e-5, [True, True, True]
    )
    y, saved = nbnorm.batch_norm_forward(x, weight, bias)
    for ours, theirs in zip(
        (y, *nbnorm.batch_norm_backward(dy, saved)), (ty, tdx, tdweight, tdbias), strict=True
    ):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def measure(shape: tuple[int, ...], channels_last: bool) -> dict[str, float]:
    """Copies and speed-ups of one shape: best of interleaved rounds."""
    b = batch(shape, channels_last)
    first = (0, b.x.ndim - 1, *range(1, b.x.ndim - 1)) if channels_last else tuple(range(b.x.ndim))
    x, dy = b.x.transpose(first), b.dy.transpose(first)
    agree(x, dy, b.weight, b.bias)
    source, target = b.x.reshape(-1), b.out.reshape(-1)
    calls = {"copy": lambda: parallel_copy(source, target)}
    calls |= nbnorm_calls(x, dy, b.weight, b.bias) | torch_calls(x, dy, b.weight, b.bias)
    best = dict(zip(calls, interleaved(*calls.values()).min(axis=0), strict=True))
    row = {"copy_ms": best["copy"] * 1e3}
    for operation in ("forward", "backward"):
        peer = min(best[f"{operation} plain"], best[f"{operation} out"])
        row[f"{operation}_copies"] = best[operation] / best["copy"]
        row[f"{operation}_speedup"] = peer / best[operation]
    return row


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of both libraries")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--only", help="run the shapes whose names contain this")
    options = parser.parse_args(argv)
    import torch

    torch.set_num_threads(options.threads)
    numba.set_num_threads(options.threads)
    print(f"{'shape':44s} {'copy ms':>8s} | forward: copies, x PyTorch | backward: copies, x PyTorch")
    rows = {}
    for name, shape in SHAPES.items():
        for channels_last in (False, True)[: 1 if len(shape) == 2 else 2]:
            label = f"{name} {shape}{' channels last' if channels_last else ''}"
            if options.only and options.only not in label:
                continue
            r = rows[label] = measure(shape, channels_last)
            print(
                f"{label:44s} {r['copy_ms']:8.3f} | {r['forward_copies']:8.2f} {r['forward_speedup']:8.2f}x"
                f"         | {r['backward_copies']:8.2f} {r['backward_speedup']:8.2f}x",
                flush=True,
            )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
