"""A warning names the line of the user, from whatever depth it comes."""

import sys
import types
from functools import partial

import pytest

from nbnorm import _warn

INNER = "def call(f, depth):\n    return f() if depth == 0 else call(f, depth - 1)\n"


@pytest.fixture
def deep():
    """Make a function of the package that calls another from a given depth."""
    module = types.ModuleType("nbnorm.deep")
    exec(compile(INNER, "nbnorm/deep.py", "exec"), vars(module))
    return module.call


def line():
    """Return the line of the caller."""
    return sys._getframe(1).f_lineno


@pytest.mark.parametrize("category", [RuntimeWarning, UserWarning])
@pytest.mark.parametrize("depth", [0, 1, 7])
def test_any_depth(deep, depth, category):
    """The line is that of the call, not one inside."""
    with pytest.warns(category, match="deep water") as caught:
        deep(partial(_warn.warn, "deep water", category), depth)
    assert (caught[0].filename, caught[0].lineno) == (__file__, line() - 1)
    with pytest.warns(RuntimeWarning, match="by default") as caught:
        _warn.warn("by default")
    assert (caught[0].filename, caught[0].lineno) == (__file__, line() - 1)


def test_a_user_inside(deep):
    """A callback of the user that is called by the package is a line of the user, too."""
    with pytest.warns(RuntimeWarning, match="called back") as caught:
        deep(
            lambda: deep(partial(_warn.warn, "called back"), 2),
            3,
        )
    assert (caught[0].filename, caught[0].lineno) == (__file__, line() - 3)
