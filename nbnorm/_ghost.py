"""Ghost batch norm: virtual batches of consecutive samples, each normalized by its own statistics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nbnorm import _batch, _call, _checks, _layout, _masks, running
from nbnorm._batch import Training
from nbnorm._call import Call, Options
from nbnorm._dispatch import backend
from nbnorm._view import sample_axis
from nbnorm.moments import Moments
from nbnorm.running import Pair
from nbnorm.saved import Saved

Array = np.ndarray
Slices = list[tuple[slice, ...]]


def slices(x_shape: tuple[int, ...], channel_axis: int, size: int) -> Slices:
    """Return where each virtual batch lies: ``size`` samples, fewer in the last one."""
    at = sample_axis(channel_axis)
    before, samples = (slice(None),) * at, x_shape[at]
    return [(*before, slice(start, start + size)) for start in range(0, max(samples, 1), size)]


def forward_training(
    operation: str, x: Any, weight: Any, bias: Any, eps: Any, channel_axis: Any, out: Any, options: Options,
    running_mean: Any, running_var: Any, size: int | None, settings: Training,
) -> tuple[Array, Saved, int | None]:  # fmt: skip
    """Normalize each virtual batch of ``size``, or the batch; its moments enter the running statistics once."""
    if size is None:
        kind = _call.known("batch", channel_axis, None, options, x, weight, bias, out)[1]
        found = None
        if kind is not None:
            found = _batch.forward_known(
                operation, kind, x, weight, bias, eps, out, running_mean, running_var, settings
            )
        if found is not None:
            return found
    call = _call.batch_call(operation, x, weight, bias, eps, channel_axis, out, options)
    _call.keep_inputs(call)
    if size is None:
        return _batch.forward_training(call, running_mean, running_var, settings)
    axis = _checks.axis("channel_axis", channel_axis, call.source.ndim)
    if call.view.size and _masks.single(call.mask, call.view):
        y, alone, update = _batch.forward_training(call, running_mean, running_var, settings)
        mean, rstd = np.asarray(alone.mean)[np.newaxis], alone.rstd[np.newaxis]
        return y, alone._replace(mean=mean, rstd=rstd), update
    pair = _batch.running_pair(call, running_mean, running_var)
    y = _room(call)
    where = slices(call.source.shape, axis, size)
    calls = list(_parts(call, where, axis, options, y))
    singles = [_batch.single(part, settings) for part in calls]
    if settings.small_batch == "running" and pair is None and any(singles):
        raise ValueError("running_mean and running_var are required when small_batch='running'")
    if settings.rule.nonfinite == "raise":
        mean, m2 = backend(call.x).moments(call.view, call.x, True, call.mask)
        running.require_finite(pair, Moments(_batch.count_of(call), mean, m2), settings.rule)
        settings = settings._replace(rule=settings.rule._replace(nonfinite="propagate"))
    parts = tuple(_normalize(part, pair, settings) for part in calls)
    saved = _call.save(
        call, "batch_norm", np.stack([part.mean for part in parts if part.mean is not None]),
        np.stack([part.rstd for part in parts]),
        _batch.count_of(call), None, False, parts=parts,
        places=tuple(where), whole=_moments(calls, parts),
    )  # fmt: skip
    return _layout.deliver(y, call.out), saved, _batch.track(saved, pair, settings.rule)


def _room(call: Call) -> Array:
    """Return where all virtual batches are written: not into a residual that later ones still read."""
    residual = call.epilogue.residual
    if call.out is None or (residual is not None and _checks.overlap(call.out, residual)):
        return _layout.empty_like(call.source)  # type: ignore[no-any-return]
    return call.out


def _normalize(call: Call, pair: Pair | None, settings: Training) -> Saved:
    """Normalize one virtual batch; one with a single value by the running statistics if that is wanted."""
    alone = settings.small_batch == "running" and _masks.single(call.mask, call.view)
    if alone and call.view.size and pair is not None:
        return _batch.forward_by_constants(call, *pair)[1]
    return _batch.normalize_batch(call, pair, settings)[1]


def _moments(calls: list[Call], parts: tuple[Saved, ...]) -> Moments:
    """Merge the moments of all virtual batches; one normalized by constants has but one value."""
    whole = Moments.empty(parts[0].rstd.size)
    for call, part in zip(calls, parts, strict=True):
        own = part.moments
        if own is None:
            own = Moments(1.0, *backend(call.x).moments(call.view, call.x, True, call.mask))
        whole = whole.merge(own)
    return whole


def _parts(call: Call, where: Slices, axis: int, options: Options, y: Array) -> Iterator[Call]:
    """Plan a call for each virtual batch."""
    mask = None
    if options.mask is not None:
        mask = _masks.check(options.mask, call.source.shape, axis)
    residual = None if options.residual is None else _checks.array("residual", options.residual)
    for part in where:
        own = Options(
            options.activation,
            None if residual is None else residual[part],
            None if mask is None else mask[part[-1]],
        )
        weight, bias = call.epilogue.weight, call.epilogue.bias
        yield _call.batch_call(call.operation, call.source[part], weight, bias, call.eps, axis, y[part], own)
