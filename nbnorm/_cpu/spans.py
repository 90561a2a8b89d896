"""How rows are cut: into bands of samples, which are tasks, and long ones into chunks of columns.

A sample is ``period`` rows, which have all the parameters between them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nbnorm._cpu.launch import inlined, shares
from nbnorm._cpu.short_slots import SLOTS
from nbnorm._cpu.streams import remote, told, worthwhile
from nbnorm._cpu.tiles import CHUNK, FOUR, TILE, within
from nbnorm._view import View

# Rows that backward takes together, pass after pass, if they are short, for what `short_slots` says; else a row follows
# the other, four in all, whose terms of the parameters' gradients are added at once. Short are those of fewer values
# than are ever streamed: of 128 and 160 four take 1.06 to 1.28 of the time of eight, past the caches 0.97 to 1.21; of
# 192 and 256, eight take 0.88 to 0.97 of that of four in cache, past it, where they are streamed, 1.04 to 1.13 (Zen 4;
# benchmarks/choices.py, rows together).
ROWS = 8
SHORT_PAIR = 191  # of x and dy
# Values of a row from which backward takes four rows side by side for the sums of rows and of parameters at once: of
# 1024 and more they take 0.81 to 0.95 of the time of one walk for each, past the caches 0.88 to 1.08; of 192 to 768
# 0.85 to 0.9 of it while they fit the second-level cache, beyond it 0.98 to 1.54, since each such row begins a walk
# along memory anew (Zen 4; the same, sums in one walk). Not of float64, of which a chain of additions may be but a few
# long.
LONG = 1024
# Bytes of a row of x and of y up to which forward takes such rows together, where x and y fit half of the last-level
# cache: 384 to 768 columns of float32 take 0.78 to 0.97 of the time there, up to 2048 take 0.84 to 1.02. Of more, or
# where that cache is remote, columns and elements of these rows are fewer: 512 columns take up to a quarter less time
# row by row (Zen 4, benchmarks/choices.py).
ROW = 1 << 14
PAST_ROW = 256
PAST = 2048
# Columns up to which forward asks for the next rows before it normalizes these: where the last-level cache is remote,
# 0.82 to 1.04 of the time, 0.92 to 1.13 with rows of 2048 (Emerald Rapids); where it is near and they are taken one by
# one, 0.8 to 0.95, halves 0.65 to 0.98, with rows of 2048 0.95 to 1.03. There, rows that are taken together take up to
# 1.45 of the time (Zen 5, benchmarks/choices.py, rows in advance); in trials backward lost by it, too.
FETCHED = 1536
# Samples of a band at most: their terms of the parameters' gradients are summed in the array's own type, in chains of
# 16 additions of four terms each, before float64 takes over. Fewer where there would be less than MIN_BANDS bands, but
# not so few that a band has much less than BAND_SIZE elements, or that the sums of all bands are large beside x. Few
# bands are 8, 4 or 2 where they can be: of 3, 5 or 7, threads would share not whole ones, but chunks, pass after pass
# (`shares`). 18 to 201 rows take 0.73 to 0.95 of the time so, backward 0.77 to 1.04 (Emerald Rapids, two threads;
# benchmarks/bench_norms.py, FewRows, before and after).
BAND = 64
MIN_BANDS = 8
BAND_SIZE = 16384
# Bands that a task of forward goes through, which sums nothing over them: as many as make BUNDLE values, but not so
# many that less than TASKS tasks remain for each thread, or that equal tasks leave threads idle. They take 0.94 to 1 of
# the time of one by one (Emerald Rapids, two threads; benchmarks/choices.py, bands of a task). TASKS is reasoned: the
# last task may have but one band.
BUNDLE = 4 * CHUNK
TASKS = 8


class Cut(NamedTuple):
    """How rows are cut: `View` sizes, samples of a band, bands, chunks of a row, rows that are taken together."""

    rows: int
    inner: int
    period: int
    band: int
    bands: int
    chunks: int
    step: int  # in forward
    together: int  # in backward, of samples one behind the other
    streamed: int  # whether results are written past the caches
    ahead: int  # rows that forward asks for before it normalizes these
    bundle: int  # bands of a task of forward


_BANDS = Cut._fields.index("bands")


def geometry(view: View, threads: int, masked: bool = False, size: int = 0, letter: str = "f") -> np.ndarray:
    """Return the `Cut` of a view as an array, the cheapest way to hand a kernel many integers.

    All traversals are asked in this way; here a mask does not matter, nor do threads for any sum. ``size`` is that of
    all arrays in bytes.
    """
    rows, inner, period = view.slots, view.inner, view.period
    samples = rows // period
    band = samples_in_band(samples, rows * inner)
    step = rows_together(rows, inner, size)
    together = ROWS if inner <= SHORT_PAIR else FOUR
    chunks = -(-inner // CHUNK)
    ahead = step if inner <= FETCHED and (step == 1 or remote()) else 0
    streamed = worthwhile(size, inner, band * inner if period == 1 else inner, letter, threads)
    bands = -(-samples // band)
    bundle = max(1, min(BUNDLE // max(band * period * inner, 1), bands // (TASKS * threads)))
    while bundle > 1 and not shares(-(-bands // bundle), rows * chunks, threads):
        bundle -= 1
    return np.array(Cut(rows, inner, period, band, bands, chunks, step, together, streamed, ahead, bundle))


def samples_in_band(samples: int, size: int) -> int:
    """Return how many samples make a band, such that two or four threads may share few bands equally."""
    wanted = min(max(MIN_BANDS, samples // BAND), -(-size // BAND_SIZE))
    few = (8, 4, 2) if wanted > 4 else (4, 2)
    for bands in few if 2 < wanted <= MIN_BANDS else ():
        band = -(-samples // bands)
        if FOUR <= band <= BAND and -(-samples // band) == bands:
            return band
    return min(BAND, max(FOUR, -(-samples // max(wanted, 1))))


def long_rows(inner: int, letter: str) -> bool | None:
    """Whether backward takes the sums of four rows and of parameters in one walk, as kernels are told: True or None.

    What None leaves out of them is not compiled.
    """
    return True if inner >= LONG and letter != "d" else None


def rows_together(rows: int, inner: int, size: int) -> int:
    """Return how many rows forward takes together, if x and y have ``size`` bytes."""
    if size <= told() // 2 and not remote():
        return SLOTS if inner <= TILE and size <= rows * ROW else 1
    return min(SLOTS, PAST // max(inner, 1)) if inner <= PAST_ROW else 1


def band_count(g: np.ndarray) -> int:
    """Return the number of bands."""
    return int(g[_BANDS])


def fused(view: View, threads: int, masked: bool = False) -> int:
    """Return how many threads should share whole bands; 0 where chunks of their rows keep more threads busy."""
    cut = Cut(*geometry(view, threads).tolist())
    return shares(cut.bands, cut.rows * cut.chunks, threads)


@inlined
def unpack(g):
    """Name the integers of a geometry."""
    return Cut(g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10])


@inlined
def short_rows(g):
    """Whether rows are so short that backward sums each at once: whole, and with sums of their own."""
    return unpack(g).together == ROWS


@inlined
def span(g, r, chunk):
    """First element of a chunk of a row, how many there are, and where their parameters start."""
    cut = unpack(g)
    start = chunk * CHUNK
    n = min(CHUNK, cut.inner - start)
    return r * cut.inner + start, n, within(r, cut.period) * cut.inner + start


@inlined
def samples_of(g, band):
    """First and one past the last sample of a band."""
    cut = unpack(g)
    return band * cut.band, min((band + 1) * cut.band, cut.rows // cut.period)
