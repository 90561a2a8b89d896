"""Results that are written in vectors: every length, both types, no look at the neighbours and none touched."""

import numpy as np
import pytest

from nbnorm._cpu.launch import kernel
from nbnorm._cpu.memory import row
from nbnorm._cpu.segments import apply_elements, input_grad_segment
from nbnorm._cpu.vector_results import in_vectors, input_grad_vectors, normalize_vectors

LENGTHS = [*range(1, 70), 100, 127, 128, 129, 255, 256]


@kernel
def normalized(x, y, first, n, terms, vectors):
    """Normalize some neighbours of a line; say whether it can be done in vectors."""
    own_x, own_y, own = row(x, first, n), row(y, first, n), (terms[0], terms[1], terms[2])
    if in_vectors(x, (None, None)) and vectors:
        normalize_vectors(own_x, own_y, *own)
    else:
        apply_elements(own_x, own_y, None, *own, None)
    return in_vectors(x, (None, None)), in_vectors(x, (None, y))


@kernel
def gradients(x, dy, dx, first, n, terms, vectors):
    """Dx of some neighbours of a line."""
    own_x, own_dy, own_dx = row(x, first, n), row(dy, first, n), row(dx, first, n)
    own = (terms[0], terms[1], terms[2], terms[3], terms[4])
    if in_vectors(x, (None,)) and vectors:
        input_grad_vectors(own_x, own_dy, own_dx, *own)
    else:
        input_grad_segment(own_x, own_dy, own_dx, None, None, None, *own, terms[0], terms[0], None)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("in_place", [False, True])
def test_every_length(dtype, in_place, rng):
    """The bits of a loop over elements; what lies beside them keeps its own."""
    line = np.dtype(dtype)
    for n in LENGTHS:
        first, size = int(rng.integers(0, 20)), n + 40
        x, dy, terms = (rng.standard_normal(k).astype(line) for k in (size, size, 5))
        for run, inputs in ((normalized, (x,)), (gradients, (x, dy))):
            results = []
            for vectors in (False, True):
                own = [array.copy() for array in inputs]
                target = own[-1] if in_place else np.full(size, 7, line)
                target[:first] = target[first + n :] = np.nan
                run(*own, target, first, n, terms, vectors)
                assert np.isnan(target[:first]).all()
                assert np.isnan(target[first + n :]).all()
                assert not np.isnan(target[first : first + n]).any()
                results.append(target)
            np.testing.assert_array_equal(*results)


def test_options_are_left_to_loops(rng):
    """What depends on more than x and dy, and half types, are not written in vectors."""
    x, terms = rng.standard_normal((2, 8), np.float32)
    assert not normalized(x, x.copy(), 0, 8, terms, True)[1]
    halves = x.astype(np.float16).view(np.uint16)
    assert normalized(halves, halves.copy(), 0, 8, terms, True) == (False, False)
