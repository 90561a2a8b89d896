"""The checks of the project as nox sessions; CONTRIBUTING.md has the plain commands."""

import nox

nox.options.sessions = ["lint", "tests"]

# What reaches every kernel and every line with few elements: each of them is a call of Python without the compiler.
SMALL = [
    "accuracy",
    "backward_faults",
    "benchmarks",
    "conventions",
    "faults",
    "glance",
    "halves",
    "layer",
    "layer_faults",
    "layer_libraries",
    "layer_options",
    "layer_settings",
    "layers",
    "masks",
    "norms",
    "options",
    "out",
    "properties",
    "reestimate",
    "renorm_and_ghost",
    "streams",
    "tools",
    "two_phase",
    "view",
]
# Every kernel, on arrays that end in the middle of every block.
KERNELS = [
    f"tests/test_{name}.py"
    for name in ("batch_norm", "norms", "options", "masks", "halves", "properties", "streams")
]


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
def processes(session: nox.Session) -> None:
    """Threads and forks in processes of their own, under OpenMP, workqueue and TBB; minutes."""
    session.install("-e", ".[test]", "tbb")
    environment = {"NUMBA_CACHE_DIR": session.create_tmp()}
    session.run("pytest", "-m", "processes", *session.posargs, env=environment)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Random calls against the reference for ten minutes, or NBNORM_FUZZ_SECONDS."""
    session.install("-e", ".[test]")
    session.run("pytest", "-m", "fuzz", "-s", "tests/test_properties.py", *session.posargs)


@nox.session
def large(session: nox.Session) -> None:
    """More than 2**31 and 2**32 elements: 16 GB of memory, sparse files; minutes."""
    session.install("-e", ".[test]")
    session.run("pytest", "-m", "large", "tests/test_large.py", *session.posargs)


@nox.session
def bounds(session: nox.Session) -> None:
    """Every index of the serial kernels checked; parallel ones cannot report what they find."""
    session.install("-e", ".[test]")
    environment = {"NUMBA_BOUNDSCHECK": "1", "NBNORM_PARALLEL": "0", "NUMBA_CACHE_DIR": session.create_tmp()}
    session.run("pytest", *KERNELS, *session.posargs, env=environment)


@nox.session
def coverage(session: nox.Session) -> None:
    """Which lines the tests reach, kernels included: without the compiler."""
    session.install("-e", ".[test,torch]", "pytest-cov")  # PyTorch: one of those that the bench compares with
    # NumPy's scalars warn of what compiled code computes in silence, and keep sums of float32 in float32.
    options = [
        "--cov=nbnorm",
        "--cov-report=term-missing",
        "--cov-fail-under=95",
        "-W",
        "ignore::RuntimeWarning",
    ]
    options += ["-k", "not (test_norms and float32) and not two_threads and not warmup_compiles"]
    files = [f"tests/test_{name}.py" for name in SMALL]
    session.run("pytest", *options, *files, *session.posargs, env={"NUMBA_DISABLE_JIT": "1"})


@nox.session
def cuda(session: nox.Session) -> None:
    """What the compiler makes of the CUDA kernels; needs no GPU."""
    session.install("-e", ".[cuda13]", "pytest", "ml_dtypes", "nvidia-cuda-nvcc", "nvidia-cuda-nvdisasm")
    session.run("pytest", "--noconftest", "-W", "ignore", "tests/test_cuda_compile.py", *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """Checks and times on the GPU of this machine."""
    session.install("-e", ".[cuda13,test]")
    session.run("python", "-m", "benchmarks.gpu", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Every benchmark once, to see that all of them run."""
    session.install("-e", ".[bench]")
    session.run("asv", "check", "--python=same")
    session.run("asv", "machine", "--yes")
    session.run("asv", "run", "--quick", "--python=same", "--show-stderr", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The pages and the gallery, with every example run; a warning is an error. NBNORM_GALLERY=0: without running."""
    session.install("-e", ".[docs]")
    session.run("sphinx-build", "-W", "--keep-going", *session.posargs, "docs", "docs/_build/html")
