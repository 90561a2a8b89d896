"""Where do the microseconds of a small call go? `python -m benchmarks.small_call` takes one of (32, 64) apart.

The steps are timed alone, one after the other, so that their sum misses what lies between them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np

with suppress(ImportError):  # asv reads every file of this folder, with versions that lack them
    import nbnorm
    from nbnorm import _batch, _call, _cpu, _gradients
    from nbnorm._cpu import columns

from benchmarks.common import best

SHAPE = (32, 64)


def steps() -> dict[str, dict[str, Callable[[], object]]]:
    """Return the steps of forward and backward, the whole call first."""
    rng = np.random.default_rng(0)
    x, dy, y, dx = (rng.standard_normal(SHAPE, np.float32) for _ in range(4))
    weight, bias, dweight, dbias, *running = (np.ones(SHAPE[1], np.float32) for _ in range(6))
    _, saved = nbnorm.batch_norm_forward(x, weight, bias, out=y)
    view, count, mean, rstd, m2 = saved.view, saved.count, saved.mean, saved.rstd, saved.m2
    epilogue = saved.epilogue
    g, sums = columns.geometry(view, 1), np.zeros((2, view.slots, view.width))
    lines = x.reshape(-1), dy.reshape(-1), y.reshape(-1), dx.reshape(-1)
    outs = dx, dweight, dbias
    options, for_gradients = (_cpu._options(view, epilogue, None, gradient) for gradient in (False, True))
    return {
        "forward": {
            "call": lambda: nbnorm.batch_norm_forward(x, weight, bias, out=y),
            "with running statistics": lambda: nbnorm.batch_norm_forward(x, weight, bias, *running, out=y),
            "its kind": lambda: _call.known("batch", 1, None, _call.PLAIN, x, weight, bias, y),
            "settings": lambda: _batch.training(0.1, 1, "error", "propagate"),
            "backend": lambda: _cpu.forward(view, x, y, epilogue, 1e-5),
            "of it the kernel": lambda: columns.forward_kernel.serial(
                g, lines[0], lines[2], *options, 1e-5, mean, m2, rstd
            ),
        },
        "backward": {
            "call": lambda: nbnorm.batch_norm_backward(dy, saved, out=outs),
            "checks": lambda: _gradients._at_a_glance(dy, saved, outs, 3),
            "backend": lambda: _cpu.backward(view, x, dy, dx, None, mean, rstd, epilogue, count),
            "of it the kernel": lambda: columns.backward_kernel.serial(
                g, lines[0], lines[1], lines[3], None, mean, rstd, *for_gradients, sums, float(count), None
            ),
            "parameters' gradients": lambda: _gradients._parameter_gradients(
                (mean, rstd), weight, bias, outs, 3
            ),
        },
    }


def add_pytorch(parts: dict[str, dict[str, Callable[[], object]]]) -> None:
    """Let PyTorch's operators take their turns, too, if it is there."""
    with suppress(ImportError):
        import torch

        x, dy = torch.randn(2, *SHAPE)
        mean, var, weight, bias = torch.ones(4, SHAPE[1])
        operators = torch.ops.aten
        norm = torch.nn.functional.batch_norm
        _, own_mean, own_rstd = operators.native_batch_norm(x, weight, bias, mean, var, True, 0.1, 1e-5)
        parts["forward"]["PyTorch's call"] = lambda: norm(x, mean, var, weight, bias, True)
        parts["backward"]["PyTorch's call"] = lambda: operators.native_batch_norm_backward(
            dy, x, weight, mean, var, own_mean, own_rstd, True, 1e-5, [True] * 3
        )


def main() -> None:
    """Print the microseconds of each step."""
    whole = steps()
    add_pytorch(whole)
    for operation, parts in whole.items():
        for name, seconds in zip(parts, best(*parts.values()), strict=True):
            print(f"{operation:10} {name:24} {seconds * 1e6:6.1f} us", flush=True)


if __name__ == "__main__":
    main()
