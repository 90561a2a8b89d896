"""Moments of slots of one tile each, a few together: the sums of one do not wait for the divisions of another.

They are concluded side by side, with the bits of `tile_moments`.
"""

from __future__ import annotations

import numpy as np

from nbnorm._cpu.lane_moments import conclude
from nbnorm._cpu.lanes import fill
from nbnorm._cpu.launch import helper
from nbnorm._cpu.memory import row
from nbnorm._cpu.tiles import careful_tile_moments, nearby, piece, tile_squares, tile_sums
from nbnorm._cpu.vector_sums import vector_sums_of_rows
from nbnorm._cpu.vectors import BYTES
from nbnorm._math import rounded

# Slots that are taken together, as many as the widest vectors have elements: rows of 32 values take 0.9 of the time of
# eight together, half of that one by one (Zen 4, benchmarks/choices.py, rows together).
SLOTS = BYTES // 4


@helper
def short_moments(x, first, apart, slots, stride, rows, n, shift, sums, mean, m2):
    """Mean and m2 of slots that begin ``apart`` elements from each other, each ``rows`` segments of ``n``.

    Without means, which are then taken as 0, a slot is one segment. ``shift`` and ``sums``, three rows, have room for
    the slots, rounded up to a multiple of `SLOTS`: what is behind them is overwritten.
    """
    for k in range(slots):
        i = first + k * apart
        shift[k] = rounded(0.0, x) if mean is None else nearby(row(x, i, n))
    total, squares, count = row(sums, (0, 0), slots), row(sums, (1, 0), slots), np.float64(rows * n)
    if rows == 1 and n <= piece(x):
        own_shift = row(shift, 0, slots)
        if mean is None:  # two calls: what may be None or not has a type of its own
            vector_sums_of_rows(x, first, apart, n, slots, own_shift, None, squares)
        else:
            vector_sums_of_rows(x, first, apart, n, slots, own_shift, total, squares)
    else:
        for k in range(slots):
            total[k], squares[k] = tile_sums(x, first + k * apart, stride, rows, n, shift[k])
    if mean is None:
        fill(total, 0.0)
    own_mean = row(sums, (2, 0), slots) if mean is None else mean
    if conclude(total, squares, row(shift, 0, slots), count, own_mean, m2) > 0:
        for k in range(slots):
            i = first + k * apart
            if m2[k] < 0.0:
                if mean is None:
                    m2[k] = tile_squares(row(x, i, n))
                else:
                    _, mean[k], m2[k] = careful_tile_moments(x, None, i, stride, rows, n)
