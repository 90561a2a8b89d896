"""What part of a training step do batch norm layers take, and what does keeping their buffers save?

The network is that of examples/digits.py, and a wider one: dense layers with batch norm and relu between them.
python -m benchmarks.bench_training prints seconds, the share of the layers and the bytes that they allocate.
OPENBLAS_NUM_THREADS=1 suits matrices as small as these.
"""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np

import nbnorm
from benchmarks.common import EPS, Measured, best, measured, oracle, reference, show

NETWORKS = {"digits": (64, 64, 128, 64, 10), "wide": (512, 256, 1024, 1024, 10)}  # samples and features


class Network:
    """Dense layers, each but the last with batch norm and relu, and a step of gradient descent."""

    def __init__(self, samples: int, *sizes: int, reuse_buffers: bool) -> None:
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((samples, sizes[0]), np.float32)
        self.target = rng.standard_normal((samples, sizes[-1]), np.float32)
        self.weights = [
            rng.standard_normal(s, np.float32) * np.float32((2 / s[0]) ** 0.5) for s in pairwise(sizes)
        ]
        self.norms = [
            nbnorm.BatchNorm(n, activation="relu", reuse_buffers=reuse_buffers) for n in sizes[1:-1]
        ]

    def step(self) -> None:
        """Forward, backward, update."""
        inputs, *_ = self.inputs, self.products, self.gradients = [self.x], [], []
        for weight, norm in zip(self.weights, self.norms, strict=False):
            self.products.append(inputs[-1] @ weight)
            inputs.append(norm(self.products[-1]))
        dy = (inputs[-1] @ self.weights[-1] - self.target) / np.float32(len(self.x))
        for i in reversed(range(len(self.weights))):
            dweight = inputs[i].T @ dy
            if i:
                self.gradients.insert(0, dy @ self.weights[i].T)
                dy = self.norms[i - 1].backward(self.gradients[0])
            self.weights[i] -= np.float32(1e-3) * dweight
        for norm in self.norms:
            for name, value in norm.params.items():
                value -= np.float32(1e-3) * norm.grads[name]

    def layers(self) -> None:
        """What the step asks of the layers, once more."""
        for norm, z, dy in zip(self.norms, self.products, self.gradients, strict=True):
            norm(z)
            norm.backward(dy)

    def check(self) -> None:
        """Compare the first layer's results with the oracle."""
        norm, z, dy = self.norms[0], self.products[0], self.gradients[0]
        y, dx = norm(z), norm.backward(dy)
        axes = {"reduced": (0,), "param": (1,)}
        right = reference.forward(z, *norm.params.values(), eps=EPS, activation="relu", **axes)
        gradients, _ = reference.backward(dy, right)
        oracle.assert_within(y, right.y, oracle.y_tolerance(right.plain), "y")
        oracle.assert_within(dx, gradients.dx, oracle.dx_tolerance(right.plain, gradients), "dx")


class Step(Measured):
    """With new results in every step, and with the same buffers again."""

    params = (list(NETWORKS), ["new", "reused"])
    param_names = ("network", "buffers")

    def measure(self, name, buffers):
        network = Network(*NETWORKS[name], reuse_buffers=buffers == "reused")
        network.step()
        network.check()
        step, layers = best(network.step, network.layers)
        tracemalloc.start()
        network.layers()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return step, layers / step, peak

    def setup_cache(self):
        return measured(self)

    def track_seconds(self, measured, *case):
        return measured[case][0]

    def track_share(self, measured, *case):
        return measured[case][1]

    def track_bytes(self, measured, *case):
        return measured[case][2]

    track_seconds.unit = "seconds"
    track_share.unit = "of the step"
    track_bytes.unit = "bytes"


if __name__ == "__main__":
    show(Step)
