"""Results that are written past the caches, of which small arrays make no use by themselves."""

import math

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from nbnorm import _cpu
from nbnorm._cpu import cut, grid, spans, streams
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
    monkeypatch.setattr(streams, "last_level", lambda: size)
    _cpu.start.cache_clear()


@pytest.fixture
def everything_is_streamed(monkeypatch):
    set_last_level(monkeypatch, 0)
    monkeypatch.setattr(streams, "LEAST_OF_HALVES", {})
    yield
    set_last_level(monkeypatch, ENDLESS)


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
@pytest.mark.usefixtures("everything_is_streamed")
def test_streamed_results_have_the_bits_of_plain_ones(case, dtype, options, monkeypatch):
    streamed = [results(case, dtype, shift, **options) for shift in (0, 1, 5)]
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


@pytest.mark.usefixtures("everything_is_streamed")
def test_a_gradient_may_be_streamed_into_dy():
    rng = np.random.default_rng(5)
    x, dy = rng.standard_normal((2, *PLANES), np.float32)
    _, saved = nbnorm.batch_norm_forward(x)
    expected = nbnorm.batch_norm_backward(dy, saved)[0].copy()
    (into, *_) = nbnorm.batch_norm_backward(dy, saved, out=(dy, None, None))
    assert into is dy
    np.testing.assert_array_equal(dy, expected)


@pytest.mark.parametrize("letter", ["f", "d", *streams.LEAST_OF_HALVES])
def test_what_is_streamed_follows_from_sizes(letter):
    size = int(streams.FULL * streams.last_level())
    shortest, stretch = streams.LEAST_OF_HALVES.get(letter, streams.LEAST)
    assert streams.worthwhile(size + 1, shortest, stretch, letter)
    assert not streams.worthwhile(size, shortest, stretch, letter)
    assert not streams.worthwhile(size + 1, shortest - 1, stretch, letter)
    assert not streams.worthwhile(size + 1, shortest, stretch - 1, letter)


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
    ("content", "size"),
    [
        ("32768K\n", 1 << 25),
        ("1024K\n", 1 << 20),
        ("307200K\n", 300 << 20),
        ("0K\n", streams.MOST),
        ("", streams.MOST),
        (None, streams.MOST),
    ],
)
def test_the_size_of_the_last_level(content, size, tmp_path, monkeypatch):
    """What the system tells, unless that is nothing; then streaming everything would be slow."""
    file = tmp_path / "size"
    if content is not None:
        file.write_text(content)
    monkeypatch.setattr(streams, "Path", lambda _: file)
    monkeypatch.setattr(streams, "told", streams.told.__wrapped__)
    assert streams.told() == size
    assert streams.last_level() == min(size, streams.MOST)
