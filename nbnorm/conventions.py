"""Other libraries' defaults, the names in their states, and folding into the layer in front."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nbnorm import _checks
from nbnorm._libraries import type_name
from nbnorm.batch_layer import BatchNorm
from nbnorm.moments import Moments

Array = np.ndarray

_PRESETS: dict[str, dict[str, Any]] = {
    "torch": {"momentum": 0.1, "eps": 1e-5, "ddof": 1, "channel_axis": 1},
    "keras": {"momentum": 0.01, "eps": 1e-3, "ddof": 0, "channel_axis": -1},
    "flax": {"momentum": 0.01, "eps": 1e-5, "ddof": 0, "channel_axis": -1},
    "chainer": {"momentum": 0.1, "eps": 2e-5, "ddof": 1, "channel_axis": 1},
}

# Each library's names in the order of PyTorch's, which are ours; a slash stands for a dict in a dict.
_ENTRIES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_NAMES: dict[str, tuple[str, ...]] = {
    "torch": _ENTRIES,
    "keras": ("gamma", "beta", "moving_mean", "moving_variance"),
    "flax": ("params/scale", "params/bias", "batch_stats/mean", "batch_stats/var"),
    "chainer": ("gamma", "beta", "avg_mean", "avg_var", "N"),
}


def preset(name: str) -> dict[str, Any]:
    r"""Return the arguments that make `BatchNorm` train as another library's layer does by default.

    .. math:: running = (1 - momentum) \cdot running + momentum \cdot batch

    In this formula momentum weighs the new value, as in PyTorch. Keras (0.99), Flax (0.99) and Chainer (decay
    0.9) write down the weight of the old one: the preset holds 1 minus that number.

    ============= ======== ==== ==== ============ ========================================
    name          momentum eps  ddof channel_axis stands for
    ============= ======== ==== ==== ============ ========================================
    ``"torch"``   0.1      1e-5 1    1            ``torch.nn.BatchNorm1d``, ``2d``, ``3d``
    ``"keras"``   0.01     1e-3 0    -1           ``keras.layers.BatchNormalization``
    ``"flax"``    0.01     1e-5 0    -1           ``flax.linen.BatchNorm``
    ``"chainer"`` 0.1      2e-5 1    1            ``chainer.links.BatchNormalization``
    ============= ======== ==== ==== ============ ========================================

    The libraries also differ where a channel has one value only; that is no part of the preset, see
    ``small_batch`` of `batch_norm_forward`.

    Parameters
    ----------
    name : {"torch", "keras", "flax", "chainer"}
        The library.

    Returns
    -------
    dict
        ``momentum``, ``eps``, ``ddof`` and ``channel_axis``; a new dict at each call, to be changed at will.

    Raises
    ------
    ValueError
        If the library is not known.

    References
    ----------
    The layers' own code: PyTorch 2.13, Keras 3, Flax (linen), Chainer 7.

    Examples
    --------
    >>> import nbnorm
    >>> nbnorm.preset("keras")
    {'momentum': 0.01, 'eps': 0.001, 'ddof': 0, 'channel_axis': -1}
    >>> bn = nbnorm.BatchNorm(64, **nbnorm.preset("keras"))
    """
    return dict(_PRESETS[_checks.choice("preset", name, _PRESETS)])


def convert_state_dict(state: Mapping[str, Any], source: str, target: str) -> dict[str, Any]:
    r"""Return the state of one batch norm layer under the names of another library.

    .. math:: target[name_{target}] = source[name_{source}]

    Every array keeps its bits and its dtype: all four libraries store the variance itself, without eps.
    What they make of it differs (eps, the next updates): give the layer the `preset` of the source.

    ======= ======================= =================== ===================== ============
    array   torch                   keras               flax                  chainer
    ======= ======================= =================== ===================== ============
    scale   ``weight``              ``gamma``           params: ``scale``     ``gamma``
    shift   ``bias``                ``beta``            params: ``bias``      ``beta``
    mean    ``running_mean``        ``moving_mean``     batch_stats: ``mean`` ``avg_mean``
    var     ``running_var``         ``moving_variance`` batch_stats: ``var``  ``avg_var``
    batches ``num_batches_tracked`` none                none                  ``N``
    ======= ======================= =================== ===================== ============

    Parameters
    ----------
    state : mapping of str to array_like
        Of any shape and numeric dtype; PyTorch's tensors on the CPU are welcome. Flax nests two mappings,
        ``{"params": {"scale": ..., "bias": ...}, "batch_stats": {"mean": ..., "var": ...}}``. Scale and shift
        may each be missing, and so may the statistics, together: what is missing stays missing.
    source, target : {"torch", "keras", "flax", "chainer"}
        Whose names the state has, and whose it gets; ``"torch"`` also means `BatchNorm` itself.

    Returns
    -------
    dict
        Copies, as NumPy arrays. That of ``"torch"`` is one for `BatchNorm.load_state_dict`.

    Raises
    ------
    KeyError
        If there are unexpected keys, or parts of the statistics without the others; the message names them.
    TypeError, ValueError
        If the state is not a mapping, an entry is not numeric, the number of batches is not an integer >= 0,
        or a library is not known.

    Notes
    -----
    PyTorch's ``num_batches_tracked`` and Chainer's ``N`` become each other, unchanged. Both serve the average
    that weighs all batches equally: the next batch gets 1 / (number + 1). PyTorch counts in every training,
    Chainer in its fine-tuning mode only, so N is 0 after ordinary training, and ``num_batches_tracked``
    becomes 0. From PyTorch, N may come as a large number. Chainer's ordinary training ignores it, but its
    fine-tuning would go on from there: call ``start_finetuning()``, which sets N to 0, even the first time.
    Keras and Flax do not count: to them the number is lost, and from them it is 0, as it is from a state of
    PyTorch or Chainer without it. The result is always an int64 array without axes.

    Keras's ``get_weights()`` is a list. With scale and center::

        names = ("gamma", "beta", "moving_mean", "moving_variance")
        state = dict(zip(names, layer.get_weights(), strict=True))

    Leave out ``"gamma"`` for a layer with ``scale=False`` and ``"beta"`` for one with ``center=False``.
    ``layer.set_weights(list(state.values()))`` is the way back: the result has this order.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> flax = {"params": {"scale": np.float32([2.0])},
    ...         "batch_stats": {"mean": np.float32([0.5]), "var": np.float32([4.0])}}
    >>> state = nbnorm.convert_state_dict(flax, "flax", "torch")
    >>> list(state)
    ['weight', 'running_mean', 'running_var', 'num_batches_tracked']
    >>> bn = nbnorm.BatchNorm(1, center=False, **nbnorm.preset("flax"))
    >>> bn.load_state_dict(state)
    >>> bn.running_var
    array([4.], dtype=float32)
    """
    source_names = _NAMES[_checks.choice("source", source, _NAMES)]
    target_names = _NAMES[_checks.choice("target", target, _NAMES)]
    entries = _entries(state, source_names)
    # Shorter than the entries where the target has no number of batches.
    named = zip(target_names, _ENTRIES, strict=False)
    return _nested({name: entries[entry] for name, entry in named if entry in entries})


def _entries(state: Any, names: tuple[str, ...]) -> dict[str, Array]:
    """Return copies of a state's arrays under our names, once its keys are found to be right."""
    leaves = _flat(state, names)
    unexpected = sorted(leaves.keys() - set(names), key=str)
    if unexpected:
        raise KeyError(f"state has unexpected keys {unexpected}; expected {list(names)}")
    statistics = names[2:4]
    given = [name for name in names[2:] if name in leaves]
    missing = [name for name in statistics if name not in leaves]
    if given and missing:
        raise KeyError(f"state has {given} without {missing}; give all statistics or none")
    found = zip(names, _ENTRIES, strict=False)
    entries = {entry: _copy(name, leaves[name]) for name, entry in found if name in leaves}
    if given:
        count = _checks.count(names[-1], entries.get("num_batches_tracked", 0))
        entries["num_batches_tracked"] = np.array(count, np.int64)
    return entries


def _copy(name: str, value: Any) -> Array:
    """Return a new array with the values and the dtype of anything NumPy reads as numbers."""
    array = np.asarray(value)
    if array.dtype.kind in "OSU":
        raise TypeError(f"{name} must be a numeric array, got {type_name(value)} of dtype {array.dtype}")
    return array.copy()


def _flat(state: Any, names: tuple[str, ...]) -> dict[Any, Any]:
    """Return a state without inner dicts: ``{"params": {"scale": s}}`` becomes ``{"params/scale": s}``."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping of names to arrays, got {type_name(state)}")
    collections = {name.split("/")[0] for name in names if "/" in name}
    flat: dict[Any, Any] = {}
    for key, value in state.items():
        if key in collections and isinstance(value, Mapping):
            flat |= {f"{key}/{inner}": leaf for inner, leaf in value.items()}
        else:
            flat[key] = value
    return flat


def _nested(leaves: Mapping[str, Array]) -> dict[str, Any]:
    """Undo `_flat`; an inner dict that would be empty does not come into being, as in Flax."""
    state: dict[str, Any] = {}
    for name, value in leaves.items():
        *collections, leaf = name.split("/")
        inner = state
        for collection in collections:
            inner = inner.setdefault(collection, {})
        inner[leaf] = value
    return state


def fold_batch_norm(
    weight: Any, bias: Any, norm: BatchNorm, *, output_axis: int = 0, groups: int = 1
) -> tuple[Array, Array]:
    r"""Fold an eval-mode batch norm into the dense or convolution layer in front of it.

    .. math::

       scale = \frac{weight_{norm}}{\sqrt{running\_var + eps}}, \qquad
       weight' = weight \cdot scale, \qquad
       bias' = (bias - running\_mean) \cdot scale + bias_{norm}

    The layer with weight' and bias' gives what both gave together, up to rounding and zero padding included.
    All is computed in float64 and rounded once.

    Parameters
    ----------
    weight : array_like
        float32 or float64, with one entry per output channel on ``output_axis``.
    bias : array_like, shape (C,), or None
        None counts as 0.
    norm : BatchNorm
        The layer behind, with C channels, running statistics and no activation; its mode does not matter.
    output_axis : int
        The axis of weight that counts the output channels:

        * 0 for PyTorch's and Chainer's dense layers (out, in) and convolutions (O, I / groups, ...), grouped
          or not;
        * -1 for the dense layers (in, out) and convolutions (..., I / groups, O) of Keras and Flax;
        * 1 for PyTorch's and Chainer's transposed convolutions (I, O / groups, ...);
        * -2 for Keras's transposed convolutions (..., O, I).
    groups : int
        Leave it at 1 but for grouped transposed convolutions: there weight[i, o] belongs to output channel
        ``g * (O / groups) + o``, where ``g = i // (I / groups)``, which no axis alone can tell. It goes with
        ``output_axis=1`` only.

    Returns
    -------
    weight, bias : ndarray
        New arrays, weight' like weight and bias' of shape (C,), both with the dtype of weight.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        If an argument does not fit, or norm keeps no running statistics.

    References
    ----------
    Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference
    (2018), section 3.2, https://arxiv.org/abs/1712.05877.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> norm = nbnorm.BatchNorm(2, eps=0.0)
    >>> norm.running_mean, norm.running_var = [1.0, 2.0], [4.0, 0.25]
    >>> weight, bias = nbnorm.fold_batch_norm(np.eye(2), None, norm)
    >>> weight
    array([[0.5, 0. ],
           [0. , 2. ]])
    >>> bias
    array([-0.5, -4. ])
    """
    weight = _checks.array("weight", weight)
    _checks.instance("norm", norm, BatchNorm)
    axis = _checks.axis("output_axis", output_axis, weight.ndim)
    if norm.activation is not None:
        raise ValueError(f"norm has activation={norm.activation!r}, which no weight and bias can stand for")
    groups = _checks.positive_integer("groups", groups)
    _channels(weight, norm.num_features, axis, groups)
    if bias is not None:
        bias = _checks.array("bias", bias)
        _checks.shape("bias", bias, (norm.num_features,))

    state = norm.state_dict()  # copies, taken while no other thread updates them
    if "running_mean" not in state:
        raise ValueError("norm keeps no running statistics")
    mean, var = (state[name].astype(np.float64) for name in ("running_mean", "running_var"))
    scale = Moments(1.0, mean, var).rstd(norm.eps) * state.get("weight", 1.0)
    shifted = (0.0 if bias is None else bias) - mean
    folded_bias = shifted * scale + state.get("bias", 0.0)
    folded_weight = weight * _along(scale, weight, axis, groups)
    return folded_weight.astype(weight.dtype), folded_bias.astype(weight.dtype)


def _channels(weight: Array, channels: int, axis: int, groups: int) -> None:
    """Compare the output channels of weight with those of the norm."""
    if groups > 1 and axis != 1:
        raise ValueError(
            f"groups={groups} goes with output_axis=1 (transposed convolutions), got output_axis={axis}; "
            "for other convolutions leave groups at 1"
        )
    if channels % groups:
        raise ValueError(f"groups must divide norm.num_features = {channels}, got {groups}")
    if weight.shape[axis] != channels // groups:
        per_group = f" / groups = {channels // groups}" if groups > 1 else f" = {channels}"
        raise ValueError(
            f"weight has shape {weight.shape}, expected norm.num_features{per_group} on axis {axis}"
        )
    if weight.shape[0] % groups:
        raise ValueError(
            f"weight has shape {weight.shape}, expected a multiple of groups = {groups} on axis 0"
        )


def _along(scale: Array, weight: Array, axis: int, groups: int) -> Array:
    """Shape the scale of each output channel to broadcast against weight."""
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    if groups > 1:
        shape[0] = weight.shape[0]
        scale = np.repeat(scale.reshape(groups, -1), weight.shape[0] // groups, axis=0)
    return scale.reshape(shape)
