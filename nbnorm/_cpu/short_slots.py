"""Moments of slots of one tile each, a few together: the sums of one do not wait for the divisions of another.

They are concluded side by side, with the bits of `tile_moments`.
"""

from __future__ import annotations

import numpy as np

from nbnorm._cpu.held_sums import ROWS, held_like, held_totals, hold_sums
from nbnorm._cpu.lane_moments import conclude
from nbnorm._cpu.lanes import add_row, fill
from nbnorm._cpu.launch import helper
from nbnorm._cpu.memory import row
from nbnorm._cpu.tiles import FOUR, careful_tile_moments, in_fours, nearby, piece, sums_about, tile_squares
from nbnorm._math import rounded

# Slots that are taken together, as many as the widest vectors have elements: rows of 32 values take 0.9 of the time of
# eight together, half of that one by one (Zen 4, benchmarks/choices.py, rows together).
SLOTS = ROWS


@helper
def segment_sums(x, first, stride, rows, n, shift):
    """Sums of (x - shift) and of (x - shift)**2 of a slot, piece by piece."""
    total = squares = 0.0
    for r in range(rows):
        _, a, b = sums_about(row(x, first + r * stride, n), None, shift)
        total += a
        squares += b
    return total, squares


@helper
def add_fours(x, first, apart, stride, rows, n, shift, held, found, total, squares):
    """Add to the sums of slots those of short segments, four at once."""
    slots = total.shape[0]
    for r in range(0, rows, FOUR):
        for k in range(slots):
            own_x = row(x, first + k * apart + r * stride, n)
            hold_sums(own_x, stride, min(FOUR, rows - r), shift[k], held, k)
        held_totals(held, 0, slots, found)
        add_row(total, found)
        held_totals(held, 1, slots, found)
        add_row(squares, found)


@helper
def short_moments(x, first, apart, slots, stride, rows, n, shift, sums, mean, m2):
    """Mean and m2 of slots that begin ``apart`` elements from each other, each ``rows`` segments of ``n``.

    Without means, which are then taken as 0, a slot is one segment. There are `SLOTS` at most, for which ``shift``, and
    ``sums`` in four rows, have room.
    """
    for k in range(slots):
        i = first + k * apart
        shift[k] = rounded(0.0, x) if mean is None else nearby(row(x, i, n))
    total, squares, held = row(sums, (0, 0), slots), row(sums, (1, 0), slots), held_like(x)
    if rows == 1 and n <= piece(x):  # short rows notice what more would take
        for k in range(slots):
            hold_sums(row(x, first + k * apart, n), 0, 1, shift[k], held, k)
        if mean is not None:
            held_totals(held, 0, slots, total)
        held_totals(held, 1, slots, squares)
    elif in_fours(n, x) > 1:
        fill(total, 0.0)
        fill(squares, 0.0)
        add_fours(x, first, apart, stride, rows, n, shift, held, row(sums, (3, 0), slots), total, squares)
    else:
        for k in range(slots):
            total[k], squares[k] = segment_sums(x, first + k * apart, stride, rows, n, shift[k])
    if mean is None:
        fill(total, 0.0)
    own_mean = row(sums, (2, 0), slots) if mean is None else mean
    if conclude(total, squares, row(shift, 0, slots), np.float64(rows * n), own_mean, m2) > 0:
        for k in range(slots):
            i = first + k * apart
            if m2[k] < 0.0:
                if mean is None:
                    m2[k] = tile_squares(row(x, i, n))
                else:
                    _, mean[k], m2[k] = careful_tile_moments(x, None, i, stride, rows, n)
