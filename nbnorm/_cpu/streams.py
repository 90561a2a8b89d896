"""Results past the caches: whole lines of memory, written without being read first and without driving others out.

A plain store brings its line into the caches. Where x and the results nearly fill the last-level cache together, that
is a transfer for nothing, and takes the place of x, which a second pass reads. Streamed results are computed block by
block, each a few lines that the compiler keeps in registers, and stored from there.

A line that is written in part, plainly, between others that are streamed costs more than itself: it is read, and holds
the stream up. So a block goes on from where a row, segment or run ends to where the next begins, if that is behind it
in memory; until then, a seam in cache holds it. Only the ends of a whole stretch are written plainly. In trials,
streamed rows of 256 lanes whose ends were plain took 1.4 to 1.9 times as long, those of 1024 values 1.3 (Zen 4).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from numba import types

from nbnorm._cpu.bfloats import processor_rounds
from nbnorm._cpu.lanes import copy_row
from nbnorm._cpu.launch import helper, inlined
from nbnorm._cpu.memory import LINE, row
from nbnorm._cpu.row_type import data_of
from nbnorm._cpu.stores import block_like, rounded_in_blocks, store_block
from nbnorm._math import emitted

# Neighbours that are worth it if each row, segment or run of as many is followed by the next one, and the least length
# of such a stretch; of halves by NumPy's letter. Of 192 and more values rows take 0.61 to 0.97 of the time, of 128 and
# 160 0.86 to 1.2, of 64 and 96 1.08 to 1.9; of float16 0.32 to 1 from 512 on, 1.06 to 1.3 with 256. Segments of 196 and
# 256 take 0.78 to 0.84 (Zen 4; benchmarks/choices.py, streams); of 196, one slot by itself takes 1.7 to 1.9 times as
# long as eight that follow each other (the same, slots past the caches). bfloat16 that is not rounded by the processor,
# which takes as long as its way to memory, took 0.73 to 1.25 of any length; one that is takes 0.68 to 0.95 from 192
# lanes on, rows of 256 1.03 to 1.13 (the same, streams), eight segments of 196, a shorter stretch, 0.83 to 1; half as
# many of these took up to 1.11 backward in trials.
LEAST = (192, 768)
LEAST_OF_HALVES = {"e": (512, 2048), "E": (2048, 2048)}
LEAST_OF_ROUNDED = (192, 2048)
# Share of the last-level cache that x and the results may fill before they are worth it: others use it, too. Of 32 MB,
# all walks take 0.63 to 0.95 of the time from 24 MB on, backward, forward from 28 MB; forward 0.73 to 1.04 with 24,
# 0.92 to 1.13 with 20, 1.3 to 1.53 with 16 (Zen 4; benchmarks/choices.py, streams, cases around the last-level cache).
FULL = 0.75
# Bytes of that cache at most, and of one of which the system does not tell; a larger one mostly serves many cores.
MOST = 1 << 25
# Bytes of one from which on it is far from all of them: of 300 MB on Emerald Rapids, two get data as slowly as from
# memory. That others of 100 MB and more are like it is reasoned; the largest that a few cores have nearby have 96 MB.
FAR = 100 << 20
# What such a one counts for, for each thread. Past the caches, x and results of 8 MB and more together take two threads
# 0.5 to 0.85 of the time, and 0.77 to 1.01 with a copy of the results behind it, as the next layer of a network reads
# them; those of 4 to 6 MB 0.56 to 0.85, and 0.9 to 1.26 with that copy (Emerald Rapids; the same, streams). What lies
# between is not measured; that it grows with the threads is reasoned: so does the second-level cache that they have
# together. Half types gain nothing: with 8 to 16 MB, float16 takes 0.92 to 1.07 of the time, once 1.21, with the copy
# 0.93 to 1.15, bfloat16 0.68 to 1.04, with the copy 0.95 to 1.13.
SHARE = 5 << 20


@lru_cache(maxsize=1)
def told() -> int:
    """Return the bytes of the last-level cache, as far as the system tells."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(size.removesuffix("K")) << 10 or MOST
    except (OSError, ValueError):
        return MOST


def last_level(threads: int, letter: str) -> int:
    """Return how much of the last-level cache is at hand for arrays of a type."""
    far = told() >= FAR and letter not in LEAST_OF_HALVES
    return min(MOST, SHARE * threads if far else told())


def remote() -> bool:
    """Whether the last-level cache is mostly one that many cores share, so that data from there may take long."""
    return told() > MOST


def worthwhile(size: int, neighbours: int, stretch: int, letter: str, threads: int) -> bool:
    """Whether arrays of so many bytes together do not stay in the caches, and most lines of a stretch are whole."""
    least_neighbours, least_stretch = least(letter)
    return (
        neighbours >= least_neighbours
        and stretch >= least_stretch
        and size > FULL * last_level(threads, letter)
    )


def least(letter: str) -> tuple[int, int]:
    """Return the least neighbours, and the least length of a stretch of them, that are worth it."""
    if letter == "E" and processor_rounds():
        return LEAST_OF_ROUNDED
    return LEAST_OF_HALVES.get(letter, LEAST)


def bytes_before_line(x):
    """Bytes before the first that begins a line of memory."""
    return -x.ctypes.data % LINE


@emitted(bytes_before_line)
def _bytes_before_line(typingctx, x):
    def generate(context, builder, signature, args):
        word = context.get_value_type(types.intp)
        address = builder.ptrtoint(data_of(context, builder, x, args[0]), word)
        return builder.and_(builder.neg(address), word(LINE - 1))

    return types.intp(x), generate


def fence():
    """Let other threads see what has been streamed."""


@emitted(fence)
def _fence(typingctx):
    def generate(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), generate


class Stream(NamedTuple):
    """A stretch of memory that is being written: where its first block begins, and how far it goes."""

    past: bool  # the caches
    start: int
    end: int


@helper
def begin(y, streamed):
    """Return the stream before the first element; elements that lie across lines of memory are written plainly."""
    return Stream(streamed != 0 and bytes_before_line(y) % y.itemsize == 0, 0, -1)


@helper
def close(y, seam, stream):
    """Write what the seam holds."""
    if stream.start < stream.end:
        held = (stream.end - stream.start) % seam.shape[0]
        copy_row(row(y, stream.end - held, held), row(seam, 0, held))


@helper
def follow(y, seam, stream, first, size):
    """Go on with a stream, or with a new one if it does not end where the next elements begin."""
    start = stream.start
    if first != stream.end:
        close(y, seam, stream)
        start = first + bytes_before_line(row(y, first, size)) // y.itemsize
    return Stream(stream.past, start, first + size)


@helper
def finish(y, seam, stream):
    """End a stream, and let other threads see it."""
    if stream.past:
        close(y, seam, stream)
        fence()


def writer(piece: Any, whole_block: Any = None) -> Any:
    """Return a function that writes neighbours, plainly or past the caches, and returns the stream they are part of.

    ``piece(target, at, i, n, given)`` is what computes ``n`` of them, from the ``i``-th on, which is element ``at`` of
    the arrays; ``whole_block`` is the same, for as many as a block has.
    """
    whole_block = whole_block or piece

    @inlined
    def write(y, seam, stream, first, size, given):
        """Write ``size`` neighbours from element ``first`` on.

        The first piece ends where a block begins, the last is less than a block. Plainly, one piece is all there is,
        but for blocks that the processor rounds: then the first is empty.
        """
        block = block_like(y)
        i, n, whole = 0, size, block.shape[0]
        if rounded_in_blocks(y) and size >= whole:
            n = 0
        if stream.past:
            stream = follow(y, seam, stream, first, size)
            ahead = stream.start - first
            n = min(size, ahead if ahead > 0 else ahead % whole)
        while i < size:
            at = first + i
            held = (at - stream.start) % whole
            in_seam = stream.past and at >= stream.start
            piece(row(seam, held, n) if in_seam else row(y, at, n), at, i, n, given)
            i += n
            if in_seam and held + n == whole:
                store_block(seam, y, first + i - whole, True)
            while i + whole <= size:
                whole_block(block, first + i, i, whole, given)
                store_block(block, y, first + i, stream.past)
                i += whole
            n = size - i
        return stream

    return write
