"""What importing nbnorm loads, and who imports whom inside it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nbnorm

PACKAGE = Path(nbnorm.__file__).parent
# From the calls of the user down to the formulas; a module imports from its own level and below. The packages
# _cpu and _cuda stand for everything in them and do not know each other.
LEVELS = [
    {"__init__"},
    {"__main__"},
    {"tools", "torch", "conventions", "reestimation", "_peers"},
    {"_bench"},
    {"layers", "batch_layer", "_catalogue"},
    {"_layer"},
    {"_state", "_buffers"},
    {"functional", "layer_norms", "group_norms", "phases"},
    {"_ghost"},
    {"_batch", "_samples"},
    {"_call", "_gradients"},
    {"running", "_layout", "_masks"},
    {"saved"},
    {"moments"},
    {"_checks"},
    {"_dispatch", "_tables"},
    {"_cpu", "_cuda"},
    {"_activation"},
    {"_known"},
    {"_expressions", "_glance", "_libraries", "_math", "_options", "_view", "_warn"},
    {"_inner"},
    {"_rounds"},
]
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}


def test_import_loads_no_device_and_no_framework():
    """A fresh interpreter that imports nbnorm and touches every public name."""
    code = (
        "import sys, nbnorm, nbnorm.__main__; [getattr(nbnorm, name) for name in dir(nbnorm)];"
        "print(*[m for m in ('cupy', 'torch', 'jax', 'numba.cuda', 'mpi4py') if m in sys.modules])"
    )
    environment = {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def part_of(path):
    """Return the level name of a file: its module, or the package it is in."""
    inside = path.relative_to(PACKAGE).parts
    return inside[0] if len(inside) > 1 else path.stem


def imported(path):
    """Return the absolute names a file imports, nested imports included."""
    names, package = set(), ["nbnorm", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{stem}.{alias.name}" for alias in node.names}
    return names


FILES = sorted(PACKAGE.rglob("*.py"))
on_files = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def internal(path):
    """Return the level names of the parts of nbnorm that a file imports."""
    found = {name.split(".")[1] for name in imported(path) if name.startswith("nbnorm.")}
    return {name if name in LEVEL else "__init__" for name in found}


@on_files
def test_imports_go_one_way(path):
    """Nothing imports from above itself, and the two backends do not meet."""
    part = part_of(path)
    assert part in LEVEL, f"{part} has no place in LEVELS"
    upwards = {name for name in internal(path) if LEVEL[name] < LEVEL[part]}
    assert not upwards, f"{part} imports {upwards} from above"
    assert not {"_cpu", "_cuda"} <= {part, *internal(path)} or part == "_dispatch"


def test_device_arrays_without_a_device():
    """Without a driver, or without numba-cuda, an array of CuPy is a RuntimeError that says what is missing."""
    code = (
        "import fake_cupy, nbnorm, numpy as np\n"
        "with fake_cupy.installed() as cp:\n"
        "    try: nbnorm.batch_norm_forward(cp.asarray(np.ones((4, 2), np.float32)))\n"
        "    except RuntimeError as error: print(error)\n"
        "y, _ = nbnorm.batch_norm_forward(np.ones((4, 2), np.float32))\n"
        "print(y.sum())"
    )
    paths = os.pathsep.join([str(PACKAGE.parent), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "arrays on a CUDA device need" in done.stdout
    assert done.stdout.endswith("0.0\n")


@on_files
def test_outside_packages(path):
    """Only _cuda knows CuPy and numba.cuda, only the PyTorch client torch, the planner integers alone."""
    part, names = part_of(path), imported(path)
    roots = {name.split(".")[0] for name in names}
    if part != "_cuda":
        assert "cupy" not in roots
        assert not {name for name in names if name.startswith("numba.cuda")}
    if part != "torch":
        assert "torch" not in roots
    if part == "_view":
        assert not {"numpy", "numba"} & roots
    if part in {"_checks", "moments", "layers", "batch_layer", "_layer", "_state"}:
        assert "numba" not in roots


def test_the_reader_of_imports_reads():
    """The files looked at are those of the package, and the imports found are those that are there."""
    assert {part_of(path) for path in FILES} >= {"__init__", "functional", "layers", "_view", "_math", "_cpu"}
    assert "layer_norms" in internal(PACKAGE / "layers.py")
    assert {"_call", "_checks"} <= internal(PACKAGE / "functional.py")
    assert "_math" in internal(PACKAGE / "_cpu" / "slots.py")
    assert "numpy" in {name.split(".")[0] for name in imported(PACKAGE / "functional.py")}
