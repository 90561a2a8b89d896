"""Every error message: each check returns the checked value or says what came and what was expected."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from nbnorm._dispatch import library, place
from nbnorm._glance import PARAMETERS, apart
from nbnorm._libraries import is_cupy, is_foreign, type_name

_NAMES = "float16, bfloat16, float32, float64"
SMALL_BATCH = ("error", "warn", "zero", "running")
NONFINITE = ("propagate", "skip", "raise")


def array(name: str, x: Any) -> Any:
    """Return a native, aligned float array that shares the memory of x where it can."""
    if type(x) is np.ndarray and x.dtype in PARAMETERS and x.flags.aligned:
        return x
    if is_cupy(x):
        if not supported(x.dtype):
            _float_dtype(name, x.dtype)
        return x
    if type_name(x) != "torch.Tensor" and is_foreign(x):
        raise TypeError(
            f"{name} is a {type_name(x)} on a CUDA device, unlike the array that the call is about"
        )
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name}: masked arrays are not supported; fill or index first")
    if type_name(x) == "torch.Tensor":
        raise TypeError(f"{name} is a torch.Tensor; expected a NumPy array, for example {name}.numpy()")
    listed = isinstance(x, (list, tuple))
    try:
        value = np.asarray(x)
    except ValueError:
        raise ValueError(f"{name} must be an array of numbers, got {x!r:.80}") from None
    if listed and value.dtype.kind in "biu":
        value = value.astype(np.float64)
    if supported(value.dtype):
        return np.require(value, value.dtype, "A")
    _float_dtype(name, value.dtype)
    return np.require(value, value.dtype.newbyteorder("="), "A")


def supported(dtype: np.dtype[Any]) -> bool:
    """Whether elements may have a native dtype; bfloat16 is that of ml_dtypes, which need not be there."""
    return dtype in PARAMETERS or dtype == np.float16 or dtype.name == "bfloat16"


def _float_dtype(name: str, dtype: np.dtype[Any]) -> None:
    """Refuse every dtype but the supported ones, in either byte order."""
    if dtype.kind in "biu":
        raise TypeError(f"{name} has dtype {dtype}; cast to float32 or float64 first")
    if dtype.kind == "f" or dtype.name.startswith("float8"):
        if supported(dtype.newbyteorder("=")):
            return
        raise TypeError(f"{name}: dtype {dtype} is not supported; supported: {_NAMES}")
    raise TypeError(f"{name} must be a real floating array, got dtype {dtype}")


def at_least_2d(operation: str, x: np.ndarray) -> None:
    """Refuse an array without a channel axis beside the samples."""
    if x.ndim < 2:
        raise ValueError(f"{operation} expects at least 2 dimensions (N, C, ...), got {x.ndim}")


def axis(name: str, value: Any, ndim: int) -> int:
    """Return an axis counted from the front."""
    index = value if type(value) is int else integer(name, value)
    if not -ndim <= index < ndim:
        raise np.exceptions.AxisError(index, ndim, name)
    return index % ndim


def integer(name: str, value: Any) -> int:
    """Return an int from anything that is one exactly; bool is not."""
    if type(value) is int:
        return value
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def positive_integer(name: str, value: Any) -> int:
    """Return a positive int."""
    try:
        number = integer(name, value)
    except TypeError:
        number = 0
    if number <= 0:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return number


def eps(value: Any) -> float:
    """Return eps as a Python float."""
    number = value if type(value) is float else _number(value)
    if not 0.0 <= number < np.inf:
        raise ValueError(f"eps must be a finite number >= 0, got {value!r}")
    return number


def momentum(value: Any) -> float:
    """Return the weight of the new value as a Python float."""
    number = _number(value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"momentum must be in [0, 1], got {value!r}")
    return number


def _number(value: Any) -> float:
    """Return a Python float, NaN for what is no number."""
    if isinstance(value, (str, bytes)) or value is None:
        return float("nan")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def ddof(value: Any) -> int:
    """Return the delta degrees of freedom."""
    if isinstance(value, (bool, np.bool_, np.ndarray)) or value not in (0, 1):
        raise ValueError(f"ddof must be 0 (biased) or 1 (unbiased), got {value!r}")
    return int(value)


def choice(name: str, value: Any, allowed: Collection[str]) -> str:
    """Return one of some words."""
    if not isinstance(value, str) or value not in allowed:
        words = ", ".join(repr(word) for word in allowed)
        raise ValueError(f"{name} must be one of {words}, got {value!r}")
    return value


def parameter(name: str, value: Any, channel_axis: int, x_shape: tuple[int, ...]) -> Any:
    """Return weight or bias with one entry per channel, or None."""
    if value is None:
        return None
    checked = array(name, value)
    channels = x_shape[channel_axis]
    if checked.shape != (channels,):
        raise ValueError(
            f"{name} has shape {checked.shape}, expected {(channels,)} = number of channels "
            f"(axis {channel_axis} of x with shape {x_shape})"
        )
    return checked


def activation(value: Any) -> tuple[str, float] | None:
    """Return the name of an activation and its slope, or None."""
    if value is None:
        return None
    name, slope = "", 0.0
    if isinstance(value, str) and value in ("relu", "silu"):
        name = value
    elif isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], str):
        name, slope = value[0] if value[0] == "leaky_relu" else "", _number(value[1])
    if not name or not np.isfinite(slope):
        raise ValueError(f"activation must be None, 'relu', ('leaky_relu', slope) or 'silu', got {value!r}")
    return name, slope


def mask(value: Any, expected: tuple[int, ...]) -> Any:
    """Return the weights of a mask, broadcast to the shape of x without its channels; unchecked on a device."""
    if is_foreign(value) or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"mask must be an array like x, got {type_name(value)}")
    on_device = is_cupy(value)
    try:
        weights = value if on_device else np.asarray(value)
    except ValueError:
        raise ValueError(f"mask must be an array of numbers, got {value!r:.80}") from None
    if weights.dtype.name == "bfloat16":
        weights = weights.astype(np.float32)
    if weights.dtype.kind not in "biuf":
        raise TypeError(f"mask must be boolean or floating, got dtype {weights.dtype}")
    try:
        weights = library(weights).broadcast_to(weights, expected)
    except ValueError:
        raise ValueError(
            f"mask has shape {weights.shape}, expected {expected}, the shape of x without its channel axis, or one "
            "that broadcasts to it"
        ) from None
    if (
        not on_device
        and weights.dtype.kind != "b"
        and not (np.isfinite(weights).all() and (weights >= 0).all())
    ):
        worst = weights[~(np.isfinite(weights) & (weights >= 0))].flat[0]
        raise ValueError(f"mask must hold finite weights >= 0, got {worst}")
    if not on_device and weights.dtype.kind == "f":
        extreme = weights[(weights > 0) & ((weights < 1e-30) | (weights > 1e30))]
        if extreme.size:
            raise ValueError(f"mask must hold weights of 0 or from 1e-30 to 1e30, got {extreme.flat[0]}")
    return weights


def renorm(value: Any) -> tuple[float, float] | None:
    """Return the limits r_max and d_max of batch renormalization, or None."""
    if value is None:
        return None
    limits = tuple(_number(limit) for limit in value) if isinstance(value, (tuple, list)) else ()
    if len(limits) != 2 or not limits[0] >= 1.0 or not limits[1] >= 0.0:
        raise ValueError(f"renorm must be (r_max, d_max) with r_max >= 1 and d_max >= 0, got {value!r}")
    return limits[0], limits[1]


def virtual_batch_size(value: Any) -> int | None:
    """Return the number of samples of a virtual batch, or None."""
    return None if value is None else positive_integer("virtual_batch_size", value)


def trailing_axes(norm: str, value: Any, ndim: int) -> int:
    """Return where the normalized axes start: an int names the last axis, a tuple the trailing ones."""
    if ndim < 1:
        raise ValueError(f"{norm} expects at least 1 dimension, got {ndim}")
    if type(value) is int and value == -1:  # as most calls have it; small ones notice the rest
        return ndim - 1
    axes = [axis("axis", item, ndim) for item in (value if isinstance(value, (tuple, list)) else (value,))]
    if len(set(axes)) != len(axes):
        raise ValueError(f"repeated axis in axis={value!r}")
    split = ndim - len(axes)
    if not axes or sorted(axes) != list(range(split, ndim)):
        raise ValueError(
            f"axis must be the last axis or a tuple of trailing axes, got {value!r} for {ndim} dimensions"
        )
    return split


def normalized_parameter(name: str, value: Any, expected: tuple[int, ...], x_shape: tuple[int, ...]) -> Any:
    """Return weight or bias with one entry per normalized element, or None."""
    if value is None:
        return None
    checked = array(name, value)
    if checked.shape != expected:
        raise ValueError(
            f"{name} has shape {checked.shape}, expected {expected} = normalized axes of x with shape {x_shape}"
        )
    return checked


def num_groups(value: Any, channels: int) -> int:
    """Return a number of groups that divides the channels."""
    groups = positive_integer("num_groups", value)
    if channels % groups:
        raise ValueError(f"number of channels {channels} is not divisible by num_groups {groups}")
    return groups


def statistic(name: str, value: Any, channels: int) -> Any:
    """Return a mean or variance that is read, with one entry per channel."""
    checked = array(name, value)
    shape(name, checked, (channels,))
    return checked


def running(name: str, value: Any, channels: int) -> Any:
    """Return a running statistic that will be updated in place."""
    if isinstance(value, np.ma.MaskedArray) or not (isinstance(value, np.ndarray) or is_cupy(value)):
        raise TypeError(f"{name} must be a NumPy array, which is updated in place, got {type_name(value)}")
    if value.dtype not in PARAMETERS:
        raise TypeError(f"{name} has dtype {value.dtype}, expected float32 or float64")
    shape(name, value, (channels,))
    if not _writeable(value):
        raise ValueError(f"{name} is read-only, but is updated in place")
    return value


def both_or_neither(running_mean: Any, running_var: Any) -> None:
    """Refuse one running statistic without the other."""
    if (running_mean is None) != (running_var is None):
        given, missing = ("running_mean", "running_var")[:: 1 if running_var is None else -1]
        raise ValueError(f"{given} was given without {missing}; give both or neither")


def shape(name: str, value: np.ndarray, expected: tuple[int, ...]) -> None:
    """Compare shapes."""
    if value.shape != expected:
        raise ValueError(f"{name} has shape {value.shape}, expected {expected}")


def dtype(name: str, value: np.ndarray, expected: np.dtype[Any]) -> None:
    """Compare dtypes."""
    if value.dtype != expected:
        raise TypeError(f"{name} has dtype {value.dtype}, expected {expected}")


def instance(name: str, value: Any, expected: type) -> None:
    """Compare types."""
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be a nbnorm.{expected.__name__}, got {type_name(value)}")


def disjoint_from_parameters(name: str, value: np.ndarray | None, weight: Any, bias: Any) -> None:
    """Refuse a result buffer in the memory of the parameters, which are read while it is filled."""
    if value is not None and not apart(value, weight, bias):
        disjoint(name, value, [("weight", weight), ("bias", bias)])


def out(name: str, value: Any, expected_shape: tuple[int, ...], expected_dtype: np.dtype[Any]) -> None:
    """Refuse a result buffer that cannot take the result."""
    known = type(value) is np.ndarray or is_cupy(value)
    if not known and (not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray)):
        raise TypeError(f"{name} must be a NumPy array, got {type_name(value)}")
    shape(name, value, expected_shape)
    dtype(name, value, expected_dtype)
    if not _writeable(value):
        raise ValueError(f"{name}: output array is read-only")


def _writeable(x: Any) -> bool:
    """Whether an array may be written; on a device they all may."""
    return bool(x.flags.writeable) if isinstance(x, np.ndarray) else True


def together(names: Sequence[str], arrays: Sequence[Any]) -> None:
    """Refuse arrays that are not in the library and on the device of the first one; None is anywhere."""
    for value in arrays:
        if value is not None and type(value) is not np.ndarray:
            break
    else:
        return
    for name, value in zip(names[1:], arrays[1:], strict=True):
        if value is not None and place(value) != place(arrays[0]):
            raise TypeError(f"{names[0]} is {place(arrays[0])}, but {name} is {place(value)}")


def disjoint(name: str, value: np.ndarray, others: Iterable[tuple[str, Any]], reason: str = "") -> None:
    """Refuse memory that is shared with one of the other arrays."""
    for other_name, other in others:
        if other is not None and overlap(value, other):
            raise ValueError(f"{name} shares memory with {other_name}{reason}")


def overlap(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have an element in common; True where that is too hard to tell."""
    if a is b:
        return a.size > 0
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return type(a) is type(b) and bool(library(a).may_share_memory(a, b))
    if (a.base is None and b.base is None) or not np.may_share_memory(a, b):
        return False
    try:
        return bool(np.shares_memory(a, b, max_work=10_000))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def keys(name: str, mapping: Mapping[str, Any], expected: Collection[str]) -> None:
    """Refuse missing and unexpected keys, naming all of them."""
    missing = sorted(set(expected) - set(mapping))
    unexpected = sorted(set(mapping) - set(expected))
    problems = [
        f"{word} keys {which}" for word, which in (("missing", missing), ("unexpected", unexpected)) if which
    ]
    if problems:
        raise KeyError(f"{name} has {' and '.join(problems)}; expected {sorted(expected)}")


def need(value: Any, known: tuple[str, ...]) -> frozenset[str]:
    """Return the names of the gradients that are wanted."""
    if not isinstance(value, Iterable):
        raise TypeError(f"need must be a collection of {', '.join(known)}, got {value!r}")
    names = (value,) if isinstance(value, str) else tuple(value)
    for name in names:
        choice("every entry of need", name, known)
    return frozenset(names)


def parameter_dtype(value: Any) -> np.dtype[Any]:
    """Return the dtype of a layer's parameters."""
    for candidate in PARAMETERS:
        if candidate == value:
            return candidate
    raise TypeError(f"dtype must be float32 or float64, got {value!r}")


def channels(layer: str, x: np.ndarray, channel_axis: int, expected: int) -> None:
    """Compare the channels of x with those of a layer."""
    if x.shape[channel_axis] != expected:
        raise ValueError(
            f"{layer} expects {expected} channels on axis {channel_axis}, got x with shape {x.shape}"
        )


def state(name: str, value: Any, like: np.ndarray) -> np.ndarray:
    """Return an entry of a state dict that fits the layer's array."""
    entry = np.asarray(value)
    if entry.dtype.kind not in "fiu":
        raise ValueError(f"{name} has dtype {entry.dtype}, expected {like.dtype}")
    shape(name, entry, like.shape)
    if np.isnan(entry).any():
        raise ValueError(f"{name} contains NaN")
    if name == "running_var" and (entry < 0).any():
        raise ValueError(f"running_var must be >= 0, got {entry.min()}")
    return entry


def count(name: str, value: Any) -> int:
    """Return a number of batches from an int or an array of one."""
    number = np.asarray(value)
    if number.size != 1 or number.dtype.kind not in "iu" or number.item() < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
    return int(number.item())


def normalized_shape(value: Any) -> tuple[int, ...]:
    """Return the shape that a layer normalizes over, from one length or several."""
    lengths = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not lengths:
        raise ValueError("normalized_shape must be a positive integer or several, got ()")
    return tuple(positive_integer("normalized_shape", length) for length in lengths)


def trailing_shape(expected: tuple[int, ...], x: np.ndarray) -> None:
    """Compare the trailing dimensions of x with those of a layer."""
    if x.shape[-len(expected) :] != expected:
        raise ValueError(f"normalized_shape {expected} does not match trailing dimensions of x {x.shape}")


def array_library(name: str, value: Any) -> Any:
    """Return a library that makes arrays as NumPy does."""
    if not all(hasattr(value, needed) for needed in ("asarray", "ones", "zeros", "zeros_like")):
        raise TypeError(f"{name} must be a library of arrays such as numpy or cupy, got {value!r}")
    return value


def not_a_result(name: str, value: Any, buffers: Iterable[np.ndarray]) -> None:
    """Refuse an input in the memory of a result that the layer is about to write again."""
    if apart(value, *buffers):
        return
    if isinstance(value, np.ndarray) and any(overlap(value, buffer) for buffer in buffers):
        raise ValueError(
            f"{name} shares memory with an earlier result of this layer, which reuse_buffers=True writes again; "
            "copy it first"
        )


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """Return two result buffers, each of which may be None."""
    if value is None:
        return None, None
    if not isinstance(value, tuple) or len(value) != 2:
        raise ValueError(f"{name} must be a tuple of 2 arrays or None (dx, dresidual), got {value!r:.80}")
    return value
