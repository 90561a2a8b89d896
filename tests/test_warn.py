"""A warning names the line of the user, from whatever depth it comes."""

import sys
import types
from functools import partial

import numpy as np
import pytest

import nbnorm
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


# Parameters and shapes as in most tests of layers, whose compiled kernels these calls share.
ONE, CONSTANT = np.ones((1, 6), np.float32), np.ones((4, 6, 5, 3), np.float32)
BOTH = ONE[0], ONE[0]
SINGLE, DIVISION = "expected more than 1 value per channel", "invalid value encountered in {}"
WAYS = {
    "function": (lambda: nbnorm.batch_norm_forward(ONE, *BOTH, small_batch="warn"), SINGLE),
    "layer": (lambda: nbnorm.BatchNorm(6, small_batch="warn")(ONE), SINGLE),
    "forward": (lambda: nbnorm.BatchNorm(6, small_batch="warn").forward(ONE), SINGLE),
    "run": (
        lambda: nbnorm.reestimate(bn := nbnorm.BatchNorm(6, small_batch="warn"), [ONE], lambda x: bn(x)),
        SINGLE,
    ),
    "eps": (
        lambda: nbnorm.group_norm_forward(CONSTANT, 2, *BOTH, eps=0),
        DIVISION.format("group_norm_forward"),
    ),
    "eps of a layer": (
        lambda: nbnorm.GroupNorm(2, 6, eps=0)(CONSTANT),
        DIVISION.format("group_norm_forward"),
    ),
    "eps of batch norm": (lambda: nbnorm.BatchNorm(6, eps=0)(CONSTANT), DIVISION.format("BatchNorm")),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in(way):
    """Functions and layers, whose calls differ in depth, name the line of the table above."""
    call, message = WAYS[way]
    with pytest.warns(RuntimeWarning, match=message) as caught:
        call()
    assert caught[0].filename == __file__
    assert caught[0].lineno - call.__code__.co_firstlineno in (0, 1)
