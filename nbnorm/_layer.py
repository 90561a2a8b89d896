"""How every layer is called: forward, what it remembers, backward, and the buffers that may be reused."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from nbnorm import _checks, _layout
from nbnorm._buffers import Buffers
from nbnorm._state import State
from nbnorm.saved import Saved

Array = np.ndarray


class Layer(State, ABC):
    """A norm with its state; what a kind of layer adds is how it calls its functions."""

    # The backward function; behind dx it returns the gradients of these parameters.
    _differentiate: ClassVar[Callable[..., tuple[Array | None, ...]]]
    _parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")
    _transient: ClassVar[tuple[str, ...]] = ("_lock", "_saved", "_latest", "_buffers")

    def __init__(
        self,
        shape: tuple[int, ...],
        affine: bool,
        center: bool,
        scale: bool,
        eps: float,
        dtype: Any,
        xp: ModuleType,
        reuse_buffers: bool,
    ) -> None:
        self.eps = _checks.eps(eps)
        self.reuse_buffers = bool(reuse_buffers)
        super().__init__(shape, affine, center, scale, dtype, xp)

    def _begin(self) -> None:
        """Start without calls in flight."""
        super()._begin()
        self._saved: Saved | None = None
        # rstd of the last call stands for the call: it is small, and no other call has the same array.
        self._latest: Array | None = None
        self._buffers = Buffers() if self.reuse_buffers else None

    def __call__(self, x: Any, *, out: Array | None = None, keep: bool = True) -> Array:
        """Normalize x and, with ``keep``, remember what `backward` needs."""
        return self._call(keep, x, out=out)

    def forward(self, x: Any, *, out: Array | None = None) -> tuple[Array, Saved]:
        """Normalize x; return y and what `backward` needs, for several calls in flight."""
        return self._forward(x, out)

    def _call(self, keep: bool, x: Any, **options: Any) -> Array:
        """Run `forward` and remember or forget what it saved."""
        self._saved = None  # a call that fails must not leave the one before to backward
        y, saved = self.forward(x, **options)
        self._saved = saved if keep else None
        return y

    def _forward(self, x: Any, out: Array | None, **options: Any) -> tuple[Array, Saved]:
        """Normalize x with the options that are not None, into a kept buffer if the layer has such."""
        x = _checks.array("x", x)
        given = {name: value for name, value in options.items() if value is not None}
        if self._buffers is not None and out is None:
            for name, value in {"x": x, **given}.items():
                _checks.not_a_result(name, value, self._buffers)
            out = self._buffers.get("y", x)
        y, saved = self._normalize(x, out, **given)
        self._latest = saved.rstd
        return y, saved

    @abstractmethod
    def _normalize(self, x: Array, out: Array | None, **options: Any) -> tuple[Array, Saved]:
        """Call the forward function."""

    def backward(
        self, dy: Any, saved: Saved | None = None, *, accumulate: bool = False, out: Any = None
    ) -> Any:
        """Return dx and put the parameters' gradients into `grads`, or add them with ``accumulate``.

        Without ``saved`` the last call of the layer that kept its state is meant. Where that had a residual,
        the result is ``(dx, dresidual)``, and ``out`` a pair of buffers.
        """
        saved = self._recall(saved)
        outs = _checks.pair("out", out) if saved.with_residual else (out,)
        wanted = zip(("dx", "dresidual"), outs, strict=False)
        dx, *rest = (self._like_x(name, saved, buffer) for name, buffer in wanted)
        into = (self._like_parameter(name, accumulate) for name in self._parameters)
        gradients = self._differentiate(dy, saved, out=(dx, *into, *rest))
        if accumulate:
            self._accumulate(gradients[1:])
        return (gradients[0], gradients[-1]) if rest else gradients[0]

    def _recall(self, saved: Saved | None) -> Saved:
        """Return the state that backward is to use."""
        saved = self._saved if saved is None else saved
        if saved is None:
            raise RuntimeError("backward called before forward, or after a call with keep=False")
        _checks.instance("saved", saved, Saved)
        if self._buffers is not None and saved.rstd is not self._latest:
            raise RuntimeError(
                "saved is stale: with reuse_buffers=True it is good until the layer's next forward; "
                "run backward first, or make the layer without reuse_buffers"
            )
        return saved

    def _like_x(self, name: str, saved: Saved, out: Array | None) -> Array | None:
        """Return the buffer of a gradient by an array like x: the given one, a kept one, or None."""
        if out is not None or self._buffers is None:
            return out
        return self._buffers.get((name, saved.order), saved.x, lambda: _layout.result(saved))

    def _like_parameter(self, name: str, accumulate: bool) -> Array | None:
        """Return where the gradient of a parameter goes: to its place, or where it waits to be added."""
        gradient = self.grads.get(name)
        if gradient is None or not accumulate:
            return gradient
        return None if self._buffers is None else self._buffers.get(name, gradient)

    def _accumulate(self, gradients: tuple[Array | None, ...]) -> None:
        """Add to the gradients that are there; two threads lose nothing."""
        with self._lock:
            for name, gradient in zip(self._parameters, gradients, strict=False):
                if gradient is not None:
                    self.grads[name] += gradient


class ChannelLayer(Layer):
    """A norm with parameters per channel, whose results may be added to and activated in the same pass."""

    def __init__(
        self,
        channels: int,
        affine: bool,
        center: bool,
        scale: bool,
        eps: float,
        channel_axis: int,
        activation: Any,
        dtype: Any,
        xp: ModuleType,
        reuse_buffers: bool,
    ) -> None:
        self._channels = channels
        self.channel_axis = _checks.integer("channel_axis", channel_axis)
        _checks.activation(activation)
        self.activation = activation
        super().__init__((channels,), affine, center, scale, eps, dtype, xp, reuse_buffers)

    def __call__(
        self, x: Any, *, residual: Any = None, mask: Any = None, out: Array | None = None, keep: bool = True
    ) -> Array:
        """Normalize x, as `forward` does, and with ``keep`` remember what `backward` needs."""
        return self._call(keep, x, residual=residual, mask=mask, out=out)

    def forward(
        self, x: Any, *, residual: Any = None, mask: Any = None, out: Array | None = None
    ) -> tuple[Array, Saved]:
        """Normalize x, add the residual, activate; return y and what `backward` needs, for several calls in flight.

        The mask says which positions count for the statistics.
        """
        return self._forward(x, out, activation=self.activation, residual=residual, mask=mask)

    def _forward(self, x: Any, out: Array | None, **options: Any) -> tuple[Array, Saved]:
        """Compare the channels of x with the layer's: otherwise a parameter would be blamed."""
        x, name = _checks.array("x", x), type(self).__name__
        _checks.at_least_2d(name, x)
        axis = _checks.axis("channel_axis", self.channel_axis, x.ndim)
        _checks.channels(name, x, axis, self._channels)
        return super()._forward(x, out, **options)
