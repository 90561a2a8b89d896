"""What does an activation or a residual cost in the same pass, and what in a pass of its own?

python -m benchmarks.bench_options prints the times in those of the plain call.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numba import njit, prange

from benchmarks.common import STAGE, TRAINING, Call, Case, Measured, best, forward, measured, prepare, show

CASES = {
    "channels first": STAGE,
    "channels last": STAGE._replace(channels_last=True),
    "rows": Case("batch", (65536, 64)),
}


@njit(parallel=True)
def relu(y):
    for i in prange(y.size):
        y[i] = max(y[i], np.float32(0))


@njit(parallel=True)
def add_relu(y, residual):
    for i in prange(y.size):
        y[i] = max(y[i] + residual[i], np.float32(0))


@njit(parallel=True)
def relu_gradient(dy, y, dz):
    for i in prange(dy.size):
        dz[i] = dy[i] if y[i] > 0 else np.float32(0)


def apart(operation: str, case: Case, with_residual: bool) -> Call:
    """Return the same work in two calls: the plain norm, and a parallel loop over the array."""
    plain, b = prepare(operation, case)
    out, dy = b.out.reshape(-1), b.dy.reshape(-1)
    if operation == "backward":
        y, dz = forward(b)()[0].reshape(-1), np.zeros_like(b.dy)
        behind = partial(plain.func, dz, *plain.args[1:], **plain.keywords)
        return lambda: (relu_gradient(dy, y, dz.reshape(-1)), behind())
    if with_residual:
        return lambda: (plain(), add_relu(out, dy))
    return lambda: (plain(), relu(out))


class Fused(Measured):
    """Times in those of the plain call; the gradient by a residual costs nothing where it stands apart."""

    params = (TRAINING, list(CASES), ["relu", "residual and relu"])
    param_names = ("operation", "case", "option")

    def measure(self, operation, name, option):
        case, with_residual = CASES[name], option.startswith("residual")
        plain = prepare(operation, case)[0]
        fused = prepare(operation, case, "relu", with_residual)[0]
        seconds = best(plain, fused, apart(operation, case, with_residual))
        return seconds[1] / seconds[0], seconds[2] / seconds[0]

    def setup_cache(self):
        return measured(self)

    def track_fused(self, measured, *case):
        return measured[case][0]

    def track_apart(self, measured, *case):
        return measured[case][1]

    track_fused.unit = track_apart.unit = "times the plain call"


if __name__ == "__main__":
    show(Fused)
