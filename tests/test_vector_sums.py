"""Sums that are written in vectors: every length, type and place in memory, without a look at the neighbours."""

import ml_dtypes
import numpy as np
import pytest
from llvmlite import binding

import processes
from nbnorm._cpu.halves import computing, stored
from nbnorm._cpu.held_sums import ROWS, held_like, held_totals, hold_grad_sums, hold_sums
from nbnorm._cpu.launch import kernel
from nbnorm._cpu.memory import row
from nbnorm._cpu.vector_sums import vector_sums

LENGTHS = [*range(1, 140), 255, 256, 257, 1000, 1023, 1024]


@kernel
def sums_of(x, first, n, shift, sums):
    """Sums of some neighbours of a line."""
    sums[0], sums[1] = vector_sums(row(x, first, n), shift)


@kernel
def sums_of_rows(x, first, apart, n, shift, sums):
    """Sums of some rows of a line, put together."""
    rows = shift.shape[0]
    held = held_like(x)
    for k in range(rows):
        hold_sums(row(x, first + k * apart, n), 0, 1, shift[k], held, k)
    for which in range(2):
        held_totals(held, which, rows, row(sums, (which, 0), ROWS))


@kernel
def grad_sums_of_rows(x, dy, first, apart, n, segments, stride, terms, activation, sums):
    """Sums of dz and of dz * x_hat of some rows of a line, each some segments; of neighbours at once."""
    rows = terms.shape[1]
    held, some = held_like(x), rows if apart == n else 1
    for k in range(0, rows, some):
        own_x, own_dy = row(x, first + k * apart, some * n), row(dy, first + k * apart, some * n)
        own = (
            row(terms, (0, k), some),
            row(terms, (1, k), some),
            row(terms, (2, k), some),
            row(terms, (3, k), some),
        )
        hold_grad_sums(own_x, stride, own_dy, stride, segments, n, own, activation, held, k)
    for which in range(2):
        held_totals(held, which, rows, row(sums, (which, 0), ROWS))


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64], ids=lambda t: np.dtype(t).name
)
@pytest.mark.parametrize("aligned", [True, False])
def test_every_length(dtype, aligned, rng):
    """All values of a row count once, and NaN beside it does not."""
    itemsize = np.dtype(dtype).itemsize
    memory = np.zeros(1100 * itemsize + 1, np.uint8)
    line = memory[:-1].view(dtype) if aligned else memory[1:].view(dtype)
    kind = computing(np.dtype(dtype)).type
    shift, sums = kind(0.7), np.zeros(2)
    for n in LENGTHS:
        first = int(rng.integers(1, 40))
        line[:] = np.nan
        values = line[first : first + n]
        values[:] = (rng.standard_normal(n) * 2 + 1).astype(dtype)
        sums_of(line if itemsize > 2 else stored(line), first, n, shift, sums)
        d = values.astype(kind).astype(np.float64) - np.float64(shift)
        tolerance = 64 * np.finfo(kind).eps
        np.testing.assert_allclose(sums[0], d.sum(), rtol=0, atol=tolerance * np.abs(d).sum())
        np.testing.assert_allclose(sums[1], (d * d).sum(), rtol=tolerance)


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64], ids=lambda t: np.dtype(t).name
)
def test_rows_side_by_side(dtype, rng):
    """Any number of rows has the bits of one by one; NaN between them does not count."""
    kind = computing(np.dtype(dtype)).type
    one = np.zeros(2)
    for rows in (1, 2, 7, 8, 9, 15, 16):
        for n, apart in ((1, 1), (5, 9), (8, 8), (15, 15), (16, 20), (17, 17), (96, 96), (100, 131)):
            line = np.full(3 + rows * apart, np.nan).astype(dtype)
            for k in range(rows):
                line[3 + k * apart :][:n] = (rng.standard_normal(n) * 2 + 1).astype(dtype)
            x = line if line.itemsize > 2 else stored(line)
            shift, sums = rng.standard_normal(rows).astype(kind), np.full((3, ROWS), np.nan)
            sums_of_rows(x, 3, apart, n, shift, sums)
            assert np.isnan(sums[2]).all()
            for k in range(rows):
                sums_of(x, 3 + k * apart, n, shift[k], one)
                assert tuple(sums[:2, k]) == tuple(one), (rows, n, k)


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64], ids=lambda t: np.dtype(t).name
)
@pytest.mark.parametrize("activation", [None, True], ids=["plain", "relu"])
def test_gradients_of_segments(dtype, activation, rng):
    """Segments of a row count once each, in sums of any rows; NaN between segments and rows does not."""
    kind = computing(np.dtype(dtype)).type
    eps = np.finfo(kind).eps
    for rows, segments in ((1, 1), (3, 2), (8, 4), (13, 1), (16, 3)):
        for n, apart in ((1, 2), (5, 5), (15, 17), (16, 16), (17, 17), (33, 40), (64, 64), (196, 200)):
            stride = rows * apart + 3
            x, dy = (np.full(5 + segments * stride, np.nan).astype(dtype) for _ in range(2))
            counted = 5 + np.add.outer(np.arange(segments) * stride, np.arange(rows) * apart)[..., np.newaxis]
            counted = counted + np.arange(n)
            for line in (x, dy):
                line[counted] = (rng.standard_normal(counted.shape) + 1).astype(dtype)
            terms = rng.standard_normal((4, rows)).astype(kind)
            sums = np.full((3, ROWS), np.nan)
            given = [line if line.itemsize > 2 else stored(line) for line in (x, dy)]
            grad_sums_of_rows(*given, 5, apart, n, segments, stride, terms, activation, sums)
            own_x, dz = (line[counted].astype(np.float64) for line in (x, dy))
            mean_hi, rstd, scale, shift = terms[..., np.newaxis].astype(np.float64)
            if activation:
                dz = np.where((own_x - mean_hi) * scale + shift <= 0, 0, dz)
            wanted = dz, dz * ((own_x - mean_hi) * rstd)
            for found, term in zip(sums, wanted, strict=False):
                error = np.abs(found[:rows] - term.sum(axis=(0, 2)))
                assert (error <= 4 * eps * np.abs(term).sum(axis=(0, 2))).all(), (rows, segments, n)


@pytest.mark.skipif(
    not binding.get_host_cpu_features().get("avx2"), reason="runs code for a processor with AVX2"
)
def test_with_sixteen_registers(tmp_path):
    """Where fewer vectors are taken side by side."""
    code = f"""
import pytest
from nbnorm._inner import processor_has
assert processor_has("avx2") and not processor_has("avx512f")
assert pytest.main(["-q", "-p", "no:cacheprovider", "-k", "test_every_length or rows or segments", {__file__!r}]) == 0
"""
    environment = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}
    assert "20 passed" in "\n".join(processes.run(code, **environment, NUMBA_CACHE_DIR=tmp_path))
