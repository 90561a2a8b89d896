"""Every option with every norm and layout, pairs of options by a pairwise cover, against the reference."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
from llvmlite import binding

import nbnorm
import oracle
import processes
import reference
from cases import arrange

pytestmark = pytest.mark.usefixtures("kernels_keep_nothing")


@dataclass(frozen=True)
class Place:
    """A norm, a shape, its channel axis and strides, with the reason it is there."""

    norm: str
    shape: tuple
    channel_axis: int
    reason: str
    groups: int = 0
    layout: str = "C"

    def __str__(self):
        """Name the test."""
        return f"{self.norm} {'x'.join(map(str, self.shape))} axis {self.channel_axis} {self.layout}"

    @property
    def axis(self):
        """Channel axis from the front."""
        return self.channel_axis % len(self.shape)

    @property
    def channels(self):
        """Number of channels."""
        return self.shape[self.axis]

    @property
    def sample_axis(self):
        """Return the first axis that is not the channels'."""
        return 1 if self.axis == 0 else 0

    def geometry(self):
        """Return reduced axes and those of the parameters, of x as `split` shapes it."""
        ndim = len(self.shape)
        if self.norm == "batch":
            return oracle.axes_but(ndim, self.axis)
        sample = self.sample_axis + (self.sample_axis > self.axis)
        return tuple(i for i in range(ndim + 1) if i not in (self.axis, sample)), (self.axis, self.axis + 1)

    def split(self, x):
        """Split the channels of x into groups, as the reference takes it."""
        return x if self.norm == "batch" else oracle.grouped(x, self.groups or self.channels, self.axis)

    def spread(self, mask):
        """Give a mask the axes of `split` x."""
        at = (self.axis,) if self.norm == "batch" else (self.axis, self.axis + 1)
        return np.expand_dims(mask, at)

    def forward(self, *args, **options):
        """Call the norm."""
        options["channel_axis"] = self.channel_axis
        if self.norm == "group":
            return nbnorm.group_norm_forward(args[0], self.groups, *args[1:], **options)
        return getattr(nbnorm, f"{self.norm}_norm_forward")(*args, **options)

    def backward(self, dy, saved, **options):
        """Call the norm's backward."""
        return getattr(nbnorm, f"{self.norm}_norm_backward")(dy, saved, **options)


PLACES = [
    Place("batch", (5, 4, 9, 8), 1, "planes"),
    Place("batch", (6, 5, 3, 3), 1, "short planes: columns, but planes under a mask"),
    Place("batch", (3, 2, 70), 1, "more than one tile row"),
    Place("batch", (50, 6), 1, "narrow columns, folded without a mask"),
    Place("batch", (4, 7, 6, 5), -1, "channels last"),
    Place("batch", (4, 5, 6), 0, "channels lead: one segment per slot"),
    Place("batch", (4, 3, 5, 6), 1, "channels last in memory", layout="axis 1 fastest"),
    Place("batch", (4, 3, 10), 1, "packed", layout="gaps inside"),
    Place("group", (3, 6, 5, 4), 1, "several runs a slot", groups=2),
    Place("group", (3, 5, 4, 6), -1, "channels last, lanes of a group merged", groups=3),
    Place("group", (5, 6), 1, "no positions", groups=3),
    Place("group", (3, 6, 5, 4), 1, "packed into another order", groups=2, layout="F"),
    Place("instance", (3, 4, 6, 5), 1, "planes"),
    Place("instance", (3, 6, 5, 4), -1, "channels last"),
    Place("instance", (4, 3, 9), 0, "channels lead: packed", groups=0),
]


LARGE = [
    Place("batch", (1, 2, 40000), 1, "slots in chunks, threads"),
    Place("batch", (700, 60), 1, "columns in chunks, threads"),
]


@dataclass(frozen=True)
class Choice:
    """A choice of options."""

    activation: object
    residual: bool
    mask: str
    parameters: bool

    def __str__(self):
        """Name the test."""
        act = self.activation[0] if isinstance(self.activation, tuple) else self.activation
        return f"{act} {'residual' * self.residual} {self.mask or ''} {'affine' * self.parameters}"


LEAKY = ("leaky_relu", 0.125)
CHOICES = [
    Choice("relu", True, "", True),
    Choice("relu", False, "bool", False),
    Choice(LEAKY, True, "float", False),
    Choice(LEAKY, False, "", True),
    Choice("silu", True, "", False),
    Choice("silu", False, "float", True),
    Choice(None, True, "bool", True),
    Choice(None, False, "float", False),
    Choice(None, True, "", False),
]


def test_choices_cover_pairs():
    """Every pair of values of two options is in the table."""
    rows = [(c.activation, c.residual, bool(c.mask), c.parameters) for c in CHOICES]
    for i, j in combinations(range(4), 2):
        wanted = {(a, b) for a in {row[i] for row in rows} for b in {row[j] for row in rows}}
        assert {(row[i], row[j]) for row in rows} == wanted


def draw(place, choice, rng, dtype=np.float32):
    """Draw everything a call takes: x, dy, weight, bias, residual, mask."""
    x = arrange((rng.standard_normal(place.shape) * 1.5 + 0.7).astype(dtype), place.layout)
    dy = rng.standard_normal(place.shape).astype(dtype)
    weight = bias = residual = mask = None
    if choice.parameters:
        weight = (rng.uniform(0.5, 2, place.channels) * rng.choice([-1, 1], place.channels)).astype(
            np.float32
        )
        bias = rng.standard_normal(place.channels).astype(np.float32)
    if choice.residual:
        residual = arrange(rng.standard_normal(place.shape).astype(dtype), place.layout)
    if choice.mask:
        shape = tuple(n for i, n in enumerate(place.shape) if i != place.axis)
        mask = rng.random(shape) < 0.7
        mask[(slice(None),) + (0,) * (mask.ndim - 1)] = True  # every sample counts somewhere
        if choice.mask == "float":
            mask = mask * rng.uniform(0.5, 3, shape)
    return x, dy, weight, bias, residual, mask


def expected(place, x, dy, weight, bias, residual, mask, activation, **options):
    """Run the reference."""
    reduced, param = place.geometry()
    weight, bias = (
        None if p is None else (p if place.norm == "batch" else p.reshape(place.groups or place.channels, -1))
        for p in (weight, bias)
    )
    forward = reference.forward(
        place.split(x), weight, bias, reduced=reduced, param=param, eps=1e-5, activation=activation,
        residual=None if residual is None else place.split(residual),
        mask=None if mask is None else place.spread(mask), **options,
    )  # fmt: skip
    return forward, *reference.backward(place.split(dy), forward)


def check(place, y, found, forward, gradients, dz, parameter_dtype=np.float32):
    """Compare results with the reference, within the promises."""
    plain = forward.plain
    tolerance = oracle.y_tolerance(plain) + 4 * oracle.eps(plain.dtype) * oracle.largest(forward.z, floor=0)
    oracle.assert_within(place.split(y), forward.y, tolerance, "y")
    dx, dweight, dbias, *dresidual = found
    oracle.assert_within(place.split(dx), gradients.dx, oracle.dx_tolerance(plain, gradients), "dx")
    for name, value in (("dweight", dweight), ("dbias", dbias)):
        if value is not None:
            want = getattr(gradients, name)
            bound = oracle.sum_tolerance(
                getattr(gradients, f"{name}_terms"), plain, np.dtype(parameter_dtype)
            )
            oracle.assert_within(value.reshape(want.shape), want, bound, name)
    if dresidual:
        bound = 16 * oracle.eps(plain.dtype) * oracle.largest(dz)
        oracle.assert_within(place.split(dresidual[0]), dz, bound, "dresidual")


@pytest.mark.parametrize(
    ("place", "choice"),
    [(place, choice) for choice in CHOICES for place in PLACES] + [(place, CHOICES[-3]) for place in LARGE],
    ids=str,
)
def test_options(place, choice, rng, device):
    """Output, statistics and gradients of a choice of options."""
    x, dy, weight, bias, residual, mask = draw(place, choice, rng)
    y, saved = place.forward(x, weight, bias, activation=choice.activation, residual=residual, mask=mask)
    found = place.backward(dy, saved)
    assert len(found) == 3 + choice.residual
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    forward, gradients, dz = expected(place, x, dy, weight, bias, residual, mask, choice.activation)
    mean = np.squeeze(forward.plain.mean, axis=forward.plain.reduced)
    oracle.assert_within(
        saved.mean if place.axis or place.norm == "batch" else saved.mean.T,
        mean, oracle.mean_tolerance(forward.plain).max(), "mean",
    )  # fmt: skip
    check(place, y, found, forward, gradients, dz)


@pytest.mark.parametrize("place", [PLACES[i] for i in (0, 3, 8, 9)], ids=str)
def test_fused_relu_has_the_bits_of_its_parts(place, rng, device):
    """Relu on top of the norm, and its gradient put into the norm's backward, give the same bits.

    Group norm without positions is the exception: plain, it walks rows, with options columns.
    """
    x, dy, weight, bias, _, _ = draw(place, Choice("relu", False, "", True), rng)
    residual = rng.standard_normal(place.shape).astype(np.float32)
    plain, plain_saved = place.forward(x, weight, bias)
    fused, saved = place.forward(x, weight, bias, residual=residual, activation="relu")
    z = plain + residual
    np.testing.assert_array_equal(fused, np.maximum(z, 0))
    dz = np.where(z > 0, dy, np.float32(0))
    found, wanted = place.backward(dy, saved), place.backward(dz, plain_saved)
    for name, a, b in zip(("dx", "dweight", "dbias"), found, wanted, strict=False):
        oracle.assert_same_bits(a, b, name)
    np.testing.assert_array_equal(found[3], dz)


@pytest.mark.parametrize(("dtype", "with_residual"), [(np.float32, False), (np.float64, True)])
def test_sums_below_relu_have_the_bits_of_sums_of_dz(dtype, with_residual, rng):
    """Of planes and columns of many lengths: loops that compute dz on the way add in the order of those that do not."""
    shapes = [(3, 2, 1030), (1, 3, 5000), (5, 3, 196), (9, 2, 81), (6, 4, 17), (700, 5), (900, 64), (40, 300)]
    for shape in shapes:
        x, dy, residual = rng.standard_normal((3, *shape)).astype(dtype)
        weight, bias = rng.standard_normal((2, shape[1])).astype(dtype)
        residual = residual if with_residual else None
        plain, plain_saved = nbnorm.batch_norm_forward(x, weight, bias)
        fused, saved = nbnorm.batch_norm_forward(x, weight, bias, residual=residual, activation="relu")
        z = plain + residual if with_residual else plain
        np.testing.assert_array_equal(fused, np.maximum(z, 0))
        wanted = nbnorm.batch_norm_backward(np.where(z > 0, dy, dtype(0)), plain_saved)
        for name, a, b in zip(
            ("dx", "dweight", "dbias"), nbnorm.batch_norm_backward(dy, saved), wanted, strict=False
        ):
            oracle.assert_same_bits(a, b, f"{name} of {shape}")


FEW_REGISTERS = """
import numpy as np
import nbnorm
from nbnorm._cpu import planes
rng = np.random.default_rng(0)
weight, bias = rng.standard_normal((2, 3)).astype(np.float32)
for shape in [(2, 3, 1030), (5, 3, 196), (8, 3, 81)]:
    x, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    plain, plain_saved = nbnorm.batch_norm_forward(x, weight, bias)
    saved = nbnorm.batch_norm_forward(x, weight, bias, activation="relu")[1]
    found = nbnorm.batch_norm_backward(dy, saved)
    wanted = nbnorm.batch_norm_backward(np.where(plain > 0, dy, np.float32(0)), plain_saved)
    assert all(map(np.array_equal, found, wanted)), shape
code = "".join(planes.backward_kernel.serial.inspect_asm().values())
print("ymm" in code, "zmm" in code)
"""


@pytest.mark.skipif(
    not binding.get_host_cpu_features().get("avx2"), reason="runs code for a processor with AVX2"
)
def test_sums_below_relu_with_sixteen_registers(tmp_path):
    """Where a loop that computes dz has no registers left for as many vectors as one that need not."""
    environment = {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx2,+fma",
        "NUMBA_CACHE_DIR": tmp_path,
    }
    assert processes.run(FEW_REGISTERS, **environment)[0] == "True False", (
        "code for AVX2, and none for AVX-512"
    )


def test_need_and_out_with_a_residual(rng):
    """Fewer gradients, given buffers; y into the residual without an activation, but not below one."""
    place = PLACES[0]
    x, dy, weight, bias, residual, _ = draw(place, CHOICES[0], rng)
    _, saved = place.forward(x, weight, bias, residual=residual, activation="relu")
    dx, dweight, dbias, dresidual = place.backward(dy, saved)
    only = place.backward(dy, saved, need=("dresidual",))
    assert only[:3] == (None, None, None)
    oracle.assert_same_bits(only[3], dresidual)
    some = place.backward(dy, saved, need=("dx", "dweight"))
    assert some[2] is some[3] is None
    oracle.assert_same_bits(some[0], dx)
    out = np.empty_like(x), None, np.empty_like(bias), np.empty_like(x)
    given = place.backward(dy, saved, out=out)
    assert (given[0] is out[0], given[2] is out[2], given[3] is out[3]) == (True, True, True)
    for a, b in zip(given, (dx, dweight, dbias, dresidual), strict=True):
        oracle.assert_same_bits(a, b)
    with pytest.raises(ValueError, match="out shares memory with residual, which backward needs"):
        place.forward(x, weight, bias, residual=residual, activation="relu", out=residual)
    wanted, _ = place.forward(x, weight, bias, residual=residual)
    y, _ = place.forward(x, weight, bias, residual=residual, out=residual)
    assert y is residual
    oracle.assert_same_bits(y, wanted)


BAD = [
    ({"activation": "tanh"}, ValueError, r"activation must be None, 'relu', .* or 'silu', got 'tanh'"),
    ({"activation": "leaky_relu"}, ValueError, "activation must be None"),
    ({"activation": ("leaky_relu", "a")}, ValueError, "activation must be None"),
    ({"residual": np.ones((3, 4), np.float32)}, ValueError, r"residual has shape \(3, 4\), expected \(5, 4\)"),
    ({"residual": np.ones((5, 4))}, TypeError, "residual has dtype float64, expected float32"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[message[:40] for *_, message in BAD])
@pytest.mark.parametrize("norm", ["batch", "group", "instance", "inference"])
def test_bad_options(norm, options, error, message, rng):
    """What does not fit is refused before anything is written."""
    x, out = rng.standard_normal((5, 4)).astype(np.float32), np.full((5, 4), 7, np.float32)
    rest = {"group": (2,), "inference": (np.zeros(4), np.ones(4))}.get(norm, ())
    name = "batch_norm_inference" if norm == "inference" else f"{norm}_norm_forward"
    with pytest.raises(error, match=message):
        getattr(nbnorm, name)(x, *rest, out=out, **options)
    np.testing.assert_array_equal(out, 7)
