"""The CUDA backend without a GPU: Numba's simulator runs the kernels themselves, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nbnorm

TESTS = Path(__file__).parent
# Seconds; it takes 20 to 40 on one core, since the simulator makes a thread of the system for every CUDA thread.
TIME_LIMIT = 300
# The simulator's threads share the globals of a kernel's module, which it changes while it walks over them; a run
# may end so now and then. Nothing else is tried again.
RACE = "dictionary changed size during iteration"


@pytest.mark.parametrize("tests", ["simulated.py", "simulated_calls.py"])
def test_in_the_simulator(tests):
    """All tests of a file pass where Numba's simulator stands in for a device."""
    pytest.importorskip("ml_dtypes")
    environment = {
        **os.environ,
        "NUMBA_ENABLE_CUDASIM": "1",
        "NUMBA_DISABLE_JIT": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(nbnorm.__file__).parents[1]), str(TESTS)]),
    }
    options = ["-q", "-x", "--noconftest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    command = [sys.executable, "-m", "pytest", *options, tests]
    for _ in range(3):
        done = subprocess.run(
            command,
            cwd=TESTS,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
            check=False,
        )
        if RACE not in done.stdout:
            break
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
