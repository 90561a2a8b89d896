"""Launch configurations as data, chosen by functions of a view, and how a kernel is started.

Nothing here waits for the device. Configurations depend on shapes, on whether memory is aligned and on what the device
can do, never on data or on its load, so that results have the same bits in every run on a kind of device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from numba import cuda
from numba.cuda import config as numba_config

from nbnorm._cuda import arrays
from nbnorm._cuda.collective import WARP
from nbnorm._cuda.columns import TILE_ROWS
from nbnorm._cuda.memory import BLOCK, SIMULATED, VECTOR_BYTES, itemsize
from nbnorm._cuda.pieces import ELEMENT, RUN, SLOT
from nbnorm._cuda.rows import BAND_ROWS
from nbnorm._view import View


@dataclass(frozen=True)
class Limits:
    """What configurations may use.

    Attributes
    ----------
    teams : tuple of (int, int, int)
        Blocks of a team, warps of each and the registers in which a thread may hold elements; the smallest team first.
    held : int
        Elements that a thread of a streaming kernel holds.
    busy : int
        Warps that keep the device busy: first passes are cut into about as many chunks.
    """

    teams: tuple[tuple[int, int, int], ...]
    held: int
    busy: int


# With more than 32 registers of elements, blocks of 16 warps spill what belongs to masks, float64 or backward
# (tests/test_cuda_compile.py compiles the largest team for all of them). Clusters may have eight blocks wherever there
# are any, and room for them. `busy`: four warps on each quarter of 132 multiprocessors.
_DEVICE = Limits(
    teams=((1, 1, 32), (1, 4, 32), (1, 8, 32), (1, 16, 32), (2, 16, 32), (4, 16, 32), (8, 16, 32)),
    held=16,
    busy=2112,
)
# In the simulator a thread is one of the operating system: few of them, yet more than one warp and one step.
_SIMULATOR = Limits(teams=((1, 1, 16), (1, 2, 32), (2, 2, 32)), held=8, busy=4)
LIMITS = _SIMULATOR if SIMULATED else _DEVICE
# Positions of a chunk at most, of the pieces that one warp reads.
MAX_PIECES = 64


@dataclass(frozen=True)
class Lines:
    """How slots or their runs are read along segments.

    Attributes
    ----------
    width, steps, warps, blocks : int
        See `pieces.Build`.
    values, length, pitch : int
        Values of a unit, neighbours of a segment, and elements between the starts of segments.
    jump, turn : int
        One stride of a team: elements with the whole rows in it, columns without them.
    chunk, chunks : int
        Positions of a chunk, and chunks of a unit.
    """

    width: int
    steps: int
    warps: int
    blocks: int
    values: int
    length: int
    pitch: int
    jump: int
    turn: int
    chunk: int
    chunks: int


def parameter_rule(view: View) -> int:
    """Return what shares a parameter: a slot, a run of elements, or nothing."""
    if view.width == 1:
        return SLOT
    return ELEMENT if view.run == 1 else RUN


def vector_width(kind: int, neighbours: int, aligned: bool) -> int:
    """Return the elements of a vector, all of which must lie in one run of neighbours; 1 for any address."""
    width = VECTOR_BYTES // itemsize(kind)
    return width if aligned and neighbours % width == 0 else 1


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def _lines(
    view: View, length: int, width: int, steps: int, warps: int, blocks: int, chunk: int
) -> Lines:  # fmt: skip
    values, pitch = view.outer * length, view.group * view.inner
    rows, turn = divmod(blocks * warps * WARP * width, length)
    chunks = -(-values // chunk)
    return Lines(width, steps, warps, blocks, values, length, pitch, rows * pitch + turn, turn, chunk, chunks)


def held_lines(view: View, width: int, registers: int) -> Lines | None:
    """Return the smallest team of the current device that holds a slot, None if there is none.

    An element takes so many ``registers``.
    """
    lines = _held_lines(view, width, registers)
    return lines if lines is None or lines.blocks == 1 or runs_teams_of_blocks() else None


@lru_cache(maxsize=4096)
def _held_lines(view: View, width: int, registers: int) -> Lines | None:
    values = view.values
    for blocks, warps, span in LIMITS.teams:
        most = span // registers // width
        steps = power_of_two(-(-values // (blocks * warps * WARP * width)))
        if 0 < steps <= most:
            return _lines(view, view.inner, width, steps, warps, blocks, max(values, 1))
    return None


@lru_cache(maxsize=4096)
def streamed_lines(view: View, length: int, width: int) -> Lines:
    """Return how warps walk along units of outer x length values, cut into enough chunks to fill the device."""
    steps = max(1, LIMITS.held // width)
    piece = WARP * width * steps
    values = view.outer * length
    units = max(1, view.size // max(values, 1))
    wanted = -(-LIMITS.busy // units)
    pieces = max(1, min(MAX_PIECES, -(-values // (piece * wanted))))
    return _lines(view, length, width, steps, 1, 1, piece * pieces)


@dataclass(frozen=True)
class Lanes:
    """How columns are read: threads across and down a block, blocks across, rows of a chunk, chunks."""

    width: int
    across: int
    deep: int
    lane_blocks: int
    chunk: int
    chunks: int
    lanes: int

    @property
    def threads(self) -> tuple[int, int]:
        """Shape of a block."""
        return self.across, self.deep


@lru_cache(maxsize=4096)
def column_lanes(view: View, width: int) -> Lanes:
    """Return the blocks of a walk down columns."""
    lanes = view.group * view.inner
    across = min(WARP, power_of_two(-(-lanes // width)))
    deep = BLOCK // across
    lane_blocks = -(-lanes // (across * width))
    wanted = -(-LIMITS.busy * WARP // (BLOCK * lane_blocks * max(view.batch, 1)))
    rows = -(-view.outer // wanted)
    chunk = max(deep, min(-(-rows // deep), 8 * TILE_ROWS) * deep)
    return Lanes(width, across, deep, lane_blocks, chunk, -(-view.outer // chunk), lanes)


@dataclass(frozen=True)
class Bands:
    """Rows whose parameter gradients are summed together, and how many such bands there are."""

    band: int
    bands: int


@lru_cache(maxsize=4096)
def row_bands(view: View, warps: int) -> Bands:
    """Cut rows of one period into bands: short enough for sums in the array's type, enough to fill the device."""
    rows = view.slots // view.period
    wanted = max(1, LIMITS.busy // (warps * view.period))
    band = max(1, min(BAND_ROWS, -(-rows // wanted)))
    return Bands(band, -(-rows // band))


def start(kernel: Any, blocks: int, threads: int | tuple[int, int], like: Any, *args: Any) -> None:
    """Start a kernel on the current device and stream of the library of an array; arrays become addresses."""
    if blocks:
        stream = arrays.stream_for(like)
        _configured(kernel, blocks, threads, stream)(*arrays.addresses(args, like))


def _configure(kernel: Any, blocks: int, threads: int | tuple[int, int], stream: Any) -> Any:
    """Return a kernel with its grid; small grids are meant, so that Numba need not warn of them."""
    before = numba_config.CUDA_LOW_OCCUPANCY_WARNINGS
    numba_config.CUDA_LOW_OCCUPANCY_WARNINGS = 0
    try:
        return kernel[blocks, threads, stream]
    finally:
        numba_config.CUDA_LOW_OCCUPANCY_WARNINGS = before


# The simulator keeps the grid in the kernel itself: there it cannot be remembered apart.
_configured = _configure if SIMULATED else lru_cache(maxsize=4096)(_configure)


def runs_teams_of_blocks() -> bool:
    """Whether eight blocks of the current device can be a team.

    Small parts of a device may lack the room; other capabilities that have clusters have not been compiled for.
    """
    if SIMULATED:
        return True
    device = cuda.get_current_device()
    return bool(device.compute_capability[0] in (9, 10) and device.MULTIPROCESSOR_COUNT >= 16)


def teams_of(teams: int, lines: Lines) -> tuple[int, int]:
    """Blocks and threads for so many teams: whole blocks to a team of several warps, teams of one warp share one."""
    if lines.warps == 1:
        return blocks_of(teams), BLOCK
    threads = lines.warps * WARP
    return (teams, lines.blocks * threads) if SIMULATED else (teams * lines.blocks, threads)


def blocks_of(warps: int) -> int:
    """Blocks of `BLOCK` threads for so many independent warps."""
    return -(-warps * WARP // BLOCK)


def blocks_for(threads: int) -> int:
    """Blocks of `BLOCK` threads for so many independent threads."""
    return -(-threads // BLOCK)
