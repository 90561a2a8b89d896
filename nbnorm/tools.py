"""What runs here (`info`), and kernels compiled before they are needed (`warmup`)."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from itertools import product
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import numba
import numpy as np
from llvmlite import binding

from nbnorm import _checks, functional
from nbnorm._catalogue import LAYOUTS, NORMS, Norm
from nbnorm._cpu import cache, launch
from nbnorm._cpu.team import layer, team

_PACKAGES = [
    "nbnorm",
    "numpy",
    "numba",
    "llvmlite",
    "ml_dtypes",
    "torch",
    "jax",
    "numba-cuda",
    "cupy-cuda12x",
    "cupy-cuda13x",
]


def info() -> dict[str, Any]:
    """Describe what nbnorm runs on: versions, processor, threads, cache, graphics cards.

    Nothing is compiled or imported to find out; ``python -m nbnorm info`` prints the same as a table.

    Returns
    -------
    dict
        ``versions`` (of the packages that are installed), ``platform``, ``cpu``, ``cpu_target`` (what LLVM
        compiles for), ``cores``, ``threads``, ``parallel`` (whether large arrays are shared among the threads,
        and if not, why), ``threading_layer`` (and what decided it), ``cache`` (where compiled kernels are kept)
        and ``gpus``. Everything in it can be written as JSON.

    Examples
    --------
    >>> import nbnorm
    >>> nbnorm.info()["versions"]["nbnorm"] == nbnorm.__version__
    True
    """
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_target": binding.get_host_cpu_name(),
        "cores": _cores(),
        "threads": int(numba.get_num_threads()),
        "parallel": _parallel(),
        "threading_layer": _threading_layer(),
        "cache": _cache(),
        "gpus": _gpus(),
    }


def _versions() -> dict[str, str]:
    """Versions of the packages that matter here and are installed."""
    versions = {name: metadata.version(name) for name in _PACKAGES if any(metadata.distributions(name=name))}
    versions["nbnorm"] = version()
    return versions


def version() -> str:
    """Version of what was imported, not of what is installed: a checkout on PYTHONPATH has no metadata."""
    return str(sys.modules["nbnorm"].__version__)


def _cpu_name() -> str:
    """Name of the processor as the system writes it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parallel() -> str:
    """Whether large arrays are shared among the threads."""
    if os.environ.get("NBNORM_PARALLEL", "1") == "0":
        return "off: NBNORM_PARALLEL=0"
    if not team.enabled:
        return "off: this process was forked from one that had started GNU OpenMP"
    if numba.get_num_threads() == 1:
        return "off: one thread (numba.set_num_threads, NUMBA_NUM_THREADS)"
    return f"on, from {launch.PARALLEL_MIN} elements"


def _threading_layer() -> str:
    """Name of the layer that shares out the work, and what chose it."""
    numba.get_num_threads()  # starts it
    chosen = str(numba.config.THREADING_LAYER)  # type: ignore[attr-defined]
    rule = "the first that loads" if chosen == "default" else f"NUMBA_THREADING_LAYER={chosen}"
    priority = ", ".join(numba.config.THREADING_LAYER_PRIORITY)  # type: ignore[attr-defined]
    return f"{layer()} ({rule} of {priority})"


def _cache() -> str:
    """Say where compiled kernels are kept from process to process."""
    folders = cache.folders()
    if not folders:
        return "none: every process compiles the kernels it uses"
    kept = [folder for folder in folders if folder.is_dir()]
    return str(kept[0]) if kept else f"empty yet; will be {folders[0]}"


def _gpus() -> list[str]:
    """Names of NVIDIA cards, read from the driver's files: asking the driver itself would start it."""
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        fields = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
        names.append(fields.get("Model", "unknown").strip())
    return names


def warmup(
    norms: str | Sequence[str] = "batch_norm",
    dtypes: Any = "float32",
    *,
    shapes: Sequence[Sequence[int]] | None = None,
    layouts: str | Sequence[str] = LAYOUTS,
    progress: Callable[[str], object] | None = None,
    **options: Any,
) -> dict[str, float]:
    """Compile kernels now, so that the first step of training takes no longer than the second.

    Numba compiles a kernel at its first use, for each type of array and each set of options; the code is kept on
    disk, if there is a folder to write to, and read from there by the next process. This calls each
    norm forward, backward and with given statistics, on small arrays and on arrays large enough for a team of
    threads.

    Parameters
    ----------
    norms : str or sequence of str
        Of "batch_norm", "layer_norm", "rms_norm", "group_norm" and "instance_norm".
    dtypes : dtype or sequence of dtype
        Of the arrays; parameters and running statistics are float32, or float64 with float64 arrays.
    shapes : sequence of (N, C, ...), optional
        Shapes to run, written channels first; the default covers what shapes have in common.
    layouts : str or sequence of str
        Of "channels_first" and "channels_last"; layer and RMS norm ignore it.
    progress : callable, optional
        Called with a line of text before each step.
    **options
        More arguments for the forward calls, for the kernels that belong to them.

    Returns
    -------
    dict of str to float
        Seconds that each step took.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.
    ModuleNotFoundError
        For bfloat16 where ml_dtypes is not installed.

    Examples
    --------
    >>> import nbnorm
    >>> seconds = nbnorm.warmup("rms_norm", shapes=[(4, 8)])
    >>> list(seconds)
    ['rms_norm float32 (4, 8)']
    """
    seconds = {}
    for name, step in _steps(_several(norms), _several(dtypes), shapes, _several(layouts), options):
        if progress is not None:
            progress(name)
        start = perf_counter()
        step()
        seconds[name] = perf_counter() - start
    return seconds


def _several(value: Any) -> tuple[Any, ...]:
    """Return a tuple from one value or a sequence of values."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _steps(
    names: Sequence[Any], dtypes: Sequence[Any], shapes: Any, layouts: Sequence[Any], options: dict[str, Any]
) -> list[tuple[str, Callable[[], None]]]:
    """Name and call of every step; all arguments are checked before the first."""
    chosen = [NORMS[_checks.choice("norms", name, NORMS)] for name in names]
    types = [_dtype(dtype) for dtype in dtypes]
    layouts = [_checks.choice("layouts", layout, LAYOUTS) for layout in layouts]
    shapes = _usual_shapes(numba.get_num_threads()) if shapes is None else [tuple(shape) for shape in shapes]
    steps: list[tuple[str, Callable[[], None]]] = []
    for norm, dtype in product(chosen, types):
        for layout, shape in product(layouts if norm.by_channel else LAYOUTS[:1], shapes):
            label = f"{norm.name} {dtype.name} {shape}"
            if norm.by_channel:
                label += f" {layout.replace('_', ' ')}"
            call = partial(_run, norm, dtype, shape, layout == "channels_last", options)
            steps.append((label, call))
    return steps


def _dtype(value: Any) -> np.dtype[Any]:
    """Return the dtype of arrays; the name of bfloat16 means nothing to NumPy alone."""
    named_only = isinstance(value, str) and value == "bfloat16"
    dtype: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16 if named_only else value)
    _checks.array("dtypes", np.zeros(1, dtype))
    return dtype


def _usual_shapes(threads: int) -> list[tuple[int, ...]]:
    """Shapes that reach the serial kernels and those of a team, with whole channels and with chunks per task."""
    space, wide = (16, 16), 2048 * threads
    samples = 1 + launch.PARALLEL_MIN // (threads * prod(space))
    small, table = (2, 8, *space), (1 + launch.PARALLEL_MIN // wide, wide)
    return [small, (samples, threads, *space), (samples, threads + 1, *space), table]


def _run(
    norm: Norm, dtype: np.dtype[Any], shape: tuple[int, ...], channels_last: bool, options: dict[str, Any]
) -> None:
    """Call one norm in every direction on random numbers."""
    rng = np.random.default_rng(0)
    axes = (shape[0], *shape[2:], shape[1]) if channels_last else shape
    channel_axis = -1 if channels_last else 1
    x = rng.standard_normal(axes).astype(dtype)
    parameters = norm.parameters(x, channel_axis)
    if norm.name == "batch_norm":
        running = np.zeros_like(parameters[0]), np.ones_like(parameters[0])
        functional.batch_norm_inference(x, *running, *parameters, channel_axis=channel_axis)
        parameters += running
    y, saved = norm.forward(x, *parameters, channel_axis=channel_axis, **options)
    norm.backward_call(y, saved)
