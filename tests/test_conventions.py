"""Conventions of other libraries: presets, states under their names, folding into the layer in front."""

import copy

import numpy as np
import pytest

import nbnorm
import oracle
from refusals import Fault, assert_refused, some

LIBRARIES = ["torch", "keras", "flax", "chainer"]
EPS = {"torch": 1e-5, "keras": 1e-3, "flax": 1e-5, "chainer": 2e-5}
COUNTING = {"torch": "num_batches_tracked", "chainer": "N"}
every_source = pytest.mark.parametrize("source", LIBRARIES)
every_target = pytest.mark.parametrize("target", LIBRARIES)


@pytest.fixture
def torch():
    """PyTorch, where it is installed."""
    return pytest.importorskip("torch")


# ---- presets ----


def keras_step(x, mean, var):
    """Return y and both moving averages of BatchNormalization(): momentum=0.99, epsilon=1e-3, last axis."""
    batch_mean, batch_var = x.mean(axis=(0, 1)), x.var(axis=(0, 1))
    y = (x - batch_mean) / np.sqrt(batch_var + 1e-3)
    return y, mean * 0.99 + batch_mean * (1.0 - 0.99), var * 0.99 + batch_var * (1.0 - 0.99)


def flax_step(x, mean, var):
    """Return y, mean, var of nn.BatchNorm(): momentum=0.99, epsilon=1e-5, axis=-1, E[x^2] - E[x]^2."""
    batch_mean = x.mean(axis=(0, 1))
    batch_var = np.square(x).mean(axis=(0, 1)) - np.square(batch_mean)
    y = (x - batch_mean) / np.sqrt(batch_var + 1e-5)
    return y, 0.99 * mean + (1 - 0.99) * batch_mean, 0.99 * var + (1 - 0.99) * batch_var


def chainer_step(x, mean, var):
    """Return y, avg_mean, avg_var of BatchNormalization(size): decay=0.9, eps=2e-5, axis=(0, 2)."""
    batch_mean, batch_var = x.mean(axis=(0, 2)), x.var(axis=(0, 2))
    m = x.size // batch_mean.size
    y = (x - batch_mean[:, None]) / np.sqrt(batch_var[:, None] + 2e-5)
    adjust = m / max(m - 1.0, 1.0)
    return y, 0.9 * mean + (1 - 0.9) * batch_mean, 0.9 * var + (1 - 0.9) * adjust * batch_var


def batches(rng, shape=(3, 4, 5)):
    """Draw three small batches, of a variance at which every eps counts."""
    return [0.05 * rng.standard_normal(shape) + 0.3 for _ in range(3)]


@pytest.mark.parametrize(
    ("name", "step", "channels"),
    [("keras", keras_step, 5), ("flax", flax_step, 5), ("chainer", chainer_step, 4)],
)
def test_preset_trains_like_the_documented_formulas(name, step, channels, rng):
    """Three steps: outputs and running statistics, with the library's own numbers in its own formula."""
    layer = nbnorm.BatchNorm(channels, **nbnorm.preset(name), dtype=np.float64)
    mean, var = np.zeros(channels), np.ones(channels)
    for x in batches(rng):
        y, mean, var = step(x, mean, var)
        np.testing.assert_allclose(layer(x), y, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-12)
        np.testing.assert_allclose(layer.running_var, var, rtol=1e-12)


def test_torch_preset_trains_like_torch(torch, rng):
    """Three steps of PyTorch's layer with its defaults."""
    theirs = torch.nn.BatchNorm1d(4, dtype=torch.float64)
    ours = nbnorm.BatchNorm(4, **nbnorm.preset("torch"), dtype=np.float64)
    for x in batches(rng):
        np.testing.assert_allclose(
            ours(x), theirs(torch.from_numpy(x)).detach().numpy(), rtol=1e-10, atol=1e-12
        )
        np.testing.assert_allclose(ours.running_mean, theirs.running_mean.numpy(), rtol=1e-12)
        np.testing.assert_allclose(ours.running_var, theirs.running_var.numpy(), rtol=1e-12)


@pytest.mark.parametrize("name", LIBRARIES)
def test_preset_is_a_new_dict(name):
    """A caller who changes one changes no other."""
    first = nbnorm.preset(name)
    expected = dict(first)
    first["eps"] = 7.0
    del first["ddof"]
    assert nbnorm.preset(name) == expected
    assert expected["eps"] == EPS[name]


@pytest.mark.parametrize("name", ["jax", "Torch", None, 3])
def test_unknown_preset(name):
    """The message lists the known ones."""
    with pytest.raises(ValueError, match=r"'torch', 'keras', 'flax', 'chainer', got " + repr(name)):
        nbnorm.preset(name)


# ---- states ----

# Payload and sign of a NaN, a negative zero, the infinities and a subnormal number: bits, not just values.
ODD = {
    "float16": np.array([0x7E12, 0xFE01, 0x8000, 0x7C00, 0x0001], np.uint16).view(np.float16),
    "float32": np.array([0x7FC01234, 0xFFC00001, 0x80000000, 0x7F800000, 1], np.uint32).view(np.float32),
    "float64": np.array([0x7FF8 << 48 | 5, 0xFFF8 << 48, 1 << 63, 0x7FF0 << 48, 1], np.uint64).view(
        np.float64
    ),
}
ODD[">f4"] = ODD["float32"].astype(">f4")
MISSING = {
    "nothing": (),
    "scale": ("weight",),
    "shift": ("bias",),
    "scale and shift": ("weight", "bias"),
    "statistics": ("running_mean", "running_var", "num_batches_tracked"),
    "all": ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
}
missing_parts = pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING)


def parts(dtype="float32", missing=(), count=17):
    """Make the arrays of a state, each different from the others."""
    arrays = {name: np.roll(ODD[dtype], i) for i, name in enumerate(MISSING["all"][:4])}
    arrays["num_batches_tracked"] = np.array(count, np.int64)
    return {name: value for name, value in arrays.items() if name not in missing}


def native(library, arrays):
    """Write arrays down the way a library does; the names are spelled out here once more."""
    weight, bias, mean, var, count = (arrays.get(name) for name in MISSING["all"])
    if library == "flax":
        collections = {"params": {"scale": weight, "bias": bias}, "batch_stats": {"mean": mean, "var": var}}
        kept = {name: present(values) for name, values in collections.items()}
        return {name: values for name, values in kept.items() if values}
    if library == "torch":
        state = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
        state["num_batches_tracked"] = count
    elif library == "keras":
        state = {"gamma": weight, "beta": bias, "moving_mean": mean, "moving_variance": var}
    else:
        state = {"gamma": weight, "beta": bias, "avg_mean": mean, "avg_var": var, "N": count}
    return present(state)


def present(state):
    """Leave out what is None."""
    return {name: value for name, value in state.items() if value is not None}


def assert_same(found, expected):
    """Compare two states: structure, order, types, bits."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[name], value)
        else:
            assert type(found[name]) is np.ndarray
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
            assert found[name].tobytes() == value.tobytes(), name


def leaves(state):
    """Return the arrays of a state, nested or not."""
    return [x for value in state.values() for x in (leaves(value) if isinstance(value, dict) else [value])]


@every_source
@every_target
@missing_parts
def test_state_there_and_back(source, target, missing):
    """Every pair of libraries: the target's names and structure, and the source's state after the way back."""
    counted = source in COUNTING
    start = parts(missing=missing)
    there = nbnorm.convert_state_dict(native(source, start), source, target)
    expected = parts(missing=missing, count=17 if counted else 0)
    assert_same(there, native(target, expected))
    back = nbnorm.convert_state_dict(there, target, source)
    kept = parts(missing=missing, count=17 if counted and target in COUNTING else 0)
    assert_same(back, native(source, kept))


@every_source
@every_target
@pytest.mark.parametrize("dtype", ODD)
def test_state_keeps_dtype_and_bits(source, target, dtype):
    """Half, single, double and the other byte order."""
    state = native(source, parts(dtype, count=0))
    assert_same(nbnorm.convert_state_dict(state, source, target), native(target, parts(dtype, count=0)))


@every_source
@every_target
def test_state_is_a_copy(source, target):
    """Neither side sees what happens to the other afterwards, and the call itself changes nothing."""
    state = native(source, parts(count=0))
    before = copy.deepcopy(state)
    converted = nbnorm.convert_state_dict(state, source, target)
    assert_same(state, before)
    for array in leaves(state):
        array[...] = 3
    assert_same(converted, native(target, parts(count=0)))


@pytest.mark.parametrize("count", [5, np.int32(5), np.array(5, np.uint8), np.array([5])], ids=repr)
@pytest.mark.parametrize("source", COUNTING)
def test_count(source, count):
    """Whatever integer counts the batches becomes an int64 array without axes."""
    state = {**native(source, parts()), COUNTING[source]: count}
    for target in COUNTING:
        assert_same(nbnorm.convert_state_dict(state, source, target), native(target, parts(count=5)))


@pytest.mark.parametrize("source", COUNTING)
def test_count_is_missing(source):
    """A state from before the count existed has 0 batches."""
    state = native(source, parts(missing=["num_batches_tracked"]))
    for target in COUNTING:
        assert_same(nbnorm.convert_state_dict(state, source, target), native(target, parts(count=0)))


def test_lists_are_arrays_too():
    """What NumPy reads as numbers is a value."""
    state = {"gamma": [1.5, 2.5], "moving_mean": (0, 1), "moving_variance": np.float32([4, 5])}
    converted = nbnorm.convert_state_dict(state, "keras", "flax")
    expected = {
        "params": {"scale": np.array([1.5, 2.5])},
        "batch_stats": {"mean": np.array([0, 1]), "var": np.float32([4, 5])},
    }
    assert_same(converted, expected)


def trained(rng, missing=()):
    """Make the arrays of a layer with a past."""
    arrays = {
        "weight": rng.uniform(0.5, 2, 4).astype(np.float32),
        "bias": rng.standard_normal(4).astype(np.float32),
        "running_mean": rng.standard_normal(4).astype(np.float32),
        "running_var": rng.uniform(1e-4, 1e-2, 4).astype(np.float32),
        "num_batches_tracked": np.array(6),
    }
    return {name: value for name, value in arrays.items() if name not in missing}


@every_source
@missing_parts
def test_state_loads_in_a_layer(source, missing, rng):
    """The layer with the source's preset and state evaluates as the source does."""
    arrays = trained(rng, missing)
    state = nbnorm.convert_state_dict(native(source, arrays), source, "torch")
    settings = {"scale": "weight" in arrays, "center": "bias" in arrays}
    settings |= {"track_running_stats": "running_mean" in arrays} | nbnorm.preset(source)
    layer = nbnorm.BatchNorm(4, **settings).eval()
    layer.load_state_dict(state)
    assert_same(layer.state_dict(), state)

    shape = (3, 4, 5) if settings["channel_axis"] == 1 else (3, 5, 4)
    x = rng.standard_normal(shape).astype(np.float32)
    running = (arrays["running_mean"], arrays["running_var"]) if "running_mean" in arrays else None
    reference = oracle.batch_norm(
        x,
        arrays.get("weight"),
        arrays.get("bias"),
        eps=EPS[source],
        channel_axis=settings["channel_axis"],
        running=running,
    )
    oracle.assert_within(layer(x), reference.y, oracle.y_tolerance(reference), "y")


@every_source
@pytest.mark.parametrize("affine", [True, False])
def test_state_loads_in_torch(source, affine, torch, rng):
    """PyTorch takes the state and evaluates as our layer does."""
    arrays = trained(rng, () if affine else ("weight", "bias"))
    state = nbnorm.convert_state_dict(native(source, arrays), source, "torch")
    theirs = torch.nn.BatchNorm1d(4, eps=EPS[source], affine=affine).eval()
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    for name, value in theirs.state_dict().items():
        assert value.numpy().tobytes() == state[name].tobytes(), name
    x = rng.standard_normal((3, 4, 5)).astype(np.float32)
    ours = nbnorm.BatchNorm(4, eps=EPS[source], affine=affine).eval()
    ours.load_state_dict(state)
    np.testing.assert_allclose(ours(x), theirs(torch.from_numpy(x)).detach().numpy(), rtol=1e-5, atol=1e-5)


@every_target
def test_state_of_a_torch_module(target, torch, rng):
    """Tensors are values; what PyTorch does to them afterwards does not reach the copies."""
    module = torch.nn.BatchNorm1d(4)
    for _ in range(3):
        module(torch.from_numpy(rng.standard_normal((5, 4)).astype(np.float32) + 2))
    arrays = {name: value.numpy().copy() for name, value in module.state_dict().items()}
    assert arrays["num_batches_tracked"] == 3
    converted = nbnorm.convert_state_dict(module.state_dict(), "torch", target)
    module.reset_parameters()
    for parameter in module.parameters():
        parameter.data.fill_(9)
    assert_same(converted, native(target, arrays))


STATES = [
    (
        "torch",
        {"weight": 1.0, "gamma": 1.0, "N": 3},
        KeyError,
        r"unexpected keys \['N', 'gamma'\]; expected.*num_b",
    ),
    (
        "keras",
        {"gamma": 1.0, "avg_mean": 1.0},
        KeyError,
        r"unexpected keys \['avg_mean'\]; expected.*moving_mean",
    ),
    ("keras", {"moving_mean": 1.0}, KeyError, r"\['moving_mean'\] without \['moving_variance'\]"),
    ("chainer", {"avg_var": 1.0, "N": 3}, KeyError, r"\['avg_var', 'N'\] without \['avg_mean'\]"),
    (
        "torch",
        {"num_batches_tracked": 3},
        KeyError,
        r"\['num_batches_tracked'\] without \['running_mean', 'running_",
    ),
    (
        "flax",
        {"batch_stats": {"var": 1.0}},
        KeyError,
        r"\['batch_stats/var'\] without \['batch_stats/mean'\]",
    ),
    (
        "flax",
        {"scale": 1.0, "mean": 1.0},
        KeyError,
        r"unexpected keys \['mean', 'scale'\]; expected.*params/scale",
    ),
    ("flax", {"params": {"kernel": 1.0}}, KeyError, r"unexpected keys \['params/kernel'\]"),
    ("flax", {"params": 1.0}, KeyError, r"unexpected keys \['params'\]"),
    ("torch", {"weight": {}}, TypeError, r"weight must be a numeric array, got dict"),
    ("torch", {"weight": None}, TypeError, r"weight must be a numeric array, got NoneType of dtype object"),
    ("torch", {"bias": ["a"]}, TypeError, r"bias must be a numeric array, got list of dtype <U1"),
    ("torch", {1: 2.0, "x": 2.0}, KeyError, r"unexpected keys \[1, 'x'\]"),
    ("chainer", {"avg_mean": 1.0, "avg_var": 1.0, "N": -1}, ValueError, r"N must be an integer >= 0"),
    ("chainer", {"avg_mean": 1.0, "avg_var": 1.0, "N": 2.5}, ValueError, r"N must be an integer >= 0"),
    ("keras", [1.0, 2.0, 3.0, 4.0], TypeError, r"state must be a mapping of names to arrays, got list"),
    ("jax", {}, ValueError, r"source must be one of 'torch', 'keras', 'flax', 'chainer', got 'jax'"),
]


@pytest.mark.parametrize(("source", "state", "exception", "message"), STATES, ids=range(len(STATES)))
def test_refused_states(source, state, exception, message):
    """The message names the keys."""
    with pytest.raises(exception, match=message):
        nbnorm.convert_state_dict(state, source, "torch")


def test_refused_target():
    """The message lists the libraries."""
    with pytest.raises(
        ValueError, match=r"target must be one of 'torch', 'keras', 'flax', 'chainer', got 'mlx'"
    ):
        nbnorm.convert_state_dict({}, "torch", "mlx")


# ---- folding ----

RELATIVE = {"float32": 1e-5, "float64": 1e-12}
every_dtype = pytest.mark.parametrize("dtype", RELATIVE)
NORMS = [{}, {"scale": False}, {"center": False}, {"affine": False, "eps": 1e-2}]
every_norm = pytest.mark.parametrize("options", NORMS, ids=str)


def trained_norm(rng, channels, dtype="float64", offset=0.0, **options):
    """Make a layer with drawn parameters and statistics."""
    norm = nbnorm.BatchNorm(channels, dtype=dtype, **options)
    for value in norm.params.values():
        value[:] = rng.uniform(-2, 2, channels)
    norm.running_mean = offset + rng.standard_normal(channels)
    norm.running_var = rng.uniform(1e-3, 3, channels)
    return norm


def normalized(z, norm, channel_axis=1):
    """Normalize float64 values by the formula, with a layer's running statistics."""
    assert z.dtype == np.float64
    return oracle.batch_norm(
        z,
        norm.weight,
        norm.bias,
        eps=norm.eps,
        channel_axis=channel_axis,
        running=(norm.running_mean, norm.running_var),
    ).y


def assert_close(found, expected, dtype):
    """Compare in units of the largest value."""
    assert found.dtype == dtype
    oracle.assert_within(found, expected, RELATIVE[dtype] * oracle.largest(expected, floor=0.0), "y")


@every_dtype
@every_norm
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("output_axis", [0, 1, -1])
def test_fold_dense(dtype, options, has_bias, output_axis, rng):
    """Dense layers of both orientations."""
    norm = trained_norm(rng, 6, dtype, **options)
    x = rng.standard_normal((20, 5)).astype(dtype)
    weight = rng.standard_normal((6, 5) if output_axis == 0 else (5, 6)).astype(dtype)
    bias = rng.standard_normal(6).astype(dtype) if has_bias else None
    before = [a.tobytes() for a in (weight, *leaves(norm.state_dict()), *([bias] if has_bias else []))]

    def dense(x, weight, bias):
        return x @ (weight.T if output_axis == 0 else weight) + (0 if bias is None else bias)

    folded, folded_bias = nbnorm.fold_batch_norm(weight, bias, norm, output_axis=output_axis)
    assert (folded.shape, folded_bias.shape) == (weight.shape, (6,))
    wide = dense(x.astype(np.float64), weight.astype(np.float64), bias)
    assert_close(dense(x, folded, folded_bias), normalized(wide, norm), dtype)
    after = [a.tobytes() for a in (weight, *leaves(norm.state_dict()), *([bias] if has_bias else []))]
    assert after == before


# Function of torch.nn.functional, shape of x, of weight, and its other arguments.
LAYERS = {
    "linear": ((7, 6), (8, 6), {}),
    "conv1d": ((2, 6, 9), (8, 6, 3), {"padding": 1}),
    "conv2d": ((2, 6, 7, 5), (8, 6, 3, 2), {"stride": 2, "padding": 1}),
    "conv3d": ((2, 6, 4, 5, 6), (8, 6, 2, 3, 1), {"padding": 1}),
    "conv2d grouped": ((2, 6, 7, 5), (8, 3, 3, 2), {"groups": 2}),
    "conv2d depthwise": ((2, 4, 7, 5), (8, 1, 3, 2), {"groups": 4}),
    "conv_transpose1d": ((2, 6, 9), (6, 8, 3), {"padding": 1}),
    "conv_transpose2d": ((2, 6, 4, 5), (6, 8, 3, 2), {"stride": 2}),
    "conv_transpose3d": ((2, 6, 3, 4, 5), (6, 8, 2, 3, 1), {}),
    "conv_transpose1d grouped": ((2, 6, 9), (6, 4, 3), {"groups": 2}),
    "conv_transpose2d grouped": ((2, 6, 4, 5), (6, 4, 3, 2), {"groups": 2, "stride": 2}),
    "conv_transpose2d depthwise": ((2, 4, 4, 5), (4, 2, 3, 2), {"groups": 4}),
}


@pytest.mark.parametrize("name", LAYERS)
@every_dtype
@pytest.mark.parametrize("has_bias", [True, False])
def test_fold_torch_layers(name, dtype, has_bias, torch, rng):
    """Every layer PyTorch's users put in front of a batch norm."""
    function = getattr(torch.nn.functional, name.split()[0])
    x_shape, weight_shape, options = LAYERS[name]
    norm = trained_norm(rng, 8, dtype)
    x = rng.standard_normal(x_shape).astype(dtype)
    weight = rng.standard_normal(weight_shape).astype(dtype)
    bias = rng.standard_normal(8).astype(dtype) if has_bias else None

    def layer(*arrays):
        return function(*(None if a is None else torch.from_numpy(a) for a in arrays), **options).numpy()

    where = {"output_axis": 1, "groups": options.get("groups", 1)} if "transpose" in name else {}
    folded = nbnorm.fold_batch_norm(weight, bias, norm, **where)
    wide = layer(*(None if a is None else a.astype(np.float64) for a in (x, weight, bias)))
    assert_close(layer(x, *folded), normalized(wide, norm), dtype)


def test_fold_like_torch(torch, rng):
    """PyTorch's own folding of a convolution gives the same weights."""
    conv, theirs = torch.nn.Conv2d(3, 8, 2, dtype=torch.float64), torch.nn.BatchNorm2d(8, dtype=torch.float64)
    norm = trained_norm(rng, 8)
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in norm.state_dict().items()})
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), theirs.eval())
    weight, bias = nbnorm.fold_batch_norm(conv.weight.detach().numpy(), conv.bias.detach().numpy(), norm)
    np.testing.assert_allclose(weight, fused.weight.detach().numpy(), rtol=1e-13)
    np.testing.assert_allclose(bias, fused.bias.detach().numpy(), rtol=1e-12)


def assert_equal_pairs(found, expected):
    """Compare two (weight, bias) bit for bit."""
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)


@pytest.mark.parametrize(("axes", "output_axis"), [((2, 3, 1, 0), -1), ((2, 3, 1, 0), 3), ((2, 3, 0, 1), -2)])
def test_fold_where_the_channels_are(axes, output_axis, rng):
    """A kernel in Keras's order, (kH, kW, I, O) or (kH, kW, O, I), folds as the same kernel in PyTorch's."""
    norm = trained_norm(rng, 6)
    weight, bias = rng.standard_normal((6, 5, 3, 2)), rng.standard_normal(6)
    folded, folded_bias = nbnorm.fold_batch_norm(weight, bias, norm)
    other = nbnorm.fold_batch_norm(weight.transpose(axes), bias, norm, output_axis=output_axis)
    assert_equal_pairs(other, (folded.transpose(axes), folded_bias))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_fold_groups_one_by_one(groups, rng):
    """A grouped transposed convolution is its groups side by side, each with its own part of the norm."""
    norm = trained_norm(rng, 12)
    weight, bias = rng.standard_normal((6, 12 // groups, 3, 2)), rng.standard_normal(12)
    separate = []
    for group, outputs in enumerate(np.split(np.arange(12), groups)):
        part = nbnorm.BatchNorm(len(outputs), dtype=np.float64)
        for name, value in part.state_dict().items():
            if value.ndim:
                getattr(part, name)[:] = getattr(norm, name)[outputs]
        rows = np.split(weight, groups)[group]
        separate.append(nbnorm.fold_batch_norm(rows, bias[outputs], part, output_axis=1))
    expected = [np.concatenate(values) for values in zip(*separate, strict=True)]
    assert_equal_pairs(nbnorm.fold_batch_norm(weight, bias, norm, output_axis=1, groups=groups), expected)


@pytest.mark.parametrize("norm_dtype", RELATIVE)
@pytest.mark.parametrize("bias_dtype", RELATIVE)
def test_fold_rounds_once(norm_dtype, bias_dtype, rng):
    """In float32, too, all is computed in float64, even where bias and mean cancel; weight sets the dtype."""
    norm = trained_norm(rng, 6, norm_dtype, offset=1e4)
    weight = rng.standard_normal((6, 5)).astype(np.float32)
    bias = (1e4 + rng.standard_normal(6)).astype(bias_dtype)
    wide = nbnorm.fold_batch_norm(weight.astype(np.float64), bias, norm)
    narrow = nbnorm.fold_batch_norm(weight, bias, norm)
    assert_equal_pairs(narrow, [values.astype(np.float32) for values in wide])
    at_zero = normalized(bias.astype(np.float64)[np.newaxis], norm)[0]
    np.testing.assert_allclose(wide[1], at_zero.astype(np.float64), rtol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_fold_in_either_mode(training, rng):
    """The running statistics count, whatever mode the layer is in; list and strided weights are welcome."""
    norm = trained_norm(rng, 2).train(training)
    weight = rng.standard_normal((2, 6))
    expected = nbnorm.fold_batch_norm(weight[:, ::2].copy(), None, norm)
    np.testing.assert_allclose(
        expected[1], normalized(np.zeros((1, 2)), norm)[0].astype(np.float64), rtol=1e-12
    )
    assert_equal_pairs(nbnorm.fold_batch_norm(weight[:, ::2], None, norm), expected)
    assert_equal_pairs(nbnorm.fold_batch_norm(weight[:, ::2].tolist(), [0.0, 0.0], norm), expected)


def ones(*shape):
    """Make a weight."""
    return np.ones(shape, np.float32)


FAULTS = [
    Fault(
        "channels",
        some(weight=ones(5, 4)),
        ValueError,
        r"weight has shape \(5, 4\), expected .* = 8 on axis 0",
    ),
    Fault("axis", some(output_axis=-1), ValueError, r"weight has shape \(8, 4\), expected .* = 8 on axis 1"),
    Fault("no axis", some(output_axis=2), np.exceptions.AxisError, r"output_axis.* 2 .*2"),
    Fault("axis type", some(output_axis=1.0), TypeError, r"output_axis must be an integer, got 1\.0"),
    Fault("bias shape", some(bias=ones(4)), ValueError, r"bias has shape \(4,\), expected \(8,\)"),
    Fault(
        "bias dtype", some(bias=np.arange(8)), TypeError, r"bias has dtype int64; cast to float32 or float64"
    ),
    Fault("weight dtype", some(weight=np.ones((8, 4), int)), TypeError, r"weight has dtype int64; cast to"),
    Fault(
        "activation",
        some(norm=nbnorm.BatchNorm(8, activation="relu")),
        ValueError,
        "norm has activation='relu', which no weight and bias can stand for",
    ),
    Fault("norm", some(norm=None), TypeError, r"norm must be a nbnorm.BatchNorm, got NoneType"),
    Fault(
        "untracked",
        some(norm=nbnorm.BatchNorm(8, track_running_stats=False)),
        ValueError,
        r"norm keeps no running statistics",
    ),
    Fault("groups", some(groups=0), ValueError, r"groups must be a positive integer, got 0"),
    Fault(
        "groups, axis 0", some(groups=2), ValueError, r"groups=2 goes with output_axis=1 .*got output_axis=0"
    ),
    Fault(
        "groups, channels",
        some(groups=3, output_axis=1),
        ValueError,
        r"groups must divide norm\.num_features = 8, got 3",
    ),
    Fault(
        "groups, outputs",
        some(weight=ones(6, 8), groups=2, output_axis=1),
        ValueError,
        r"weight has shape \(6, 8\), expected .* / groups = 4 on axis 1",
    ),
    Fault(
        "groups, inputs",
        some(weight=ones(5, 4), groups=2, output_axis=1),
        ValueError,
        r"weight has shape \(5, 4\), expected a multiple of groups = 2 on axis 0",
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_refused_folds(fault):
    """Each argument that does not fit, with all others right."""
    arguments = {"weight": ones(8, 4), "bias": ones(8), "norm": nbnorm.BatchNorm(8)}
    nbnorm.fold_batch_norm(**arguments)
    assert_refused(nbnorm.fold_batch_norm, arguments | fault.change(arguments), fault)
