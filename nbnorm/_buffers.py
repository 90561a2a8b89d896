"""Result buffers that are filled again and again, for layers with ``reuse_buffers=True``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np

Array = np.ndarray

# Layouts kept of each kind of result: training, its ragged last batch, evaluation, and a few to spare. Without
# a bound, sequences of ever new lengths would keep a buffer each.
LAYOUTS = 8


class Buffers:
    """Arrays by kind of result and by layout; a layout that is asked for again gets the same array."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, dict[tuple[Any, ...], Array]] = {}

    def __iter__(self) -> Iterator[Array]:
        for arrays in self._kinds.values():
            yield from arrays.values()

    def get(self, kind: Hashable, like: Array, make: Callable[[], Array] | None = None) -> Array:
        """Return the buffer for a result in the layout of an array; ``make`` allocates it the first time."""
        arrays = self._kinds.setdefault(kind, {})
        layout = (type(like), like.shape, like.dtype, like.strides)
        buffer = arrays.pop(layout, None)
        if buffer is None:
            buffer = np.empty_like(like) if make is None else make()
        arrays[layout] = buffer  # behind all others: the first is the one that has waited longest
        if len(arrays) > LAYOUTS:
            del arrays[next(iter(arrays))]
        return buffer
