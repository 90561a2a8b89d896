"""How segments are cut into chunks, and in which order tasks go through them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nbnorm._cpu.launch import helper, shares
from nbnorm._cpu.memory import part
from nbnorm._cpu.streams import worthwhile
from nbnorm._cpu.tiles import CHUNK, within
from nbnorm._view import View

# Elements of the neighbouring slots that a task goes through together, as long as there are some tasks for each thread:
# a tenth to two fifths less time than slot by slot, since the walk along memory is longer (benchmarks/choices.py; AMD
# EPYC, Zen 4, two cores, 1 MB of second-level and 32 MB of last-level cache). Slots of several segments, which lie
# apart, gain beyond the second-level cache, too; slots of one segment, neighbours in memory, gain backward only while
# x, dy and dx fit it (in float32), forward up to four times that. Of those that are streamed and lie apart, eight are
# enough: of float32 they take 0.54 to 0.92 of the time of one by one, backward 0.6 to 1.12, of (8, 64, 160, 160) and
# (32, 64, 112, 112) 1.13 to 1.23, which are too large to be taken together (Zen 4; the same, slots past the caches).
APART_TOGETHER = 1 << 19
STREAMED_SLOTS = 8
TOGETHER = 5 << 14
TASKS = 4


class Cut(NamedTuple):
    """How an array is cut: `View` sizes, then the rows and columns of a chunk and the chunks of a slot."""

    outer: int
    group: int
    inner: int
    period: int
    width: int
    run: int
    rows: int
    cols: int
    chunks: int
    slots: int  # neighbours that one task goes through together
    streamed: int  # whether results are written past the caches


def geometry(view: View, threads: int, masked: bool = False, size: int = 0, letter: str = "f") -> np.ndarray:
    """Return the `Cut` of a view as an array, the cheapest way to hand a kernel many integers.

    A mask makes no difference here; ``slots`` and ``streamed``, which follows from the ``size`` of all arrays in
    bytes, their type and the threads, make none for the bits of a result.
    """
    rows, cols = (1, CHUNK) if view.inner > CHUNK else (max(1, CHUNK // view.inner), view.inner)
    chunks = -(-view.outer // rows) * -(-view.inner // cols)
    rule = (view.period, view.width, view.run)
    slots = together(view, threads, True)
    streamed = worthwhile(size, min(view.run, cols), slots * cols, letter, threads)
    if not streamed:
        slots = together(view, threads)
    return np.array(Cut(view.outer, view.group, view.inner, *rule, rows, cols, chunks, slots, streamed))


def together(view: View, threads: int, streamed: bool = False) -> int:
    """Return how many neighbouring slots a task should go through, such that equal tasks remain for all threads."""
    most = TOGETHER if view.outer == 1 else APART_TOGETHER
    slots = min(most // max(view.values, 1), view.group // (TASKS * threads))
    if streamed and view.outer > 1:
        slots = min(slots, STREAMED_SLOTS)
    while slots > 1 and -(-view.group // (slots * threads)) * slots * threads > 1.05 * view.group:
        slots -= 1
    return max(1, slots)


def fused(view: View, threads: int, masked: bool = False) -> int:
    """Return how many threads should share whole slots; 0 where their chunks keep more threads busy."""
    cut = Cut(*geometry(view, threads).tolist())
    return shares(-(-cut.group // cut.slots), cut.chunks, threads)


@helper
def unpack(g):
    """Name the integers of a geometry."""
    return Cut(g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10])


@helper
def block(index, outer, inner, rows, cols):
    """First row, rows, first column and columns of a block of an outer x inner plane."""
    across = -(-inner // cols)
    r, c = index // across * rows, index % across * cols
    return r, min(rows, outer - r), c, min(cols, inner - c)


@helper
def positions(weights, cut, r, j, start, n):
    """Weights of ``n`` columns of run ``j`` in row ``r``: every run has the same."""
    return part(weights, (r - j) * cut.run + start, n)


@helper
def at_once(cut, slots, cols):
    """How many of some slots are walked at once, and columns then: whole segments of neighbours make one long one."""
    return (slots, slots * cols) if cols == cut.inner else (1, cols)


@helper
def runs(c0, cols, run):
    """First run and one past the last run that the columns [c0, c0 + cols) meet."""
    return c0 // run, -(-(c0 + cols) // run)


@helper
def bounds(cut, j, c0, cols):
    """First column of run ``j`` within [c0, c0 + cols), and how many there are."""
    start = max(c0, j * cut.run)
    return start, min(c0 + cols, (j + 1) * cut.run) - start


@helper
def alike(cut, slot, end):
    """How many slots from one on, before an end, have neighbouring parameters, and one row of a mask."""
    return min(cut.period - within(slot, cut.period), end - slot)


@helper
def tasks(g):
    """How many tasks a pass of its own has: chunks of neighbouring slots."""
    cut = unpack(g)
    return -(-cut.group // cut.slots) * cut.chunks


@helper
def neighbours(g, task):
    """First slot, number of slots and chunk of such a task."""
    cut = unpack(g)
    slot = task // cut.chunks * cut.slots
    return slot, min(cut.slots, cut.group - slot), task % cut.chunks
