"""Sums that are written in vectors: every length, type and place in memory, without a look at the neighbours."""

import ml_dtypes
import numpy as np
import pytest
from llvmlite import binding

import processes
from nbnorm._cpu.halves import computing, stored
from nbnorm._cpu.launch import kernel
from nbnorm._cpu.memory import part, row
from nbnorm._cpu.vector_sums import vector_sums, vector_sums_of_rows

LENGTHS = [*range(1, 140), 255, 256, 257, 1000, 1023, 1024]


@kernel
def sums_of(x, first, n, shift, sums):
    """Sums of some neighbours of a line."""
    sums[0], sums[1] = vector_sums(row(x, first, n), shift)


@kernel
def sums_of_rows(x, first, apart, n, rows, shift, sums, squares):
    """Sums of some rows of a line."""
    places = part(sums, 0, squares.shape[0]), row(squares, 0, squares.shape[0])
    vector_sums_of_rows(row(x, 0, x.shape[0]), first, apart, n, rows, row(shift, 0, rows), *places)


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
    """Any number of rows has the bits of one by one; NaN between them does not count, what is behind them is left."""
    kind = computing(np.dtype(dtype)).type
    one = np.zeros(2)
    for rows in (1, 2, 7, 8, 9, 15, 16, 17, 31, 40):
        for n, apart in ((1, 1), (5, 9), (8, 8), (15, 15), (16, 20), (17, 17), (96, 96), (100, 131)):
            line = np.full(3 + rows * apart, np.nan).astype(dtype)
            for k in range(rows):
                line[3 + k * apart :][:n] = (rng.standard_normal(n) * 2 + 1).astype(dtype)
            x = line if line.itemsize > 2 else stored(line)
            shift, room = rng.standard_normal(rows).astype(kind), -(-rows // 16) * 16
            sums, squares, alone = results = np.full((3, room + 1), np.nan)
            sums_of_rows(x, 3, apart, n, rows, shift, sums, squares)
            sums_of_rows(x, 3, apart, n, rows, shift, None, alone)
            assert np.isnan(results[:, room]).all()
            for k in range(rows):
                sums_of(x, 3 + k * apart, n, shift[k], one)
                assert (sums[k], squares[k], alone[k]) == (one[0], one[1], one[1]), (rows, n, k)


@pytest.mark.skipif(
    not binding.get_host_cpu_features().get("avx2"), reason="runs code for a processor with AVX2"
)
def test_with_sixteen_registers(tmp_path):
    """Where fewer vectors are taken side by side."""
    code = f"""
import pytest
from nbnorm._inner import processor_has
assert processor_has("avx2") and not processor_has("avx512f")
assert pytest.main(["-q", "-p", "no:cacheprovider", "-k", "test_every_length or rows", {__file__!r}]) == 0
"""
    environment = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}
    assert "12 passed" in "\n".join(processes.run(code, **environment, NUMBA_CACHE_DIR=tmp_path))
