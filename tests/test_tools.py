"""What `info` and `warmup` say is so; the command line prints it, measures right results only, exits with a status."""

import json
import subprocess
import sys

import numba
import numpy as np
import pytest

import nbnorm
from nbnorm import _bench, _catalogue, _peers, tools
from nbnorm.__main__ import main
from nbnorm._cpu import rows
from nbnorm._tables import Table

TINY = (
    _bench.Case("batch_norm", (6, 4, 3, 5)),
    _bench.Case("batch_norm", (6, 3, 5, 4), channel_axis=-1),
    _bench.Case("layer_norm", (6, 8)),
    _bench.Case("rms_norm", (6, 8)),
    _bench.Case("group_norm", (6, 4, 3, 5), num_groups=2),
    _bench.Case("instance_norm", (6, 4, 3, 5)),
)


@pytest.fixture(params=["rich", "plain"])
def terminal(request, monkeypatch):
    """Let a terminal be drawn on by rich, or by plain text where rich is missing."""
    if request.param == "plain":
        monkeypatch.setitem(sys.modules, "rich", None)
    else:
        pytest.importorskip("rich")
    return request.param


def test_info():
    """Versions and threads are those that run; all of it is JSON."""
    facts = nbnorm.info()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["numba"] == numba.__version__
    assert facts["versions"]["numpy"] == np.__version__
    assert "not-installed" not in facts["versions"]
    assert facts["threads"] == numba.get_num_threads()
    assert facts["threading_layer"].split()[0] in ("omp", "tbb", "workqueue")


def test_info_says_why_not_parallel(monkeypatch):
    monkeypatch.setenv("NBNORM_PARALLEL", "0")
    assert nbnorm.info()["parallel"] == "off: NBNORM_PARALLEL=0"
    monkeypatch.delenv("NBNORM_PARALLEL")
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        assert nbnorm.info()["parallel"].startswith("off: one thread")
    finally:
        numba.set_num_threads(before)


def test_warmup_compiles():
    """After it, a call on another array of the kind compiles nothing."""
    nbnorm.warmup("rms_norm", shapes=[(3, 8)])
    before = [len(kernel.serial.signatures) for kernel in (rows.forward_kernel, rows.backward_kernel)]
    assert all(before)
    y, saved = nbnorm.rms_norm_forward(np.ones((5, 7), np.float32), np.ones(7, np.float32))
    nbnorm.rms_norm_backward(y, saved)
    assert before == [len(kernel.serial.signatures) for kernel in (rows.forward_kernel, rows.backward_kernel)]


def test_warmup_steps_by_argument():
    said = []
    seconds = nbnorm.warmup(
        ["rms_norm", "batch_norm"],
        shapes=[(4, 3)],
        layouts="channels_last",
        progress=said.append,
        eps=1e-3,
    )
    assert said == list(seconds) == ["rms_norm float32 (4, 3)", "batch_norm float32 (4, 3) channels last"]
    assert all(value > 0 for value in seconds.values())


def test_usual_shapes_reach_serial_and_parallel_kernels():
    for threads in (1, 2, 7):
        small, even, uneven, table = tools._usual_shapes(threads)
        assert np.prod(small) < tools.launch.PARALLEL_MIN
        assert even[1] % threads == 0
        assert threads == 1 or uneven[1] % threads
        for shape in (even, uneven, table):
            assert np.prod(shape) >= tools.launch.PARALLEL_MIN


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norms": "no_norm"}, "norms must be one of 'batch_norm', .* got 'no_norm'"),
        ({"dtypes": "float128"}, "dtypes: dtype .*128 is not supported"),
        ({"layouts": ["sideways"]}, "layouts must be one of .* got 'sideways'"),
    ],
)
def test_warmup_refuses(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        nbnorm.warmup(**arguments)


def test_info_command(capsys, terminal):
    assert main(["info"]) == 0
    assert numba.__version__ in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == nbnorm.info()


def test_warmup_command(capsys, monkeypatch, terminal):
    monkeypatch.setattr(tools, "_usual_shapes", lambda threads: [(4, 8)])
    assert main(["warmup", "--norms", "rms_norm"]) == 0
    text = capsys.readouterr().out
    assert "rms_norm float32 (4, 8)" in text
    assert ("─" in text) == (terminal == "rich")
    assert main(["warmup", "--norms", "rms_norm", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["rms_norm float32 (4, 8)"]


@pytest.fixture
def tiny(monkeypatch):
    """Let the bench run on small arrays for few rounds."""
    monkeypatch.setattr(_bench, "CASES", TINY)
    monkeypatch.setattr(_bench, "ROUNDS", {True: 1, False: 1})
    monkeypatch.setattr(_bench, "BURST", 0.0)
    threads = numba.get_num_threads()
    yield
    numba.set_num_threads(threads)


@pytest.mark.slow
def test_bench_command(capsys, tiny, terminal):
    assert main(["bench", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert "batch, channels last" in text
    assert "copies" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch, about itself
@pytest.mark.parametrize("name", _peers.PEERS)
def test_bench_with_peers(capsys, tiny, monkeypatch, name):
    """Every case of ours and of a peer passes the check against float64, and is timed."""
    pytest.importorskip(_peers.PEERS[name].package)
    if name == "compile":  # seconds per case
        monkeypatch.setattr(_bench, "CASES", TINY[3:4])
    assert main(["bench", "--peers", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["info"] == nbnorm.info()
    assert [(row["case"][0], row["direction"]) for row in found["rows"]] == [
        (case.norm, direction) for case in _bench.CASES for direction in ("forward", "backward")
    ]
    for row in found["rows"]:
        lacks = name == "onednn" and row["case"][0] != "batch_norm"
        assert row["peers"].keys() == row["medians"].keys() == (set() if lacks else {name})
        assert min(row["seconds"], row["copies"], *row["peers"].values(), *row["medians"].values()) > 0


def test_bench_with_the_installed_peers(capsys, tiny, monkeypatch):
    """Without names, every one that is installed gets a column, but for the compiler; what it lacks is a dash."""
    monkeypatch.setattr(_bench, "CASES", TINY[3:4])
    monkeypatch.setattr(_peers, "find_spec", lambda package: package == "numpy" or None)
    assert main(["bench", "--peers"]) == 0
    text = capsys.readouterr().out
    assert "x numpy" in text
    assert "x torch" not in text


def test_bench_with_an_absent_peer(capsys, monkeypatch):
    monkeypatch.setattr(_peers, "find_spec", lambda package: None)
    assert main(["bench", "--peers", "jax"]) == 1
    assert (
        capsys.readouterr().err
        == "nbnorm bench: jax is measured with the package jax, which is not installed\n"
    )


@pytest.mark.parametrize("case", TINY, ids=str)
def test_expressions(case):
    """The formula that results are checked against is the gradient of what it says forward."""
    batch = _bench.make_batch(case)
    formula = case.expression()
    x, dy, weight, *bias = (a.astype(np.float64) for a in (batch.x, batch.dy, *batch.parameters))
    dx = _bench.reference(batch)["backward"]
    step = np.random.default_rng(1).standard_normal(x.shape) * 1e-6
    ahead, behind = (formula.forward(x + sign * step, weight, *bias)[0] for sign in (1, -1))
    np.testing.assert_allclose(np.sum(dx * step), np.sum(dy * (ahead - behind)) / 2, rtol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_bench_stops_at_a_wrong_result(capsys, tiny, monkeypatch, direction):
    """A kernel that is off by a thousandth gets no time, but a message and status 1."""
    right = _bench.our_calls

    def wrong(batch):
        calls = right(batch)
        (good,) = calls[direction]
        return calls | {direction: [lambda: (good()[0] + np.float32(1e-3),)]}

    monkeypatch.setattr(_bench, "our_calls", wrong)
    monkeypatch.setattr(_bench, "CASES", TINY[3:4])
    assert main(["bench"]) == 1
    printed = capsys.readouterr()
    assert f"nbnorm, {direction}: off by" in printed.err
    assert printed.out == ""


def test_interrupted(monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(tools, "warmup", interrupt)
    assert main(["warmup"]) == 130


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["bench", "--threads", "0"], ["bench", "--peers", "no"], ["warmup", "--norms", "no"]],
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: nbnorm" in capsys.readouterr().err


def test_module_and_version():
    """``python -m nbnorm`` is the same command."""
    done = subprocess.run(
        [sys.executable, "-m", "nbnorm", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"nbnorm {nbnorm.__version__}\n"


def test_plain_table():
    table = Table("Title", ("name", "n"), [("a", "1"), ("long", "23")], caption="So it is.")
    assert table.plain() == "Title\n\nname   n\n----  --\na      1\nlong  23\n\nSo it is."


def test_catalogue_knows_every_norm():
    assert {f"{name}_forward" for name in _catalogue.NORMS} <= set(nbnorm.__all__)
    assert {norm.forward_call.__name__ for norm in _catalogue.NORMS.values()} == {
        name for name in nbnorm.__all__ if name.endswith("_forward")
    }
