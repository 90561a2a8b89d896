"""The CUDA backend in Numba's simulator: every verb on every traversal, type and option, against the oracle.

benchmarks/gpu.py runs the same tests on a GPU.

Run by test_cuda_simulator.py in a process of its own, because the simulator must be chosen before Numba is imported.
Its blocks are tiny (see `nbnorm._cuda.launch`), so that small arrays already need several pieces, chunks and warps.
"""

import inspect
import sys
import zlib
from dataclasses import dataclass
from itertools import product

import ml_dtypes
import numpy as np
import pytest
from numba import cuda

import oracle
import reference
from nbnorm import _activation, _cpu, _cuda
from nbnorm._cuda import builds, launch, memory
from nbnorm._cuda.collective import WARP
from nbnorm._cuda.memory import SIMULATED
from nbnorm._options import Epilogue, Mask
from nbnorm._view import batch_view, group_view, trailing_view

EPS = 1e-5
FLOATS = {"f2": np.float16, "bf2": ml_dtypes.bfloat16, "f4": np.float32, "f8": np.float64}


@pytest.fixture(autouse=True, scope="module")
def _lively():
    """The simulator's threads wait for each other all the time: let them take turns quickly."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@dataclass(frozen=True)
class Case:
    """A norm on a shape, C-contiguous, with options, and the reason it is there."""

    norm: str
    shape: tuple
    reason: str
    channel_axis: int = 1
    groups: int = 0
    dtype: str = "f4"
    activation: str | tuple | None = None
    residual: bool = False
    mask: bool = False
    parameters: str | None = "same"

    def __str__(self):
        marks = [self.norm, "x".join(map(str, self.shape)), self.dtype, self.reason]
        return " ".join(marks)

    @property
    def axis(self):
        return self.channel_axis % len(self.shape)

    @property
    def trailing(self):
        return self.norm in ("layer", "rms")

    def plan(self, x):
        """Return the view of x."""
        if self.trailing:
            return trailing_view(x.shape, x.strides, x.itemsize, 1)
        if self.norm == "batch":
            return batch_view(x.shape, x.strides, x.itemsize, self.axis, self.mask)
        groups = self.groups or self.shape[self.axis]
        return group_view(x.shape, x.strides, x.itemsize, self.axis, groups, True)

    def split(self, x):
        """Give x the axes in which the reference tells statistics from parameters."""
        if self.trailing or self.norm == "batch":
            return x
        return oracle.grouped(x, self.groups or self.shape[self.axis], self.axis)

    def axes(self):
        """Return reduced axes and those of the parameters, of x as `split` shapes it."""
        ndim = len(self.shape)
        if self.trailing:
            return (ndim - 1,), (ndim - 1,)
        if self.norm == "batch":
            return oracle.axes_but(ndim, self.axis)
        sample = 2 if self.axis == 0 else 0
        reduced = tuple(i for i in range(ndim + 1) if i not in (self.axis, sample))
        return reduced, (self.axis, self.axis + 1)


ROWS = [
    Case("layer", (5, 24), "rows in a warp, vectors"),
    Case("layer", (4, 7), "rows of odd length: single elements"),
    Case("layer", (9, 40), "rows of two steps, several rows of a band"),
    Case("layer", (3, 120), "rows of two warps, backward of two blocks"),
    Case("layer", (3, 200), "rows of two warps forward"),
    Case("layer", (3, 300), "rows of two blocks"),
    Case("layer", (2, 600), "rows too long to hold: one kernel per pass"),
    Case("layer", (2, 601), "long rows of odd length"),
    Case("layer", (6, 24), "half", dtype="f2"),
    Case("layer", (6, 24), "bfloat16, float32 parameters", dtype="bf2", parameters="f4"),
    Case("layer", (6, 22), "double", dtype="f8"),
    Case("layer", (4, 16), "no parameters", parameters=None),
    Case("rms", (5, 24), "uncentered rows"),
    Case("rms", (2, 301), "uncentered rows of two blocks, odd length"),
    Case("rms", (2, 601), "uncentered long rows"),
    Case("rms", (4, 24), "uncentered half rows", dtype="f2", parameters="f4"),
    Case("layer", (3, 1), "rows of one value"),
    Case("group", (4, 6), "rows whose parameters repeat every second row", groups=2),
]
PLANES = [
    Case("batch", (1, 3, 40), "a channel in a warp"),
    Case("batch", (1, 3, 100), "a channel in a block"),
    Case("batch", (3, 2, 68), "a channel of three segments in a block"),
    Case("batch", (3, 2, 67), "segments of odd length"),
    Case("batch", (5, 2, 68), "channels of two blocks, relu", activation="relu"),
    Case(
        "batch",
        (7, 2, 5, 8),
        "masked channels of two blocks, silu, residual",
        mask=True,
        activation="silu",
        residual=True,
    ),
    Case("batch", (2, 2, 140), "double in two blocks", dtype="f8"),
    Case("batch", (8, 2, 68), "channels too large to hold, relu", activation="relu"),
    Case("batch", (8, 2, 67), "large, odd, silu and residual", activation="silu", residual=True),
    Case("batch", (1, 2, 1000), "several chunks of a channel"),
    Case(
        "batch",
        (1, 2, 60),
        "half, leaky relu, residual",
        dtype="f2",
        activation=("leaky_relu", 0.1),
        residual=True,
    ),
    Case(
        "batch", (8, 2, 72), "large bfloat16, relu, residual", dtype="bf2", activation="relu", residual=True
    ),
    Case("batch", (2, 2, 70), "double, silu", dtype="f8", activation="silu"),
    Case("batch", (2, 3, 4, 5), "masked channels in a block", mask=True),
    Case(
        "batch",
        (3, 2, 9, 8),
        "masked, in chunks, relu, residual",
        mask=True,
        activation="relu",
        residual=True,
    ),
    Case("batch", (2, 2, 68), "float32 x, float64 parameters", parameters="f8"),
    Case("batch", (2, 2, 68), "residual alone", residual=True),
    Case("instance", (2, 3, 5, 8), "planes in a warp"),
    Case("instance", (2, 3, 1, 1), "planes of one value, relu", activation="relu"),
    Case("instance", (3, 2, 23, 13), "planes of two blocks, odd, relu", activation="relu"),
    Case("instance", (2, 2, 23, 23), "large planes, odd, relu", activation="relu"),
    Case("instance", (2, 2, 4, 4), "masked planes", mask=True),
    Case("group", (2, 6, 3, 4), "two runs of a group", groups=3),
    Case("group", (2, 6, 3, 3), "odd runs, silu, residual", groups=3, activation="silu", residual=True),
    Case(
        "group",
        (2, 4, 4, 4),
        "groups of a warp, masked, silu, residual",
        groups=2,
        mask=True,
        activation="silu",
        residual=True,
    ),
    Case("group", (1, 4, 10, 16), "groups of two blocks", groups=2),
    Case("group", (1, 4, 8, 12), "groups of one block, backward of two, relu", groups=2, activation="relu"),
    Case("group", (2, 4, 12, 24), "large groups, masked, relu", groups=2, mask=True, activation="relu"),
    Case("group", (2, 4, 4, 8), "half groups", groups=1, dtype="f2"),
]
COLUMNS = [
    Case("batch", (9, 8), "columns"),
    Case("batch", (33, 3), "narrow columns"),
    Case("batch", (300, 4), "several tiles of a chunk"),
    Case("batch", (6, 40), "more lanes than a block, relu", activation="relu"),
    Case("batch", (5, 3, 2, 2), "short planes: lanes of a channel merged"),
    Case("batch", (5, 3, 3, 3), "short odd planes, silu, residual", activation="silu", residual=True),
    Case("batch", (3, 4, 5, 8), "channels last, half", channel_axis=-1, dtype="f2", parameters="f4"),
    Case("batch", (3, 4, 5, 8), "channels last, bfloat16, relu", channel_axis=-1, dtype="bf2", activation="relu"),
    Case("batch", (7, 6), "double", dtype="f8"),
    Case("batch", (12, 8), "masked, relu, residual", mask=True, activation="relu", residual=True),
    Case("batch", (12, 5), "masked, no parameters", mask=True, parameters=None),
    Case("instance", (2, 5, 6, 4), "channels last", channel_axis=-1),
    Case("instance", (2, 5, 6, 3), "channels last, masked", channel_axis=-1, mask=True),
    Case("group", (2, 5, 3, 8), "channels last: lanes of a group merged", channel_axis=-1, groups=2),
    Case("group", (2, 5, 3, 6), "channels last, silu, residual, masked", channel_axis=-1, groups=2,
         activation="silu", residual=True, mask=True),
]  # fmt: skip


class Run:
    """Arrays of a case on the device, and what is expected of them."""

    def __init__(self, case, rng):
        dtype = np.dtype(FLOATS[case.dtype])
        self.case, self.dtype = case, dtype
        self.computing = np.float64 if dtype.itemsize == 8 else np.float32
        self.x = (rng.standard_normal(case.shape) * 1.5 + 0.7).astype(dtype)
        self.dy = rng.standard_normal(case.shape).astype(dtype)
        self.residual = rng.standard_normal(case.shape).astype(dtype) if case.residual else None
        reduced, param = case.axes()
        n = case.shape[-1 if case.trailing else case.axis]
        self.weight = self.bias = None
        if case.parameters is not None:
            kind = dtype if case.parameters == "same" else FLOATS[case.parameters]
            self.weight = (rng.uniform(0.5, 2, n) * rng.choice([-1, 1], n)).astype(kind)
            self.bias = None if case.norm == "rms" else rng.standard_normal(n).astype(kind)
        self.view = case.plan(self.x)
        self.mask = self.weights = None
        if case.mask:
            places = tuple(m for i, m in enumerate(case.shape) if i != case.axis)
            self.weights = rng.integers(0, 3, places).astype(np.float64)
            self.weights.flat[:2] = 1
            if case.norm != "batch" and case.axis != 0:
                self.weights[:, ...].reshape(places[0], -1)[:, 0] = 1
            line = self.weights.reshape(self.view.slots // self.view.period, -1)
            self.mask = Mask(put(line.astype(self.computing)), put(line.sum(axis=1) * self.view.width))
        self.reference = self._expect(reduced, param)
        marker = None
        if case.activation is not None:
            name, slope = case.activation if isinstance(case.activation, tuple) else (case.activation, 0.0)
            marker = _activation.marker(name, slope, dtype.itemsize == 8)
        self.epilogue = Epilogue(put(self.weight), put(self.bias), put(self.residual), marker)

    def _expect(self, reduced, param):
        case = self.case
        mask = None
        if case.mask:
            at = (case.axis,) if case.norm == "batch" else (case.axis, case.axis + 1)
            mask = np.expand_dims(self.weights, at)
        f = reference.forward(
            case.split(self.x), self.weight, self.bias, reduced=reduced, param=param, eps=EPS,
            activation=case.activation, mask=mask,
            residual=None if self.residual is None else case.split(self.residual),
        )  # fmt: skip
        if case.norm == "rms":
            plain = oracle.normalize(
                self.x, self.weight, reduced=reduced, param=param, eps=EPS, centered=False
            )
            return plain, oracle.differentiate(self.dy, plain), None
        return (f.plain, *reference.backward(case.split(self.dy), f))


def put(array):
    """Bring an array to the simulated device."""
    return None if array is None else cuda.to_device(array)


def blank(like):
    """Return a result array full of NaN."""
    return put(np.full(like.shape, np.nan, like.dtype))


def host(array):
    """Bring a result back."""
    return None if array is None else array.copy_to_host()


def generator(case):
    """Make a generator seeded by the case."""
    return np.random.default_rng(zlib.crc32(str(case).encode()))


@pytest.mark.parametrize("case", [*ROWS, *PLANES, *COLUMNS], ids=str)
def test_forward_and_backward(case):
    """Both passes are within the promised bounds, and two phases have the bits of one call."""
    run = Run(case, generator(case))
    forward, gradients, dresidual = run.reference
    view, x, dy = run.view, put(run.x), put(run.dy)
    y, dx = blank(run.x), blank(run.x)
    dres = blank(run.x) if case.residual else None
    centered = case.norm != "rms"
    mean, m2, rstd = _cuda.forward(view, x, y, run.epilogue, EPS, centered, run.mask)
    split = case.split
    residual = np.zeros(1) if run.residual is None else run.residual.astype(np.float64)
    bound = oracle.y_tolerance(forward) * oracle.largest(residual)
    oracle.assert_within(split(host(y)), forward.y, bound, "y")
    if centered:
        expected, bound = forward.per_slot("mean"), oracle.mean_tolerance(forward)
        oracle.assert_within(host(mean), expected.ravel(), bound.ravel(), "mean")
    count = count_of(run, view)
    sums = _cuda.backward(view, x, dy, dx, dres, mean, rstd, run.epilogue, count, run.mask)
    oracle.assert_within(split(host(dx)), gradients.dx, oracle.dx_tolerance(forward, gradients), "dx")
    for name, found in (("dbias", sums[0]), ("dweight", sums[1])):
        expected = getattr(gradients, name)
        bound = oracle.sum_tolerance(getattr(gradients, f"{name}_terms"), forward, run.computing)
        oracle.assert_within(host(found).reshape(expected.shape), expected, bound, name)
    if case.residual:
        bound = 32 * oracle.eps(run.dtype) * np.maximum(1, np.abs(dresidual))
        oracle.assert_within(split(host(dres)), dresidual, bound, "dresidual")

    again, y_again = _cuda.moments(view, x, centered, run.mask), blank(run.x)
    for name, one, two in zip(("mean", "m2"), (mean, m2), again, strict=True):
        if one is not None:
            oracle.assert_same_bits(host(two), host(one), name)
    oracle.assert_same_bits(host(_cuda.rstd(m2, count, EPS)), host(rstd), "rstd")
    _cuda.apply(view, x, y_again, mean, rstd, run.epilogue)
    oracle.assert_same_bits(host(y_again), host(y), "y by given statistics")
    if case.norm == "batch":
        _two_phases(run, view, x, dy, mean, rstd, sums, host(dx), forward, gradients)


def count_of(run, view):
    """Return how many values share a mean: one number, or one for each row of the mask."""
    return float(view.values) if run.mask is None else run.mask.counts


def _two_phases(run, view, x, dy, mean, rstd, sums, dx, forward, gradients):
    """Sums first, dx then; dx may take the place of dy; without sums the statistics are constants."""
    found = _cuda.grad_sums(view, x, dy, mean, rstd, run.epilogue, run.mask)
    for one, two, terms in zip(found, sums, (gradients.dbias_terms, gradients.dweight_terms), strict=True):
        oracle.assert_within(
            host(one), host(two), oracle.sum_tolerance(terms, forward, run.computing), "sums"
        )
    dx_again = blank(run.x)
    dres = None if run.residual is None else blank(run.x)
    arguments = (mean, rstd, run.epilogue)
    _cuda.input_grad(view, x, dy, dx_again, dres, *arguments, found, count_of(run, view), run.mask)
    oracle.assert_within(host(dx_again), gradients.dx, oracle.dx_tolerance(forward, gradients), "dx by sums")
    _cuda.input_grad(view, x, dy, dx_again, dres, *arguments, None, float(view.values), None)
    expected = gradients.g * forward.rstd
    oracle.assert_within(host(dx_again), expected, oracle.dx_tolerance(forward, gradients), "constant dx")
    into = put(run.dy)
    _cuda.backward(view, x, into, into, None, *arguments, count_of(run, view), run.mask)
    oracle.assert_same_bits(host(into), dx, "dx in the place of dy")


def plain(shape, values, channel_axis=1):
    """Forward without parameters; return y, mean, variance, and the view."""
    x = np.asarray(values, np.float32).reshape(shape)
    view = batch_view(x.shape, x.strides, x.itemsize, channel_axis)
    y = blank(x)
    mean, m2, _ = _cuda.forward(view, put(x), y, Epilogue(), EPS)
    return host(y), host(mean), host(m2) / view.values, view


SHAPES = [(1, 2, 50), (5, 2, 68), (8, 2, 68), (1, 2, 1000), (40, 2), (5, 2, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.1, -1e10, 2.0**24 + 1, 1e-30])
def test_a_constant_has_no_variance(shape, value):
    y, mean, var, _ = plain(shape, np.full(shape, value))
    assert (var == 0).all()
    assert (y == 0).all()
    assert (mean == np.float32(value)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_extreme_values(shape, scale, offset):
    """Variances from 1e-60 to 1e60, and means a million standard deviations away."""
    rng = np.random.default_rng(3)
    x = ((rng.standard_normal(shape) + offset) * (scale if offset == 0 else 1.0)).astype(np.float32)
    _, mean, var, _ = plain(shape, x)
    wide = x.astype(np.float64)
    reduced, _ = oracle.axes_but(x.ndim, 1)
    expected = wide.var(axis=reduced)
    np.testing.assert_allclose(var, expected, rtol=1e-6)
    np.testing.assert_allclose(mean, wide.mean(axis=reduced), rtol=1e-6, atol=1e-6 * np.sqrt(expected).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e20])
def test_one_bad_value_spoils_its_own_slot_only(shape, bad):
    """The other channel keeps its bits; a wild outlier is still normalized right."""
    x = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    clean = plain(shape, x)
    x[(0, 1) + (0,) * (x.ndim - 2)] = bad
    y, mean, var, _ = plain(shape, x)
    oracle.assert_same_bits(y[:, 0], clean[0][:, 0])
    assert mean[0] == clean[1][0]
    assert var[0] == clean[2][0]
    if np.isfinite(bad):
        wide = x[:, 1].astype(np.float64)
        np.testing.assert_allclose(var[1], wide.var(), rtol=1e-6)
    else:
        assert np.isnan(var[1])


def test_the_backends_have_one_surface():
    """The same verbs with the same arguments, in the same order and with the same defaults."""
    assert _cuda.__all__ == _cpu.__all__
    for name in _cpu.__all__:
        one, two = (inspect.signature(getattr(backend, name)).parameters for backend in (_cpu, _cuda))
        assert [(p.name, p.default) for p in one.values()] == [(p.name, p.default) for p in two.values()]


def test_empty_arrays():
    """Nothing to read: statistics and sums are 0, and no kernel starts."""
    for shape in ((0, 3, 70), (4, 0), (2, 3, 0)):
        x = np.zeros(shape, np.float32)
        view = batch_view(x.shape, x.strides, x.itemsize, 1)
        mean, m2, rstd = _cuda.forward(view, put(x), put(x), Epilogue(), EPS)
        sums = _cuda.backward(view, put(x), put(x), put(x), None, mean, rstd, Epilogue(), 0.0)
        for values in (mean, m2, *sums):
            np.testing.assert_array_equal(host(values), np.zeros(shape[1]))


def test_merge_and_running_statistics():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, 3)), rng.standard_normal((9, 3))
    a = a[0]
    parts = [(float(len(v)), put(v.mean(0)), put(((v - v.mean(0)) ** 2).sum(0))) for v in (a, b)]
    n, mean, m2 = _cuda.merge_moments(*parts[0], *parts[1])
    whole = np.concatenate([a, b])
    assert n == 14.0
    np.testing.assert_allclose(host(mean), whole.mean(0), rtol=1e-14)
    np.testing.assert_allclose(host(m2), ((whole - whole.mean(0)) ** 2).sum(0), rtol=1e-14)

    old = rng.standard_normal(3).astype(np.float32), np.ones(3, np.float32)
    batch = np.array([1.0, np.nan, 3.0]), np.array([2.0, 2.0, 1e300])
    for guard, kept in ((True, [False, True, True]), (False, [False, False, False])):
        running = put(old[0].copy()), put(old[1].copy())
        skipped = _cuda.update_running(*running, put(batch[0]), put(2.0 * batch[1]), 2.0, 0.25, guard)
        assert (host(skipped).tolist() if guard else skipped) == ([float(k) for k in kept] if guard else 0)
        for found, before, new in zip(running, old, batch, strict=True):
            with np.errstate(over="ignore"):
                blended = (0.75 * before.astype(np.float64) + 0.25 * new).astype(np.float32)
            np.testing.assert_array_equal(host(found), np.where(kept, before, blended))


def test_runs_have_the_same_bits():
    """Twice the same call, parts merged in a fixed order."""
    case = Case("batch", (5, 2, 68), "determinism")
    run = Run(case, generator(case))
    results = []
    for _ in range(2):
        y = blank(run.x)
        results.append([host(y), *map(host, _cuda.moments(run.view, put(run.x)))])
    for one, two in zip(*results, strict=True):
        oracle.assert_same_bits(one, two)


@pytest.mark.skipif(not SIMULATED, reason="the blocks of a device hold all of the small slots")
def test_cases_cover_every_route():
    """The tiny blocks of the simulator still need every kind of kernel."""
    routes = set()
    for case in [*ROWS, *PLANES, *COLUMNS]:
        x = np.zeros(case.shape, FLOATS[case.dtype])
        view = case.plan(x)
        if view.traversal == "columns":
            routes.add(("columns", launch.column_lanes(view, 1).chunks > 1))
            continue
        rule = launch.parameter_rule(view)
        width = launch.vector_width(memory.kind_of(x.dtype), view.run if view.run > 1 else view.inner, True)
        arrays = {"forward": 2 if case.mask else 1, "backward": 4 if rule == launch.ELEMENT else 2}
        for direction, held in arrays.items():
            lines = launch.held_lines(view, width, builds.registers_held(x, held))
            fits = lines is not None and (rule != launch.RUN or view.run % (WARP * width) == 0)
            how = (
                f"{lines.blocks} x {lines.warps} warps"
                if fits or (lines and direction == "forward")
                else "passes"
            )
            routes.add((direction, rule, how, width > 1))
    teams = ("1 x 1 warps", "1 x 2 warps", "2 x 2 warps", "passes")
    expected = set(
        product(("forward", "backward"), (launch.SLOT, launch.RUN, launch.ELEMENT), teams, (True,))
    )
    assert expected <= routes, expected - routes
    assert {("columns", True), ("columns", False)} <= routes
