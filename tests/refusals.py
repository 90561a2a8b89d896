"""What a table of bad arguments is made of: a change of a correct call, and what it leads to."""

from dataclasses import dataclass

import numpy as np
import pytest


def read_only(array):
    """Forbid writing."""
    array.flags.writeable = False
    return array


@dataclass(frozen=True)
class Fault:
    """One change of a correct call, and what it leads to."""

    name: str
    change: object  # a function of the arguments, which returns the ones it replaces
    exception: type
    message: str

    def __str__(self):
        """Name the test."""
        return self.name


def some(**values):
    """Replace arguments by values."""
    return lambda arguments: values


def snapshot(values):
    """Copy the bytes of every array among the values, and of what it is a view of."""
    arrays = [v for v in values if isinstance(v, np.ndarray) and v.dtype != object]
    return [(a, a.tobytes()) for array in arrays for a in (array, array.base) if isinstance(a, np.ndarray)]


def assert_refused(call, arguments, fault, buffers=()):
    """Fail unless the call raises what the table says and leaves every array as it was."""
    before = snapshot([*arguments.values(), *buffers])
    with pytest.raises(fault.exception, match=fault.message):
        call(**arguments)
    for array, content in before:
        assert array.tobytes() == content, "an array was written in spite of the exception"
