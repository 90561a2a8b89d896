"""Arguments that are seen to be ordinary at a glance: what a glance misses is found, the second time as well."""

from itertools import combinations

import numpy as np
import pytest

import nbnorm
import oracle
from nbnorm import _call, _gradients, _known


def call(rng, **changes):
    """Return the arguments of an ordinary call, some of them changed."""
    arguments = {
        "x": rng.standard_normal((8, 5)).astype(np.float32),
        "weight": np.ones(5, np.float32),
        "bias": np.zeros(5, np.float32),
        "running_mean": np.zeros(5, np.float32),
        "running_var": np.ones(5, np.float32),
        "out": np.empty((8, 5), np.float32),
    }
    return arguments | changes


@pytest.fixture
def known(rng):
    """Let an ordinary call pass, twice."""
    for _ in range(2):
        nbnorm.batch_norm_forward(**call(rng))


def read_only(array):
    """Return the array without write access."""
    array.flags.writeable = False
    return array


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_that_need_a_copy(name, rng):
    """The other byte order, an odd address, a list: like the plain array, the second time as well."""
    values = rng.standard_normal(5).astype(np.float32)
    odd = np.zeros(21, np.uint8)[1:].view(np.float32)
    odd[:] = values
    given = call(rng)
    wanted = nbnorm.batch_norm_forward(**given | {name: values, "out": None})[0]
    for form in (
        values.astype(">f4"),
        odd,
        values[::-1].copy()[::-1],
        values.astype(np.float64),
        read_only(values.copy()),
    ):
        for _ in range(3):
            y = nbnorm.batch_norm_forward(**given | {name: form})[0]
            oracle.assert_within(y, wanted, 1e-6)


FAULTS = [
    ("out", lambda given: read_only(given["out"]), "out: output array is read-only"),
    ("out", lambda given: given["x"], "out shares memory with x"),
    ("out", lambda given: given["x"][:], "out shares memory with x"),
    ("running_mean", lambda given: read_only(given["running_mean"]), "running_mean is read-only"),
    ("running_var", lambda given: given["running_mean"], "running_var shares memory with running_mean"),
    ("running_mean", lambda given: given["weight"], "running_mean shares memory with weight"),
    ("weight", lambda given: np.ones(4, np.float32), r"weight has shape \(4,\)"),
    ("bias", lambda given: np.ones((5, 1), np.float32), r"bias has shape \(5, 1\)"),
    ("running_var", lambda given: None, "running_mean was given without running_var"),
    ("channel_axis", lambda given: True, "channel_axis must be an integer"),
    ("eps", lambda given: -1.0, "eps must be a finite number"),
]


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(("name", "fault", "message"), FAULTS, ids=[f"{n} {m[:30]}" for n, _, m in FAULTS])
def test_faults_of_a_known_call(name, fault, message, rng):
    """Every fault is found beside arguments that have passed before, and nothing is written."""
    given = call(rng)
    given["out"][...] = 7
    before = {key: np.array(value) for key, value in given.items()}
    with pytest.raises((ValueError, TypeError), match=message):
        nbnorm.batch_norm_forward(**given | {name: fault(given)})
    for key, value in given.items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)


NORMS = ["batch", "layer", "rms", "group", "instance"]


def ordinary(norm, rng):
    """Return the forward function of a norm, and the arguments of an ordinary call."""
    shape = (3, 4, 4)
    given = {"x": rng.standard_normal(shape, np.float32), "out": np.full(shape, 7, np.float32)}
    for name in ("weight", "bias")[: 1 if norm == "rms" else 2]:
        given[name] = rng.standard_normal(4, np.float32)
    return getattr(nbnorm, f"{norm}_norm_forward"), given, {"num_groups": 2} if norm == "group" else {}


@pytest.mark.parametrize("norm", NORMS)
def test_forward_calls_of_a_known_kind(norm, rng, monkeypatch):
    """They take no other way to their plan, nor do views without a buffer to overlap; all give the same bits."""
    forward, given, options = ordinary(norm, rng)
    views = {name: array[:] for name, array in given.items()}
    expected = forward(**views, **options)[0].copy()
    for known in (given, {"x": given["x"]}):
        forward(**known, **options)
    monkeypatch.setattr(_call, "_call", None)
    new = {"out": None}
    for arguments in (given, given | new, views | new, given | new | {"x": read_only(given["x"][:])}):
        oracle.assert_same_bits(forward(**arguments, **options)[0], expected)
    forward(given["x"], **options)
    for other in ({"x": given["x"][:]}, {"x": given["x"].astype(np.float64), "out": None}):
        with pytest.raises(TypeError, match="not callable"):
            forward(**given | other, **options)


@pytest.mark.parametrize("norm", NORMS)
def test_kinds_that_are_forgotten(norm, rng, monkeypatch):
    """More kinds than are remembered: each call is like the first one."""
    forward, given, options = ordinary(norm, rng)
    monkeypatch.setattr(_known, "_kinds", {})
    monkeypatch.setattr(_known, "MOST", 2)
    x = given["x"]
    shapes = x, x[:, :, :2].copy(), x[:2].copy(), x.astype(np.float64), x.astype(np.float16)
    calls = [(lambda own=own: forward(own, **options)[0]) for own in shapes]
    expected = [call() for call in calls]
    for call, first in zip(calls * 2, expected * 2, strict=True):
        oracle.assert_same_bits(call(), first)
        oracle.assert_same_bits(call(), first)
        assert 1 <= len(_known._kinds) <= 2


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("nonfinite", ["propagate", "raise"])
def test_running_statistics_behind_a_view_of_a_known_kind(name, nonfinite, rng):
    """A parameter that is a view of a running buffer: refused, as the first time."""
    given = call(rng) | {"out": None, "nonfinite": nonfinite}
    given[name] = given["running_mean"][:]
    before = given["running_mean"].copy()
    with pytest.raises(ValueError, match=f"running_mean shares memory with {name}"):
        nbnorm.batch_norm_forward(**given)
    np.testing.assert_array_equal(given["running_mean"], before)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_activations_of_a_known_kind(norm, activation, rng):
    """Results and gradients of the first call, of the next ones too, beside calls without an activation."""
    forward, given, options = ordinary(norm, rng)
    backward = getattr(nbnorm, f"{norm}_norm_backward")
    found = []
    for _ in range(3):
        forward(**given, **options)
        y, saved = forward(**given | {"out": None}, **options, activation=activation)
        found.append((y, *backward(given["x"], saved)))
    assert (found[0][0] >= (0 if activation == "relu" else -0.3)).all()
    for others in found[1:]:
        for first, other in zip(found[0], others, strict=True):
            oracle.assert_same_bits(other, first)


@pytest.mark.parametrize("norm", NORMS)
def test_a_known_kind_without_spread(norm):
    """0 / 0 is warned of by the second call, too."""
    forward, options = getattr(nbnorm, f"{norm}_norm_forward"), {"num_groups": 1} if norm == "group" else {}
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=f"invalid value encountered in {norm}_norm_forward"):
            forward(np.zeros((6, 3, 5)), eps=0.0, **options)


@pytest.mark.parametrize(
    ("norm", "name", "known", "fault"),
    [
        ("batch", "channel_axis", 1, True),
        ("group", "num_groups", 1, True),
        ("layer", "axis", (1, 2), (True, 2)),
    ],
)
def test_true_is_not_one(norm, name, known, fault, rng):
    """A kind of call is not known by what only equals its settings."""
    forward, given, options = ordinary(norm, rng)
    x = given["x"]
    for _ in range(2):
        forward(x, **options | {name: known})
    with pytest.raises((TypeError, ValueError), match=f"{name} must .* True"):
        forward(x, **options | {name: fault})


@pytest.mark.parametrize("norm", NORMS)
def test_views_of_every_kind(norm, rng):
    """With gaps, an odd address, a step back, one value for all: like a copy."""
    forward, given, options = ordinary(norm, rng)
    x = given.pop("x")
    del given["out"]
    bytes_, wide = np.zeros(x.nbytes + 1, np.uint8), np.zeros((3, 4, 8), np.float32)
    odd, gaps = bytes_[1:].view(np.float32).reshape(x.shape), wide[:, :, ::2]
    odd[...], gaps[...] = x, x
    for view in (odd, gaps, x[::-1], x[:, :, ::-1], np.broadcast_to(x[:1], x.shape), x.swapaxes(1, 2)):
        found, expected = (forward(source, **given, **options)[0] for source in (view, view.copy()))
        oracle.assert_within(found, expected, 1e-6)
        if view is odd or view is gaps:  # others are walked in another order
            oracle.assert_same_bits(found, expected)


def test_running_statistics_in_a_view(rng):
    """That lie within the memory of x or of a parameter, of which the call has views, are refused."""
    memory = rng.standard_normal((10, 5), np.float32)
    x, weight, apart = memory[:8], memory[8], np.zeros(5, np.float32)
    for pair, message in (
        ((memory[0], apart), "running_mean shares memory with x"),
        ((apart, memory[8]), "running_var shares memory with weight"),
    ):
        before = memory.copy()
        with pytest.raises(ValueError, match=message):
            nbnorm.batch_norm_forward(x, weight, None, *pair)
        np.testing.assert_array_equal(memory, before)


@pytest.mark.parametrize("norm", NORMS)
def test_what_only_looks_ordinary_to_a_forward_call(norm, rng):
    """Results in x, of another shape or type or read-only, and parameters of such are refused; nothing is written."""
    forward, given, options = ordinary(norm, rng)
    forward(**given, **options)
    given["out"][...] = 7
    x = given["x"]
    for name, value, message in (
        ("out", x, "out shares memory with x"),
        ("out", read_only(x.copy()), "read-only"),
        ("out", x.astype(np.float64), "out has dtype float64"),
        ("out", np.full(x.shape, 7, np.int32), "out has dtype int32"),
        ("out", x[..., np.newaxis].copy(), "out has shape"),
        ("out", x[:2].copy(), "out has shape"),
        ("weight", np.ones(5, np.float32), "weight has shape"),
        ("weight", np.ones(4, np.int64), "weight has dtype int64"),
        ("weight", given["out"][0, 0], "out shares memory with weight"),
    ):
        before = {key: array.copy() for key, array in given.items()}
        with pytest.raises((ValueError, TypeError), match=message):
            forward(**given | {name: value}, **options)
        for key, array in given.items():
            np.testing.assert_array_equal(array, before[key])


@pytest.mark.parametrize("norm", NORMS)
def test_a_result_in_another_order(norm, rng):
    """Of a known kind, too, it has the values of one in the order of x."""
    forward, given, options = ordinary(norm, rng)
    expected = forward(**given, **options)[0].copy()
    other = np.full(expected.shape, 7, np.float32, order="F")
    forward(**given | {"out": other}, **options)
    np.testing.assert_array_equal(other, expected)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_result_in_its_weight(norm, rng):
    """Over all axes the weight is as large as x; it is read while the result is written."""
    x, weight = rng.standard_normal((2, 4, 4))
    getattr(nbnorm, f"{norm}_norm_forward")(x, weight, axis=(0, 1))
    with pytest.raises(ValueError, match="out shares memory with weight"):
        getattr(nbnorm, f"{norm}_norm_forward")(x, weight, axis=(0, 1), out=weight)


def gradients(norm, rng):
    """Return the backward call of a norm, for a dy, and what its gradients are like."""
    x, weight, bias = rng.standard_normal((4, 6, 3)), rng.standard_normal(6), rng.standard_normal(6)
    if norm in ("layer", "rms"):
        x = x.transpose(0, 2, 1).copy()
    parameters = (weight,) if norm == "rms" else (weight, bias)
    groups = (2,) if norm == "group" else ()
    saved = getattr(nbnorm, f"{norm}_norm_forward")(x, *groups, *parameters)[1]
    backward, dy = getattr(nbnorm, f"{norm}_norm_backward"), rng.standard_normal(x.shape)

    def call(**options):
        return backward(dy.copy(), saved, **options)

    return call, (x, *parameters)


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_into_ordinary_buffers(norm, rng):
    """New gradients, those in buffers that own their memory, in views, and wanted by name have the same bits."""
    call, likes = gradients(norm, rng)
    wanted = call()
    names = ("dx", "dweight", "dbias")[: len(likes)]
    own = tuple(np.full_like(like, 7) for like in likes)
    views = tuple(np.full_like(like, 7)[:] for like in likes)
    for options in ({"out": own}, {"out": views}, {"need": set(names)}, {"out": (own[0], *views[1:])}):
        found = call(**options)
        for i, expected in enumerate(wanted):
            oracle.assert_same_bits(found[i], expected)
            assert "out" not in options or found[i] is options["out"][i]


SAME = [pair for pair in combinations(["dx", "dweight", "dbias", "weight", "bias"], 2) if pair[0][0] == "d"]


@pytest.mark.parametrize("pair", SAME, ids=" is ".join)
def test_one_array_for_two_gradients(pair, rng):
    """Of one dimension, x is as long as its parameters: buffers that are the same, or a parameter, are refused."""
    x, dy = rng.standard_normal((2, 5))
    arrays = {name: np.full(5, 7.0) for name in ("dx", "dweight", "dbias", "weight", "bias")}
    arrays[pair[0]] = arrays[pair[1]]
    saved = nbnorm.layer_norm_forward(x, arrays["weight"], arrays["bias"])[1]
    with pytest.raises(ValueError, match="shares memory"):
        nbnorm.layer_norm_backward(dy, saved, out=tuple(arrays[name] for name in ("dx", "dweight", "dbias")))
    assert all((array == 7).all() for array in arrays.values())


@pytest.mark.parametrize("norm", NORMS)
def test_ordinary_backward_calls_are_seen_at_a_glance(norm, rng, monkeypatch):
    """No norm takes the long way for nothing; buffers of RMS norm, one less, do."""
    call, likes = gradients(norm, rng)
    answers = []

    def asked(*given):
        answers.append(glance(*given))
        return answers[-1]

    glance = _gradients._at_a_glance
    monkeypatch.setattr(_gradients, "_at_a_glance", asked)
    call()
    if norm != "rms":
        call(out=tuple(np.empty_like(like) for like in likes))
    assert answers == [True] * (1 + (norm != "rms"))
