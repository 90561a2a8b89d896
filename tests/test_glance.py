"""Arguments that are seen to be ordinary at a glance: what a glance misses is found, the second time as well."""

import numpy as np
import pytest

import nbnorm
import oracle


def call(rng, **changes):
    """Return the arguments of an ordinary call, some of them changed."""
    arguments = {
        "x": rng.standard_normal((8, 5)).astype(np.float32),
        "weight": np.ones(5, np.float32),
        "bias": np.zeros(5, np.float32),
        "running_mean": np.zeros(5, np.float32),
        "running_var": np.ones(5, np.float32),
        "out": np.empty((8, 5), np.float32),
    }
    return arguments | changes


@pytest.fixture
def known(rng):
    """Let an ordinary call pass, twice."""
    for _ in range(2):
        nbnorm.batch_norm_forward(**call(rng))


def read_only(array):
    """Return the array without write access."""
    array.flags.writeable = False
    return array


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_that_need_a_copy(name, rng):
    """The other byte order, an odd address, a list: like the plain array, the second time as well."""
    values = rng.standard_normal(5).astype(np.float32)
    odd = np.zeros(21, np.uint8)[1:].view(np.float32)
    odd[:] = values
    given = call(rng)
    wanted = nbnorm.batch_norm_forward(**given | {name: values, "out": None})[0]
    for form in (
        values.astype(">f4"),
        odd,
        values[::-1].copy()[::-1],
        values.astype(np.float64),
        read_only(values.copy()),
    ):
        for _ in range(3):
            y = nbnorm.batch_norm_forward(**given | {name: form})[0]
            oracle.assert_within(y, wanted, 1e-6)


FAULTS = [
    ("out", lambda given: read_only(given["out"]), "out: output array is read-only"),
    ("out", lambda given: given["x"], "out shares memory with x"),
    ("out", lambda given: given["x"][:], "out shares memory with x"),
    ("running_mean", lambda given: read_only(given["running_mean"]), "running_mean is read-only"),
    ("running_var", lambda given: given["running_mean"], "running_var shares memory with running_mean"),
    ("running_mean", lambda given: given["weight"], "running_mean shares memory with weight"),
    ("weight", lambda given: np.ones(4, np.float32), r"weight has shape \(4,\)"),
    ("bias", lambda given: np.ones((5, 1), np.float32), r"bias has shape \(5, 1\)"),
    ("running_var", lambda given: None, "running_mean was given without running_var"),
    ("channel_axis", lambda given: True, "channel_axis must be an integer"),
    ("eps", lambda given: -1.0, "eps must be a finite number"),
]


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(("name", "fault", "message"), FAULTS, ids=[f"{n} {m[:30]}" for n, _, m in FAULTS])
def test_faults_of_a_known_call(name, fault, message, rng):
    """Every fault is found beside arguments that have passed before, and nothing is written."""
    given = call(rng)
    given["out"][...] = 7
    before = {key: np.array(value) for key, value in given.items()}
    with pytest.raises((ValueError, TypeError), match=message):
        nbnorm.batch_norm_forward(**given | {name: fault(given)})
    for key, value in given.items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)
