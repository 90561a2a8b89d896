"""Threads, forks, interrupts, no compiler: the surroundings a training loop may have, under every threading layer."""

import importlib.metadata
import json
import os
from pathlib import Path

import numpy as np
import pytest

import nbnorm
import oracle
from cases import Case
from processes import run

WORK = Case((24, 8, 17, 19), 1, "enough for a team of threads, in the kernels of whole planes")


def gradients_of(seed):
    """Run one step of a layer of its own and return what it leaves, as one array in float64."""
    rng = np.random.default_rng(seed)
    layer = nbnorm.BatchNorm(WORK.shape[1])
    y = layer(WORK.x(rng, np.float32))
    dx = layer.backward(WORK.dy(rng, np.float32))
    found = [y, dx, *layer.grads.values(), layer.running_mean, layer.running_var]
    return np.concatenate([array.ravel() for array in found]).astype(np.float64)


def tbb_folder():
    """Where pip has put the library of TBB, which lies off the path of the loader in a virtual environment."""
    try:
        files = importlib.metadata.files("tbb") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(f.locate()).resolve().parent for f in files if f.name == "libtbb.so.12"]
    return found[0] if found else None


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.fixture(params=["omp", "workqueue", "tbb"])
def layer(request):
    """Return the environment that selects a threading layer."""
    environment = {"NUMBA_THREADING_LAYER": request.param, "NUMBA_NUM_THREADS": 2}
    if request.param == "tbb":
        if tbb_folder() is None:
            pytest.skip("TBB is not installed")
        environment["LD_LIBRARY_PATH"] = tbb_folder()
    return environment


# Every scenario starts with this: `same` compares with results that one thread alone has.
PRELUDE = """
import os, sys, threading, multiprocessing
from concurrent.futures import ThreadPoolExecutor
import numba, numpy as np, nbnorm
from nbnorm._cpu.team import team, layer
from test_processes import gradients_of

def alone(seeds=range(4)):
    team.enabled = False
    found = {seed: gradients_of(seed) for seed in seeds}
    team.enabled = True
    return found

def same(seed):
    return bool((gradients_of(seed) == expected[seed]).all())

def in_threads(work, count=4):
    start, found = threading.Barrier(count), []
    def body(seed):
        start.wait(60)
        found.append(work(seed))
    threads = [threading.Thread(target=body, args=(seed,)) for seed in range(count)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == count and all(found), found

def exit_status(child):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if child() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

expected = alone()
"""
SCENARIOS = {
    "threads": """
in_threads(lambda seed: all(same(seed) for _ in range(20)))
""",
    "threads beside a matrix product": """
a = np.ones((300, 300))
in_threads(lambda seed: all(same(seed) and (a @ a)[0, 0] == 300 for _ in range(10)))
""",
    "a pool of threads whose tasks nest": """
with ThreadPoolExecutor(2) as outer, ThreadPoolExecutor(2) as inner:
    assert all(outer.map(lambda seed: same(seed) and inner.submit(same, seed).result(60), list(range(4)) * 5))
""",
    "one thread after another": """
for seed in range(4):
    in_threads(lambda _: same(seed), count=1)
""",
    "one layer in two threads": """
x = np.random.default_rng(0).standard_normal((24, 8, 17, 19)).astype(np.float32)
bn = nbnorm.BatchNorm(8, momentum=None)
in_threads(lambda seed: [bn.forward(x) for _ in range(50)] and True, count=2)
assert bn.num_batches_tracked == 100
assert np.allclose(bn.running_mean, x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
""",
    "child and grandchild": """
assert same(0)
assert exit_status(lambda: same(1) and exit_status(lambda: same(2)) == 0) == 0
assert same(3)
""",
    "child of a parent that has not started threads": """
assert layer() is None
assert exit_status(lambda: same(1)) == 0
assert same(2)
""",
    "threads of a child": """
assert same(0)
assert exit_status(lambda: in_threads(same) is None) == 0
""",
    "fork from a thread": """
assert same(0)
in_threads(lambda _: exit_status(lambda: same(1)) == 0, count=1)
""",
    "fork while a kernel runs": """
running, stop = threading.Event(), threading.Event()
def work():
    while not stop.is_set():
        gradients_of(0)
        running.set()
thread = threading.Thread(target=work)
thread.start()
running.wait(60)
found = [exit_status(lambda: same(1)) for _ in range(5)]
stop.set()
thread.join()
assert found == [0] * 5, found
""",
    "a pool of forked workers": """
assert same(0)
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map_async(same, [0, 1, 2, 3]).get(60) == [True] * 4
""",
}


@pytest.mark.processes
@needs_fork
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda name: name.replace(" ", "-"))
def test_scenario(scenario, layer):
    """The same bits as one thread alone, under every threading layer: never an abort, never a hang."""
    _, err = run(f"{PRELUDE}\n{SCENARIOS[scenario]}", **layer)
    assert "RuntimeWarning" not in err, err
    assert "GNU OpenMP" not in err
    assert "Concurrent access" not in err


@pytest.mark.slow
@needs_fork
def test_the_most_dangerous_scenarios():
    """What aborts or hangs plain Numba, where it does: in the ordinary run of the tests."""
    for name, threading_layer in (("threads", "workqueue"), ("child and grandchild", "omp")):
        run(f"{PRELUDE}\n{SCENARIOS[name]}", NUMBA_THREADING_LAYER=threading_layer, NUMBA_NUM_THREADS=2)


@pytest.mark.processes
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_new_interpreters(method, layer, tmp_path):
    """A layer travels to processes that share nothing with this one, and its results come back."""
    (tmp_path / "script.py").write_text(f"""
import multiprocessing, sys
import numpy as np, nbnorm
from test_processes import WORK

def outputs(bn, seed):
    return bn.eval()(WORK.x(np.random.default_rng(seed), np.float32))

if __name__ == "__main__":
    bn = nbnorm.BatchNorm(8)
    bn(WORK.x(np.random.default_rng(9), np.float32))
    with multiprocessing.get_context("{method}").Pool(2) as pool:
        found = pool.starmap_async(outputs, [(bn, seed) for seed in range(4)]).get(100)
    assert all((found[seed] == outputs(bn, seed)).all() for seed in range(4))
    print("right")
""")
    code = f"import sys, runpy; runpy.run_path({str(tmp_path / 'script.py')!r}, run_name='__main__')"
    assert run(code, **layer)[0] == "right"


SHARDS = """
import multiprocessing
import numpy as np, nbnorm

def worker(pipe, x, dy):
    pipe.send(nbnorm.batch_moments(x).to_dict())
    moments = nbnorm.Moments.from_dict(pipe.recv())
    saved = nbnorm.batch_norm_apply(x, moments)[1]
    pipe.send(nbnorm.batch_norm_grad_sums(dy, saved))
    pipe.send(nbnorm.batch_norm_input_grad(dy, saved, pipe.recv()))

def merged(parts):
    first, *others = parts
    for other in others:
        first = first.merge(other)
    return first

if __name__ == "__main__":
    x, dy = np.random.default_rng(0).standard_normal((2, 30, 4, 5))
    parts = [slice(0, 7), slice(7, 7), slice(7, 30)]
    context, pipes = multiprocessing.get_context("spawn"), []
    for part in parts:
        here, there = context.Pipe()
        context.Process(target=worker, args=(there, x[part], dy[part]), daemon=True).start()
        pipes.append(here)
    moments = merged([nbnorm.Moments.from_dict(pipe.recv()) for pipe in pipes]).to_dict()
    [pipe.send(moments) for pipe in pipes]
    sums = merged([pipe.recv() for pipe in pipes])
    [pipe.send(sums) for pipe in pipes]
    dx = np.concatenate([pipe.recv() for pipe in pipes])
    expected = nbnorm.batch_norm_backward(dy, nbnorm.batch_norm_forward(x)[1])[0]
    assert np.allclose(dx, expected, rtol=1e-12, atol=1e-12)
    print("right")
"""


@pytest.mark.processes
def test_shards_in_processes(tmp_path):
    """Shards of different sizes, an empty one too, one process each, which exchange moments and gradient sums."""
    (tmp_path / "shards.py").write_text(SHARDS)
    code = f"import runpy; runpy.run_path({str(tmp_path / 'shards.py')!r}, run_name='__main__')"
    assert run(code)[0] == "right"


COLD = """
import threading, json, hashlib
import numpy as np
from test_processes import gradients_of
start, found = threading.Barrier(4), {}
def work(seed):
    start.wait(60)
    found[seed] = hashlib.sha256(gradients_of(seed).tobytes()).hexdigest()
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
again = [hashlib.sha256(gradients_of(seed).tobytes()).hexdigest() for seed in range(4)]
assert again == [found[seed] for seed in range(4)]
"""


@pytest.mark.processes
@pytest.mark.parametrize("warm", [True, False], ids=["compiled", "nothing compiled"])
def test_first_call_from_four_threads(warm, layer, tmp_path):
    """Threads are started and kernels compiled while other threads want the same."""
    run(COLD, timeout=300, **layer, **({} if warm else {"NUMBA_CACHE_DIR": tmp_path}))


FORK_WHILE_COMPILING = """
import os, threading, time
import numpy as np
from numba import njit
import nbnorm

def compile_and_call(factor):
    scope = {}
    exec(f"def f(x):\\n    s = 0.0\\n    for v in x:\\n        s += v * {factor}\\n    return s", scope)
    return njit(scope["f"])(np.ones(3)) == 3 * factor

running, stop = threading.Event(), threading.Event()
def work():
    factor = 0
    while not stop.is_set():
        compile_and_call(factor)
        running.set()
        factor += 1
thread = threading.Thread(target=work)
thread.start()
running.wait(60)
for k in range(3):
    time.sleep(0.05 * k)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if compile_and_call(1000 + k) else 1)
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
thread.join()
"""


@pytest.mark.slow
@needs_fork
def test_fork_while_another_thread_compiles():
    """The child compiles, too: it hung in every one of eight trials before forks waited for the compiler."""
    run(FORK_WHILE_COMPILING, timeout=60)


NO_LAYER = """
import sys, warnings
{preparation}
import numpy as np
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from nbnorm._cpu.team import team, layer
    from test_processes import gradients_of
    found = [gradients_of(0) for _ in range(3)]
    team.enabled = False
    assert all((gradients_of(0) == array).all() for array in found)
print(layer(), [str(w.message) for w in caught if w.category is RuntimeWarning])
"""
MISSING_OPENMP = 'sys.modules["numba.np.ufunc.omppool"] = sys.modules["numba.np.ufunc.tbbpool"] = None'


@pytest.mark.slow
def test_without_the_library_of_openmp():
    """Slim images lack libgomp, whose absence Numba meets as a failed import: one warning, right results."""
    line, _ = run(NO_LAYER.format(preparation=MISSING_OPENMP), NUMBA_THREADING_LAYER=None)
    assert line.startswith("workqueue ['Numba found neither TBB nor OpenMP")
    assert line.count("Numba found neither") == 1


@pytest.mark.slow
def test_a_layer_that_cannot_be_loaded():
    """NUMBA_THREADING_LAYER=tbb where TBB is off the path of the loader: Numba raises, nbnorm runs on one thread."""
    preparation = 'sys.modules["numba.np.ufunc.tbbpool"] = None'
    line, _ = run(NO_LAYER.format(preparation=preparation), NUMBA_THREADING_LAYER="tbb")
    assert line.startswith("None ['nbnorm runs on one thread, since Numba has no threading layer")
    assert line.count("nbnorm runs on one thread") == 1


@pytest.mark.slow
def test_layer_chosen_by_the_user():
    """Whoever asks for workqueue knows what it is."""
    line, _ = run(NO_LAYER.format(preparation=""), NUMBA_THREADING_LAYER="workqueue")
    assert line == "workqueue []"


INTERRUPTED = """
import signal, time
import numpy as np, nbnorm
x = np.random.default_rng(0).standard_normal((24, 8, 170, 190)).astype(np.float32)

def steps(bn, count):
    for _ in range(count):
        bn(x)
        yield bn.running_mean.tobytes(), bn.running_var.tobytes()

trace = list(steps(nbnorm.BatchNorm(8), 200))
assert len(set(trace)) > 50  # each step can be told from the others, until float32 settles
number = {state: n for n, state in reversed(list(enumerate(trace, 1)))}

def interrupt(*_):
    global rung
    rung = time.perf_counter()
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
rng = np.random.default_rng(1)
for _ in range(40):
    bn = nbnorm.BatchNorm(8)
    delay = rng.uniform(0.001, 0.05)
    before = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, delay)
    try:
        for _ in steps(bn, 10**6):
            pass
    except KeyboardInterrupt:
        late = time.perf_counter() - before - delay
    assert late < 0.5, late
    state = bn.running_mean.tobytes(), bn.running_var.tobytes()
    fresh = nbnorm.BatchNorm(8)
    if bn.num_batches_tracked < 40:
        n = number.get(state, 0)
        assert n or state == (fresh.running_mean.tobytes(), fresh.running_var.tobytes()), "torn"
        assert bn.num_batches_tracked in (n, n - 1), (n, bn.num_batches_tracked)
    bn(x)  # its lock is free
print("whole")
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="no interval timer on this system")
def test_interrupted_training():
    """Ctrl-C arrives within half a second, and the running statistics are those of a whole number of batches."""
    assert run(INTERRUPTED)[0] == "whole"


# Small, since every element is a call of Python here.
WITHOUT_COMPILER = """
import json
import numpy as np, nbnorm
x = (np.arange(60) * 7 % 31).reshape(4, 3, 5).astype(np.float32)
y, saved = nbnorm.batch_norm_forward(x, np.ones(3, np.float32), None, np.zeros(3), np.ones(3))
columns = nbnorm.batch_norm_forward(x[:, :, 0])[0]
print(json.dumps([a.tolist() for a in (y, *nbnorm.batch_norm_backward(y * x, saved)[:2], columns)]))
"""


@pytest.mark.slow
def test_without_the_compiler():
    """NUMBA_DISABLE_JIT=1 runs everything as plain Python."""
    found = json.loads(run(WITHOUT_COMPILER, NUMBA_DISABLE_JIT=1)[0])
    y, dx, dweight, columns = (np.array(a) for a in found)
    x = (np.arange(60) * 7 % 31).reshape(4, 3, 5).astype(np.float32)
    reference, narrow = oracle.batch_norm(x), oracle.batch_norm(x[:, :, 0])
    gradients = oracle.differentiate((y * x).astype(np.float32), reference)
    oracle.assert_within(y, reference.y, oracle.y_tolerance(reference), "y")
    oracle.assert_within(dx, gradients.dx, oracle.dx_tolerance(reference, gradients), "dx")
    bound = oracle.sum_tolerance(gradients.dweight_terms, reference, np.dtype(np.float32))
    oracle.assert_within(dweight, gradients.dweight, bound, "dweight")
    oracle.assert_within(columns, narrow.y, oracle.y_tolerance(narrow), "columns")
