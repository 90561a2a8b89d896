"""Every benchmark runs on small arrays, its results pass the oracle, and what it finds are numbers."""

import ast
import importlib
import inspect
import json
from itertools import product
from math import isfinite, prod
from pathlib import Path

import numba
import numpy as np
import pytest

import nbnorm
from benchmarks import (
    bench_halves,
    bench_sizes,
    bench_start,
    bench_training,
    common,
    peers,
    report,
    small_call,
)
from nbnorm import _bench

FOLDER = Path(common.__file__).parent
FILES = sorted(path.stem for path in FOLDER.glob("bench_*.py"))
BENCHMARKS = [
    value
    for module in (importlib.import_module(f"benchmarks.{name}") for name in FILES)
    for key, value in vars(module).items()
    if inspect.isclass(value)
    and value.__module__ == module.__name__
    and hasattr(value, "params")
    and key[0] != "_"
]
on_benchmarks = pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.__name__)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Let every benchmark work on a few elements, for one round."""
    draw, threads = common.draw, numba.get_num_threads()

    def small(case):
        sizes = (max(2, min(n, 32 if axis == 1 else 3)) for axis, n in enumerate(case.shape))
        return draw(case._replace(shape=tuple(sizes)))

    monkeypatch.setattr(common, "draw", small)
    monkeypatch.setattr(common, "ROUNDS", 1)
    for module in (common, _bench):
        monkeypatch.setattr(module, "BURST", 0.0)
    monkeypatch.setattr(bench_start, "seconds", lambda code, cache: 0.5)
    monkeypatch.setattr(bench_halves.Halves, "params", (["forward"], ["layer"], ["float16"]))
    monkeypatch.setattr(bench_training.Step, "params", (["digits"], ["new", "reused"]))
    yield
    common.batch.cache_clear()
    common.prepare.cache_clear()
    numba.set_num_threads(threads)


def ends(params):
    """Return the combinations of the first and the last value of each parameter."""
    return [dict.fromkeys([values[0], values[-1]]) for values in params]


@pytest.mark.slow
@on_benchmarks
def test_benchmark(benchmark, monkeypatch):
    """Calls of asv, in its order."""
    monkeypatch.setattr(benchmark, "params", [list(values) for values in ends(benchmark.params)])
    instance = benchmark()
    cache = [instance.setup_cache()] if hasattr(instance, "setup_cache") else []
    names = [name for name in dir(instance) if name.split("_")[0] in ("track", "time", "peakmem")]
    assert names
    for name in names:
        call = getattr(instance, name)
        for case in product(*ends(getattr(call, "params", benchmark.params))):
            if hasattr(instance, "setup"):
                instance.setup(*case)
            result = call(*cache, *case)
            if name.startswith("track"):
                assert isfinite(result)
                assert result >= 0
                assert call.unit


@on_benchmarks
def test_every_class_has_a_cache_of_its_own(benchmark):
    """One that is inherited would be that of another class: asv tells them apart by the line."""
    assert issubclass(benchmark, common.Measured) == ("setup_cache" in vars(benchmark))


@pytest.mark.parametrize("name", ["common", *FILES])
def test_old_versions_can_be_measured(name):
    """Of nbnorm, the files of asv use what is public."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("nbnorm.")]
        elif isinstance(node, ast.ImportFrom):
            assert node.level or not node.module.startswith("nbnorm")
        elif (
            isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nbnorm"
        ):
            assert node.attr in nbnorm.__all__


@pytest.mark.parametrize(
    ("norm", "operation"),
    [("layer", "forward"), ("layer", "backward"), ("rms", "forward"), ("rms", "backward")],
)
def test_a_wrong_result_is_not_timed(monkeypatch, norm, operation):
    name = f"{norm}_norm_{operation}"
    right = getattr(nbnorm, name)

    def wrong(*arguments, out, **options):
        results = right(*arguments, **options)
        given = out if operation == "forward" else out[0]
        given[...] = results[0] + np.float32(1e-3)
        return results

    monkeypatch.setattr(nbnorm, name, wrong)
    with pytest.raises(AssertionError, match=f"of {norm} .*values are off"):
        common.prepare(operation, common.Case(norm, (3, 32)))


def test_floors():
    """Those of the table in benchmarks/README.md: a slot in the cache is read once less."""
    planes, large = common.STAGE, common.Case("batch", (32, 64, 112, 112))
    assert [common.floor(operation, planes) for operation in common.PASSES] == [1, 1.5, 1]
    assert [common.floor(operation, large) for operation in common.PASSES] == [1.5, 2.5, 1]
    for case in (planes._replace(channels_last=True), common.Case("batch", (4096, 128))):
        assert [common.floor(operation, case) for operation in common.TRAINING] == [1.5, 2.5]
    for case in (common.Case("layer", (2048, 768)), common.Case("group", (8, 128, 32, 32), num_groups=32)):
        assert [common.floor(operation, case) for operation in common.TRAINING] == [1, 1.5]


def test_the_code_that_start_times_runs(capsys):
    exec(bench_start.IMPORT.format("nbnorm"), {})
    exec(bench_start.CALL.format(norm="rms", shape=(3, 32), size=32), {})
    assert all(float(line) >= 0 for line in capsys.readouterr().out.split())


@pytest.mark.parametrize("name", bench_sizes.CASES)
def test_sizes_are_what_they_are_called(name):
    for size, count in bench_sizes.SIZES.items():
        number, unit = size.split()
        assert (
            4 * prod(bench_sizes.CASES[name](count).shape)
            == int(number) << {"KB": 10, "MB": 20, "GB": 30}[unit]
        )


def test_by_hand(capsys):
    common.show(bench_halves.Halves)
    assert "forward, layer, float16" in capsys.readouterr().out


def test_peers_and_their_report(capsys, monkeypatch, tmp_path):
    """The cases asked for are compared, and drawn."""
    make = _bench.make_batch
    monkeypatch.setattr(_bench, "make_batch", lambda case: make(case._replace(shape=(3, 8))))
    file = tmp_path / "peers.json"
    command = ["--threads", "1", "--rounds", "1", "--peers", "numpy", "--json", str(file)]
    peers.main([*command, "--norms", "layer", "rms", "--only", "4096"])
    printed = capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    labels = ["layer (512, 4096)", "rms (2048, 4096)"]
    assert [row["label"] for row in rows] == [label for label in labels for _ in common.TRAINING]
    assert all(
        row["best"] == "numpy" and row["times"] == row["peers"]["numpy"] / row["seconds"] for row in rows
    )
    assert "rms      backward  geometric mean" in printed
    assert all(label in printed for label in labels)

    pytest.importorskip("matplotlib")
    report.main([str(file), "--output", str(tmp_path)])
    markdown = capsys.readouterr().out
    report.main([str(file), "--output", str(tmp_path), "--rst"])
    for text in (markdown, capsys.readouterr().out):
        assert all(label in text for label in labels)
    for name in ("times", "copies"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_steps_of_a_small_call():
    """They call kernels themselves."""
    for parts in small_call.steps().values():
        for step in parts.values():
            step()
