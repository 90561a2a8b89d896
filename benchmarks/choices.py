"""What stands behind choices of the package that no other benchmark shows: `python -m benchmarks.choices`.

Chunks of columns (`nbnorm/_cpu/columns.py`), and half types beside float32 (README).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

import nbnorm
from nbnorm._cpu import columns
from nbnorm._view import batch_view

from .common import batch, interleaved


def table(title: str, calls: dict[str, Callable[[], object]], unit: str) -> None:
    """Print the best times of calls in turns, the first one as it is and the others as its multiples."""
    best = interleaved(*calls.values()).min(axis=0)
    times = ", ".join(f"{name} {seconds / best[0]:.2f}" for name, seconds in zip(calls, best, strict=True))
    print(f"{title}: {times} x {best[0] * 1e6:.1f} us ({unit})")


def chunks() -> None:
    """Moments of 64 long columns in more and more chunks, two passes of which go over each."""
    x = batch((65536, 64)).x
    view = batch_view(x.shape, x.strides, x.itemsize, 1)
    assert view is not None
    cut = columns.Cut(*(int(n) for n in columns.geometry(view)))
    mean, m2 = np.empty((2, 64))
    calls = {}
    for wanted in (16, 8, 32, 64, 128):
        chunk = -(-cut.rows // wanted)
        g = np.array(cut._replace(chunk=chunk, chunks=-(-cut.rows // chunk)))
        calls[f"{wanted} chunks"] = lambda g=g: columns.moments_kernel(2, g, x.reshape(-1), None, mean, m2)
    table("moments of (65536, 64)", calls, "two threads")


def halves() -> None:
    """Forward passes of half types in the time of float32, for arrays of 25 to 34 MB in float32."""
    import ml_dtypes

    for norm, shape in (("batch", (32, 64, 56, 56)), ("batch", (100352, 64)), ("layer", (8192, 1024))):
        b = batch(shape)
        weight = np.ones(shape[1], np.float32)
        forward = getattr(nbnorm, f"{norm}_norm_forward")

        calls = {}
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            x = b.x.astype(dtype)
            calls[np.dtype(dtype).name] = partial(forward, x, weight, weight, out=np.empty_like(x))
        table(f"{norm} norm of {shape}", calls, "the threads of Numba")


if __name__ == "__main__":
    chunks()
    halves()
