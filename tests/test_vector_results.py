"""Results that are written in vectors: every length, both types, no look at the neighbours and none touched."""

import numpy as np
import pytest

from nbnorm._cpu.launch import kernel
from nbnorm._cpu.memory import row
from nbnorm._cpu.segments import apply_elements, input_grad_segment
from nbnorm._cpu.vector_results import in_vectors, input_grad_vectors, normalize_vectors
from nbnorm._cpu.vector_terms import by_vectors
from nbnorm._inner import processor_has

LENGTHS = [*range(1, 70), 100, 127, 128, 129, 255, 256]


@kernel
def normalized(x, y, first, n, terms, activation, vectors):
    """Normalize and activate some neighbours of a line."""
    own_x, own_y, own = row(x, first, n), row(y, first, n), (terms[0], terms[1], terms[2])
    if in_vectors(x) and vectors:
        normalize_vectors(own_x, own_y, *own, activation)
    else:
        apply_elements(own_x, own_y, None, *own, activation)


@kernel
def gradients(x, dy, dx, first, n, terms, activation, vectors):
    """Dx of some neighbours of a line."""
    arrays = row(x, first, n), row(dy, first, n), row(dx, first, n)
    own = (terms[0], terms[1], terms[2], terms[3], terms[4])
    if in_vectors(x) and vectors:
        input_grad_vectors(*arrays, *own, terms[5], terms[6], activation)
    else:
        input_grad_segment(*arrays, None, None, None, *own, terms[5], terms[6], activation)


@kernel
def known(x, activation, residual):
    """Whether results are written in vectors, and whether vectors know what they depend on."""
    return in_vectors(x), by_vectors(activation, (residual, None))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("activation", [None, True], ids=["plain", "relu"])
def test_every_length(dtype, in_place, activation, rng):
    """The bits of a loop over elements; what lies beside them keeps its own."""
    line = np.dtype(dtype)
    for n in LENGTHS:
        first, size = int(rng.integers(0, 20)), n + 40
        x, dy, terms = (rng.standard_normal(k).astype(line) for k in (size, size, 7))
        x[first + n // 2] = np.nan
        for run, inputs in ((normalized, (x,)), (gradients, (x, dy))):
            results = []
            for vectors in (False, True):
                own = [array.copy() for array in inputs]
                target = own[-1] if in_place else np.full(size, 7, line)
                target[:first] = target[first + n :] = 5
                run(*own, target, first, n, terms, activation, vectors)
                assert (target[:first] == 5).all()
                assert (target[first + n :] == 5).all()
                results.append(target)
            np.testing.assert_array_equal(*results)
            assert (results[0][first : first + n] != 7).all()


def test_what_vectors_know(rng):
    """Relu, but no other activation and no residual; no half types."""
    x = rng.standard_normal(8, np.float32)
    wide = processor_has("avx512f")
    assert known(x, None, None) == known(x, True, None) == (wide, True)
    assert known(x, 1, None) == known(x, np.float32(0.1), None) == known(x, True, x) == (wide, False)
    assert known(x.astype(np.float16).view(np.uint16), None, None) == (False, True)
