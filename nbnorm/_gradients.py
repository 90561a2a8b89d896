"""The backward pass that all norms share: check dy and the result buffers, differentiate, hand gradients out."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from nbnorm import _checks, _glance, _layout
from nbnorm._dispatch import backend
from nbnorm.saved import Saved

Array = np.ndarray
Sums = tuple[Array, Array]
GRADIENTS = ("dx", "dweight", "dbias")
WITHOUT_BIAS = GRADIENTS[:2]


def backward(
    norm: str,
    dy: Any,
    saved: Saved,
    need: Collection[str],
    out: Any,
    names: tuple[str, ...] = GRADIENTS,
) -> tuple[Array | None, ...]:
    """Return the gradients of one norm in the order of ``names``, None for those that are not wanted.

    With a residual there is one more, dresidual; who wants all of ``names`` wants it, too.
    """
    if type(saved) is not Saved or saved.norm != norm:  # small calls notice a look through the function
        check_saved(norm, saved)
    if need is names and _at_a_glance(dy, saved, out, len(names)):
        x, weight, bias, mean, rstd = saved.x, saved.weight, saved.bias, saved.mean, saved.rstd
        buffers = (_layout.empty_like(x), None, None) if out is None else out
        if rstd.ndim != 1:
            mean, rstd = _statistics(saved)
        sums = backend(x).backward(
            saved.view, x, dy, buffers[0], None, mean, rstd, saved.epilogue, saved.count, saved.mask,
            weight is not None or bias is not None,
        )  # fmt: skip
        return (buffers[0], *_parameter_gradients(sums, weight, bias, buffers, len(names)))
    known = (*names, "dresidual") if saved.with_residual else names
    needed = _needed(need, names, known)
    dy = gradient(dy, saved)
    likes = (saved.x, saved.weight, saved.bias)[: len(names)] + (saved.x,) * saved.with_residual
    wanted = [like is not None for like in likes]
    if needed is not known:
        wanted = [given and name in needed for name, given in zip(known, wanted, strict=True)]
    buffers = _buffers(out, known, likes, wanted, saved)
    inputs = [wanted[0], saved.with_residual and wanted[-1]]
    dx, dresidual, sums = _differentiate(
        dy,
        saved,
        inputs,
        any(wanted[1 : len(names)]),
        buffers[0],
        buffers[-1] if saved.with_residual else None,
    )
    weight = saved.weight if wanted[1] else None
    bias = saved.bias if names == GRADIENTS and wanted[2] else None
    gradients = (dx, *_parameter_gradients(sums, weight, bias, buffers, len(names)))
    return (*gradients, dresidual) if saved.with_residual else gradients


def _at_a_glance(dy: Any, saved: Saved, out: Any, names: int) -> bool:
    """Whether all arrays surely pass all checks, dy and dx lie in memory as x does, and one call to the backend is all.

    So it is for most calls, of which small ones notice what follows otherwise (benchmarks/small_call.py). Dx may be dy,
    but not overlap it otherwise: each owns its memory.
    """
    x = saved.x
    return (
        type(dy) is type(x) is np.ndarray
        and dy.shape == x.shape
        and dy.strides == x.strides
        and dy.dtype == x.dtype
        and dy.flags.behaved
        and not (saved.constant or saved.parts or saved.with_residual)
        and saved.order is None
        and saved.correction is None
        and (
            out is None
            or (
                type(out) is tuple
                and len(out) == names == 3
                and dy.base is None
                and _glance.fitting_gradients(*out, x, saved.weight, saved.bias)
                and out[0].strides == x.strides
            )
        )
    )


def _needed(need: Collection[str], names: tuple[str, ...], known: tuple[str, ...]) -> Collection[str]:
    """Return the names of the gradients that are wanted: all, if all of ``names`` are."""
    if need is names:
        return known
    needed = _checks.need(need, known)
    return known if needed >= set(names) else needed


def check_saved(norm: str, saved: Any) -> None:
    """Refuse what another norm has saved."""
    _checks.instance("saved", saved, Saved)
    if saved.norm != norm:
        raise ValueError(f"saved comes from {saved.norm}_forward, expected {norm}_forward")


def check_whole(saved: Saved) -> None:
    """Refuse what virtual batches have saved, whose sums are not those of one batch."""
    if saved.parts:
        raise ValueError("saved comes from a call with virtual_batch_size; use batch_norm_backward")


def gradient(dy: Any, saved: Saved) -> Any:
    """Return a checked dy in the memory order of x."""
    if not _glance.fitting(dy, saved.x):
        dy = _checks.array("dy", dy)
        _checks.shape("dy", dy, saved.x.shape)
        _checks.dtype("dy", dy, saved.x.dtype)
        _checks.together(("x", "dy"), (saved.x, dy))
    return _layout.arrange(dy, saved.x)


def grad_sums(dy: Array, saved: Saved) -> Sums:
    """Sums of dz and of dz * x_hat that belong to each parameter."""
    sums: Sums = backend(saved.x).grad_sums(
        saved.view, saved.x, dy, *_statistics(saved), saved.epilogue, saved.mask
    )
    return sums


def input_grad(
    dy: Array,
    saved: Saved,
    sums: Sums | None,
    out: Array | None,
    out_residual: Array | None,
    with_residual: bool,
) -> tuple[Array, Array | None]:
    """Dx, and dresidual if it is wanted, for given gradient sums, None for constant statistics."""
    dx, dresidual = _room(dy, saved, out, out_residual, with_residual)
    backend(saved.x).input_grad(
        saved.view, saved.x, dy, dx[1], dresidual[1], *_statistics(saved), saved.epilogue, sums, saved.count,
        saved.mask,
    )  # fmt: skip
    return _layout.deliver(dx[1], dx[0]), _delivered(dresidual)


def _differentiate(
    dy: Array,
    saved: Saved,
    inputs: list[bool],
    with_parameters: bool,
    out: Array | None,
    out_residual: Array | None,
) -> tuple[Array | None, Array | None, Any]:
    """Return dx, dresidual and the parameters' gradients, each None where it is not wanted."""
    if saved.parts:
        return _differentiate_parts(dy, saved, inputs, with_parameters, out, out_residual)
    with_dx, with_residual = inputs
    dx = dresidual = sums = None
    if (with_dx or with_residual) and (saved.constant or not with_dx):
        sums = grad_sums(dy, saved) if with_parameters else None
        dx, dresidual = input_grad(dy, saved, None, out, out_residual, with_residual)
    elif with_dx:
        rooms = _room(dy, saved, out, out_residual, with_residual)
        sums = _whole(dy, saved, rooms[0][1], rooms[1][1], with_parameters)
        dx, dresidual = _layout.deliver(rooms[0][1], rooms[0][0]), _delivered(rooms[1])
    elif with_parameters:
        sums = grad_sums(dy, saved)
    return dx if with_dx else None, dresidual, _corrected(sums, saved)


def _whole(dy: Array, saved: Saved, dx: Array, dresidual: Array | None, with_parameters: bool) -> Sums:
    """Write dx, and dresidual where there is room for it, and return the sums that belong to each parameter."""
    sums: Sums = backend(saved.x).backward(
        saved.view, saved.x, dy, dx, dresidual, *_statistics(saved), saved.epilogue, saved.count, saved.mask,
        with_parameters,
    )  # fmt: skip
    return sums


def _corrected(sums: Sums | None, saved: Saved) -> Sums | None:
    """Turn the sum of dz * x_hat into dweight where batch renormalization has changed x_hat."""
    if sums is None or saved.correction is None:
        return sums
    r, d = saved.correction
    return sums[0], sums[1] * r + sums[0] * d


def _differentiate_parts(
    dy: Array,
    saved: Saved,
    inputs: list[bool],
    with_parameters: bool,
    out: Array | None,
    out_residual: Array | None,
) -> tuple[Array | None, Array | None, Any]:
    """Differentiate each virtual batch, into its part of the results; the parameters' gradients are added."""
    dx, dresidual = _room(dy, saved, out, out_residual, inputs[1])
    total: Any = None
    for where, part in zip(saved.places, saved.parts, strict=True):
        own = dx[1][where], None if dresidual[1] is None else dresidual[1][where]
        _, _, sums = _differentiate(gradient(dy[where], part), part, inputs, with_parameters, *own)
        if with_parameters:
            total = sums if total is None else (total[0] + sums[0], total[1] + sums[1])
    return _layout.deliver(dx[1], dx[0]) if inputs[0] else None, _delivered(dresidual), total


def _room(
    dy: Array, saved: Saved, out: Array | None, out_residual: Array | None, with_residual: bool
) -> tuple[tuple[Array, Array], tuple[Array | None, Array | None]]:
    """Return, for dx and for dresidual, the result and where kernels may write it."""
    if out is None and saved.order is None and not with_residual:
        fresh = _layout.result(saved)
        return (fresh, fresh), (None, None)
    dx = _layout.result(saved) if out is None else out
    inputs = saved.x, dy, saved.epilogue.residual
    room = dx, _layout.workspace(dx, saved.x, *inputs)
    if not with_residual:
        return room, (None, None)
    dresidual = _layout.result(saved) if out_residual is None else out_residual
    return room, (dresidual, _layout.workspace(dresidual, saved.x, *inputs))


def _delivered(room: tuple[Array | None, Array | None]) -> Array | None:
    """Return an optional result in the buffer that was asked for."""
    return None if room[1] is None else _layout.deliver(room[1], room[0])


def _statistics(saved: Saved) -> tuple[Array | None, Array]:
    """Mean and rstd with one entry per slot, as kernels take them."""
    mean, rstd = saved.mean, saved.rstd
    if rstd.ndim == 1:
        return mean, rstd
    return None if mean is None else mean.reshape(-1), rstd.reshape(-1)


def _buffers(
    out: Any, names: tuple[str, ...], likes: tuple[Array | None, ...], wanted: list[bool], saved: Saved
) -> tuple[Array | None, ...]:
    """Return checked result buffers; one for a gradient that is not computed is refused."""
    if out is None:
        return (None,) * len(names)
    if not isinstance(out, tuple) or len(out) != len(names):
        raise ValueError(
            f"out must be a tuple of {len(names)} arrays or None ({', '.join(names)}), got {out!r:.80}"
        )
    distinct = _glance.distinct(*out, saved.weight, saved.bias)
    for i, buffer in enumerate(out):
        if buffer is None or (distinct and wanted[i] and _glance.fitting(buffer, likes[i])):
            continue
        name, like = f"out[{i}]", likes[i]
        if not wanted[i] or like is None:
            raise ValueError(f"{name} was given, but {names[i]} is not computed")
        _checks.out(name, buffer, like.shape, like.dtype)
        _checks.together(("x", name), (saved.x, buffer))
        _checks.disjoint_from_parameters(name, buffer, saved.weight, saved.bias)
        _checks.disjoint(name, buffer, [(f"out[{k}]", out[k]) for k in range(i)])
    return out


def input_buffers(out: Any, saved: Saved) -> tuple[Array | None, Array | None]:
    """Return checked buffers for dx and dresidual: one array, or a tuple of two with a residual."""
    if not saved.with_residual:
        return _buffers(None if out is None else (out,), ("dx",), (saved.x,), [True], saved)[0], None
    buffers = _buffers(out, ("dx", "dresidual"), (saved.x, saved.x), [True, True], saved)
    return buffers[0], buffers[1]


def _parameter_gradients(
    sums: Any, weight: Array | None, bias: Array | None, buffers: tuple[Array | None, ...], names: int
) -> tuple[Array | None, ...]:
    """Return dweight and, of three names, dbias, None where there is no such parameter or its gradient not wanted."""
    dweight = None if weight is None else _cast(sums[1], weight, buffers[1])
    if names < 3:
        return (dweight,)
    return dweight, None if bias is None else _cast(sums[0], bias, buffers[2])


def _cast(values: Array, like: Array, out: Array | None) -> Array:
    """Return float64 sums with the shape and dtype of a parameter, in ``out`` if it is given."""
    if values.shape != like.shape:
        values = values.reshape(like.shape)
    if out is None:
        return values.astype(like.dtype)
    out[...] = values
    return out
