"""Random calls of every norm, and what must hold for each of them; hypothesis draws them, and so does the fuzzer."""

import zlib
from dataclasses import astuple, dataclass
from functools import partial

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from numba import config

import nbnorm
import oracle
from cases import LAYOUTS, arrange
from nbnorm._cpu import launch
from nbnorm._cpu.team import team

GAPS = ["gaps inside", "gaps outside", "gaps on axis 1", "inner block", "inner reversed", "all reversed"]
# Values by the promise that they test: offsets up to 1e6 spreads, magnitudes from 1e-30 to 1e30, slots without spread.
KINDS = {
    "ordinary": lambda rng, shape: rng.standard_normal(shape) * 1.5 + 0.7,
    "offset": lambda rng, shape: rng.standard_normal(shape) + rng.choice([1e2, -1e4, 1e6]),
    "huge": lambda rng, shape: np.clip(rng.standard_normal(shape), -3, 3) * 3e29,
    "tiny": lambda rng, shape: np.clip(rng.standard_normal(shape), -3, 3) * 1e-30,
    "subnormal": lambda rng, shape: rng.standard_normal(shape) * 1e-41,
    "constant": lambda rng, shape: np.full(shape, rng.choice([0.1, 1e10, 2.0**24 + 1, 0.0])),
    "outlier": lambda rng, shape: np.where(rng.random(shape) < 0.02, 1e6, rng.standard_normal(shape)),
    "few values": lambda rng, shape: rng.integers(-2, 3, shape) * 0.1,
    "ramp": lambda rng, shape: np.linspace(-1e3, 1e3, int(np.prod(shape))).reshape(shape),
}
# NumPy's scalars, which kernels meet without the compiler, keep sums of float32 in float32.
TYPES = ["float64"] if config.DISABLE_JIT else ["float32", "float64"]
NORMS = ("batch", "layer", "rms", "group", "instance")


@dataclass(frozen=True)
class Call:
    """One call: which norm, of which values, lying how in memory."""

    norm: str
    shape: tuple
    axis: int  # the channels', for layer and RMS norm the first normalized one
    groups: int
    dtype: str
    kind: str
    layout: str
    dy_layout: str
    eps: float
    seed: int

    def arrays(self):
        """Draw x and dy in their layouts, weight and bias."""
        rng = np.random.default_rng([self.seed, zlib.crc32(repr(astuple(self)).encode())])
        x = arrange(KINDS[self.kind](rng, self.shape).astype(self.dtype), self.layout)
        dy = arrange(rng.standard_normal(self.shape).astype(self.dtype), self.dy_layout)
        shape = self.shape[self.axis :] if self.norm in ("layer", "rms") else (self.shape[self.axis],)
        weight = (rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape)).astype(self.dtype)
        bias = rng.standard_normal(shape).astype(self.dtype)
        return x, dy, weight, bias

    def forward(self, x, weight, bias):
        """Call the norm."""
        trailing = tuple(range(self.axis, len(self.shape)))
        return {
            "batch": partial(nbnorm.batch_norm_forward, x, weight, bias, channel_axis=self.axis),
            "layer": partial(nbnorm.layer_norm_forward, x, weight, bias, axis=trailing),
            "rms": partial(nbnorm.rms_norm_forward, x, weight, axis=trailing),
            "group": partial(nbnorm.group_norm_forward, x, self.groups, weight, bias, channel_axis=self.axis),
            "instance": partial(nbnorm.instance_norm_forward, x, weight, bias, channel_axis=self.axis),
        }[self.norm](eps=self.eps)

    def backward(self, dy, saved):
        """Call its backward pass; RMS norm has no dbias."""
        return getattr(nbnorm, f"{self.norm}_norm_backward")(dy, saved)

    def reference(self, x, weight, bias):
        """Return the float64 (or wider) truth."""
        if self.norm in ("layer", "rms"):
            axes = tuple(range(self.axis, len(self.shape)))
            bias = bias if self.norm == "layer" else None
            return oracle.layer_norm(x, weight, bias, axis=axes, eps=self.eps, centered=self.norm == "layer")
        if self.norm == "batch":
            return oracle.batch_norm(x, weight, bias, channel_axis=self.axis, eps=self.eps)
        groups = self.shape[self.axis] if self.norm == "instance" else self.groups
        return oracle.group_norm(x, groups, weight, bias, channel_axis=self.axis, eps=self.eps)


@st.composite
def calls(draw, largest=400, norms=NORMS):
    """Draw a call of at most about ``largest`` elements."""
    norm = draw(st.sampled_from(norms))
    rank = draw(st.integers(2, 4))
    shape = []
    for _ in range(rank):
        room = largest // int(np.prod(shape, dtype=np.int64))
        shape.append(draw(st.integers(1, max(1, min(largest // 10, room)))))
    axis, groups = draw(st.sampled_from([1, rank - 1])), 1
    if norm in ("layer", "rms"):
        axis = draw(st.integers(1, rank - 1))
    elif norm == "group":
        groups = draw(st.sampled_from([g for g in range(1, shape[axis] + 1) if shape[axis] % g == 0]))
    if norm == "batch" and int(np.prod(shape)) == shape[axis]:
        shape[0] += 1  # one value per channel is an error, tested elsewhere
    kind = draw(st.sampled_from(list(KINDS)))
    eps = (
        0.0 if kind in ("huge", "tiny") and draw(st.booleans()) else draw(st.sampled_from([1e-5, 1e-3, 1.0]))
    )
    layouts = st.sampled_from([name for name in LAYOUTS if name != "big endian"])
    call = Call(
        norm, tuple(shape), axis, groups, draw(st.sampled_from(TYPES)), kind, draw(layouts), draw(layouts), eps,
        draw(st.integers(0, 999)),
    )  # fmt: skip
    x, _, weight, bias = call.arrays()
    assume(eps or call.reference(x, weight, bias).var.all())  # 0 / 0 is tested elsewhere
    return call


def bytes_of(*arrays):
    """Copy the contents of arrays."""
    return [array.tobytes() for array in arrays]


def check_accuracy(call):
    """Output and gradients within their bounds; inputs as they were; dx sums to 0 in every centered slot."""
    x, dy, weight, bias = call.arrays()
    before = bytes_of(x, dy, weight, bias)
    reference = call.reference(x, weight, bias)
    y, saved = call.forward(x, weight, bias)
    found = call.backward(dy, saved)
    assert bytes_of(x, dy, weight, bias) == before, "an input was written"
    shape = reference.y.shape
    oracle.assert_within(y.reshape(shape), reference.y, oracle.y_tolerance(reference), "y")
    gradients = oracle.differentiate(dy.reshape(shape), reference)
    bound = oracle.dx_tolerance(reference, gradients)
    dx = found[0].reshape(shape)
    oracle.assert_within(dx, gradients.dx, bound, "dx")
    if reference.centered:
        total = np.abs(dx.astype(reference.y.dtype).sum(axis=reference.reduced, keepdims=True))
        assert (total <= reference.count * bound).all(), "dx does not sum to 0"
    for name, gradient in zip(("dweight", "dbias"), found[1:], strict=False):
        terms = getattr(gradients, f"{name}_terms") + gradients.dbias_terms
        tolerance = oracle.ATOL * np.finfo(call.dtype).eps * terms * np.max(oracle.spread_factor(reference))
        oracle.assert_within(gradient.reshape(terms.shape), getattr(gradients, name), tolerance, name)


def check_layout(call):
    """A view with gaps has the bits of its dense copy."""
    x, dy, weight, bias = call.arrays()
    results = []
    for one, gradient in ((x, dy), (np.ascontiguousarray(x), np.ascontiguousarray(dy))):
        if call.layout not in GAPS:
            one = x
        y, saved = call.forward(one, weight, bias)
        results.append([y, *call.backward(gradient, saved)])
    for viewed, dense in zip(*results, strict=True):
        oracle.assert_same_bits(viewed, dense)


def check_containment(call):
    """A NaN or an infinity spoils its own slot: elsewhere y and dx have the bits of the clean run."""
    x, dy, weight, bias = call.arrays()
    rng = np.random.default_rng(call.seed)
    place = tuple(int(rng.integers(n)) for n in call.shape)
    results = []
    for bad in (None, rng.choice([np.nan, np.inf, -np.inf])):
        if bad is not None:
            x = x.copy(order="K")
            x[place] = bad
        y, saved = call.forward(x, weight, bias)
        results.append((y, call.backward(dy, saved)[0]))
    with np.errstate(all="ignore"):
        reference = call.reference(x, weight, bias)
    clean_slots = np.broadcast_to(np.isfinite(reference.var), reference.y.shape).reshape(call.shape)
    for clean, spoiled in zip(*results, strict=True):
        oracle.assert_same_bits(spoiled[clean_slots], clean[clean_slots])
    assert not np.isfinite(results[1][0][place])


def check_scaling(call):
    """Doubling x and quadrupling eps changes nothing but the last bit; dx is halved."""
    if call.kind in ("huge", "tiny", "subnormal"):
        return  # where doubling meets the end of the range
    x, dy, weight, bias = call.arrays()
    reference = call.reference(x, weight, bias)
    y, saved = call.forward(x, weight, bias)
    dx = call.backward(dy, saved)[0]
    doubled = Call(*astuple(call)[:-2], 4 * call.eps, call.seed)
    z, kept = doubled.forward(x * 2, weight, bias)
    bound = np.broadcast_to(2 * oracle.y_tolerance(reference), reference.y.shape).reshape(call.shape)
    oracle.assert_within(z, y.astype(np.float64), bound, "y of 2x")
    gradients = oracle.differentiate(dy.reshape(reference.y.shape), reference)
    bound = np.broadcast_to(2 * oracle.dx_tolerance(reference, gradients), reference.y.shape)
    oracle.assert_within(
        2 * doubled.backward(dy, kept)[0], dx.astype(np.float64), bound.reshape(call.shape), "dx"
    )


def check_parts(call):
    """Moments of two parts, merged, are those of the whole, wherever the cut."""
    if call.norm != "batch":
        return
    x, *_ = call.arrays()
    axis = 1 if call.axis == 0 else 0
    cut = call.seed % (x.shape[axis] + 1)
    parts = np.split(x, [cut], axis=axis)
    first, second = (nbnorm.batch_moments(part, channel_axis=call.axis) for part in parts)
    whole, both = nbnorm.batch_moments(x, channel_axis=call.axis), first.merge(second)
    reference = oracle.batch_norm(x, channel_axis=call.axis, eps=1.0)
    assert both.count == whole.count
    for moments in (whole, both):
        oracle.assert_within(
            moments.var(), reference.per_slot("var"), 2 * oracle.var_tolerance(reference), "var"
        )
        oracle.assert_within(
            moments.mean, reference.per_slot("mean"), 2 * oracle.mean_tolerance(reference), "mean"
        )


def check_twins(call):
    """Serial and parallel kernels have the same bits."""
    if call.dtype != "float32":
        return  # the same sources, at the price of compiling them once more
    x, dy, weight, bias = call.arrays()
    results, limit, enabled = [], launch.PARALLEL_MIN, team.enabled
    try:
        launch.PARALLEL_MIN = 0
        for team.enabled in (False, True):
            y, saved = call.forward(x, weight, bias)
            results.append([y, *call.backward(dy, saved)])
    finally:
        launch.PARALLEL_MIN, team.enabled = limit, enabled
    for serial, parallel in zip(*results, strict=True):
        oracle.assert_same_bits(parallel, serial)


CHECKS = (check_accuracy, check_layout, check_containment, check_scaling, check_parts, check_twins)
