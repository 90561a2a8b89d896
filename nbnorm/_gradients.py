"""The backward pass that all norms share: check dy and the result buffers, differentiate, hand gradients out."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from nbnorm import _checks, _layout
from nbnorm._dispatch import backend
from nbnorm.saved import Saved

Array = np.ndarray
Sums = tuple[Array, Array]
GRADIENTS = ("dx", "dweight", "dbias")


def backward(
    norm: str,
    dy: Any,
    saved: Saved,
    need: Collection[str],
    out: Any,
    names: tuple[str, ...] = GRADIENTS,
) -> tuple[Array | None, ...]:
    """Return the gradients of one norm in the order of ``names``, None for those that are not wanted."""
    check_saved(norm, saved)
    needed = _checks.need(need, names)
    dy = gradient(dy, saved)
    likes = (saved.x, saved.weight, saved.bias)[: len(names)]
    wanted = [name in needed and like is not None for name, like in zip(names, likes, strict=True)]
    buffers = _buffers(out, names, likes, wanted)
    dx, sums = _differentiate(dy, saved, wanted[0], any(wanted[1:]), buffers[0])
    gradients = [dx]
    for which, like, buffer, is_wanted in zip((1, 0), likes[1:], buffers[1:], wanted[1:], strict=False):
        gradients.append(_cast(sums[which], like, buffer) if is_wanted else None)
    return tuple(gradients)


def check_saved(norm: str, saved: Any) -> None:
    """Refuse what another norm has saved."""
    _checks.instance("saved", saved, Saved)
    if saved.norm != norm:
        raise ValueError(f"saved comes from {saved.norm}_forward, expected {norm}_forward")


def gradient(dy: Any, saved: Saved) -> Array:
    """Return a checked dy in the memory order of x."""
    dy = _checks.array("dy", dy)
    _checks.shape("dy", dy, saved.x.shape)
    _checks.dtype("dy", dy, saved.x.dtype)
    return _layout.arrange(dy, saved.x)


def grad_sums(dy: Array, saved: Saved) -> Sums:
    """Sums of dz and of dz * x_hat that belong to each parameter."""
    sums: Sums = backend(saved.x).grad_sums(saved.view, saved.x, dy, *_statistics(saved))
    return sums


def input_grad(dy: Array, saved: Saved, sums: Sums | None, out: Array | None) -> Array:
    """Dx for given gradient sums, None for constant statistics."""
    target = _layout.result(saved) if out is None else out
    dx = _layout.workspace(target, saved.x, dy, saved.x)
    backend(saved.x).input_grad(
        saved.view, saved.x, dy, dx, *_statistics(saved), saved.weight, sums, saved.count
    )
    return _layout.deliver(dx, target)


def _differentiate(
    dy: Array, saved: Saved, with_dx: bool, with_parameters: bool, out: Array | None
) -> tuple[Array | None, Any]:
    """Return dx and the parameters' sums, each None where it is not wanted."""
    if not with_dx or saved.constant:
        sums = grad_sums(dy, saved) if with_parameters else None
        return input_grad(dy, saved, None, out) if with_dx else None, sums
    target = _layout.result(saved) if out is None else out
    dx = _layout.workspace(target, saved.x, dy, saved.x)
    sums = backend(saved.x).backward(
        saved.view, saved.x, dy, dx, *_statistics(saved), saved.weight, saved.count, with_parameters
    )
    return _layout.deliver(dx, target), sums


def _statistics(saved: Saved) -> tuple[Array | None, Array]:
    """Mean and rstd with one entry per slot, as kernels take them."""
    return None if saved.mean is None else saved.mean.reshape(-1), saved.rstd.reshape(-1)


def _buffers(
    out: Any, names: tuple[str, ...], likes: tuple[Array | None, ...], wanted: list[bool]
) -> tuple[Array | None, ...]:
    """Return checked result buffers; one for a gradient that is not computed is refused."""
    if out is None:
        return (None,) * len(names)
    if not isinstance(out, tuple) or len(out) != len(names):
        raise ValueError(
            f"out must be a tuple of {len(names)} arrays or None ({', '.join(names)}), got {out!r:.80}"
        )
    for i, (name, like, buffer) in enumerate(zip(names, likes, out, strict=True)):
        if buffer is not None and not wanted[i]:
            raise ValueError(f"out[{i}] was given, but {name} is not computed")
        if buffer is not None and like is not None:
            _checks.out(f"out[{i}]", buffer, like.shape, like.dtype)
            _checks.disjoint_from_parameters(f"out[{i}]", buffer, *likes[1:], *[None] * (3 - len(likes)))
            _checks.disjoint(f"out[{i}]", buffer, [(f"out[{k}]", out[k]) for k in range(i)])
    return out


def _cast(values: Array, like: Array | None, out: Array | None) -> Array:
    """Return float64 sums with the shape and dtype of a parameter, in ``out`` if it is given."""
    assert like is not None
    if out is None:
        return values.reshape(like.shape).astype(like.dtype)
    out[...] = values.reshape(like.shape)
    return out
