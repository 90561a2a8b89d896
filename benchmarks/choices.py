"""What stands behind choices of the package that no other benchmark shows: `python -m benchmarks.choices`.

Chunks of columns (`nbnorm/_cpu/columns.py`).
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np

with suppress(ImportError):  # asv reads every file of this folder, with versions that lack them
    from nbnorm._cpu import columns
    from nbnorm._view import batch_view

from .common import Case, batch, best


def chunks() -> None:
    """Moments of 64 long columns in more and more chunks, two passes of which go over each."""
    x = batch(Case("batch", (65536, 64))).x
    view = batch_view(x.shape, x.strides, x.itemsize, 1)
    assert view is not None
    cut = columns.Cut(*(int(n) for n in columns.geometry(view)))
    mean, m2 = np.empty((2, 64))
    calls = {}
    for wanted in (16, 8, 32, 64, 128):
        chunk = -(-cut.rows // wanted)
        g = np.array(cut._replace(chunk=chunk, chunks=-(-cut.rows // chunk)))
        calls[wanted] = lambda g=g: columns.moments_kernel(2, g, x.reshape(-1), None, mean, m2)
    seconds = best(*calls.values())
    times = ", ".join(
        f"{wanted} chunks {s / seconds[0]:.2f}" for wanted, s in zip(calls, seconds, strict=True)
    )
    print(f"moments of (65536, 64): {times} x {seconds[0] * 1e6:.1f} us (two threads)")


if __name__ == "__main__":
    chunks()
