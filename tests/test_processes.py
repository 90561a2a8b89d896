"""Several Python threads, a forked child, no compiler: the surroundings a training loop may have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nbnorm
import oracle
from cases import Case

WORK = Case((1001, 40), 1, "enough for a team of threads")


def gradients_of(seed):
    """Run one step of a layer of its own and return what it leaves, as one array in float64."""
    rng = np.random.default_rng(seed)
    layer = nbnorm.BatchNorm(WORK.shape[1])
    y = layer(WORK.x(rng, np.float32))
    dx = layer.backward(WORK.dy(rng, np.float32))
    found = [y, dx, *layer.grads.values(), layer.running_mean, layer.running_var]
    return np.concatenate([array.ravel() for array in found]).astype(np.float64)


THREADS_THEN_FORK = """
import os, sys, threading
import numpy as np
from test_processes import gradients_of

expected = [gradients_of(seed) for seed in range(4)]
found, start = {}, threading.Barrier(4)
def work(seed):
    start.wait(60)
    found[seed] = [gradients_of(seed) for _ in range(10)]
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert all((array == expected[seed]).all() for seed in range(4) for array in found[seed]), "threads"

def child(generations):
    pid = os.fork()
    if pid == 0:
        same = (gradients_of(0) == expected[0]).all()
        os._exit(0 if same and (generations == 1 or child(generations - 1) == 0) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print("child and grandchild:", child(2))
"""
# Small, since every element is a call of Python here.
WITHOUT_COMPILER = """
import json
import numpy as np, nbnorm
x = (np.arange(60) * 7 % 31).reshape(4, 3, 5).astype(np.float32)
y, saved = nbnorm.batch_norm_forward(x, np.ones(3, np.float32), None, np.zeros(3), np.ones(3))
columns = nbnorm.batch_norm_forward(x[:, :, 0])[0]
print(json.dumps([a.tolist() for a in (y, *nbnorm.batch_norm_backward(y * x, saved)[:2], columns)]))
"""


def run(code, **environment):
    """Run code in a fresh interpreter and return its last line."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-3000:]}"
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_threads_and_forked_children():
    """Four threads at once where the threading layer bears one at a time, then a child and its child."""
    assert run(THREADS_THEN_FORK, NUMBA_THREADING_LAYER="workqueue") == "child and grandchild: 0"


@pytest.mark.slow
def test_without_the_compiler():
    """NUMBA_DISABLE_JIT=1 runs everything as plain Python."""
    y, dx, dweight, columns = (np.array(a) for a in json.loads(run(WITHOUT_COMPILER, NUMBA_DISABLE_JIT="1")))
    x = (np.arange(60) * 7 % 31).reshape(4, 3, 5).astype(np.float32)
    reference, narrow = oracle.batch_norm(x), oracle.batch_norm(x[:, :, 0])
    gradients = oracle.differentiate((y * x).astype(np.float32), reference)
    oracle.assert_within(y, reference.y, oracle.y_tolerance(reference), "y")
    oracle.assert_within(dx, gradients.dx, oracle.dx_tolerance(reference, gradients), "dx")
    bound = oracle.sum_tolerance(gradients.dweight_terms, reference, np.dtype(np.float32))
    oracle.assert_within(dweight, gradients.dweight, bound, "dweight")
    oracle.assert_within(columns, narrow.y, oracle.y_tolerance(narrow), "columns")
