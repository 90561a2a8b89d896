"""A fresh interpreter for a piece of code: environment, time limit, what it printed and how it ended."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def start(code, package=None, **environment):
    """Start code in a fresh interpreter; a variable that is None is taken out of its environment."""
    root = package or HERE.parent
    path = [str(root), str(HERE), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path), **environment}
    return subprocess.Popen(
        [sys.executable, "-W", "always", "-c", code],
        env={name: str(value) for name, value in variables.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,  # which Python searches first
    )


def finish(process, timeout=120):
    """Wait for its end and return (last line printed, everything on stderr); fail on any other end than 0."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"hung for {timeout} s:\n{out[-1000:]}\n{err[-3000:]}") from None
    assert process.returncode == 0, f"exit status {process.returncode}:\n{err[-3000:]}"
    lines = out.splitlines()
    return (lines[-1] if lines else ""), err


def run(code, timeout=120, **environment):
    """Run code to its end."""
    return finish(start(code, **environment), timeout)
