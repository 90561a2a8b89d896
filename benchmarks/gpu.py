"""Is the CUDA backend right on this GPU, are its bits fixed, and how near the memory's limit is it?

    python -m benchmarks.gpu                      # everything: about ten minutes
    python -m benchmarks.gpu --skip-large         # without the array of more than 2**31 elements (20 GB)
    python -m benchmarks.gpu --only batch,layer   # timing of some norms

Needs CuPy and numba-cuda (``pip install "nbnorm[cuda13,test]"``); PyTorch, where it is installed, is timed as a peer.
Prints a table and writes benchmarks/results/<gpu>.json. The exit status is that of the correctness checks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import nbnorm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
ROUNDS, WARM_UP = 30, 5
FLUSH_BYTES = 256 << 20
# (norm, shape, dtype); channels first unless the norm ends in "last".
CASES = [
    ("layer", (16384, 4096), "float32"),
    ("layer", (65536, 256), "float32"),
    ("layer", (1024, 12288), "float16"),
    ("layer", (512, 65536), "float32"),
    ("rms", (16384, 4096), "float16"),
    ("rms", (8192, 8192), "bfloat16"),
    ("rms", (131072, 128), "bfloat16"),
    ("group", (32, 256, 64, 64), "float32"),
    ("group", (32, 256, 56, 56), "float32"),
    ("instance", (32, 64, 256, 256), "float32"),
    ("batch", (32, 64, 56, 56), "float32"),
    ("batch", (32, 64, 112, 112), "float32"),
    ("batch", (128, 256, 56, 56), "float32"),
    ("batch", (32, 2048, 7, 7), "float32"),
    ("batch", (65536, 1024), "float32"),
    ("batch", (401408, 3), "float32"),
    ("batch last", (128, 56, 56, 256), "float32"),
    ("batch last", (128, 56, 56, 256), "float16"),
    ("inference", (128, 256, 56, 56), "float32"),
]


@dataclass
class Row:
    """One line of the table; bytes are those that any implementation must move."""

    norm: str
    shape: tuple[int, ...]
    dtype: str
    direction: str
    microseconds: float
    gigabytes_per_second: float
    copies: float
    peers: dict[str, float]
    host_microseconds: float


# ---- correctness ----


def run_tests() -> bool:
    """Run the simulator's tests on the device itself: kernels against the oracle, public calls against the CPU."""
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_ENABLE_CUDASIM"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-W", "ignore"]
    command = [sys.executable, "-m", "pytest", *options, "simulated.py", "simulated_calls.py"]
    return subprocess.run(command, cwd=ROOT / "tests", env=environment, check=False).returncode == 0


def check_odd_addresses(cp: Any) -> None:
    """Every offset of x and of the buffer gives the values of the aligned call; nothing is written beside it."""
    values = np.random.default_rng(0).standard_normal((6, 40, 33)).astype(np.float32)
    expected = nbnorm.batch_norm_forward(cp.asarray(values))[0]
    for offset in range(1, 5):
        memory = cp.zeros(values.size + 8, np.float32)
        x = memory[offset : offset + values.size].reshape(values.shape)
        x[...] = cp.asarray(values)
        block = cp.full(values.size + 8, np.nan, np.float32)
        out = block[offset : offset + values.size].reshape(values.shape)
        nbnorm.batch_norm_forward(x, out=out)
        cp.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
        assert bool(cp.isnan(block[:offset]).all())
        assert bool(cp.isnan(block[offset + values.size :]).all())


def check_teams(cp: Any) -> None:
    """Slots of one block, of two, four and eight, and such as no team holds, give what they give on the CPU.

    Of several segments, one of them constant, one wild; masked, in halves, and with dx in the place of dy, too.
    """
    rng = np.random.default_rng(1)
    for values in (8_192, 16_384, 16_392, 32_768, 65_536, 65_544, 131_072, 131_076):
        for dtype, masked, norm in product(
            ("float32", "float16"), (False, True), ("layer", "group", "batch")
        ):
            if masked and norm == "layer":
                continue
            shape = {"layer": (40, values), "group": (2, 4, values // 2), "batch": (4, 3, values // 4)}[norm]
            x, dy, residual = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
            x += rng.uniform(-3, 3, (*shape[:-1], 1)).astype(dtype)
            if dtype == "float32":
                x[-1, -1] *= 1e20
            x[0, 0] = 2
            mask = rng.integers(0, 3, (shape[0], shape[-1])) if masked else None
            weight, bias = rng.uniform(0.5, 2, (2, shape[-1] if norm == "layer" else shape[1])).astype(
                "float32"
            )
            results = []
            for library in (np, cp):
                a, b, r, w, c = (library.array(array) for array in (x, dy, residual, weight, bias))
                options = {} if norm == "layer" else {"residual": r, "activation": "silu"}
                if masked:
                    options["mask"] = library.asarray(mask)
                forward, backward = (getattr(nbnorm, f"{norm}_norm_{way}") for way in ("forward", "backward"))
                more = (2,) if norm == "group" else ()
                y, saved = forward(a, *more, w, c, **options)
                gradients = backward(b, saved)
                results.append(
                    [y, *gradients, backward(b, saved, out=(b, *[None] * (len(gradients) - 1)))[0]]
                )
            for expected, found in zip(*results, strict=True):
                tolerance = 1e-3 if dtype == "float32" else 2e-2
                scale = float(np.abs(expected.astype(np.float64)).max())
                np.testing.assert_allclose(
                    cp.asnumpy(found).astype(np.float64), expected.astype(np.float64), rtol=tolerance,
                    atol=tolerance * scale, err_msg=f"{norm} {shape} {dtype} {masked=}",
                )  # fmt: skip


def check_large(cp: Any) -> None:
    """More than 2**31 elements: the last slots are as right as the first."""
    x = cp.random.standard_normal((2, 4096, 262200), dtype=np.float32).astype(np.float16)
    assert x.size > 2**31
    y, saved = nbnorm.instance_norm_forward(x)
    for n, c in ((0, 0), (1, 4095)):
        wide = x[n, c].astype(np.float64)
        expected = (wide - wide.mean()) / cp.sqrt(wide.var() + 1e-5)
        cp.testing.assert_allclose(y[n, c].astype(np.float64), expected, atol=4e-3)
    dx = nbnorm.instance_norm_backward(x, saved, need=("dx",), out=(y, None, None))[0]
    assert bool(cp.isfinite(dx[1, 4095]).all())
    del x, y, dx, saved
    cp.get_default_memory_pool().free_all_blocks()


def check_determinism(cp: Any) -> None:
    """Twenty runs of every case of the table have the same bits."""
    for norm, shape, dtype in CASES:
        small = tuple(min(n, 4096) if i == 0 else n for i, n in enumerate(shape))
        forward, backward, x, dy, parameters = _call(cp, norm, small, dtype)
        first = None
        for _ in range(20):
            y, saved = forward(x, *parameters)
            results = [y] if backward is None else [y, *backward(dy, saved)]
            bits = [r.view(f"u{r.itemsize}") for r in results if r is not None]
            if first is None:
                first = bits
            assert all(bool((a == b).all()) for a, b in zip(first, bits, strict=True)), (norm, shape, dtype)


def check_graph(cp: Any) -> None:
    """A captured call, replayed on new data, gives what a direct call gives."""
    stream = cp.cuda.Stream(non_blocking=True)
    for values in (512, 65_536):  # of a warp, and of a team of blocks where the device has them
        _check_graph(cp, stream, values)


def _check_graph(cp: Any, stream: Any, values: int) -> None:
    x, out = cp.random.standard_normal((64, values), dtype=np.float32), cp.empty((64, values), np.float32)
    with stream:
        nbnorm.layer_norm_forward(x, out=out)  # compiles, and fills the memory pool
        stream.synchronize()
        stream.begin_capture()
        nbnorm.layer_norm_forward(x, out=out)
        graph = stream.end_capture()
        x[...] = cp.random.standard_normal(x.shape, dtype=np.float32)
        graph.launch(stream)
        stream.synchronize()
    cp.testing.assert_array_equal(out, nbnorm.layer_norm_forward(x)[0])


def correctness(cp: Any, skip_large: bool) -> dict[str, str]:
    """Run every check; return what each said."""
    said = {"tests": "passed" if run_tests() else "FAILED"}
    checks = [check_odd_addresses, check_teams, check_determinism, check_graph]
    for check in checks if skip_large else [*checks, check_large]:
        try:
            check(cp)
            said[check.__name__] = "passed"
        except Exception as error:  # every failure belongs into the report
            said[check.__name__] = f"FAILED: {type(error).__name__}: {error}"[:500]
        print(f"{check.__name__:24s} {said[check.__name__]}", flush=True)
    return said


# ---- timing ----


def _call(cp: Any, norm: str, shape: tuple[int, ...], dtype: str) -> tuple[Any, Any, Any, Any, list[Any]]:
    """Return forward, backward, x, dy and the parameters of a case."""
    if dtype == "bfloat16":
        import ml_dtypes

        kind = np.dtype(ml_dtypes.bfloat16)
    else:
        kind = np.dtype(dtype)
    x, dy = (cp.random.standard_normal(shape, dtype=np.float32).astype(kind) for _ in range(2))
    channels = shape[1] if norm in ("batch", "group", "instance", "inference") else shape[-1]
    parameters = [cp.ones(channels, np.float32), cp.zeros(channels, np.float32)]
    if norm == "rms":
        return nbnorm.rms_norm_forward, nbnorm.rms_norm_backward, x, dy, parameters[:1]
    if norm == "group":
        return (
            lambda x, *p: nbnorm.group_norm_forward(x, 32, *p), nbnorm.group_norm_backward, x, dy, parameters,
        )  # fmt: skip
    if norm == "inference":
        statistics = [cp.zeros(channels), cp.ones(channels)]
        return lambda x, *p: (nbnorm.batch_norm_inference(x, *statistics, *p), None), None, x, dy, parameters
    if norm == "batch last":
        return (
            lambda x, *p: nbnorm.batch_norm_forward(x, *p, channel_axis=-1), nbnorm.batch_norm_backward, x, dy,
            parameters,
        )  # fmt: skip
    forward, backward = (getattr(nbnorm, f"{norm}_norm_{way}") for way in ("forward", "backward"))
    return forward, backward, x, dy, parameters


def median_microseconds(cp: Any, call: Callable[[], object]) -> float:
    """Time on the device by events, the second-level cache flushed before every run."""
    flush = cp.empty(FLUSH_BYTES, np.uint8)
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(ROUNDS):
        flush.fill(1)
        start, end = cp.cuda.Event(), cp.cuda.Event()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e3 * cp.cuda.get_elapsed_time(start, end))
    return float(np.median(times))


def host_microseconds(cp: Any, call: Callable[[], object]) -> float:
    """Time that a call keeps the host, the device having little to do."""
    call()
    cp.cuda.Device().synchronize()
    start = perf_counter()
    for _ in range(200):
        call()
    seconds = perf_counter() - start
    cp.cuda.Device().synchronize()
    return 1e6 * seconds / 200


def rows(cp: Any, only: set[str]) -> Iterator[Row]:
    """Time every case, forward and backward, beside a copy of the tensor and beside PyTorch."""
    for norm, shape, dtype in CASES:
        if not only or norm.split()[0] in only:
            for row in timed(cp, norm, shape, dtype):
                peers = "  ".join(f"{name} {time:.1f}" for name, time in row.peers.items())
                print(
                    f"{norm:11s} {shape!s:22s} {dtype:9s} {row.direction:9s} {row.microseconds:9.1f} us "
                    f"{row.gigabytes_per_second:6.0f} GB/s {row.copies:5.2f} copies  "
                    f"host {row.host_microseconds:5.1f} us  {peers}",
                    flush=True,
                )
                yield row
            cp.get_default_memory_pool().free_all_blocks()


def timed(cp: Any, norm: str, shape: tuple[int, ...], dtype: str) -> Iterator[Row]:
    """Time one case."""
    forward, backward, x, dy, parameters = _call(cp, norm, shape, dtype)
    target = cp.empty_like(x)
    copy = median_microseconds(cp, lambda: cp.copyto(target, x))
    _, saved = forward(x, *parameters)
    calls: dict[str, Callable[[], object]] = {"forward": lambda: forward(x, *parameters)}
    if backward is not None:
        calls["backward"] = lambda: backward(dy, saved)
    peers = torch_peers(cp, norm, x, dy)
    for direction, call in calls.items():
        moved = x.nbytes * (2 if direction == "forward" else 3)
        took = median_microseconds(cp, call)
        times = {name: median_microseconds(cp, peer) for name, peer in peers.get(direction, {}).items()}
        host = _host_cost(cp, norm, dtype, direction)
        yield Row(norm, shape, dtype, direction, took, moved / took / 1e3, took / copy, times, host)


def _host_cost(cp: Any, norm: str, dtype: str, direction: str) -> float:
    """Host time of a call on a small array."""
    shape = {"batch last": (8, 4, 4, 64)}.get(norm, (8, 64) if norm in ("layer", "rms") else (8, 64, 4, 4))
    forward, backward, x, dy, parameters = _call(cp, norm, shape, dtype)
    _, saved = forward(x, *parameters)
    if direction == "forward":
        return host_microseconds(cp, lambda: forward(x, *parameters))
    return host_microseconds(cp, lambda: backward(dy, saved))


def torch_peers(cp: Any, norm: str, x: Any, dy: Any) -> dict[str, dict[str, Callable[[], object]]]:
    """Return PyTorch's calls for a case: eager with and without cuDNN, compiled."""
    try:
        import torch
        import torch.nn.functional as f
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    t, g = (
        (torch.utils.dlpack.from_dlpack(a) for a in (x.view(np.int16), dy.view(np.int16)))
        if (x.dtype.name == "bfloat16")
        else (torch.utils.dlpack.from_dlpack(a) for a in (x, dy))
    )
    if x.dtype.name == "bfloat16":
        t, g = t.view(torch.bfloat16), g.view(torch.bfloat16)
    if norm == "batch last":
        t, g = (a.permute(0, 3, 1, 2) for a in (t, g))
    t = t.detach().requires_grad_()
    channels = (
        t.shape[1] if norm in ("batch", "batch last", "group", "instance", "inference") else t.shape[-1]
    )
    w, b = (
        make(channels, device="cuda", dtype=t.dtype, requires_grad=True) for make in (torch.ones, torch.zeros)
    )
    mean, var = torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda")
    functions = {
        "layer": lambda t: f.layer_norm(t, (channels,), w, b),
        "rms": lambda t: f.rms_norm(t, (channels,), w),
        "group": lambda t: f.group_norm(t, 32, w, b),
        "instance": lambda t: f.instance_norm(t, weight=w, bias=b),
        "inference": lambda t: f.batch_norm(t, mean, var, w, b),
    }
    function = functions.get(norm, lambda t: f.batch_norm(t, None, None, w, b, training=True))

    def without_cudnn(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.backends.cudnn.flags(enabled=False):
                return call()

        return run

    stream = torch.cuda.ExternalStream(cp.cuda.get_current_stream().ptr)
    torch.cuda.set_stream(stream)
    peers: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "backward": {}}
    for name, made in (("torch", function), ("compiled", torch.compile(function))):
        with suppress(Exception):  # a peer that fails is not timed
            y = made(t)
            peers["forward"][name] = lambda made=made: made(t)
            peers["backward"][name] = lambda y=y: torch.autograd.grad(y, (t, w), g, retain_graph=True)
    peers["forward"]["torch, no cuDNN"] = without_cudnn(lambda: function(t))
    return peers


def main() -> int:
    """Check, time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip-large", action="store_true")
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--only", default="", help="norms to time, separated by commas")
    options = parser.parse_args()
    import cupy as cp

    properties = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)
    name = properties["name"].decode()
    report: dict[str, Any] = {
        "gpu": name,
        "multiprocessors": properties["multiProcessorCount"],
        "driver": cp.cuda.runtime.driverGetVersion(),
        "python": platform.python_version(),
        "versions": dict(_versions()),
        "checks": {} if options.skip_checks else correctness(cp, options.skip_large),
    }
    report["rows"] = [asdict(row) for row in rows(cp, set(filter(None, options.only.split(","))))]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name.replace(' ', '_').lower()}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")
    return int(any(said != "passed" for said in report["checks"].values()))


def _versions() -> Iterator[tuple[str, str]]:
    packages = (
        "nbnorm",
        "numpy",
        "numba",
        "numba-cuda",
        "cupy-cuda12x",
        "cupy-cuda13x",
        "torch",
        "ml_dtypes",
    )
    for package in packages:
        with suppress(PackageNotFoundError):
            yield package, version(package)


if __name__ == "__main__":
    raise SystemExit(main())
