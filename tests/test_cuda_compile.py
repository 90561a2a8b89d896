"""The CUDA kernels compiled for real devices, without one: what the compiler makes of them.

Needs numba-cuda and NVIDIA's NVVM (``pip install "nbnorm[cuda13]"``); ptxas (nvidia-cuda-nvcc) tells registers. A test
process that runs the simulator cannot compile, and the other way round.
"""

import ctypes
import importlib.util
import inspect
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from numba import types

from nbnorm._cuda import columns, finish, launch, planes, rows
from nbnorm._cuda.memory import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, SIMULATED
from nbnorm._cuda.pieces import ELEMENT, RUN, SLOT, Build

# Bytes of a thread that may be in local memory where the compiler does not do without.
WASTED = 320
FLOATS = {"eps", "count", "momentum", "n_a", "n_b"}
REGISTERS_OF_A_MULTIPROCESSOR = 65536


def row(kind, width, steps, warps, parameters=FLOAT32, **options):
    """Build for rows whose every element has parameters."""
    return Build(kind, width, steps, warps, ELEMENT, parameters, parameters, whole=True, **options)


def channel(kind, width, steps, warps, rule=SLOT, **options):
    """Build for slots, or runs of a slot, with float32 parameters."""
    return Build(kind, width, steps, warps, rule, FLOAT32, FLOAT32, **options)


def forward(build):
    return rows.forward_kernel(build, True)


def backward(build):
    return rows.backward_kernel(build, True, False)


def down(build):
    """Dx down columns."""
    return columns.input_grad_kernel(build, False, False)


RELU, SILU = {"activation": ("relu", 0.0)}, {"activation": ("silu", 0.0)}


class Kernel(NamedTuple):
    """A kernel with what it may cost: threads of its blocks, registers of a thread."""

    name: str
    make: object
    build: Build | None
    threads: int
    registers: int

    def __str__(self):
        return self.name

    def compiled(self):
        """Return the kernel, each made once by its cached factory."""
        return self.make() if self.build is None else self.make(self.build)


# Registers: what ptxas 13.5 took for sm_90 in November 2026, and some room for another version.
VECTORS = [
    Kernel("rows forward, a warp", forward, row(FLOAT32, 4, 8, 1), 256, 88),
    Kernel("rows forward, 8 warps", forward, row(FLOAT32, 4, 8, 8), 256, 88),
    Kernel("rows forward, 8 blocks", forward, row(FLOAT32, 4, 8, 16, blocks=8), 512, 128),
    Kernel("rows forward, uncentered", forward, row(FLOAT32, 4, 8, 8, centered=False), 256, 80),
    Kernel("rows forward, half", forward, row(FLOAT16, 8, 4, 8), 256, 88),
    Kernel("rows forward, bfloat16", forward, row(BFLOAT16, 8, 4, 8), 256, 88),
    Kernel("rows forward, double", forward, row(FLOAT64, 2, 8, 8, FLOAT64), 256, 128),
    Kernel(
        "channel forward, residual", forward, channel(FLOAT32, 4, 8, 8, has_residual=True, **RELU), 256, 104
    ),
    Kernel("channel forward, masked", forward, channel(FLOAT32, 4, 8, 8, has_mask=True), 256, 144),
    Kernel("rows backward", backward, row(FLOAT32, 4, 4, 8), 256, 144),
    Kernel("channel backward, relu", backward, channel(FLOAT32, 4, 4, 8, **RELU), 256, 112),
    Kernel("groups backward", backward, channel(FLOAT32, 4, 4, 8, RUN, whole=True), 256, 144),
    Kernel("channel backward, 8 blocks", backward, channel(FLOAT32, 4, 4, 16, blocks=8, **RELU), 512, 128),
    Kernel("rows parameter sums", rows.parameter_sums_kernel, Build(FLOAT32, 4, 1, 1, ELEMENT), 128, 64),
    Kernel("planes apply, silu", planes.apply_kernel, channel(FLOAT32, 4, 4, 1, **SILU), 256, 72),
    Kernel("planes apply, runs", planes.apply_kernel, channel(FLOAT32, 4, 4, 1, RUN, whole=True), 256, 96),
    Kernel(
        "planes input_grad",
        lambda b: planes.input_grad_kernel(b, False, False),
        channel(FLOAT32, 4, 4, 1),
        256,
        88,
    ),
    Kernel("columns apply", columns.apply_kernel, channel(FLOAT32, 4, 1, 1), 256, 64),
    Kernel("columns input_grad", down, channel(FLOAT32, 4, 1, 1), 256, 80),
    Kernel("columns input_grad, half", down, channel(FLOAT16, 8, 1, 1), 256, 128),
]
READERS = [
    Kernel("planes moments", planes.moments_kernel, Build(FLOAT32, 4, 4, 1), 256, 80),
    Kernel("planes moments, masked", planes.moments_kernel, Build(FLOAT32, 4, 4, 1, has_mask=True), 256, 104),
    Kernel("planes grad_sums", planes.grad_sums_kernel, Build(FLOAT32, 4, 4, 1), 256, 88),
    Kernel("columns moments", columns.moments_kernel, Build(FLOAT32, 4, 1, 1), 256, 128),
    Kernel("columns moments, half", columns.moments_kernel, Build(FLOAT16, 8, 1, 1), 256, 200),
    Kernel("columns grad_sums", columns.grad_sums_kernel, Build(FLOAT32, 4, 1, 1), 256, 104),
]
SMALL = [
    Kernel("finish moments", lambda: finish.moments_kernel(True), None, 256, 64),
    Kernel("finish sums", finish.sums_kernel, None, 256, 40),
    Kernel("weigh", lambda: finish.weigh_kernel(FLOAT32), None, 256, 48),
    Kernel("fold", lambda: finish.fold_kernel(FLOAT32), None, 256, 40),
    Kernel("rstd", lambda: finish.rstd_kernel(True), None, 256, 40),
    Kernel("merge", finish.merge_kernel, None, 256, 48),
    Kernel("update", lambda: finish.update_kernel(FLOAT32, FLOAT32, True), None, 256, 40),
]
SCALAR = [
    Kernel("rows forward, single halves", forward, row(FLOAT16, 1, 8, 4), 256, 128),
    Kernel("rows forward, single bfloat16", forward, row(BFLOAT16, 1, 8, 4), 256, 128),
    Kernel("rows forward, single elements", forward, row(FLOAT32, 1, 32, 8), 256, 128),
    Kernel("columns moments, single elements", columns.moments_kernel, Build(FLOAT32, 1, 1, 1), 256, 96),
]


def named(*names):
    """Kernels of `VECTORS` and `READERS`."""
    kernels = {kernel.name: kernel for kernel in [*VECTORS, *READERS]}
    return [kernels[name] for name in names]


@pytest.fixture(scope="module", autouse=True)
def _no_device():
    """Let functions that kernels call be compiled for a device that is not there."""
    if SIMULATED:
        pytest.skip("the simulator does not compile")
    import numba.cuda.dispatcher as dispatcher

    before = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=(9, 0))
    yield
    dispatcher.get_current_device = before


@cache
def ptx(kernel, cc=(9, 0), output="ptx"):
    """Compile a kernel (a cached factory makes each once) as its launcher does: addresses and sizes are int64."""
    from numba import cuda

    python = kernel.py_func
    arguments = [
        types.float64 if name in FLOATS else types.int64 for name in inspect.signature(python).parameters
    ]
    try:
        text, _ = cuda.compile(
            python, types.void(*arguments), cc=cc, output=output, device=False, abi="numba",
            launch_bounds=kernel.targetoptions["launch_bounds"],
        )  # fmt: skip
    except RuntimeError as error:  # pragma: no cover
        pytest.skip(f"NVVM is not installed: {error}")
    return text


def tool(name):
    """Return the path of one of NVIDIA's tools, of a wheel or of a toolkit; skip the test without it."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        for found in sorted(Path(folder).glob(f"*/bin/{name}")):
            return str(found)
    return shutil.which(name) or pytest.skip(f"{name} is not installed")


def resources(text, folder, arch):
    """Return registers of a thread and bytes of stack and spills, as ptxas tells them."""
    source = folder / "kernel.ptx"
    # Any ptxas since 13.0 takes this version; the code needs none of the later ones.
    source.write_text(re.sub(r"\.version \d+\.\d+", ".version 8.8", text))
    command = [tool("ptxas"), "-v", f"-arch={arch}", str(source), "-o", str(folder / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", done.stderr))
    waste = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", done.stderr)
    return registers, sum(map(int, waste))


@pytest.mark.parametrize("kernel", [*VECTORS, *READERS, *SMALL, *SCALAR], ids=str)
def test_registers(kernel, tmp_path):
    """Everything stays in registers, and a block's registers fit into a multiprocessor."""
    text = ptx(kernel.compiled())
    assert ".local" not in text
    registers, waste = resources(text, tmp_path, "sm_90")
    assert waste == 0 or (kernel in SCALAR and waste <= 64)
    assert registers <= kernel.registers
    assert registers * kernel.threads <= REGISTERS_OF_A_MULTIPROCESSOR


def largest_teams():
    """Forward and backward of the largest team, as `launch` would have it, for every type and rule."""
    blocks, warps, span = launch.LIMITS.teams[-1]
    every = {"has_mask": True, "has_residual": True, **SILU}
    for kind, width in ((FLOAT32, 4), (FLOAT16, 8), (FLOAT64, 2), (FLOAT32, 1)):
        parameters, size = (FLOAT64, 2) if kind == FLOAT64 else (FLOAT32, 1)
        for rule in (SLOT, RUN, ELEMENT):
            for options in ({},) if rule == ELEMENT else ({}, SILU, every):
                for make, arrays in (
                    (forward, 1 + ("has_mask" in options)),
                    (backward, 4 if rule == ELEMENT else 2),
                ):
                    steps = max(1, span // (arrays * size) // width)
                    build = Build(
                        kind, width, steps, warps, rule, parameters, parameters, blocks=blocks, whole=rule != SLOT,
                        **options,
                    )  # fmt: skip
                    yield pytest.param(
                        make, build, id=f"{make.__name__} {kind=} {width=} {rule=} {[*options]}"
                    )


@pytest.mark.parametrize(("make", "build"), largest_teams())
def test_the_largest_teams_hold_their_slots_in_registers(make, build, tmp_path):
    """Nothing is spilled but a few single elements, and float64 where runs share parameters below silu."""
    _, waste = resources(ptx(make(build)), tmp_path, "sm_90")
    few = build.width == 1 or (build.kind == FLOAT64 and build.rule == RUN and build.needs_z)
    assert waste <= (WASTED if few else 0)


def global_accesses(text):
    """Bytes of every access to global memory: loads, stores."""
    size = {"v2.f64": 16, "v4.f32": 16, "v4.b32": 16, "v4.u32": 16, "v2.u64": 16, "v2.b64": 16}

    def bytes_of(kind):
        known = size.get(kind)
        return known if known else int(kind.lstrip("vfbus24.") or kind[1:]) // 8

    found = {}
    for direction in ("ld", "st"):
        kinds = re.findall(rf"\b{direction}\.global(?:\.[a-z]+)*?\.((?:v\d\.)?[fbus]\d+)\b", text)
        found[direction] = [bytes_of(kind) for kind in kinds]
    return found["ld"], found["st"]


@pytest.mark.parametrize("kernel", VECTORS, ids=str)
def test_vectors_of_16_bytes(kernel):
    """Elements are written 16 bytes at a time; what is written singly are statistics."""
    loads, stores = global_accesses(ptx(kernel.compiled()))
    assert loads.count(16) > 0
    assert stores.count(16) > 0
    assert set(stores) <= {8, 16}, "an element is stored alone"
    assert loads.count(2) <= 1, "one half is loaded alone at most, the base of the mean"


@pytest.mark.parametrize("kernel", READERS, ids=str)
def test_first_passes_read_vectors(kernel):
    loads, stores = global_accesses(ptx(kernel.compiled()))
    assert loads.count(16) > 0
    assert set(stores) == {8}, "partial results are float64"


@pytest.mark.parametrize("kind", [FLOAT16, BFLOAT16, FLOAT32, FLOAT64])
@pytest.mark.parametrize("vector", [True, False])
def test_what_is_loaded(kind, vector):
    """The code that loads elements, run on the CPU: every value in its place, halves widened."""
    import llvmlite.binding as llvm
    import ml_dtypes
    from llvmlite import ir

    from nbnorm._cuda import memory

    dtype = np.dtype([np.float16, ml_dtypes.bfloat16, np.float32, np.float64][kind])
    width = 16 // dtype.itemsize if vector else 1
    result = ir.DoubleType() if kind == FLOAT64 else ir.FloatType()
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 3), "read")
    builder = ir.IRBuilder(function.append_basic_block())
    target = builder.inttoptr(function.args[2], result.as_pointer())
    for i, value in enumerate(memory._read(builder, *function.args[:2], kind, width)):
        builder.store(value, builder.gep(target, [ir.IntType(32)(i)]))
    builder.ret_void()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    read = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(engine.get_function_address("read"))

    raw = np.zeros(32 * dtype.itemsize + 16, np.uint8)
    start = -raw.__array_interface__["data"][0] % 16
    source = raw[start : start + 32 * dtype.itemsize].view(dtype)
    source[:] = np.linspace(-3, 100, 32).astype(dtype)
    found = np.zeros(width, np.float64 if kind == FLOAT64 else np.float32)
    addresses = [a.__array_interface__["data"][0] for a in (source, found)]
    first = 2 * width
    read(addresses[0], first, addresses[1])
    np.testing.assert_array_equal(found, source[first : first + width].astype(found.dtype))


@pytest.mark.parametrize("kernel", SCALAR, ids=str)
def test_single_elements_need_no_alignment(kernel):
    loads, stores = global_accesses(ptx(kernel.compiled()))
    assert 16 not in loads + stores


def double_arithmetic(text):
    return len(
        re.findall(
            r"\b(?:add|sub|mul|div|fma|cvt|max|min)(?:\.rn|\.rz|\.approx)*\.(?:f64|f32\.f64|f64\.f32)", text
        )
    )


FACTORIES = {
    "forward": lambda steps: forward(row(FLOAT32, 4, steps, 4)),
    "backward": lambda steps: backward(row(FLOAT32, 4, steps, 4)),
    "moments": lambda steps: planes.moments_kernel(Build(FLOAT32, 4, steps, 1)),
    "apply": lambda steps: planes.apply_kernel(channel(FLOAT32, 4, steps, 1)),
    "input_grad": lambda steps: planes.input_grad_kernel(channel(FLOAT32, 4, steps, 1), False, False),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_no_double_precision_per_element(name):
    """Four times the elements of a thread take no more float64 instructions: those belong to slots."""
    few, many = (double_arithmetic(ptx(FACTORIES[name](steps))) for steps in (1, 4))
    assert many < few + 4, "a few more may come from the compiler's choices, three per vector would be 9"


def test_clusters():
    """A team of several blocks is launched as a cluster, whose blocks meet and read each other's memory."""
    alone, together = named("rows forward, 8 warps", "rows forward, 8 blocks")
    for cc in ((9, 0), (10, 0)):
        text = ptx(together.compiled(), cc)
        for part in (".explicitcluster", "barrier.cluster.arrive", "mapa.u64"):
            assert part not in ptx(alone.compiled(), cc)
            assert part in text
        assert re.search(r"\.reqnctapercluster 8, 1, 1", text)


@pytest.mark.parametrize(
    "kernel",
    named(
        "rows forward, 8 warps",
        "rows forward, 8 blocks",
        "rows forward, half",
        "rows backward",
        "columns moments",
    ),
    ids=str,
)
def test_machine_code(kernel, tmp_path):
    """Linked as numba-cuda links it: 16 bytes per access reach the machine code, and nothing is spilled."""
    linker = pytest.importorskip("cuda.core")
    code = linker.ObjectCode.from_ltoir(ptx(kernel.compiled(), output="ltoir"))
    options = linker.LinkerOptions(arch="sm_90", link_time_optimization=True)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(linker.Linker(code, options=options).link("cubin").code)
    done = subprocess.run([tool("nvdisasm"), str(cubin)], capture_output=True, text=True, check=True)
    instructions = re.findall(r"\b(LDG|STG|LDL|STL)([.\w]*)", done.stdout)
    names = [name for name, _ in instructions]
    assert not {"LDL", "STL"} & set(names)
    assert ("EIATTR_CTA_PER_CLUSTER" in done.stdout) == (kernel.build.blocks > 1)
    wide = [name for name, kind in instructions if kind.endswith(".128")]
    assert wide.count("LDG") >= kernel.build.steps
    assert wide.count("STG") >= (kernel.build.steps if kernel in VECTORS else 0)


HALVES_AND_SINGLES = named("rows forward, half", "rows backward", "columns moments")
OLDER = [((7, 5), kernel) for kernel in HALVES_AND_SINGLES]
OLDER += [((8, 0), kernel) for kernel in [*HALVES_AND_SINGLES, *named("rows forward, bfloat16")]]


@pytest.mark.parametrize(("cc", "kernel"), OLDER, ids=str)
def test_other_architectures(cc, kernel, tmp_path):
    """Turing, and Ampere, the oldest that has bfloat16 conversions; neither has clusters."""
    registers, waste = resources(ptx(kernel.compiled(), cc), tmp_path, f"sm_{cc[0]}{cc[1]}")
    assert waste == 0
    assert registers * kernel.threads <= REGISTERS_OF_A_MULTIPROCESSOR
