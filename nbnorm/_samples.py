"""The steps of norms whose every sample has statistics of its own: layer, RMS, group and instance norm."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbnorm import _call
from nbnorm._call import PLAIN, Call, Options
from nbnorm.saved import Saved

Array = np.ndarray


def over_trailing_axes(
    norm: str, x: Any, axis: Any, weight: Any, bias: Any, eps: Any, out: Any, centered: bool = True
) -> tuple[Array, Saved]:
    """Normalize over the trailing axes from ``axis`` on."""
    operation = f"{norm}_forward"
    kind = _call.known("trailing", axis, None, PLAIN, x, weight, bias, out)[1]
    if kind is not None:
        return _call.normalize_known(operation, norm, kind, x, weight, bias, eps, out, centered)
    return _normalize(norm, *_call.trailing_call(operation, x, axis, weight, bias, eps, out), centered)


def over_groups(
    norm: str, x: Any, groups: Any, weight: Any, bias: Any, eps: Any, channel_axis: Any, out: Any, options: Options
) -> tuple[Array, Saved]:  # fmt: skip
    """Normalize over groups of channels, over each channel if ``groups`` is None."""
    operation = f"{norm}_forward"
    kind = _call.known("group", channel_axis, groups, options, x, weight, bias, out)[1]
    if kind is not None:
        return _call.normalize_known(operation, norm, kind, x, weight, bias, eps, out)
    call = _call.group_call(operation, x, groups, weight, bias, eps, channel_axis, out, options)
    return _normalize(norm, *call)


def _normalize(
    norm: str, call: Call, statistics: tuple[int, ...], centered: bool = True
) -> tuple[Array, Saved]:
    """Normalize by statistics of the shape ``statistics``."""
    _call.keep_inputs(call)
    if call.mask is not None:
        call = _call.counted(call)
    y, mean, m2, rstd = _call.forward(call, centered)
    if call.eps == 0.0:
        _call.warn_of_zero_over_zero(call, m2)
    count = np.float64(call.view.values) if call.mask is None else call.mask.counts[:, np.newaxis]
    mean = None if mean is None else mean.reshape(statistics)
    return y, _call.save(call, norm, mean, rstd.reshape(statistics), count, None)
