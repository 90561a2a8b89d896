"""The checks of the project as nox sessions; CONTRIBUTING.md has the plain commands."""

import nox

nox.options.sessions = ["lint", "tests"]


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format and types."""
    session.install("-e", ".[lint]")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Tests and the examples in the docstrings, with a fresh cache of compiled kernels."""
    session.install("-e", ".[test]")
    session.run("pytest", *session.posargs, env={"NUMBA_CACHE_DIR": session.create_tmp()})


@nox.session
def bench(session: nox.Session) -> None:
    """Every benchmark once, to see that all of them run."""
    session.install("-e", ".[bench]")
    session.run("asv", "machine", "--yes")
    session.run("asv", "run", "--quick", "--python=same", "--show-stderr", *session.posargs)
