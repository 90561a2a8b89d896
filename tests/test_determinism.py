"""The same bits whatever the threads, the twin, the strides, the form of the call, and from run to run."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

import nbnorm
import oracle
from cases import TRAVERSALS, Case, arrange
from nbnorm import _cpu
from nbnorm._cpu import cut, grid, rows, spans
from nbnorm._cpu.launch import shares
from nbnorm._cpu.tiles import CHUNK
from nbnorm._gradients import GRADIENTS
from nbnorm._view import View, batch_view, trailing_view

# Beside the traversals: work that does not divide among two or four threads, enough of it to be shared out.
SHARED_OUT = [
    *TRAVERSALS,
    Case((3, 5, 263, 257), 1, "planes, uneven"),
    Case((30011, 17), 1, "columns, uneven"),
    Case((1, 1, 400009), 1, "one long slot"),
    Case((4, 20011), 1, "wide columns"),
    Case((300, 2100), 1, "wide columns, in chunks"),
]
# Enough to meet both traversals where every further case costs a compilation.
FEW = [SHARED_OUT[0], SHARED_OUT[3]]


def results(case):
    """Every array one training step and one inference call produce; the data depend on the case alone."""
    rng = np.random.default_rng(7)
    x, dy = case.x(rng, np.float32), case.dy(rng, np.float32)
    parameters, running = case.parameters(rng, np.float32), case.running(rng)
    options = {"channel_axis": case.channel_axis}
    inferred = nbnorm.batch_norm_inference(x, *running, *parameters, **options)
    y, saved = nbnorm.batch_norm_forward(x, *parameters, *running, **options)
    return [
        inferred,
        y,
        saved.mean,
        saved.rstd,
        saved.moments.m2,
        *running,
        *nbnorm.batch_norm_backward(dy, saved),
    ]


def digests(cases=SHARED_OUT):
    """Return one digest of the results per case, for the threads that are set now."""
    found = {}
    for case in cases:
        arrays = [np.ascontiguousarray(array).tobytes() for array in results(case)]
        found[str(case)] = hashlib.sha256(b"".join(arrays)).hexdigest()
    return found


def digests_by_threads():
    """Return the digests for each number of threads."""
    found = {}
    for count in (1, 2, 4):
        numba.set_num_threads(count)
        found[str(count)] = digests()
    return found


def in_subprocess(call, **environment):
    """Return the result of a call of this file in a fresh interpreter, with four threads to its name."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", f"import json; from test_determinism import *; print(json.dumps({call}))"],
        env={**os.environ, "NUMBA_NUM_THREADS": "4", "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_runs():
    """The same call again has the same bits."""
    assert digests() == digests()


@pytest.mark.slow
def test_threads():
    """One, two and four threads of another process agree with this one; one thread runs the serial twin."""
    here = digests()
    found = in_subprocess("digests_by_threads()")
    assert sorted(found) == ["1", "2", "4"]
    for count in found:
        assert found[count] == here, f"{count} threads"


@pytest.mark.slow
def test_without_threads():
    """NBNORM_PARALLEL=0 keeps everything serial, with the bits of the parallel twin."""
    assert in_subprocess("digests(FEW)", NBNORM_PARALLEL="0") == digests(FEW)


def test_digests_see_a_single_bit(monkeypatch):
    """The comparison above can fail: one changed bit changes the digest of that case only."""
    before = digests()
    forward = nbnorm.batch_norm_forward

    def altered(x, *args, **options):
        y, saved = forward(x, *args, **options)
        if x.shape == (700, 80):
            y[699, 79] = np.nextafter(y[699, 79], np.float32(9))
        return y, saved

    monkeypatch.setattr(nbnorm, "batch_norm_forward", altered)
    after = digests()
    assert [name for name in before if before[name] != after[name]] == ["700x80 axis 1 C"]


VIEWS = [
    (shape, axis, layout)
    for shape, axis in [((5, 6, 40, 41), 1), ((700, 80), 1), ((4001, 3), 1)]
    for layout in ("gaps inside", "gaps outside", "gaps on axis 1", "inner block", "unaligned", "read-only")
]


@pytest.mark.parametrize(("shape", "axis", "layout"), VIEWS)
def test_view_with_gaps_and_its_dense_copy(shape, axis, layout, rng):
    """Strides of a view change where values lie, not one bit of the results."""
    values = rng.standard_normal((2, *shape)).astype(np.float32)
    case = Case(shape, axis, "view")
    parameters, running = case.parameters(rng, np.float32), case.running(rng)
    found = []
    for x, dy in ((arrange(values[0], layout), arrange(values[1], layout)), values):
        buffers = [array.copy() for array in running]
        y, saved = nbnorm.batch_norm_forward(x, *parameters, *buffers, channel_axis=axis)
        inferred = nbnorm.batch_norm_inference(x, *running, *parameters, channel_axis=axis)
        found.append([y, *nbnorm.batch_norm_backward(dy, saved), saved.mean, saved.rstd, *buffers, inferred])
    for of_view, of_copy in zip(*found, strict=True):
        oracle.assert_same_bits(of_view, of_copy)


@pytest.mark.parametrize("case", [*TRAVERSALS, SHARED_OUT[-1]], ids=lambda case: case.reason)
@pytest.mark.parametrize(("dtype", "masked"), [("float32", False), ("float32", True), ("float64", False)])
def test_one_call_and_two_phases(case, dtype, masked, rng):
    """The one-call form is the two-phase form, with weights whose sum is not exact in the type of x, too."""
    x, dy = case.x(rng, dtype), case.dy(rng, dtype)
    weight, bias = case.parameters(rng, dtype)
    mask = rng.random(np.delete(x.shape, 1)) if masked else None
    running = [case.running(rng)] * 2
    running = [[array.copy() for array in pair] for pair in running]
    y, saved = nbnorm.batch_norm_forward(x, weight, bias, *running[0], momentum=0.3, ddof=0, mask=mask)
    once = [y, *nbnorm.batch_norm_backward(dy, saved), saved.mean, saved.rstd, *running[0]]

    moments = nbnorm.batch_moments(x, mask=mask)
    y, saved = nbnorm.batch_norm_apply(x, moments, weight, bias, mask=mask)
    sums = nbnorm.batch_norm_grad_sums(dy, saved)
    nbnorm.update_running_stats(*running[1], moments, momentum=0.3, ddof=0)
    dx = nbnorm.batch_norm_input_grad(dy, saved, sums)
    gradients = [dx, sums.sum_dz_x_hat.astype(dtype), sums.sum_dz.astype(dtype)]
    twice = [y, *gradients, saved.mean, saved.rstd, *running[1]]
    for one, two in zip(once, twice, strict=True):
        oracle.assert_same_bits(two, one)


@pytest.mark.parametrize(
    ("tasks", "chunks", "threads", "expected"),
    [(1, 1, 8, 1), (3, 1, 2, 2), (1, 4, 2, 0), (3, 2, 2, 0), (19, 2, 2, 2), (7, 3, 1, 1)],
)
def test_threads_share_whole_tasks_or_chunks(tasks, chunks, threads, expected):
    """Few or uneven tasks are shared chunk by chunk, but not where a chunk is all of a task."""
    assert shares(tasks, chunks, threads) == expected


@pytest.mark.parametrize("height", [100, 1024, 1500, 2048, 3000, 5000])
def test_chunks_of_columns_are_equal_shares(height):
    """A power of two of them, each of about as many values, or of more where they would be few rows."""
    found = grid.Cut(*grid.geometry(batch_view((height, 256), (1024, 4), 4, 1), 2).tolist())
    assert found.chunks in (1, 2, 4, 8, 16)
    assert found.chunks == 1 or found.chunk >= grid.CHUNK_ROWS
    assert found.chunks == 1 or found.chunk * found.block > 0.7 * CHUNK
    assert found.chunk * found.block < 1.5 * CHUNK or found.chunk < 2 * grid.CHUNK_ROWS


@numba.njit
def places(g, tasks):
    """Block and chunk of each task."""
    return [grid.place(g, task) for task in range(tasks)]


@pytest.mark.parametrize(
    ("batch", "rows", "lanes", "threads", "team"),
    [
        (1, 512, 4096, 2, 0), (1, 256, 512, 2, 0), (3, 600, 5000, 2, 0),  # chunks of rows
        (1, 100, 4096, 2, 2), (1, 256, 65536, 16, 16),  # too few of them
        (4, 600, 5000, 2, 2),  # batch entries
    ],
)  # fmt: skip
def test_threads_share_rows_of_wide_arrays(batch, rows, lanes, threads, team):
    """Threads share blocks of the same rows only where chunks are few; else one chunk after the other."""
    view = View(batch, rows, lanes, 1, lanes, 1, 1, "columns")
    g = grid.geometry(view, threads)
    found = grid.Cut(*g.tolist())
    assert grid.fused(view, threads) == team
    assert places(g, batch * found.blocks * found.chunks) == [
        (entry * found.blocks + block, chunk)
        for entry in range(batch)
        for chunk in range(found.chunks)
        for block in range(found.blocks)
    ]


def wild(x):
    """Spoil some slots, a row of x each, so that a pass of shifted sums does not do for them."""
    x[3, ::2] += 1e6
    x[5] *= 1e-30
    x[8, 2] = np.inf
    x[11, 0] = np.nan
    return x


@pytest.mark.parametrize("inner", [7 * 13, 5000], ids=["short", "long"])
def test_slots_that_a_task_takes_together(rng, inner, monkeypatch):
    """How many neighbouring slots share a task is a matter of speed alone, and so is whether passes share a kernel."""
    x = wild(rng.standard_normal((19, 6, inner)).astype(np.float32)).swapaxes(0, 1).copy()
    dy = rng.standard_normal(x.shape).astype(np.float32)
    groups = wild(rng.standard_normal((20, 3, inner)).astype(np.float32)).reshape(5, 12, inner)
    found = []
    for slots in (1, 2, 7, 19):
        monkeypatch.setattr(cut, "together", lambda *_, slots=slots: slots)
        _cpu.start.cache_clear()
        y, saved = nbnorm.batch_norm_forward(x, activation="relu")
        own = [y, saved.mean, saved.rstd, nbnorm.batch_norm_backward(dy, saved)[0]]
        y, saved = nbnorm.group_norm_forward(groups, 4, activation="relu")
        found.append((*own, y, saved.mean, saved.rstd, nbnorm.group_norm_backward(groups, saved)[0]))
    _cpu.start.cache_clear()
    for other in found[1:]:
        for name, first, same in zip(("y", "mean", "rstd", "dx") * 2, found[0], other, strict=True):
            oracle.assert_same_bits(same, first, name)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_rows_that_are_taken_together(rng, norm, monkeypatch):
    """How many rows forward takes together is a matter of speed alone."""
    x = wild(rng.standard_normal((37, 700)).astype(np.float32))
    found = []
    for together in (1, 7, 16):
        monkeypatch.setattr(spans, "rows_together", lambda *_, together=together: together)
        _cpu.start.cache_clear()
        y, saved = getattr(nbnorm, f"{norm}_norm_forward")(x)
        found.append((y, saved.rstd) if saved.mean is None else (y, saved.rstd, saved.mean))
    _cpu.start.cache_clear()
    for other in found[1:]:
        for first, same in zip(found[0], other, strict=True):
            oracle.assert_same_bits(same, first)


@pytest.mark.parametrize("inner", [90, 300, 1030], ids=["short", "middle", "long"])
def test_gradients_of_rows(rng, inner, monkeypatch):
    """Short, longer and long rows, four at once or what is left over: the same bits pass after pass, and one by one."""
    x, dy = rng.standard_normal((2, 23, inner), np.float32)
    weight, bias = rng.standard_normal((2, inner), np.float32)
    saved = nbnorm.layer_norm_forward(x, weight, bias)[1]
    in_groups = nbnorm.group_norm_forward(x.reshape(-1)[: 22 * inner].reshape(11, 2 * inner), 2)[1]
    found = []
    for team in (1, 0):
        monkeypatch.setattr(rows, "fused", lambda *_, team=team: team)
        _cpu.start.cache_clear()
        whole = nbnorm.layer_norm_backward(dy, saved)
        parts = [nbnorm.layer_norm_backward(dy, saved, need={name})[i] for i, name in enumerate(GRADIENTS)]
        found += [whole, parts]
        found[-1] += [nbnorm.group_norm_backward(in_groups.x, in_groups)[0]]
    _cpu.start.cache_clear()
    for other in found[1:]:
        for name, first, same in zip(GRADIENTS, found[0], other, strict=False):
            oracle.assert_same_bits(same, first, name)
    oracle.assert_same_bits(found[1][-1], found[3][-1], "dx of groups")


@pytest.mark.parametrize("shape", [(1030, 40), (700, 300)], ids=str)
def test_bands_of_a_task_leave_no_trace(shape, rng):
    """Forward of rows has the same bits however many bands a task goes through, the last task having fewer."""
    x = rng.standard_normal(shape, np.float32)
    view = trailing_view(x.shape, x.strides, x.itemsize, 1)
    chosen = spans.Cut(*spans.geometry(view, 1).tolist())
    assert chosen.bands > 3
    found = []
    for bundle in (1, 3, chosen.bands):
        y, statistics = np.full_like(x, np.nan), np.full((3, view.slots), np.nan)
        g = np.array(chosen._replace(bundle=bundle))
        rows.forward_kernel.serial(g, x.reshape(-1), y.reshape(-1), None, None, 1e-5, *statistics)
        found.append([y, statistics])
    for one in found[1:]:
        for a, b in zip(one, found[0], strict=True):
            oracle.assert_same_bits(a, b)
            assert np.isfinite(a).all()


@pytest.mark.parametrize(
    ("samples", "columns", "bands"),
    [
        (18, 5120, 4),
        (25, 3072, 4),
        (71, 1536, 8),
        (102, 1000, 8),
        (201, 384, 8),
        (49, 4096, 4),
        (10, 4096, 2),
    ],
)
def test_few_bands_are_equal_shares(samples, columns, bands):
    """Of 3, 5 or 7 bands two threads would not share whole ones."""
    view = trailing_view((samples, columns), (columns * 4, 4), 4, 1)
    assert spans.Cut(*spans.geometry(view, 2).tolist()).bands == bands
    assert spans.fused(view, 2) == 2


@pytest.mark.parametrize(
    ("samples", "columns", "bands"), [(3, 5, 1), (513, 384, 9), (809, 96, 13), (8192, 1024, 128)]
)
def test_other_bands_are_of_many_samples(samples, columns, bands):
    """Where there is work for fewer or more bands than a few, a band has as many samples as its sums allow."""
    view = trailing_view((samples, columns), (columns * 4, 4), 4, 1)
    assert spans.Cut(*spans.geometry(view, 2).tolist()).bands == bands
