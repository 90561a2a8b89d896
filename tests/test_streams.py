"""Results that are written past the caches, of which small arrays make no use by themselves."""

import math
import os
import subprocess
import sys

import ml_dtypes
import numba
import numpy as np
import pytest

import nbnorm
from nbnorm import _cpu
from nbnorm._cpu import cut, grid, spans, streams
from nbnorm._cpu.stores import BLOCK
from nbnorm._view import batch_view, trailing_view

ROWS, PLANES = (7, 1555), (5, 3, 29, 31)
FEATURES = (23, 615)
SHAPES = {
    "planes": PLANES,
    "short": (4, 64, 15, 15),
    "side by side": (3, 6, 31, 33),  # of group norm, whose slots and runs lie one behind the other
    "features": FEATURES,
    "folded": (2222, 19),
    "chunks": (1111, 301),
    "blocks": (37, 4200),
    "layer": ROWS,
    "narrow": (301, 200),
    "long": (2, 70001),
    "groups": (9, 1602),  # two rows a sample
    "rms": ROWS,
}
NORMS = dict.fromkeys(("layer", "narrow", "long"), "layer") | {
    "rms": "rms",
    "groups": "group",
    "side by side": "group",
}
ENDLESS = 1 << 60


def set_last_level(monkeypatch, size):
    """Let the last-level cache, which many cores share, have another size."""
    monkeypatch.setattr(streams, "told", lambda: ENDLESS)
    monkeypatch.setattr(streams, "last_level", lambda *_: size)
    _cpu.start.cache_clear()


@pytest.fixture
def everything_is_streamed(monkeypatch):
    """Let all arrays be streamed whose stretches are long enough; return, call by call, whether they were."""
    answers = []

    def asked(size, *others):
        answer = streams.worthwhile(size, *others)
        if size:
            answers.append(answer)
        return answer

    for walk in (cut, grid, spans):
        monkeypatch.setattr(walk, "worthwhile", asked)
    monkeypatch.setattr(streams, "least", lambda letter: streams.LEAST)
    threads = numba.get_num_threads()
    numba.set_num_threads(min(threads, 2))
    set_last_level(monkeypatch, 0)
    yield answers
    set_last_level(monkeypatch, ENDLESS)
    numba.set_num_threads(threads)


def shifted(shape, dtype, shift, rng):
    """Draw an array that begins some elements behind a line of memory."""
    size = int(np.prod(shape))
    room = np.full(size + 256, np.nan, dtype)
    start = -room.ctypes.data % streams.LINE // room.itemsize + shift
    room[start : start + size] = rng.standard_normal(size).astype(dtype)
    return room[start : start + size].reshape(shape), room


def results(case, dtype, shift, **options):
    """Return y and the gradients, written into shifted buffers, and see that nothing around these has changed."""
    shape, norm = SHAPES[case], NORMS.get(case, "batch")
    rng = np.random.default_rng(3)
    x, dy = (shifted(shape, dtype, shift, rng)[0] for _ in range(2))
    kept = {name: value(shape).astype(dtype) if callable(value) else value for name, value in options.items()}
    features = shape[1]
    wide = np.float64 if dtype == np.float64 else np.float32
    weight, bias = rng.uniform(0.5, 2, (2, features)).astype(wide)
    forward, backward = (getattr(nbnorm, f"{norm}_norm_{direction}") for direction in ("forward", "backward"))
    (y, around_y), (dx, around_dx) = (shifted(shape, dtype, shift, rng) for _ in range(2))
    parameters = (weight,) if norm == "rms" else (weight, bias)
    groups = (2,) if norm == "group" else ()
    _, saved = forward(x, *groups, *parameters, out=y, **kept)
    gradients = backward(dy, saved, out=(dx, *[None] * (len(parameters) + ("residual" in kept))))
    for around in (around_y, around_dx):
        assert np.isnan(around).sum() == 256
    return [y, *gradients]


CASES = [
    ("planes", np.float32, {}),
    ("planes", np.float64, {}),
    ("planes", np.float16, {}),
    ("planes", ml_dtypes.bfloat16, {}),
    (
        "planes",
        np.float32,
        {"activation": "relu", "residual": lambda shape: np.linspace(-1, 1, np.prod(shape)).reshape(shape)},
    ),
    ("planes", np.float32, {"mask": np.arange(5.0).reshape(5, 1, 1)}),
    ("short", np.float32, {}),
    ("short", np.float16, {"activation": "relu"}),
    ("features", np.float32, {}),
    ("features", np.float32, {"mask": np.arange(23.0)}),
    ("folded", np.float32, {"activation": "relu"}),
    ("folded", np.float16, {}),
    ("chunks", np.float32, {}),
    ("blocks", ml_dtypes.bfloat16, {"activation": "silu"}),
    ("side by side", np.float32, {"activation": "relu"}),
    ("layer", np.float32, {}),
    ("narrow", np.float32, {}),
    ("long", np.float32, {}),
    ("groups", np.float64, {}),
    ("rms", ml_dtypes.bfloat16, {}),
]


@pytest.mark.parametrize(
    ("case", "dtype", "options"), CASES, ids=lambda value: getattr(value, "__name__", None)
)
def test_streamed_results_have_the_bits_of_plain_ones(
    case, dtype, options, everything_is_streamed, monkeypatch
):
    streamed = [results(case, dtype, shift, **options) for shift in (0, 1, 5)]
    assert everything_is_streamed == [True, True]  # forward and backward
    set_last_level(monkeypatch, ENDLESS)
    for shift, own in zip((0, 1, 5), streamed, strict=True):
        for ours, plain in zip(own, results(case, dtype, shift, **options), strict=True):
            assert ours.tobytes() == plain.tobytes()


@pytest.mark.usefixtures("everything_is_streamed")
@pytest.mark.parametrize(
    ("dtype", "offset"), [(np.float32, 1), (np.float32, 2), (np.float64, 4), (np.float16, 1)]
)
def test_buffers_whose_elements_are_not_aligned(dtype, offset):
    """No element of theirs begins a line of memory; a store of whole lines would end the process."""
    rng = np.random.default_rng(11)
    x, dy = rng.standard_normal((2, *PLANES)).astype(dtype)
    raw = np.empty(x.nbytes + 64, np.uint8)
    out = raw[offset : offset + x.nbytes].view(dtype).reshape(x.shape)
    expected, saved = nbnorm.batch_norm_forward(x)
    assert nbnorm.batch_norm_forward(x, out=out)[0].tobytes() == expected.tobytes()
    expected = nbnorm.batch_norm_backward(dy, saved)[0]
    assert nbnorm.batch_norm_backward(dy, saved, out=(out, None, None))[0].tobytes() == expected.tobytes()
    rows, grad, into = (a.reshape(15, -1) for a in (x, dy, out))
    for forward, backward in (
        (nbnorm.layer_norm_forward, nbnorm.layer_norm_backward),
        (nbnorm.batch_norm_forward, nbnorm.batch_norm_backward),
    ):
        expected, saved = forward(rows)
        assert forward(rows, out=into)[0].tobytes() == expected.tobytes()
        expected = backward(grad, saved)[0]
        assert backward(grad, saved, out=(into, None, None))[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("norm", "shape"), [("batch", PLANES), ("batch", FEATURES), ("layer", ROWS), ("layer", (301, 200))]
)
def test_a_gradient_may_be_streamed_into_dy(norm, shape, everything_is_streamed, monkeypatch):
    forward, backward = (getattr(nbnorm, f"{norm}_norm_{direction}") for direction in ("forward", "backward"))
    x, dy = np.random.default_rng(5).standard_normal((2, *shape), np.float32)
    _, saved = forward(x)
    into = dy.copy()
    assert backward(into, saved, out=(into, None, None))[0] is into
    assert everything_is_streamed == [True, True]
    set_last_level(monkeypatch, ENDLESS)
    np.testing.assert_array_equal(into, backward(dy, saved)[0])


STORES = """
import numpy as np
import nbnorm
from nbnorm._cpu import streams

def store(block, y, first, past):
    assert past
    assert (y.ctypes.data + y.itemsize * first) % streams.LINE == 0
    stored.append(block.size)
    y[first : first + block.shape[0]] = block

streams.store_block, streams.last_level = store, lambda *_: 0
rng = np.random.default_rng(0)
for norm, shape in (("batch", (2, 32, 14, 14)), ("batch", (13, 210)), ("layer", (9, 300))):
    stored = []
    x = rng.standard_normal(shape).astype(np.float32)
    y, _ = getattr(nbnorm, f"{norm}_norm_forward")(x)
    axis = 1 if norm == "layer" else (0, *range(2, x.ndim))
    wide = x.astype(float)
    expected = (wide - wide.mean(axis, keepdims=True)) / np.sqrt(wide.var(axis, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    print(x.size - sum(stored))
"""


def test_only_the_ends_of_a_stretch_are_written_plainly():
    """Of segments, those of eight channels; of rows and columns, all. Run by Python, without a compiler."""
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STORES]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    segments, columns, rows = (int(line) for line in found.stdout.split())
    block = BLOCK // 4
    assert 0 <= columns < 2 * block
    assert 0 <= rows < 2 * block
    assert 0 <= segments < 2 * block * 2 * 4  # stretches: two samples of four times eight channels


@pytest.mark.parametrize("letter", ["f", "d", *streams.LEAST_OF_HALVES])
def test_what_is_streamed_follows_from_sizes(letter):
    size = int(streams.FULL * streams.last_level(2, letter))
    shortest, stretch = streams.least(letter)
    assert streams.worthwhile(size + 1, shortest, stretch, letter, 2)
    assert not streams.worthwhile(size, shortest, stretch, letter, 2)
    assert not streams.worthwhile(size + 1, shortest - 1, stretch, letter, 2)
    assert not streams.worthwhile(size + 1, shortest, stretch - 1, letter, 2)


def test_lanes_that_are_streamed_are_more_than_a_block_has():
    """Behind the last lane, the terms of the first ones follow again."""
    for letter, itemsize in (("d", 8), ("f", 4), *((letter, 2) for letter in streams.LEAST_OF_HALVES)):
        assert streams.least(letter)[0] >= BLOCK // itemsize
    assert streams.LEAST_OF_ROUNDED[0] >= BLOCK // 2


def test_letters_of_halves():
    assert {np.dtype(dtype).char for dtype in (np.float16, ml_dtypes.bfloat16)} == set(
        streams.LEAST_OF_HALVES
    )


# Shapes, with how many neighbours are written together, and whether a stretch goes on from one row or segment to the
# next; where it does not, it must be longer.
SHORTEST, STRETCH = streams.LEAST
GEOMETRIES = [
    (grid, batch_view, (1 << 14, 320), True),
    (grid, batch_view, (1 << 14, SHORTEST), True),
    (grid, batch_view, (33, 5 * grid.CACHED_LANES), True),
    (grid, batch_view, (255, 5 * grid.CACHED_LANES), False),
    (grid, batch_view, (1, 2 * SHORTEST), False),
    (cut, batch_view, (64, 64, SHORTEST), True),
    (cut, batch_view, (64, 64, SHORTEST - 1), False),
    (cut, batch_view, (64, 3, SHORTEST), False),
    (cut, batch_view, (64, 3, STRETCH), True),
    (spans, trailing_view, (1 << 14, SHORTEST), True),
    (spans, trailing_view, (1 << 14, SHORTEST - 1), False),
]


@pytest.mark.parametrize(("walk", "planner", "shape", "expected"), GEOMETRIES)
def test_which_arrays_are_streamed(walk, planner, shape, expected):
    strides = tuple(4 * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    view = planner(shape, strides, 4, 1)
    large, small = (
        walk.Cut(*walk.geometry(view, 2, False, size).tolist()).streamed for size in (1 << 40, 1 << 10)
    )
    assert (bool(large), small) == (expected, 0)


@pytest.mark.parametrize(
    ("walk", "view"),
    [
        (cut, batch_view((5, 64, 64, 64), (1 << 20, 1 << 14, 256, 4), 4, 1)),
        (grid, batch_view((5120, 256), (1024, 4), 4, 1)),
        (spans, trailing_view((1280, 1024), (4096, 4), 4, 1)),
    ],
)
@pytest.mark.parametrize(
    ("cache", "threads", "letter", "expected"),
    [
        (streams.FAR, 2, "f", 1),
        (streams.FAR, 4, "f", 0),
        (streams.FAR, 2, "e", 0),
        (streams.FAR, 2, "E", 0),
        (streams.FAR - 1, 2, "f", 0),
    ],
)
def test_what_is_streamed_follows_from_threads_and_type(
    walk, view, cache, threads, letter, expected, monkeypatch
):
    """10 MB of x and y, of which a far cache is full for two threads, not for four."""
    monkeypatch.setattr(streams, "told", lambda: cache)
    assert walk.Cut(*walk.geometry(view, threads, False, 10 << 20, letter).tolist()).streamed == expected


@pytest.mark.parametrize(
    ("content", "size", "at_hand"),
    [
        ("32768K\n", 1 << 25, 1 << 25),
        ("1024K\n", 1 << 20, 1 << 20),
        ("98304K\n", 96 << 20, streams.MOST),
        ("307200K\n", 300 << 20, 2 * streams.SHARE),
        ("0K\n", streams.MOST, streams.MOST),
        ("", streams.MOST, streams.MOST),
        (None, streams.MOST, streams.MOST),
    ],
)
def test_the_size_of_the_last_level(content, size, at_hand, tmp_path, monkeypatch):
    """What the system tells, unless that is nothing, when streaming everything would be slow, or far away."""
    file = tmp_path / "size"
    if content is not None:
        file.write_text(content)
    monkeypatch.setattr(streams, "Path", lambda _: file)
    monkeypatch.setattr(streams, "told", streams.told.__wrapped__)
    assert streams.told() == size
    assert streams.last_level(2, "f") == at_hand
    assert streams.last_level(64, "f") == streams.last_level(2, "e") == min(size, streams.MOST)
