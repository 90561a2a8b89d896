"""The steps of batch norm that the one-call function, the two-phase functions and the layer share."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from nbnorm import _call, _checks, _glance, _known, _masks, _warn, running
from nbnorm._call import Call
from nbnorm._dispatch import backend
from nbnorm._known import Kind
from nbnorm._options import Epilogue
from nbnorm.moments import Moments
from nbnorm.running import Pair, Rule
from nbnorm.saved import Saved

Array = np.ndarray


class Training(NamedTuple):
    """Checked settings of a training call."""

    rule: Rule
    small_batch: str
    renorm: tuple[float, float] | None = None


def training(momentum: Any, ddof: Any, small_batch: Any, nonfinite: Any, renorm: Any = None) -> Training:
    """Check the settings of a training call; those that have passed are remembered."""
    try:
        return _training(momentum, ddof, small_batch, nonfinite, renorm)
    except TypeError:  # not hashable
        return _training.__wrapped__(momentum, ddof, small_batch, nonfinite, renorm)


@lru_cache(maxsize=256, typed=True)
def _training(momentum: Any, ddof: Any, small_batch: Any, nonfinite: Any, renorm: Any) -> Training:
    rule = Rule(_checks.momentum(momentum), _checks.ddof(ddof), nonfinite)
    _checks.choice("small_batch", small_batch, _checks.SMALL_BATCH)
    _checks.choice("nonfinite", nonfinite, _checks.NONFINITE)
    return Training(rule, small_batch, _checks.renorm(renorm))


def running_pair(call: Call, running_mean: Any, running_var: Any) -> Pair | None:
    """Return the running buffers of a training call, checked, or None."""
    if running_mean is None and running_var is None:
        return None
    weight, bias, residual, _ = call.epilogue
    others = (call.source, weight, bias, residual, call.out)
    if call.owned and _glance.fitting_pair(running_mean, running_var, call.view.slots, *others):
        return running_mean, running_var
    _checks.both_or_neither(running_mean, running_var)
    pair = running.checked_pair(running_mean, running_var, "x", call.source, call.view.slots)
    for name, buffer in zip(("running_mean", "running_var"), pair, strict=True):
        if not _glance.apart(buffer, *others):
            named = zip(("x", "weight", "bias", "residual", "out"), others, strict=True)
            _checks.disjoint(name, buffer, named)
    return pair


def forward_training(
    call: Call, running_mean: Any, running_var: Any, settings: Training
) -> tuple[Array, Saved, int | None]:
    """Normalize by the batch's own statistics, then update the running ones.

    The third result is the number of channels whose update was skipped, None if there was no update at all.
    """
    pair = running_pair(call, running_mean, running_var)
    if single(call, settings):
        if settings.small_batch == "running":
            return forward_single(call, pair, settings.rule)
        pair, settings = None, settings._replace(renorm=None)
    y, saved = normalize_batch(call, pair, settings)
    return y, saved, track(saved, pair, settings.rule)


def forward_known(
    operation: str, kind: Kind, x: Array, weight: Array | None, bias: Array | None, eps: Any, out: Array | None,
    running_mean: Any, running_var: Any, settings: Training,
) -> tuple[Array, Saved, int | None] | None:  # fmt: skip
    """`forward_training` for a call of a known kind in few steps; None where it takes more of them."""
    if settings.renorm is not None or settings.rule.nonfinite == "raise" or kind.values == 1.0:
        return None
    pair = None
    if running_mean is not None or running_var is not None:
        if not (
            _known.owned(x, weight, bias, out)
            and _glance.fitting_pair(running_mean, running_var, kind.view.slots, x, weight, bias, None, out)
        ):
            return None
        pair = running_mean, running_var
    y, saved = _call.normalize_known(operation, "batch_norm", kind, x, weight, bias, eps, out, tracked=True)
    return y, saved, None if pair is None else running.update(pair, saved, settings.rule)


def track(saved: Saved, pair: Pair | None, rule: Rule) -> int | None:
    """Let the moments of a batch enter the running statistics; return how many channels were left out."""
    if pair is None or saved.count == 0.0 or not saved.view.size:
        return None
    return running.update(pair, saved.whole or saved, rule)


def normalize_batch(call: Call, pair: Pair | None, settings: Training) -> tuple[Array, Saved]:
    """Normalize by the batch's own statistics, corrected towards the running ones by batch renormalization."""
    if call.mask is not None:
        call = _call.counted(call)
    correction = None
    count = count_of(call)
    rule = settings.rule
    if settings.renorm is not None or rule.nonfinite == "raise":
        mean, m2 = backend(call.x).moments(call.view, call.x, True, call.mask)
        m = Moments(count, mean, m2)
        if rule.nonfinite == "raise":
            running.require_finite(pair, m, rule)
        rstd = m.rstd(call.eps)
        if settings.renorm is not None:
            correction = renormalization(call, mean, m2, count, pair, settings.renorm)
        epilogue = corrected(call.epilogue, correction)
        y = _call.apply(call._replace(epilogue=epilogue), mean, rstd)
        saved = _call.save(
            call, "batch_norm", mean, rstd, count, m2, epilogue=epilogue, correction=correction
        )
    else:
        y, mean, m2, rstd = _call.forward(call)
        saved = _call.save(call, "batch_norm", mean, rstd, count, m2)
    if call.eps == 0.0:
        _call.warn_of_zero_over_zero(call, m2)
    return y, saved


def count_of(call: Call) -> np.float64:
    """Number of values that count in each channel."""
    return np.float64(call.view.values) if call.mask is None else call.mask.counts.sum()


def renormalization(
    call: Call, mean: Array, m2: Array, count: float, pair: Pair | None, limits: tuple[float, float]
) -> tuple[Array, Array]:
    """Return r and d of batch renormalization, which bring x_hat near that of the running statistics.

    r = clip(std / running_std, 1 / r_max, r_max), d = clip((mean - running_mean) / running_std, -d_max, d_max).
    """
    if pair is None:
        raise ValueError("running_mean and running_var are required with renorm")
    r_max, d_max = limits
    with np.errstate(all="ignore"):
        running_std = np.sqrt(pair[1].astype(np.float64) + call.eps)
        std = np.sqrt((m2 / count if count else m2) + call.eps)
        r = np.clip(std / running_std, 1.0 / r_max, r_max)
        d = np.clip((mean - pair[0]) / running_std, -d_max, d_max)
    return r, d


def corrected(epilogue: Epilogue, correction: Pair | None) -> Epilogue:
    """Return what follows x_hat if x_hat * r + d takes its place."""
    if correction is None:
        return epilogue
    weight, bias = epilogue.weight, epilogue.bias
    r, d = correction
    shift = d if weight is None else d * weight
    return epilogue._replace(
        weight=r if weight is None else r * weight, bias=shift if bias is None else shift + bias
    )


def single(call: Call, settings: Training) -> bool:
    """Whether one value per channel leaves no variance to train on; raise or warn about it if that is wanted."""
    if not call.view.size or not _masks.single(call.mask, call.view):
        return False
    message = f"expected more than 1 value per channel when training, got input shape {call.source.shape}"
    if call.mask is not None:
        message += " and a mask that counts one of them"
    if settings.small_batch == "error":
        raise ValueError(message)
    if settings.small_batch == "warn":
        _warn.warn(message)
    return True


def forward_single(call: Call, pair: Pair | None, rule: Rule) -> tuple[Array, Saved, int]:
    """Normalize one value per channel by the running statistics, then update these by its deviation."""
    if pair is None:
        raise ValueError("running_mean and running_var are required when small_batch='running'")
    value, _ = backend(call.x).moments(call.view, call.x, True, call.mask)
    m = Moments(1.0, value, (1.0 - rule.momentum) * (value - pair[0]) ** 2)
    rule = rule._replace(ddof=0)
    if rule.nonfinite == "raise":
        running.require_finite(pair, m, rule)
    y, saved = forward_by_constants(call, *pair)
    return y, saved, running.update(pair, m, rule)


def forward_by_constants(call: Call, mean: Array, var: Array) -> tuple[Array, Saved]:
    """Normalize by a mean and a variance that backward takes as constants; both are snapshotted."""
    mean = mean.astype(np.float64)
    rstd = backend(call.x).rstd(var.astype(np.float64), 1.0, call.eps)
    y = _call.apply(call, mean, rstd)
    return y, _call.save(call, "batch_norm", mean, rstd, count_of(call), None, True)


def forward_eval(call: Call, running_mean: Any, running_var: Any) -> tuple[Array, Saved]:
    """Normalize by the running statistics, as constants."""
    _call.keep_inputs(call)
    if running_mean is None or running_var is None:
        raise ValueError("running_mean and running_var are required when training=False")
    mean = _checks.statistic("running_mean", running_mean, call.view.slots)
    return forward_by_constants(call, mean, _checks.statistic("running_var", running_var, call.view.slots))


def forward_by_moments(call: Call, m: Moments, constant: bool) -> tuple[Array, Saved]:
    """Normalize by moments of the batch that x is a part of."""
    rstd = m.rstd(call.eps)
    y = _call.apply(call, m.mean, rstd)
    if call.eps == 0.0:
        _call.warn_of_zero_over_zero(call, m.m2)
    m2 = None if constant else m.m2
    return y, _call.save(call, "batch_norm", m.mean, rstd, m.count, m2, constant)
