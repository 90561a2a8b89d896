"""Fixtures: the device, a seeded generator, result buffers that show what was not written."""

import zlib

import numpy as np
import pytest
from numba.core.runtime import _nrt_python as runtime

from cases import place

# Markers of tests that take minutes or gigabytes: each has a nox session that asks for it with `pytest -m`.
ON_DEMAND = ("processes", "fuzz", "large")


def pytest_collection_modifyitems(config, items):
    """Leave out what takes long and is not asked for by its name."""
    asked = config.option.markexpr
    unasked = {name for name in ON_DEMAND if name not in asked}
    left_out = [item for item in items if unasked & {mark.name for mark in item.iter_markers()}]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


class NumpyDevice:
    """Arrays of the host: both ways are the identity."""

    name = "numpy"

    def put(self, array):
        """Bring an array to the device, strides and all."""
        return array

    def get(self, array):
        """Bring a result back to the host."""
        assert type(array) is np.ndarray
        return array


@pytest.fixture(params=[NumpyDevice()], ids=lambda device: device.name)
def device(request):
    """Return the device that the arrays of a test live on."""
    return request.param


@pytest.fixture
def rng(request):
    """Make a generator seeded by the name of the test: neither order nor selection changes the data."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def kernels_keep_nothing():
    """Fail if kernels have not freed what they made, or still hold what they were given."""

    def held():
        return runtime.memsys_get_stats_mi_alloc() - runtime.memsys_get_stats_mi_free()

    runtime.memsys_enable_stats()
    before = held()
    yield
    assert held() == before


class Buffer:
    """A result buffer with given strides, full of a value no test expects, in a larger block full of it."""

    def __init__(self, shape, dtype, layout, fill):
        self.block, self.out = place(shape, dtype, layout, fill)
        self.fill = fill

    def assert_gaps_untouched(self):
        """Fail if anything was written beside the result."""
        block = self.block.copy()
        if self.out.size:
            offset = self.out.__array_interface__["data"][0] - self.block.__array_interface__["data"][0]
            twin = np.ndarray(self.out.shape, self.out.dtype, block, offset, self.out.strides)
            twin[...] = self.fill
        expected = np.full_like(self.block, self.fill)
        np.testing.assert_array_equal(block, expected, err_msg="written beside the result")


@pytest.fixture(params=[np.nan, 1e30], ids=["nan", "huge"])
def poisoned(request):
    """Make result buffers full of NaN or of a large number, in which an unwritten element is seen."""
    return lambda shape, dtype, layout="C": Buffer(shape, dtype, layout, request.param)
