"""What stands behind choices of the package that no other benchmark shows: `python -m benchmarks.choices`.

Segments that lie side by side as columns (`nbnorm/_view.py`), chunks and blocks of columns and rows of them side by
side (`nbnorm/_cpu/grid.py`), slots that one task takes together (`nbnorm/_cpu/cut.py`), rows that are taken together or
asked for in advance (`nbnorm/_cpu/spans.py`), and results that are written past the caches (`nbnorm/_cpu/streams.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import numpy as np

with suppress(ImportError):  # asv reads every file of this folder, with versions that lack them
    from nbnorm import _cpu, _view
    from nbnorm._cpu import columns, cut, grid, planes, rows, spans
    from nbnorm._view import batch_view, trailing_view

    # Walk of batch norm, channels first and last.
    WALKS = (planes, cut.Cut), (columns, grid.Cut)

from benchmarks.common import Case, batch, best, copy_of, prepare

# Shapes of group norm, with the number of groups.
GROUPS = (
    ((32, 64, 32, 32), 64),
    ((64, 256, 14, 14), 32),
    ((8, 128, 32, 32), 32),
    ((8, 64, 112, 112), 64),
    ((32, 64, 56, 56), 8),
    ((2, 320, 64, 64), 32),
    ((16, 32, 128, 128), 8),
)
# Shapes of batch norm.
SEGMENTS = (
    (16, 32, 28, 28),
    (4, 64, 56, 56),
    (32, 64, 28, 28),
    (8, 256, 40, 40),
    (64, 384, 13, 13),
    (32, 1024, 14, 14),
    (32, 64, 56, 56),
    (32, 512, 28, 28),
)
# Narrow arrays, which one thread works on.
FOLDED = ((32, 64), (128, 64), (256, 64), (64, 3), (2048, 3), (256, 10), (2048, 10), (512, 32), (128, 256))
# Narrow arrays of more rows.
WIDTHS = (
    (256, 128), (512, 128), (1024, 128), (4096, 128), (1024, 64), (2048, 64), (8192, 64), (4096, 32), (8192, 16),
    (512, 256), (2048, 256), (16384, 96),
)  # fmt: skip
# Wide arrays.
WIDE = (
    (256, 512), (256, 2048), (512, 2048), (768, 2048), (1024, 2048), (512, 4096), (1024, 4096), (1568, 2048),
    (3136, 1536), (8192, 2048),
)  # fmt: skip
# Cases around the last-level cache and past it; of short and long segments, rows and columns.
STREAMS = (
    *(Case("batch", (n, 64, 64, 64)) for n in (2, 3, 4, 6, 8, 10, 12, 14, 16, 24, 64)),
    *(Case("batch", (n, 256, 32, 32), channels_last=True) for n in (2, 3, 4, 6, 8, 10, 12, 14, 16, 24, 64)),
    *(Case("layer", (n, 1024)) for n in (512, 768, 1024, 1536, 2048, 2560, 3072, 4096, 8192, 32768)),
    *(Case("layer", ((1 << 24) // n, n)) for n in (64, 96, 128, 160, 192, 256, 384, 512, 768)),
    *(
        Case("batch", shape)
        for shape in (
            (32, 1024, 14, 14), (64, 512, 16, 16), (32, 512, 20, 20), (32, 512, 24, 24), (32, 512, 28, 28),
            (32, 64, 56, 56), (32, 256, 40, 40), (32, 64, 112, 112),
        )
    ),
    *(
        Case("batch", shape, channels_last=True)
        for shape in (
            (8, 256, 40, 40), (32, 64, 56, 56), (32, 64, 112, 112), (106, 200, 28, 28), (32, 512, 28, 28),
            (32, 1024, 14, 14), (32, 2048, 7, 7), (16, 4096, 14, 14),
        )
    ),
    *(
        Case(norm, shape, last, dtype=dtype)
        for dtype in ("float16", "bfloat16")
        for norm, shape, last in (
            ("batch", (64, 512, 28, 28), False),
            ("batch", (64, 128, 56, 56), False),
            ("batch", (64, 1024, 14, 14), False),
            ("batch", (167, 192, 28, 28), True),
            ("batch", (167, 256, 28, 28), True),
            ("batch", (64, 512, 28, 28), True),
            ("batch", (64, 1024, 14, 14), True),
            ("batch", (8, 64, 64, 64), False),
            ("batch", (16, 256, 28, 28), False),
            ("batch", (8, 256, 32, 32), True),
            ("layer", (2048, 1024), False),
            ("layer", (4096, 512), False),
            ("layer", (1024, 4096), False),
            ("layer", (8192, 512), False),
            ("layer", (65536, 256), False),
            ("layer", (65536, 512), False),
            ("layer", (32768, 1024), False),
            ("layer", (16384, 2048), False),
        )
    ),
)  # fmt: skip
# Cases of batch norm whose results are written past the caches.
PAST = (
    *(
        Case("batch", shape)
        for shape in (
            (32, 1024, 14, 14), (32, 512, 20, 20), (32, 512, 28, 28), (8, 256, 40, 40), (16, 128, 56, 56),
            (32, 64, 56, 56), (32, 256, 56, 56), (8, 64, 160, 160), (32, 64, 112, 112),
        )
    ),
    Case("batch", (64, 512, 28, 28), dtype="float16"),
    Case("batch", (64, 128, 56, 56), dtype="bfloat16"),
)  # fmt: skip


def show(title: str, calls: dict[Any, Callable[[], object]]) -> None:
    """Print the times of calls in turns, those of all but the first as multiples of it."""
    seconds = best(*calls.values())
    times = ", ".join(f"{name} {s / seconds[0]:.2f}" for name, s in zip(calls, seconds, strict=True))
    print(f"{title}: {times} x {seconds[0] * 1e6:.1f} us")


def with_cut(cut: Any, call: Callable[[], object]) -> Callable[[], object]:
    """Return a call whose traversal cuts arrays in another way."""
    start, g = _cpu.start, np.array(cut)
    return started(lambda *arguments: start(*arguments)._replace(geometry=g), call)


def started(start: Callable[..., _cpu.Start], call: Callable[[], object]) -> Callable[[], object]:
    """Return a call whose traversal starts in another way."""

    def run() -> None:
        with patch.object(_cpu, "start", start):
            call()

    return run


def then(*calls: Callable[[], object]) -> Callable[[], object]:
    """Return calls one after the other as one."""

    def run() -> None:
        for call in calls:
            call()

    return run


def moved(direction: str, b: Any) -> int:
    """Return the bytes of x and y, or of x, dy and dx."""
    return int(b.x.nbytes) * (2 if direction == "forward" else 3)


def walked(down: bool, case: Case, name: str) -> Callable[[], object]:
    """Return a call that walks short segments as columns, or as segments."""

    def run(call: Callable[[], object]) -> Any:
        batch_view.cache_clear()
        with patch.object(_view, "short", lambda rows, segment: down):
            return call()

    call, _ = run(lambda: prepare(name, case))
    return partial(run, call)


def segments() -> None:
    """Batch norm of more and more segments of more and more neighbours, walked as columns and as segments."""
    for dtype, inner, outer in product(
        ("float32", "bfloat16", "float64"), (9, 16, 25, 36, 49, 64, 81, 121), (2, 4, 8, 16, 32, 64, 128)
    ):
        case = Case("batch", (outer, max(8, (1 << 18) // (outer * inner)), inner), dtype=dtype)
        for name in ("forward", "backward"):
            calls = {"columns": walked(True, case, name), "planes": walked(False, case, name)}
            chosen = "columns" if _view.short(outer, inner * batch(case).x.itemsize) else "planes"
            show(f"segments, {name} {case.shape} {dtype}, chosen {chosen}", calls)


def chunks() -> None:
    """Moments of long columns in more and more chunks, all of which are merged at the end; all passes of short ones."""
    x = batch(Case("batch", (65536, 64))).x
    view = batch_view(x.shape, x.strides, x.itemsize, 1)
    assert view is not None
    long = grid.Cut(*columns.geometry(view, 2).tolist())
    mean, m2 = np.empty((2, 64))
    calls = {
        n: partial(columns.passes_kernel, 2, in_chunks(long, n), x.reshape(-1), *[None] * 8, mean, m2, None)
        for n in (16, 8, 32, 64, 128)
    }
    show(f"chunks for the moments of {x.shape}", calls)
    for shape in ((1024, 256), (2048, 256), (4096, 256), (512, 2048), (1024, 1024)):
        for name in ("forward", "backward"):
            call, b = prepare(name, Case("batch", shape))
            view = batch_view(b.x.shape, b.x.strides, b.x.itemsize, 1)
            assert view is not None
            chosen = grid.Cut(*columns.geometry(view, 2).tolist())
            numbers = sorted({2, 3, 4, 7, 8, 16}, key=lambda n: n != chosen.chunks)
            ways = {n: with_cut(in_chunks(chosen, n), call) for n in numbers}
            show(f"chunks, {name} {shape}, chosen {chosen.chunks}", ways)


def blocks() -> None:
    """Batch norm of wide arrays in narrower and wider blocks of lanes, which threads share chunk by chunk or whole."""
    for shape in WIDE:
        for name in ("forward", "backward"):
            call, b = prepare(name, Case("batch", shape))
            view = batch_view(b.x.shape, b.x.strides, b.x.itemsize, 1)
            assert view is not None
            chosen = grid.Cut(*columns.geometry(view, 2, False, moved(name, b)).tolist())
            widths = sorted({256, 512, 1024, 2048, chosen.block}, key=lambda n: n != chosen.block)
            ways = {
                f"{n} lanes {how}": started(partial(in_blocks, chosen, n, team), call)
                for n, (how, team) in product(widths, (("in chunks", 0), ("whole", 2)))
                if n <= shape[1]
            }
            show(f"blocks, {name} {shape}, chosen {chosen.block} lanes in chunks", ways)


def in_blocks(whole: grid.Cut, lanes: int, team: int, *_: Any) -> _cpu.Start:
    """Return a walk over blocks of so many lanes."""
    g = np.array(whole._replace(block=lanes, blocks=-(-whole.lanes // lanes)))
    return _cpu.Start(columns, g, team)


def in_chunks(whole: grid.Cut, wanted: int) -> np.ndarray:
    """Return a way to cut columns into so many chunks."""
    chunk = -(-whole.rows // wanted)
    return np.array(whole._replace(chunk=chunk, chunks=-(-whole.rows // chunk)))


def folded() -> None:
    """Batch norm of narrow arrays, more and more rows of which lie side by side."""
    for shape in FOLDED:
        calls = {
            "forward": prepare("forward", Case("batch", shape)),
            "backward": prepare("backward", Case("batch", shape)),
        }
        view = calls["backward"][0].args[1].view
        chosen = grid.Cut(*columns.geometry(view, 1).tolist())
        for name, (call, _) in calls.items():
            ways = {}
            for fold in sorted({1, 2, 4, 8, 16, 32, 64, chosen.fold}, key=lambda fold: fold != chosen.fold):
                rows, lanes = shape[0] // fold, shape[1] * fold
                if rows and lanes <= grid.WIDE:
                    spare = shape[0] % fold * shape[1]
                    own = chosen._replace(
                        fold=fold, block=lanes, lanes=lanes, chunk=rows, rows=rows, spare=spare
                    )
                    ways[fold] = with_cut(own, call)
            show(f"rows side by side, {name} {shape}, chosen {chosen.fold}", ways)


def widths() -> None:
    """Batch norm of narrow arrays whose rows fill fewer and more lanes, by two threads."""
    for shape in WIDTHS:
        for name in ("forward", "backward"):
            call, b = prepare(name, Case("batch", shape))
            view = batch_view(b.x.shape, b.x.strides, b.x.itemsize, 1)
            ways = {}
            for lanes in sorted({256, 384, 512, 768}, key=lambda lanes: lanes != grid.WIDE):
                with patch.object(grid, "WIDE", lanes):
                    found = _cpu.start.__wrapped__(view, 2, False, moved(name, b), False)
                ways[lanes] = started(lambda *_, found=found: found, call)
            show(f"lanes of a row, {name} {shape}, chosen {grid.WIDE}", ways)


def together() -> None:
    """Forward and backward passes that take more and more neighbouring slots together."""
    groups = [Case("group", shape, num_groups=number) for shape, number in GROUPS]
    for case in [*(Case("batch", shape) for shape in SEGMENTS), *groups]:
        forward, _ = prepare("forward", case)
        backward, b = prepare("backward", case)
        view = backward.args[1].view
        for name, call in (("forward", forward), ("backward", backward)):
            chosen = cut.Cut(*planes.geometry(view, 2, False, moved(name, b)).tolist())
            calls: dict[Any, Callable[[], object]] = {
                slots: with_cut(chosen._replace(slots=slots), call)
                for slots in sorted({1, 2, 4, 8, 16, 32, chosen.slots})
            }
            # Another call between them, as in a network: what a call leaves in the caches is not what it finds.
            calls["copy"] = lambda b=b: np.copyto(b.out, b.dy)
            show(f"slots together, {case.norm} {name} {case.shape}, chosen {chosen.slots}", calls)


def past() -> None:
    """Batch norm whose results are written past the caches, of more and more neighbouring slots together."""
    for case in PAST:
        for name in ("forward", "backward"):
            call, b = prepare(name, case)
            view = batch_view(b.x.shape, b.x.strides, b.x.itemsize, 1)
            assert view is not None
            chosen = cut.Cut(*planes.geometry(view, 2, False, moved(name, b), b.x.dtype.char).tolist())
            numbers = sorted({1, 2, 4, 8, 16, 32}, key=lambda n: n != 1)
            ways: dict[Any, Callable[[], object]] = {
                n: with_cut(chosen._replace(streamed=1, slots=n), call) for n in numbers
            }
            ways["copy"] = lambda b=b: np.copyto(b.out, b.dy)
            own = chosen.slots if chosen.streamed else "plain"
            show(f"slots past the caches, {name} {case.shape} {case.dtype}, chosen {own}", ways)


def rows_together() -> None:
    """Layer norm of which more and more rows are taken together, pass after pass; in cache and past it."""
    for width, size in product(
        (32, 96, 128, 160, 192, 256, 384, 512, 768, 1024, 2048), (1 << 16, 1 << 18, 1 << 20, 1 << 21, 1 << 23)
    ):
        case = Case("layer", (size // width, width))
        for name, field in (("forward", "step"), ("backward", "together")):
            call, b = prepare(name, case)
            view = trailing_view(b.x.shape, b.x.strides, b.x.itemsize, 1)
            assert view is not None
            chosen = spans.Cut(*rows.geometry(view, 2, False, moved(name, b)).tolist())
            own = getattr(chosen, field)
            numbers = sorted({1, 4, 8, 16, 32} if name == "forward" else {4, 8}, key=lambda n: n != own)
            ways: dict[Any, Callable[[], object]] = {
                n: with_cut(chosen._replace(**{field: n}), call) for n in numbers
            }
            ways["copy"] = lambda b=b: np.copyto(b.out, b.dy)
            show(f"rows together, {name} {case.shape}, chosen {own}", ways)


def in_one_walk() -> None:
    """Layer norm backward whose rows have their own sums and those of parameters one after the other, or at once."""
    for width, size in product(
        (192, 256, 512, 768, 1024, 1536, 2048, 4096, 50257), (1 << 17, 1 << 21, 1 << 23)
    ):
        case = Case("layer", (max(size // width, 4), width))
        call, b = prepare("backward", case)
        chosen = rows.long_rows(width, b.x.dtype.char)
        ways = {name: told(long, call) for name, long in (("two walks", None), ("one", True))}
        ways["copy"] = lambda b=b: np.copyto(b.out, b.dy)
        show(f"sums in one walk, {case.shape}, chosen {'one' if chosen else 'two'}", ways)


def told(long: bool | None, call: Callable[[], object]) -> Callable[[], object]:
    """Return a call whose rows are taken for long ones, or not."""

    def run() -> None:
        with patch.object(rows, "long_rows", lambda *_: long):
            call()

    return run


def fetched() -> None:
    """Layer norm forward that asks for the next rows in advance, and that does not."""
    for shape in (
        (65536, 96), (65536, 256), (16384, 512), (2048, 768), (32768, 768), (16384, 1024), (20000, 1536), (20000, 2048),
        (512, 4096),
    ):  # fmt: skip
        for dtype in ("float32", "float16", "bfloat16"):
            call, b = prepare("forward", Case("layer", shape, dtype=dtype))
            view = trailing_view(b.x.shape, b.x.strides, b.x.itemsize, 1)
            assert view is not None
            chosen = spans.Cut(*rows.geometry(view, 2, False, moved("forward", b), b.x.dtype.char).tolist())
            ways = {n: with_cut(chosen._replace(ahead=n), call) for n in (0, chosen.step)}
            show(f"rows in advance, {shape} {dtype}, chosen {chosen.ahead}", ways)


def bundled() -> None:
    """Layer norm forward whose tasks are one band each, or some."""
    for shape in ((131072, 32), (65536, 96), (16384, 96), (32768, 200), (8192, 1024)):
        call, b = prepare("forward", Case("layer", shape))
        view = trailing_view(b.x.shape, b.x.strides, b.x.itemsize, 1)
        assert view is not None
        chosen = spans.Cut(*rows.geometry(view, 2, False, moved("forward", b), b.x.dtype.char).tolist())
        ways = {n: with_cut(chosen._replace(bundle=n), call) for n in dict.fromkeys((1, 4, chosen.bundle))}
        show(f"bands of a task, {shape}, chosen {chosen.bundle}", ways)


def streamed() -> None:
    """Forward and backward passes whose results are written plainly, and past the caches; both with a copy behind."""
    for case in STREAMS:
        walk, kind = (rows, spans.Cut) if case.norm == "layer" else WALKS[case.channels_last]
        calls = {"forward": prepare("forward", case), "backward": prepare("backward", case)}
        view = calls["backward"][0].args[1].view
        for name, (call, b) in calls.items():
            plain, past = (kind(*walk.geometry(view, 2, False, s).tolist()) for s in (0, 1 << 60))
            past = past._replace(streamed=1)
            ways: dict[Any, Callable[[], object]] = {
                "plain": with_cut(plain, call), "streamed": with_cut(past, call)
            }  # fmt: skip
            # What reads these results next, as a network's next layer does, finds them in another place.
            ways |= {f"{way} and read": then(call, copy_of(b.out)) for way, call in ways.items()}
            chosen = kind(*walk.geometry(view, 2, False, moved(name, b), b.x.dtype.char).tolist()).streamed
            show(f"streams, {name} of {case} {case.dtype}, chosen {'streamed' if chosen else 'plain'}", ways)


if __name__ == "__main__":
    segments()
    chunks()
    blocks()
    folded()
    widths()
    together()
    past()
    rows_together()
    in_one_walk()
    fetched()
    bundled()
    streamed()
