"""What the forward calls of all norms share: checked arguments, and where x, y and the options lie in memory."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from nbnorm import _activation, _checks, _cpu, _glance, _known, _layout, _masks, _warn
from nbnorm._dispatch import backend
from nbnorm._known import Kind
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
    sample_axis: int  # of a call with a mask
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
    key, kind = known("batch", channel_axis, None, options, x, weight, bias, out)
    if kind is not None:
        return _of_kind(operation, kind, x, weight, bias, eps, out)
    source = _checks.array("x", x)
    _checks.at_least_2d(operation, source)
    axis = _checks.axis("channel_axis", channel_axis, source.ndim)
    given = (
        _checks.parameter("weight", weight, axis, source.shape),
        _checks.parameter("bias", bias, axis, source.shape),
    )
    masked = options.mask is not None

    def planner(shape: Shape, strides: Shape, itemsize: int) -> View | None:
        return batch_view(shape, strides, itemsize, axis, masked)

    call = _call(operation, source, planner, tuple, axis, sample_axis(axis), *given, eps, out, options)
    _note(key, call, x, weight, bias, (source.shape[axis],))
    return call


def group_call(
    operation: str, x: Any, groups: int | None, weight: Any, bias: Any, eps: Any, channel_axis: Any, out: Any,
    options: Options = PLAIN,
) -> tuple[Call, Shape]:  # fmt: skip
    """Check and plan a call of group norm, or of instance norm without ``groups``; also the shape of its means."""
    key, kind = known("group", channel_axis, groups, options, x, weight, bias, out)
    if kind is not None:
        return _of_kind(operation, kind, x, weight, bias, eps, out), kind.shape
    source = _checks.array("x", x)
    _checks.at_least_2d(operation, source)
    axis = _checks.axis("channel_axis", channel_axis, source.ndim)
    channels = source.shape[axis]
    groups = channels if groups is None else _checks.num_groups(groups, channels)
    samples = sample_axis(axis)
    given = (
        _checks.parameter("weight", weight, axis, source.shape),
        _checks.parameter("bias", bias, axis, source.shape),
    )
    planner = partial(group_view, channel_axis=axis, num_groups=groups, plain=options.plain)

    def order() -> list[int]:
        return [samples, axis, *(i for i in range(source.ndim) if i not in (samples, axis))]

    call = _call(operation, source, planner, order, axis, samples, *given, eps, out, options)
    shape = source.shape[samples], groups
    _note(key, call, x, weight, bias, shape)
    return call, shape


def trailing_call(
    operation: str, x: Any, axis: Any, weight: Any, bias: Any, eps: Any, out: Any
) -> tuple[Call, Shape]:
    """Check and plan a call over trailing axes; also the shape of its means."""
    key, kind = known("trailing", axis, None, PLAIN, x, weight, bias, out)
    if kind is not None:
        return _of_kind(operation, kind, x, weight, bias, eps, out), kind.shape
    source = _checks.array("x", x)
    split = _checks.trailing_axes(operation, axis, source.ndim)
    shape, normalized = source.shape[:split], source.shape[split:]
    given = (
        _checks.normalized_parameter("weight", weight, normalized, source.shape),
        _checks.normalized_parameter("bias", bias, normalized, source.shape),
    )
    planner = partial(trailing_view, normalized=len(normalized))
    order = partial(range, source.ndim)
    call = _call(operation, source, planner, order, -1, -1, *given, eps, out, PLAIN)
    _note(key, call, x, weight, bias, shape)
    return call, shape


def known(
    family: str, axis: Any, groups: Any, options: Options, x: Any, weight: Any, bias: Any, out: Any
) -> tuple[_known.Key | None, Kind | None]:
    """Return by what a call is known, and its kind if it is; one with arrays among its options is not."""
    if options.residual is options.mask is None:
        return _known.find(family, axis, groups, options.activation, x, weight, bias, out)
    return None, None


def _of_kind(
    operation: str,
    kind: Kind,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: Any,
    out: Array | None,
) -> Call:
    """Return a call of a known kind."""
    epilogue = Epilogue(weight, bias, None, kind.activation)
    owned = _known.owned(x, weight, bias, out)
    return Call(
        operation, x, x, kind.view, None, epilogue, False, None, -1, _checks.eps(eps), out, owned, True
    )  # fmt: skip


def _note(key: _known.Key | None, call: Call, x: Any, weight: Any, bias: Any, shape: Shape) -> None:
    """Remember the kind of a call whose arrays have been taken as they are."""
    if (
        key is not None
        and call.view.size
        and call.x is x
        and call.epilogue.weight is weight
        and call.epilogue.bias is bias
    ):
        kind = Kind(call.view, shape, np.float64(call.view.values), call.epilogue.activation)
        _known.note(key, kind)


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


def normalize_known(
    operation: str, norm: str, kind: Kind, x: Array, weight: Array | None, bias: Array | None, eps: Any,
    out: Array | None, centered: bool = True, tracked: bool = False,
) -> tuple[Array, Saved]:  # fmt: skip
    """Run a forward call of a known kind by x's own statistics, in few steps; ``tracked``: m2 is saved, too."""
    eps = _checks.eps(eps)
    y = np.empty_like(x) if out is None else out
    view, shape, values, activation = kind
    epilogue = Epilogue(weight, bias, None, activation)
    mean, m2, rstd = _cpu.forward(view, x, y, epilogue, eps, centered)
    if eps == 0.0:
        warn_of_zero_over_zero(_of_kind(operation, kind, x, weight, bias, eps, out), m2)
    if len(shape) != 1:
        mean, rstd = None if mean is None else mean.reshape(shape), rstd.reshape(shape)
    saved = Saved(
        norm, x, weight, bias, mean, rstd, values, m2 if tracked else None, False, view, None, epilogue, False
    )
    return y, saved


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
