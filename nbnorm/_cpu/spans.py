"""How rows are cut: into bands, which are tasks, and long ones into chunks of columns."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from nbnorm._cpu.launch import balanced, inlined
from nbnorm._cpu.tiles import CHUNK
from nbnorm._view import View

# Rows of a band at most: their terms of the parameters' gradients are summed in the array's own type, in chains of
# a quarter as many additions, before float64 takes over. Fewer where that leaves less than MIN_BANDS.
BAND_ROWS = 128
MIN_BANDS = 8
# Rows that backward takes together: one's coefficients are computed while the next one is read, and the parameters'
# sums are read and written once for all of them.
TOGETHER = 4
# Rows that forward takes together, up to so many columns: a fifth less time, but half as much more with 1024
# columns (benchmarks/choices.py).
PAIR = 2
SHORT_ROW = 256


class Cut(NamedTuple):
    """How rows are cut: `View` sizes, then rows of a band, columns of a chunk, and how many there are of both."""

    rows: int
    inner: int
    period: int
    band: int
    chunk: int
    bands: int
    chunks: int
    together: int  # rows that forward takes together


@lru_cache(maxsize=4096)
def geometry(view: View, threads: int, masked: bool = False) -> np.ndarray:
    """Return the `Cut` of a view as an array, the cheapest way to hand a kernel many integers.

    Neither threads nor a mask make a difference here.
    """
    rows, inner = view.slots, view.inner
    wanted = min(max(MIN_BANDS, rows // BAND_ROWS), -(-rows * inner // CHUNK))
    band = min(BAND_ROWS, -(-rows // max(wanted, 1)))
    together = PAIR if inner <= SHORT_ROW else 1
    cut = Cut(rows, inner, view.period, band, CHUNK, -(-rows // band), -(-inner // CHUNK), together)
    return np.array(cut)


@lru_cache(maxsize=4096)
def fused(view: View, threads: int, masked: bool = False) -> bool:
    """Whether whole bands keep the threads busy."""
    return balanced(Cut(*geometry(view, threads)).bands, threads)


@inlined
def unpack(g):
    """Name the integers of a geometry."""
    return Cut(g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7])


@inlined
def span(g, r, chunk):
    """First element of a chunk of a row, how many there are, and where their parameters start."""
    cut = unpack(g)
    start = chunk * cut.chunk
    n = min(cut.chunk, cut.inner - start)
    return r * cut.inner + start, n, r % cut.period * cut.inner + start


@inlined
def band_rows(g, band):
    """First and one past the last row of a band."""
    cut = unpack(g)
    return band * cut.band, min((band + 1) * cut.band, cut.rows)
