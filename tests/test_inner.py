"""Functions that only kernels call: compiled into the kernels, which find all of them."""

import os
import re

import numpy as np
import pytest
from numba import njit, prange

from nbnorm._cpu.launch import called, helper, inlined, kernel, loop, narrow_reduction, reduction
from nbnorm._cpu.memory import row
from nbnorm._inner import InnerCode, LoopCode, Outer, Wide
from processes import run

pytestmark = pytest.mark.skipif(os.environ.get("NUMBA_DISABLE_JIT") == "1", reason="nothing is compiled")


@helper
def increment(x, i):
    """Add one."""
    x[i] += 1


@helper
def never(x, i):
    """Call what LLVM finds out not to be called, as no number is below 0 and above."""
    if i < 0 and i > 0:
        increment(x, i)


@helper
def always(x, i):
    """Call the same."""
    increment(x, i)


@helper
def either(x, i):
    """Come by one function on two ways, of which one leads nowhere."""
    never(x, i)
    always(x, i)


@loop
def twice(x, i):
    """Do it again in code that is optimized by itself."""
    either(x, i)


@kernel
def serial(x):
    """Add 2 to every element."""
    for i in range(x.shape[0]):
        either(x, i)
        twice(x, i)


def parallel_body(x):
    """The same in parallel."""
    for i in prange(x.shape[0]):
        either(x, i)
        twice(x, i)


def libraries(dispatcher):
    """Return what the functions of a dispatcher were compiled into."""
    return [result.library for result in dispatcher.overloads.values()]


def test_kernels_find_what_they_call():
    """On whatever ways; a call of something missing would end the process."""
    code = (
        "import numpy as np, test_inner as t; x = np.zeros(5); t.serial(x);"
        "t.kernel(t.parallel_body, parallel=True, pipeline_class=t.Outer)(x); print(x)"
    )
    assert run(code, NUMBA_CACHE_DIR=os.devnull)[0] == "[4. 4. 4. 4. 4.]"


def test_who_is_compiled_how():
    """Helpers wait for a kernel; kernels, loops over elements and functions of others are what Numba makes of them."""
    x = np.zeros(5)
    other = njit(lambda x: x.sum())
    fresh = njit(parallel=True, pipeline_class=Outer)(parallel_body)
    fresh(x)
    assert other(x) == 10.0
    assert libraries(never)
    assert all(
        isinstance(library, InnerCode) for f in (increment, never, always, either) for library in libraries(f)
    )
    assert all(isinstance(library, LoopCode) for library in libraries(twice))
    assert not any(isinstance(library, InnerCode) for f in (fresh, twice, other) for library in libraries(f))


def test_ours_may_use_the_widest_vectors():
    """And functions of others do as Numba would have it."""
    x = np.zeros(5)
    wide, other = (njit(lambda x: x.sum(), **options) for options in ({"pipeline_class": Wide}, {}))
    for f, expected in ((wide, True), (other, False)):
        f(x)
        assert all(("prefer-vector-width" in library.get_llvm_str()) is expected for library in libraries(f))


@called
def apart(x, i):
    """Add one where a kernel calls and does not take in."""
    x[i] += 1


@helper
def product_and_sum(a, b):
    """Compute what fused multiplication would round once, and reassociation to nothing."""
    return (a * b + a) - a * b


@reduction
def sums(x):
    """Be the first that calls it, with fewer rules."""
    total = 0.0
    for i in range(x.shape[0]):
        total += product_and_sum(x[i], 3.0)
    return total


@njit(pipeline_class=Wide)  # not kept on disk, for what comes from there does not show its code
def calling(x):
    """Call both."""
    for i in range(x.shape[0]):
        apart(x, i)
    return sums(x)


def test_what_is_called_is_there_once():
    """Optimized with the kernel, yet not put in the place of its call."""
    x = np.zeros(5)
    calling(x)
    (library,) = libraries(calling)
    code = library.get_llvm_str()
    assert x.tolist() == [1.0] * 5
    assert len(re.findall(r"\ndefine [^\n]*apart", code)) == 1
    assert re.search(r"call [^\n]*apart", code)


def test_nobody_takes_over_the_rules_of_a_caller():
    """Numba would let a function have the fastmath and the inlining of whoever calls it first."""
    calling(np.zeros(5))
    (library,) = libraries(product_and_sum)
    code = library.get_llvm_str()
    assert "fsub double" in code
    assert "alwaysinline" not in code


def combine(a, b, c):
    """Access each element in one round."""
    for i in range(a.shape[0]):
        a[i] = a[i] * b[i] + c[i]


@pytest.mark.parametrize(
    ("kind", "promised"), [(inlined, True), (loop, True), (called, True), (helper, False)]
)
def test_who_promises_that_rounds_are_independent(kind, promised):
    """Where elements are promised to one round each, nothing is compared before a loop, and in place is right."""
    combined = kind(combine)

    @njit(pipeline_class=Wide)
    def combining(a, b, c):
        n = a.shape[0]
        combined(row(a, 0, n), row(b, 0, n), row(c, 0, n))

    a, b = np.arange(100.0), np.linspace(1, 2, 100)
    expected = a * b + a
    combining(a, b, a)
    (library,) = libraries(combining)
    assert ("memcheck" in library.get_llvm_str()) is not promised
    np.testing.assert_array_equal(a, expected)


def total_of(x):
    """Sum a row."""
    total = 0.0
    for i in range(x.shape[0]):
        total += x[i]
    return total


def test_sums_over_few_elements_take_two_vectors_at_a_time():
    """Of which LLVM takes four otherwise, where it has AVX."""
    total = narrow_reduction(total_of)
    summing = njit(pipeline_class=Wide)(lambda x: total(row(x, 0, x.shape[0])))
    assert summing(np.ones(100)) == 100.0
    (library,) = libraries(summing)
    main = re.search(r"\nvector\.body[^\n]*:.*?\n\n", library.get_llvm_str(), re.DOTALL)
    assert len(re.findall(r"phi <\d+ x double>", main[0])) == 2
