"""The one table of shapes and strides that every norm is tested on, each row with the reason it is there."""

from dataclasses import dataclass, field

import numpy as np

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))

# ---- strides: each layout makes a view of the wanted shape in a block full of ``fill`` ----


def permuted(order):
    """Memory order of the axes, from the slowest to the fastest, as a function of the rank."""

    def layout(shape, dtype, fill):
        axes = order(len(shape))
        block = np.full([shape[axis] for axis in axes], fill, dtype)
        return block, block.transpose(np.argsort(axes))

    return layout


def cut(index, grow):
    """View of a larger block: ``grow(n)`` elements along an axis of n, seen through ``index(axis, rank)``."""

    def layout(shape, dtype, fill):
        rank = len(shape)
        slices = tuple(index(axis, rank) for axis in range(rank))
        block = np.full(
            [n if s == slice(None) else grow(n) for n, s in zip(shape, slices, strict=True)], fill, dtype
        )
        return block, block[slices]

    return layout


def unaligned(shape, dtype, fill):
    """Put every element one byte off its natural address."""
    raw = np.zeros(int(np.prod(shape)) * dtype.itemsize + 1, np.uint8)
    view = raw[1:].view(dtype).reshape(shape)
    view[...] = fill
    return view, view


def big_endian(shape, dtype, fill):
    """Use the other byte order."""
    block = np.full(shape, fill, dtype.newbyteorder(">"))
    return block, block


WHOLE, EVERY_OTHER, BACKWARDS = slice(None), slice(None, None, 2), slice(None, None, -1)
LAYOUTS = {
    "C": permuted(lambda rank: list(range(rank))),
    "F": permuted(lambda rank: list(range(rank))[::-1]),
    "axis 1 fastest": permuted(lambda rank: [0, *range(2, rank), 1]),
    "axis 1 slowest": permuted(lambda rank: [1, 0, *range(2, rank)]),
    "axis 0 fastest": permuted(lambda rank: [*range(1, rank), 0]),
    "last two swapped": permuted(lambda rank: [*range(rank - 2), rank - 1, rank - 2]),
    "gaps inside": cut(lambda axis, rank: EVERY_OTHER if axis == rank - 1 else WHOLE, lambda n: 2 * n),
    "gaps outside": cut(lambda axis, rank: EVERY_OTHER if axis == 0 else WHOLE, lambda n: 2 * n),
    "gaps on axis 1": cut(lambda axis, rank: EVERY_OTHER if axis == 1 else WHOLE, lambda n: 2 * n),
    "inner block": cut(lambda axis, rank: slice(1, -2), lambda n: n + 3),
    "inner reversed": cut(lambda axis, rank: BACKWARDS if axis == rank - 1 else WHOLE, lambda n: n),
    "outer reversed": cut(lambda axis, rank: BACKWARDS if axis == 0 else WHOLE, lambda n: n),
    "all reversed": cut(lambda axis, rank: BACKWARDS, lambda n: n),
    "unaligned": unaligned,
    "big endian": big_endian,
}
BROADCAST = {"broadcast outside": 0, "broadcast inside": -1}


def place(shape, dtype, layout, fill):
    """Return (block, view of it): a writable view with the strides of a layout."""
    return LAYOUTS[layout](tuple(shape), np.dtype(dtype), fill)


def arrange(values, layout):
    """Return an array with the strides of a layout; between its elements lies NaN, which nobody may read."""
    if layout == "read-only":
        values = values.copy()
        values.flags.writeable = False
        return values
    if layout in BROADCAST:
        return np.broadcast_to(values.take([0], axis=BROADCAST[layout]), values.shape)
    view = place(values.shape, values.dtype, layout, np.nan)[1]
    view[...] = values
    return view


# ---- the table ----


@dataclass(frozen=True)
class Case:
    """A shape, the axis that keeps its statistics, the strides of x and of dy, and options of the call."""

    shape: tuple
    channel_axis: int
    reason: str
    layout: str = "C"
    dy_layout: str = ""
    options: dict = field(default_factory=dict, hash=False)
    norm: str = "batch"

    def __str__(self):
        """Name the test."""
        strides = self.layout if not self.dy_layout else f"{self.layout}, dy {self.dy_layout}"
        return f"{'x'.join(map(str, self.shape))} axis {self.channel_axis} {strides}"

    def x(self, rng, dtype):
        """Draw an input with mean 0.7 and standard deviation 1.5."""
        return arrange((rng.standard_normal(self.shape) * 1.5 + 0.7).astype(dtype), self.layout)

    def dy(self, rng, dtype):
        """Draw a random gradient (with a constant one the true dx is 0 and wrong kernels pass)."""
        return arrange(rng.standard_normal(self.shape).astype(dtype), self.dy_layout or self.layout)

    def parameters(self, rng, dtype):
        """Draw weight (away from 0, both signs) and bias."""
        channels = self.shape[self.channel_axis]
        weight = rng.uniform(0.5, 2, channels) * rng.choice([-1, 1], channels)
        return weight.astype(dtype), rng.standard_normal(channels).astype(dtype)

    def running(self, rng, dtype=np.float32):
        """Draw running statistics."""
        channels = self.shape[self.channel_axis]
        return rng.standard_normal(channels).astype(dtype), rng.uniform(0.5, 2, channels).astype(dtype)


CASES = [
    # ranks
    Case((8, 5), 1, "rank 2, the usual dense layer"),
    Case((5, 8), 0, "rank 2, channels first: every slot one contiguous row"),
    Case((6, 4, 9), 1, "rank 3, a sequence"),
    Case((4, 6, 5, 3), 1, "rank 4, images"),
    Case((2, 3, 4, 5, 6), 1, "rank 5, volumes"),
    # where the channel axis is
    Case((4, 5, 3, 6), -1, "channels last"),
    Case((4, 6, 5, 3), 2, "channels in the middle, outer axes on both sides"),
    Case((6, 4, 5), 0, "channels outermost: one segment per slot, no batch axis outside"),
    Case((2, 3, 4, 5, 6), -2, "negative axis in the middle"),
    # extreme extents
    Case((2, 1), 1, "two values, one channel: the smallest batch that has a variance"),
    Case((1, 3, 5), 1, "N = 1, statistics over the plane only"),
    Case((5, 1, 7), 1, "C = 1: one slot holds everything"),
    Case((7, 3, 1, 1), 1, "pooled features: the planes are single values, so these are columns"),
    Case((7, 1, 1, 3), -1, "size-1 axes between batch and channels"),
    Case((1, 1, 2, 3), 2, "leading size-1 axes"),
    Case((13, 11, 17), 1, "primes: no width of a vector or a tile divides anything"),
    Case((31, 37), 1, "prime columns"),
    # short segments
    Case((26, 33, 7, 7), 1, "planes of 7x7 = 49: segments shorter than a worthwhile loop"),
    Case((2, 3, 7, 7), 1, "few short planes"),
    Case((5, 130, 2, 2), 1, "planes of four values, more channels than a vector or a small tile"),
    Case((1, 64, 7, 7), 1, "short planes, one sample: nothing to merge across samples"),
    Case((32, 5, 8, 8), 1, "planes of 64 float32: the longest that count as short"),
    Case((32, 5, 5, 13), 1, "planes of 65: one longer"),
    # columns of every width
    Case((4001, 3), 1, "long and narrow with a ragged end: columns are folded, lanes merged"),
    Case((4001, 1), 1, "one narrow column"),
    Case((2003, 7), 1, "narrow, odd"),
    Case((5, 3001), 1, "wide and short: far more lanes than rows"),
    Case((2, 1025), 1, "two rows, lanes one past a power of two"),
    Case((997, 129), 1, "lanes one past a multiple of every vector, prime rows"),
    Case((2, 40, 41, 3), -1, "an image with three channels last"),
    Case((3, 20, 21, 96), -1, "channels last of ordinary width"),
    Case((15, 5), 1, "narrow, too few rows to fold"),
    Case((16, 5), 1, "narrow, just enough rows to fold once"),
    Case((31, 5), 1, "folded, the row left over in a block of few rows"),
    Case((49, 3), 1, "folded, one row left over"),
    Case((300, 767), 1, "just narrow enough to be folded, were it not for its lanes"),
    Case((40, 384), 1, "half as wide: two rows side by side"),
    Case((256, 1100), 1, "wide blocks, the last rows that are cached together"),
    Case((257, 2100), 1, "one row more, lanes past one block"),
    # few slots, long planes: split into chunks
    Case((1, 2, 300, 301), 1, "two slots with large planes: each is split and merged"),
    Case((3, 1, 99991), 1, "one slot, planes past one chunk, prime length"),
    Case((2, 3, 4095), 1, "one below 4096 values"),
    Case((2, 3, 4096), 1, "exactly 4096 values"),
    Case((2, 3, 4097), 1, "one above 4096 values"),
    Case((1, 2, 65535), 1, "one below 65536 values"),
    Case((1, 2, 65536), 1, "exactly 65536 values"),
    Case((1, 2, 65537), 1, "one above 65536 values: a chunk with a single value in it"),
    Case((4096, 2), 1, "columns, a power of two rows"),
    Case((65537, 2), 1, "columns, one row above 65536"),
    Case((70, 937), 1, "columns, just above 65536 values in all"),
    Case((700, 2, 130), 1, "many short segments in one slot"),
    # dense, in another memory order
    Case((4, 5, 6), 1, "Fortran order", layout="F"),
    Case((6, 5), 1, "Fortran order: columns become rows", layout="F"),
    Case((2, 3, 4, 5), 1, "channels first by name, last in memory", layout="axis 1 fastest"),
    Case((4, 7, 7, 33), -1, "channels last by name, in the middle of memory", layout="last two swapped"),
    Case((4, 3, 5, 6), 1, "channels outermost in memory", layout="axis 1 slowest"),
    Case((4, 3, 5, 6), 1, "batch innermost in memory", layout="axis 0 fastest"),
    Case((4, 3, 5, 6), 1, "planes transposed: still one dense segment", layout="last two swapped"),
    Case((3, 2, 3, 2, 4), 2, "rank 5 in Fortran order, channels in the middle", layout="F"),
    # views that are packed
    Case((4, 3, 10), 1, "every other value of a plane", layout="gaps inside"),
    Case((10, 6), 1, "every other column", layout="gaps inside"),
    Case((4, 3, 10), 1, "every other sample: segments stay whole", layout="gaps outside"),
    Case((41, 6), 1, "every other row", layout="gaps outside"),
    Case((4, 3, 10), 1, "every other channel", layout="gaps on axis 1"),
    Case((4, 3, 9, 8), 1, "a block cut out of a larger one", layout="inner block"),
    Case((4, 9, 8, 3), -1, "a block cut out, channels last", layout="inner block"),
    Case((4, 3, 10), 1, "planes backwards", layout="inner reversed"),
    Case((4, 3, 10), 1, "samples backwards", layout="outer reversed"),
    Case((5, 6, 7), 1, "every axis backwards", layout="all reversed"),
    Case((8, 5), 1, "columns backwards", layout="all reversed"),
    Case((4, 3, 10), 1, "one sample repeated by a stride of 0", layout="broadcast outside"),
    Case((4, 3, 10), 1, "planes of one value each, by a stride of 0", layout="broadcast inside"),
    Case((4, 3, 10), 1, "not writable: only read", layout="read-only"),
    Case((4, 3, 10), 1, "addresses off by one byte", layout="unaligned"),
    Case((4, 3, 10), 1, "the other byte order; the result is native", layout="big endian"),
    # dy laid out unlike x
    Case((4, 3, 5, 6), 1, "x channels first, dy channels last in memory", dy_layout="axis 1 fastest"),
    Case((4, 3, 5, 6), 1, "x channels last in memory, dy first", layout="axis 1 fastest", dy_layout="C"),
    Case((6, 5), 1, "x rows, dy columns", dy_layout="F"),
    Case((4, 3, 10), 1, "x dense, dy with gaps", dy_layout="gaps inside"),
    Case((4, 3, 10), 1, "x with gaps, dy backwards", layout="gaps outside", dy_layout="all reversed"),
    Case((4, 3, 10), 1, "dy repeated by a stride of 0, the gradient of a sum", dy_layout="broadcast inside"),
    Case((4, 3, 10), 1, "dy not writable", dy_layout="read-only"),
    Case((4, 3, 10), 1, "dy off by one byte", dy_layout="unaligned"),
    # options
    Case((6, 4, 5), 1, "a large eps, seen in every value", options={"eps": 1.0}),
    Case((6, 4, 5), 1, "no eps", options={"eps": 0.0}),
]

# One row per traversal of memory, for tests that ask something else than "is the layout understood".
TRAVERSALS = [
    Case((5, 6, 40, 41), 1, "planes"),
    Case((26, 33, 7, 7), 1, "short planes"),
    Case((1, 2, 300, 301), 1, "planes in chunks"),
    Case((700, 80), 1, "columns"),
    Case((4001, 3), 1, "narrow columns"),
]

# Two small rows for tests of a single argument.
PLANES, COLUMNS = Case((4, 6, 5, 3), 1, "planes"), Case((8, 5), 1, "columns")
