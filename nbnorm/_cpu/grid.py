"""How an array is cut into blocks of lanes and chunks of rows.

A lane has a fixed place in its row, so SIMD runs across lanes. Narrow rows are folded, ``fold`` of them
side by side, as long as that is worth merging their lanes; wide ones are cut into blocks of whole slots. Lanes of one
slot, from folding or from ``inner`` > 1, are merged at the end.
"""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple

import numpy as np

from nbnorm._cpu.launch import helper, shares
from nbnorm._cpu.streams import worthwhile
from nbnorm._cpu.tiles import CHUNK
from nbnorm._view import View

# Folding fills rows up to this many lanes: with twice as many, most take up to a fifth more time, a few 0.96 to 1 of it
# (Zen 4, two threads; benchmarks/choices.py, lanes of a row), since narrower rows are sooner enough for two chunks.
WIDE = 384
# Of n rows, folding puts as many side by side as the largest power of two up to sqrt(n) / FOLDING, if WIDE has room for
# them: what it saves in the rows of a block, merging its lanes must not cost (benchmarks/choices.py; Emerald Rapids, 32
# to 2048 rows of 3 to 256 lanes: within a tenth of the best number).
FOLDING = 2
# Lanes of a block, and of one of an array of more than CACHED values: gradients of (256 to 768, 2048) take 0.79 to 0.97
# of the time with 1024 lanes instead of 2048, those of (8192, 2048) 1.12, other shapes 0.8 to 1.09 (Zen 5;
# benchmarks/choices.py, blocks).
CACHED_LANES = 1024
STREAMED_LANES = 2048
CACHED = 3 << 19
# Chunks of a block: about CHUNK values each, a power of two of them, until there are SOME, LONG values each until there
# are MANY. Of three, five or seven equal chunks, one of two threads has one more to do. Every chunk has moments or sums
# of its own for each lane, whose merge is one thread's work: moments of (65536, 64) in 64 chunks take 1.3 to 1.4 times
# as long as in 16, and (512, 2048) in chunks of 32 rows 1.15 to 1.5 times as long as of CHUNK_ROWS at least (AMD
# EPYC with AVX-512, Emerald Rapids; all of this by benchmarks/choices.py). MANY_CHUNKS and LONG_CHUNK are reasoned.
SOME_CHUNKS = 16
MANY_CHUNKS = 64
LONG_CHUNK = 1 << 20
CHUNK_ROWS = 128


class Cut(NamedTuple):
    """How an array is cut: `View` sizes, then what `geometry` chooses and what follows from it."""

    batch: int
    outer: int
    group: int
    inner: int
    period: int
    width: int
    run: int
    fold: int  # rows of the array side by side in one row of lanes
    block: int  # lanes of a block: all of them, or some whole slots
    chunk: int  # rows of a chunk
    lanes: int
    rows: int  # whole rows of lanes
    spare: int  # lanes of the partial row that folding leaves over; it ends the last chunk
    blocks: int
    chunks: int
    streamed: int  # whether results are written past the caches


def geometry(view: View, threads: int, masked: bool = False, size: int = 0, letter: str = "f") -> np.ndarray:
    """Return the `Cut` of a view as an array, the cheapest way to hand a kernel many integers.

    Rows of a mask are not folded: a row of lanes has one weight. ``size`` is that of all arrays in bytes; it and the
    threads make no difference for the bits of a result.
    """
    width = view.group * view.inner
    fold = 1 if masked else max(1, min(WIDE // width, power_of_two(isqrt(view.outer) // FOLDING)))
    lanes, rows = fold * width, view.outer // fold
    if fold > 1:
        block = lanes
    elif rows < 2 * CHUNK_ROWS:
        block = min(CHUNK // rows, CACHED_LANES)
    else:
        block = CACHED_LANES if view.size <= CACHED else STREAMED_LANES
    block = min(lanes, max(block // view.inner, 1) * view.inner) if fold == 1 else lanes
    values = rows * block
    chunks = min(power_of_two(4 * values // (3 * CHUNK)), max(SOME_CHUNKS, values // LONG_CHUNK), MANY_CHUNKS)
    chunks = min(chunks, power_of_two(rows // CHUNK_ROWS))
    chunk = -(-rows // max(chunks, 1))
    spare = view.outer % fold * width
    sizes = (view.batch, view.outer, view.group, view.inner, view.period, view.width, view.run)
    blocks, chunks = -(-lanes // block), -(-rows // chunk)
    streamed = worthwhile(size, block, chunk * block if blocks == 1 else block, letter, threads)
    return np.array(Cut(*sizes, fold, block, chunk, lanes, rows, spare, blocks, chunks, streamed))


def power_of_two(most: int) -> int:
    """Return the largest power of two up to a number; 0 if there is none."""
    return 1 << most.bit_length() >> 1


def fused(view: View, threads: int, masked: bool = False) -> int:
    """Return how many threads should share whole blocks; 0 where it is better that they share their chunks.

    Threads share blocks of the same rows only where there are too few chunks for them: each reads ahead into what the
    other writes. In trials (256, 512) took 66 to 80 us by columns and 35 by rows while two cores were far apart, else
    28 and 26; mostly whole blocks take 1 to 1.5 times as long (Zen 5; benchmarks/choices.py, blocks).
    """
    cut = Cut(*geometry(view, threads, masked).tolist())
    return shares(cut.batch * (cut.blocks if cut.chunks < threads else 1), cut.chunks, threads)


@helper
def unpack(g):
    """Name the integers of a geometry."""
    return Cut(
        g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10], g[11], g[12], g[13], g[14], g[15]
    )  # fmt: skip


class Block(NamedTuple):
    """A block of lanes of one batch entry."""

    batch: int
    base: int  # index of the batch entry's first element
    lane: int
    lanes: int
    width: int  # lanes that remain once folds are merged
    slot: int
    slots: int


@helper
def place(g, task):
    """Block and chunk of a task: chunk by chunk through all blocks, so that neighbouring tasks share rows."""
    cut = unpack(g)
    batch, own = task // (cut.blocks * cut.chunks), task % (cut.blocks * cut.chunks)
    return batch * cut.blocks + own % cut.blocks, own // cut.blocks


@helper
def locate(g, index):
    """Find a block by its index."""
    cut = unpack(g)
    b, lane = index // cut.blocks, index % cut.blocks * cut.block
    lanes = min(cut.block, cut.lanes - lane)
    width = lanes // cut.fold
    base = b * cut.outer * cut.group * cut.inner
    return Block(b, base, lane, lanes, width, b * cut.group + lane // cut.inner, width // cut.inner)


@helper
def rows_end(cut, chunk):
    """One past the last row of a chunk, the spare row included."""
    return min((chunk + 1) * cut.chunk, cut.rows) + (chunk == cut.chunks - 1 and cut.spare > 0)


@helper
def rows_in_one(cut, own, rows, weights, stream):
    """How many of some rows are written in one go: all, if they go past the caches and lie one behind the other.

    Under a mask each has a weight of its own.
    """
    return rows if stream.past and weights is None and own.lanes == cut.lanes else 1


@helper
def lanes_in(cut, own, r, rows):
    """How many lanes of a block rows [r, r + rows) have: the row after the whole ones is the spare one."""
    spare = r + rows > cut.rows
    return (rows - spare) * own.lanes + (cut.spare if spare else 0)
