"""Running statistics: how the moments of a batch enter them, and what keeps bad ones out."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nbnorm import _checks, _glance
from nbnorm._dispatch import backend, library
from nbnorm.moments import Moments

Pair = tuple[np.ndarray, np.ndarray]


class Rule(NamedTuple):
    """How a batch enters the running statistics; the arguments of `update_running_stats`."""

    momentum: float
    ddof: int
    nonfinite: str


def update_running_stats(
    running_mean: np.ndarray,
    running_var: np.ndarray,
    m: Moments,
    momentum: float = 0.1,
    ddof: int = 1,
    *,
    nonfinite: str = "propagate",
) -> None:
    """Blend the moments of a batch into the running statistics, in place.

    ``running = (1 - momentum) * running + momentum * batch``, computed in float64.

    Parameters
    ----------
    running_mean, running_var : ndarray, shape (C,)
        float32 or float64.
    m : Moments
        Of the whole batch. Without values nothing changes; with one value and ``ddof=1`` only the mean does.
    momentum : float
        Weight of the new value, from 0 (nothing changes) to 1 (assign).
    ddof : {0, 1}
        The batch variance is m2 / (count - ddof).
    nonfinite : {"propagate", "skip", "raise"}
        What a non-finite result does: enters; leaves the channel's old values; raises before any write.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.
    FloatingPointError
        With ``nonfinite="raise"``.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> mean, var = np.zeros(1), np.ones(1)
    >>> nbnorm.update_running_stats(mean, var, nbnorm.batch_moments(np.array([[1.0], [3.0]])), momentum=0.5)
    >>> mean, var
    (array([1.]), array([1.5]))
    """
    _checks.instance("m", m, Moments)
    pair = checked_pair(running_mean, running_var, "m", m.mean, m.mean.size)
    rule = Rule(_checks.momentum(momentum), _checks.ddof(ddof), nonfinite)
    _checks.choice("nonfinite", nonfinite, _checks.NONFINITE)
    if m.count == 0.0:
        return
    if nonfinite == "raise":
        require_finite(pair, m, rule)
    update(pair, m, rule)


def checked_pair(running_mean: Any, running_var: Any, name: str, batch: Any, channels: int) -> Pair:
    """Return both buffers if they can be updated by what comes of ``batch``, an array."""
    pair = (
        _checks.running("running_mean", running_mean, channels),
        _checks.running("running_var", running_var, channels),
    )
    _checks.together((name, "running_mean", "running_var"), (batch, *pair))
    if not _glance.apart(*pair):
        _checks.disjoint("running_var", pair[1], [("running_mean", pair[0])])
    return pair


def update(pair: Pair, m: Any, rule: Rule) -> int:
    """Update checked buffers by a count, a mean and an m2, the variance only if the count leaves it a freedom.

    Returns how many channels were left out.
    """
    if rule.momentum == 0.0:
        return 0
    dense = pair
    if not (pair[0].flags.c_contiguous and pair[1].flags.c_contiguous):
        xp = library(m.mean)
        dense = xp.ascontiguousarray(pair[0]), xp.ascontiguousarray(pair[1])
    skipped: int = backend(m.mean).update_running(
        *dense, m.mean, m.m2, float(m.count) - rule.ddof, rule.momentum, rule.nonfinite == "skip"
    )
    if dense is not pair:
        pair[0][...], pair[1][...] = dense
    return skipped


def require_finite(pair: Pair | None, m: Moments, rule: Rule) -> None:
    """Raise if batch statistics are not finite or would overflow the running buffers."""
    bad = ~np.isfinite(m.mean)
    if m.count > rule.ddof:
        bad |= ~np.isfinite(m.var(rule.ddof))
    if pair is not None:
        trial = (pair[0].copy(), pair[1].copy())
        update(trial, m, rule._replace(nonfinite="propagate"))
        for before, after in zip(pair, trial, strict=True):
            bad |= np.isfinite(before) & ~np.isfinite(after)
    if bad.any():
        channels = np.flatnonzero(bad)
        shown = ", ".join(str(channel) for channel in channels[:5]) + (", ..." if channels.size > 5 else "")
        raise FloatingPointError(
            f"batch statistics are not finite, or overflow the running ones, in {channels.size} of "
            f"{m.mean.size} channels: {shown}"
        )
