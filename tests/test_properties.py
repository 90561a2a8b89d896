"""What holds for every call, over random shapes, strides, types and values; minutes of it with `-m fuzz`."""

import os
import time

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from properties import CHECKS, NORMS, calls, check_twins

COMMON = {
    "deadline": None,
    "database": None,
    "phases": [Phase.generate, Phase.shrink],
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}
# The parallel twins of the other norms are left to the fuzzer: nothing else in the tests compiles them.
COMPILED_IN_PARALLEL = ("batch",)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_property(check):
    """The same hundred calls in every run."""
    norms = COMPILED_IN_PARALLEL if check is check_twins else NORMS
    settings(max_examples=100, derandomize=True, **COMMON)(given(calls(norms=norms))(check))()


@pytest.mark.fuzz
def test_fuzz():
    """Other calls in every run, larger ones too, for NBNORM_FUZZ_SECONDS (600)."""
    end = time.monotonic() + float(os.environ.get("NBNORM_FUZZ_SECONDS", "600"))
    first = number = int(os.environ.get("NBNORM_FUZZ_SEED", time.time_ns() % 10**9))
    while time.monotonic() < end:
        print(f"NBNORM_FUZZ_SEED={number}")  # the last one printed is that of a failure
        drawn = calls(largest=100_000 if number % 4 == 0 else 400)
        for check in CHECKS:
            seed(number)(settings(max_examples=50, **COMMON)(given(drawn)(check)))()
        number += 1
    print(f"{50 * len(CHECKS) * (number - first)} calls")
