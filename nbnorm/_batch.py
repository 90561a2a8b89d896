"""The steps of batch norm that the one-call and the two-phase functions share."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from nbnorm import _checks, _layout, running
from nbnorm._dispatch import backend
from nbnorm._view import View, batch_view
from nbnorm.moments import Moments
from nbnorm.running import Pair, Rule
from nbnorm.saved import Saved

Array = np.ndarray


class Call(NamedTuple):
    """Checked arguments of a forward call; ``x`` is laid out for ``view``, ``source`` is what came."""

    operation: str
    source: Array
    x: Array
    view: View
    weight: Array | None
    bias: Array | None
    eps: float
    out: Array | None


def prepare(
    operation: str,
    x: Any,
    weight: Any,
    bias: Any,
    eps: Any,
    channel_axis: Any,
    out: Array | None,
    num_features: int | None = None,
) -> Call:
    """Check what every forward call takes, and plan; a layer knows its number of channels."""
    source = _checks.array("x", x)
    _checks.at_least_2d(operation, source)
    axis = _checks.axis("channel_axis", channel_axis, source.ndim)
    eps = _checks.eps(eps)
    if num_features is not None:
        _checks.channels(operation, source, axis, num_features)
    weight = _checks.parameter("weight", weight, axis, source.shape)
    bias = _checks.parameter("bias", bias, axis, source.shape)
    if out is not None:
        _checks.out("out", out, source.shape, source.dtype)
        _checks.disjoint_from_parameters("out", out, weight, bias)
    packed, view, _ = _layout.plan(source, partial(batch_view, channel_axis=axis))
    return Call(operation, source, packed, view, weight, bias, eps, out)


def keep_x(call: Call) -> None:
    """Refuse to write over what backward needs."""
    if call.out is not None:
        _checks.disjoint("out", call.out, [("x", call.source)], ", which backward needs")


def running_pair(call: Call, running_mean: Any, running_var: Any) -> Pair | None:
    """Return the running buffers of a training call, checked, or None."""
    if not _checks.both_or_neither(running_mean, running_var):
        return None
    pair = running.checked_pair(running_mean, running_var, call.view.slots)
    others = [("weight", call.weight), ("bias", call.bias), ("x", call.source), ("out", call.out)]
    _checks.disjoint("running_mean", pair[0], others)
    _checks.disjoint("running_var", pair[1], others)
    return pair


def forward_training(
    call: Call, running_mean: Any, running_var: Any, rule: Rule, small_batch: str
) -> tuple[Array, Saved, int | None]:
    """Normalize by the batch's own statistics, then update the running ones.

    The third result is the number of channels whose update was skipped, None if there was no update at all.
    """
    pair = running_pair(call, running_mean, running_var)
    if call.view.values == 1 and call.view.size:
        if small_batch == "running":
            return forward_single(call, pair, rule)
        refuse_single_value(call, small_batch)
        pair = None
    be, view = backend(call.x), call.view
    if rule.nonfinite == "raise":
        mean, m2 = be.moments(view, call.x)
        running.require_finite(pair, mean, running.batch_var(view.values, m2, rule.ddof), rule)
        rstd = be.rstd(m2, view.values, call.eps)
        y = normalize(call, mean, rstd)
    else:
        work = _layout.workspace(call.out, call.x)
        mean, m2, rstd = be.forward(view, call.x, work, call.weight, call.bias, call.eps)
        y = _layout.deliver(work, call.out)
    warn_of_zero_over_zero(call, m2)
    saved = _saved(call, mean, rstd, view.values, m2)
    if pair is None or not view.size:
        return y, saved, None
    return y, saved, running.update(pair, mean, running.batch_var(view.values, m2, rule.ddof), rule)


def refuse_single_value(call: Call, small_batch: str) -> None:
    """Raise or warn where one value per channel leaves no variance to train on."""
    message = f"expected more than 1 value per channel when training, got input shape {call.source.shape}"
    if small_batch == "error":
        raise ValueError(message)
    if small_batch == "warn":
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def forward_single(call: Call, pair: Pair | None, rule: Rule) -> tuple[Array, Saved, int]:
    """Normalize one value per channel by the running statistics, then update these by its deviation."""
    if pair is None:
        raise ValueError("running_mean and running_var are required when small_batch='running'")
    value, _ = backend(call.x).moments(call.view, call.x)
    var = (1.0 - rule.momentum) * (value - pair[0]) ** 2
    if rule.nonfinite == "raise":
        running.require_finite(pair, value, var, rule)
    y, saved = forward_by_constants(call, *pair)
    return y, saved, running.update(pair, value, var, rule)


def forward_by_constants(call: Call, mean: Array, var: Array) -> tuple[Array, Saved]:
    """Normalize by a mean and a variance that backward takes as constants; both are snapshotted."""
    mean = mean.astype(np.float64)
    rstd = backend(call.x).rstd(var.astype(np.float64), 1.0, call.eps)
    y = normalize(call, mean, rstd)
    return y, _saved(call, mean, rstd, call.view.values, None)


def forward_eval(call: Call, running_mean: Any, running_var: Any) -> tuple[Array, Saved]:
    """Normalize by the running statistics, as constants."""
    if running_mean is None or running_var is None:
        raise ValueError("running_mean and running_var are required when training=False")
    mean = _checks.statistic("running_mean", running_mean, call.view.slots)
    return forward_by_constants(call, mean, _checks.statistic("running_var", running_var, call.view.slots))


def forward_by_moments(call: Call, m: Moments, constant: bool) -> tuple[Array, Saved]:
    """Normalize by moments of the batch that x is a part of."""
    rstd = m.rstd(call.eps)
    y = normalize(call, m.mean, rstd)
    warn_of_zero_over_zero(call, m.m2)
    return y, _saved(call, m.mean, rstd, m.count, None if constant else m.m2)


def normalize(call: Call, mean: Array, rstd: Array) -> Array:
    """Write the result of a call for given statistics."""
    work = _layout.workspace(call.out, call.x, call.x)
    backend(call.x).apply(call.view, call.x, work, mean, rstd, call.weight, call.bias)
    return _layout.deliver(work, call.out)


def warn_of_zero_over_zero(call: Call, m2: Array) -> None:
    """Warn as NumPy does where eps = 0 meets a channel without variance."""
    if call.eps == 0.0 and call.view.size and not m2.all():
        warnings.warn(f"invalid value encountered in {call.operation}", RuntimeWarning, stacklevel=4)


def _saved(call: Call, mean: Array, rstd: Array, count: float, m2: Array | None) -> Saved:
    """Gather what backward needs; statistics without m2 are constants."""
    count = np.float64(count)
    return Saved(
        "batch_norm", call.x, call.weight, call.bias, mean, rstd, count, m2, m2 is None, call.view, None
    )
