"""What the forward calls of all norms share: checked arguments, and where x, y and the options lie in memory."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from nbnorm import _activation, _checks, _glance, _layout, _masks, _warn
from nbnorm._dispatch import backend
from nbnorm._layout import Order, Planner
from nbnorm._options import Epilogue, Mask
from nbnorm._view import View, batch_view, group_view, sample_axis, trailing_view
from nbnorm.saved import Saved

Array = np.ndarray
Shape = tuple[int, ...]
Activation = str | tuple[str, float] | None


class Call(NamedTuple):
    """Checked arguments of a forward call; ``x`` is laid out for ``view``, ``source`` is what came."""

    operation: str
    source: Array
    x: Array
    view: View
    order: tuple[int, ...] | None  # memory order of the results where it is not that of x
    epilogue: Epilogue
    with_residual: bool
    mask: Mask | None
    sample_axis: int
    eps: float
    out: Array | None
    owned: bool  # whether all that came, and ``out``, surely own their memory, seen at a glance
    apart: bool  # whether ``out`` surely shares no memory with the rest, or there is none


class Options(NamedTuple):
    """Options of a forward call as they came."""

    activation: Any = None
    residual: Any = None
    mask: Any = None

    @property
    def plain(self) -> bool:
        """Whether there are none."""
        return self.activation is None and self.residual is None and self.mask is None


PLAIN = Options()


def options_of(activation: Any = None, residual: Any = None, mask: Any = None) -> Options:
    """Return options of a forward call; a tuple of none at all is not made again, which small calls notice."""
    if activation is residual is mask is None:
        return PLAIN
    return Options(activation, residual, mask)


_TOGETHER = ("x", "weight", "bias", "residual", "out")


def batch_call(
    operation: str, x: Any, weight: Any, bias: Any, eps: Any, channel_axis: Any, out: Any,
    options: Options = PLAIN,
) -> Call:  # fmt: skip
    """Check and plan a call of batch norm."""
    source = _checks.array("x", x)
    _checks.at_least_2d(operation, source)
    axis = _checks.axis("channel_axis", channel_axis, source.ndim)
    owned = (
        _glance.fitting_inputs(source, weight, bias, out, (source.shape[axis],)) if options is PLAIN else None
    )
    if owned is not None:
        view = batch_view(source.shape, source.strides, source.itemsize, axis)
        if view is not None:
            return _at_a_glance(operation, source, view, sample_axis(axis), weight, bias, eps, out, owned)
    weight = _checks.parameter("weight", weight, axis, source.shape)
    bias = _checks.parameter("bias", bias, axis, source.shape)
    masked = options.mask is not None

    def planner(shape: Shape, strides: Shape, itemsize: int) -> View | None:
        return batch_view(shape, strides, itemsize, axis, masked)

    return _call(operation, source, planner, tuple, axis, sample_axis(axis), weight, bias, eps, out, options)


def group_call(
    operation: str, x: Any, groups: int | None, weight: Any, bias: Any, eps: Any, channel_axis: Any, out: Any,
    options: Options = PLAIN,
) -> tuple[Call, tuple[int, int]]:  # fmt: skip
    """Check and plan a call of group norm, or of instance norm without ``groups``; also the shape of its means."""
    source = _checks.array("x", x)
    _checks.at_least_2d(operation, source)
    axis = _checks.axis("channel_axis", channel_axis, source.ndim)
    channels = source.shape[axis]
    groups = channels if groups is None else _checks.num_groups(groups, channels)
    samples = sample_axis(axis)
    owned = _glance.fitting_inputs(source, weight, bias, out, (channels,)) if options is PLAIN else None
    if owned is not None:
        view = group_view(source.shape, source.strides, source.itemsize, axis, groups)
        if view is not None:
            call = _at_a_glance(operation, source, view, samples, weight, bias, eps, out, owned)
            return call, (source.shape[samples], groups)
    weight = _checks.parameter("weight", weight, axis, source.shape)
    bias = _checks.parameter("bias", bias, axis, source.shape)
    planner = partial(group_view, channel_axis=axis, num_groups=groups, plain=options.plain)

    def order() -> list[int]:
        return [samples, axis, *(i for i in range(source.ndim) if i not in (samples, axis))]

    call = _call(operation, source, planner, order, axis, samples, weight, bias, eps, out, options)
    return call, (source.shape[samples], groups)


def trailing_call(
    operation: str, x: Any, axis: Any, weight: Any, bias: Any, eps: Any, out: Any
) -> tuple[Call, tuple[int, ...]]:
    """Check and plan a call over trailing axes; also the shape of its means."""
    source = _checks.array("x", x)
    split = _checks.trailing_axes(operation, axis, source.ndim)
    normalized = source.shape[split:]
    owned = _glance.fitting_inputs(source, weight, bias, out, normalized)
    if owned is not None:
        view = trailing_view(source.shape, source.strides, source.itemsize, len(normalized))
        if view is not None:
            call = _at_a_glance(operation, source, view, -1, weight, bias, eps, out, owned)
            return call, source.shape[:split]
    weight = _checks.normalized_parameter("weight", weight, normalized, source.shape)
    bias = _checks.normalized_parameter("bias", bias, normalized, source.shape)
    planner = partial(trailing_view, normalized=len(normalized))
    order = partial(range, source.ndim)
    call = _call(operation, source, planner, order, -1, -1, weight, bias, eps, out, PLAIN)
    return call, source.shape[:split]


def _at_a_glance(
    operation: str, x: Array, view: View, samples: int, weight: Array | None, bias: Array | None, eps: Any, out: Any,
    owned: bool,
) -> Call:  # fmt: skip
    """Return a call without options whose arrays surely pass all checks and have a view as they lie in memory.

    So it is for most calls, of which small ones notice what `_call` does (benchmarks/small_call.py).
    """
    epilogue = Epilogue(weight, bias)
    return Call(
        operation, x, x, view, None, epilogue, False, None, samples, _checks.eps(eps), out, owned, True
    )  # fmt: skip


def _call(
    operation: str, source: Array, planner: Planner, order: Order, channel_axis: int, samples: int,
    weight: Array | None, bias: Array | None, eps: Any, out: Any, options: Options,
) -> Call:  # fmt: skip
    """Check what all norms take, and lay everything out for the view of x."""
    eps = _checks.eps(eps)
    _, residual, weights = options
    activation = None if options.activation is None else _checks.activation(options.activation)
    if residual is not None:
        residual = _checks.array("residual", residual)
        _checks.shape("residual", residual, source.shape)
        _checks.dtype("residual", residual, source.dtype)
    owned = _glance.owners(source, weight, bias, residual, out)
    apart = out is None or _glance.apart(out, source, weight, bias, residual)
    if out is not None and not _glance.fitting(out, source):
        _checks.out("out", out, source.shape, source.dtype)
    if not apart:
        _checks.disjoint_from_parameters("out", out, weight, bias)
    if not owned:
        _checks.together(_TOGETHER, (source, weight, bias, residual, out))
    if weights is not None:
        weights = _masks.check(weights, source.shape, channel_axis)
    x, view, results = _layout.plan(source, planner, order)
    mask = None
    if weights is not None:
        mask = _masks.arrange(weights, x, view, channel_axis)
    with_residual = residual is not None
    if residual is not None:
        residual = _layout.arrange(residual, x)
    marker = None if activation is None else _activation.marker(*activation, double=source.itemsize == 8)
    epilogue = Epilogue(weight, bias, residual, marker)
    return Call(
        operation, source, x, view, results, epilogue, with_residual, mask, samples, eps, out, owned, apart
    )


def keep_inputs(call: Call) -> None:
    """Refuse to write over what backward needs: x, and the residual below an activation."""
    if call.apart or call.out is None:
        return
    _checks.disjoint("out", call.out, [("x", call.source)], ", which backward needs")
    if call.epilogue.activation is not None:
        residual = [("residual", call.epilogue.residual)]
        _checks.disjoint("out", call.out, residual, ", which backward needs for the activation")


def counted(call: Call) -> Call:
    """Prepare a masked call for statistics of its own: what has none at all leaves no trace, NaN or not."""
    assert call.mask is not None
    return call._replace(x=_masks.without_uncounted(call.x, call.mask, call.sample_axis))


def forward(call: Call, centered: bool = True) -> tuple[Array, Array | None, Array, Array]:
    """Normalize x by its own statistics; return y, mean, m2 and rstd."""
    target, work = _room(call)
    mean, m2, rstd = backend(call.x).forward(
        call.view, call.x, work, call.epilogue, call.eps, centered, call.mask
    )
    return target if work is target else _layout.deliver(work, target), mean, m2, rstd


def apply(call: Call, mean: Array, rstd: Array) -> Array:
    """Normalize x by given statistics."""
    target, work = _room(call)
    backend(call.x).apply(call.view, call.x, work, mean, rstd, call.epilogue)
    return _layout.deliver(work, target)


def _room(call: Call) -> tuple[Array, Array]:
    """Return the result, and where kernels may write it."""
    target = _layout.empty_like(call.source) if call.out is None else call.out
    if call.apart and target.strides == call.x.strides:
        return target, target
    return target, _layout.workspace(target, call.x, call.x, call.epilogue.residual)


def normalize(
    norm: str, call: Call, statistics: tuple[int, ...], centered: bool = True
) -> tuple[Array, Saved]:
    """Run a forward call whose every sample has statistics of its own, of the shape ``statistics``."""
    keep_inputs(call)
    if call.mask is not None:
        call = counted(call)
    y, mean, m2, rstd = forward(call, centered)
    if call.eps == 0.0:
        warn_of_zero_over_zero(call, m2)
    count = np.float64(call.view.values) if call.mask is None else call.mask.counts[:, np.newaxis]
    mean = None if mean is None else mean.reshape(statistics)
    return y, save(call, norm, mean, rstd.reshape(statistics), count, None)


def warn_of_zero_over_zero(call: Call, m2: Array) -> None:
    """For eps = 0, warn as NumPy does where it meets a slot without variance; on a device a look would wait for it."""
    if call.mask is not None and not call.mask.counts.all():
        return
    if call.view.size and isinstance(m2, np.ndarray) and not m2.all():
        _warn.warn(f"invalid value encountered in {call.operation}")


def save(
    call: Call, norm: str, mean: Array | None, rstd: Array, count: Any, m2: Array | None, constant: bool = False,
    epilogue: Epilogue | None = None, **more: Any,
) -> Saved:  # fmt: skip
    """Gather what backward needs, by another epilogue than that of the call if one is given.

    A residual is read again only below an activation.
    """
    weight, bias, residual, activation = epilogue = call.epilogue if epilogue is None else epilogue
    if residual is not None and activation is None:
        epilogue = Epilogue(weight, bias)
    return Saved(
        norm, call.x, call.epilogue.weight, call.epilogue.bias, mean, rstd, count, m2, constant, call.view,
        call.order, epilogue, call.with_residual, call.mask, **more,
    )  # fmt: skip
