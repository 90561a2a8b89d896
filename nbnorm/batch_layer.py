"""Batch norm as a layer: the one norm with statistics that outlive a call."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from nbnorm import _batch, _call, _checks, _ghost, functional
from nbnorm._layer import ChannelLayer
from nbnorm._state import Entry
from nbnorm.saved import Saved

Array = np.ndarray


class BatchNorm(ChannelLayer):
    r"""Batch normalization with learned scale and shift and running statistics.

    .. math:: y = act\left(\frac{x - mean}{\sqrt{var + eps}} \cdot weight + bias + residual\right)

    Mean and (biased) variance are those of the batch in training, and the running ones in eval mode.

    Parameters
    ----------
    num_features : int
        Number of channels C.
    eps : float
        Added to the variance.
    momentum : float or None
        Weight of the new value in the running statistics, as in PyTorch; None averages all batches equally.
    affine : bool
        Whether there are a scale and a shift at all; False overrides ``center`` and ``scale``.
    center, scale : bool
        Whether there is a shift (``bias``) and a scale (``weight``).
    track_running_stats : bool
        Whether running statistics are kept; without them the batch's are used in eval mode, too.
    channel_axis : int
        The axis of the channels: 1 for channels first, -1 for channels last.
    activation : None, "relu", ("leaky_relu", slope) or "silu"
        Applied in the same pass.
    ddof : {0, 1}
        1 keeps the unbiased running variance (PyTorch), 0 the biased one (Keras).
    renorm : (float, float), optional
        The bounds (r_max, d_max) of batch renormalization, see `batch_norm_forward`.
    virtual_batch_size : int, optional
        Number of samples that share statistics in training, see `batch_norm_forward`.
    small_batch : {"error", "warn", "zero", "running"}
        What happens in training when a channel has one value only, see `batch_norm_forward`.
    nonfinite : {"propagate", "skip", "raise"}
        What a NaN or infinite batch statistic does to the running ones, see `batch_norm_forward`.
    dtype : dtype
        Of parameters and running statistics, float32 or float64; x may have another.
    xp : module
        The library of parameters and running statistics, numpy or cupy.
    reuse_buffers : bool
        Whether results are written into the same arrays again and again, one per shape and layout: a training
        loop allocates none after its first step. A result is good until the layer's next call, which must not
        come before backward, nor from another thread.

    Attributes
    ----------
    params, grads : dict of str to ndarray
        ``weight`` and ``bias`` and their gradients, for an optimizer that updates them in place.
    running_mean, running_var : ndarray or None
        Running statistics, shape (C,).
    num_batches_tracked : int
        Number of batches that have entered them.
    skipped_updates : int
        Channel updates that ``nonfinite="skip"`` has left out.
    training : bool
        The mode, set by `train` and `eval`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    References
    ----------
    Ioffe, Szegedy: Batch Normalization (2015), https://arxiv.org/abs/1502.03167.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> bn = nbnorm.BatchNorm(3)
    >>> x = np.arange(12, dtype=np.float32).reshape(4, 3)
    >>> y = bn(x)
    >>> dx = bn.backward(np.ones_like(y))
    >>> bn.grads["bias"]
    array([4., 4., 4.], dtype=float32)
    """

    running_mean = Entry("Running mean, None if none is kept; assigning copies the values.")
    running_var = Entry("Running variance, None if none is kept; assigning copies the values.")
    _differentiate = staticmethod(functional.batch_norm_backward)
    _transient: ClassVar[tuple[str, ...]] = (*ChannelLayer._transient, "_observe")

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        center: bool = True,
        scale: bool = True,
        track_running_stats: bool = True,
        channel_axis: int = 1,
        activation: Any = None,
        ddof: int = 1,
        renorm: tuple[float, float] | None = None,
        virtual_batch_size: int | None = None,
        small_batch: str = "error",
        nonfinite: str = "propagate",
        dtype: Any = np.float32,
        xp: ModuleType = np,
        reuse_buffers: bool = False,
    ) -> None:
        self.num_features = _checks.positive_integer("num_features", num_features)
        super().__init__(
            self.num_features, affine, center, scale, eps, channel_axis, activation, dtype, xp, reuse_buffers
        )
        self.momentum = None if momentum is None else _checks.momentum(momentum)
        self.track_running_stats = bool(track_running_stats)
        self.ddof = _checks.ddof(ddof)
        self.renorm = _checks.renorm(renorm)
        self.virtual_batch_size = _checks.virtual_batch_size(virtual_batch_size)
        self.small_batch = _checks.choice("small_batch", small_batch, _checks.SMALL_BATCH)
        self.nonfinite = _checks.choice("nonfinite", nonfinite, _checks.NONFINITE)
        self.skipped_updates = 0
        self._running: dict[str, Array] = {}
        if self.track_running_stats:
            self._running["running_mean"] = xp.zeros(self.num_features, self.dtype)
            self._running["running_var"] = xp.ones(self.num_features, self.dtype)
        self._tracked = np.zeros((), np.int64)  # an array, as state dicts want it; on the host

    def _begin(self) -> None:
        """Start without calls in flight."""
        super()._begin()
        self._observe: Callable[..., None] | None = None  # sees the batches of `reestimate`

    @property
    def num_batches_tracked(self) -> int:
        """Number of batches in the running statistics."""
        return int(self._tracked)

    def _normalize(self, x: Array, out: Array | None, **options: Any) -> tuple[Array, Saved]:
        """Normalize by the batch in training, else by a snapshot of the running statistics."""
        weight, bias = self.params.get("weight"), self.params.get("bias")
        given = "BatchNorm", x, weight, bias, self.eps, self.channel_axis, out, _call.options_of(**options)
        with self._lock:
            if self.training or not self._running:
                momentum = 1.0 / (self.num_batches_tracked + 1) if self.momentum is None else self.momentum
                momentum = 0.0 if self._observe else momentum
                settings = _batch.training(momentum, self.ddof, self.small_batch, self.nonfinite, self.renorm)
                mean, var = self._running.values() or (None, None)
                y, saved, update = _ghost.forward_training(
                    *given, mean, var, self.virtual_batch_size, settings
                )
                self._track(x, options.get("mask"), update)
                return y, saved
            mean, var = (statistic.copy() for statistic in self._running.values())
        return _batch.forward_eval(_call.batch_call(*given), mean, var)

    def _track(self, x: Array, mask: Any, update: int | None) -> None:
        """Count a batch, and the updates that it has skipped, or show it to who observes; under the lock."""
        if self._observe:
            self._observe(x, mask)
        else:
            self._tracked += update is not None
            self.skipped_updates += 0 if update is None else update

    def reset_running_stats(self) -> None:
        """Forget all batches: running mean 0, running variance 1."""
        self._replace_running(0, 1, 0)

    def _replace_running(self, mean: Any, var: Any, batches: int) -> None:
        """Put other running statistics in the place of those there are."""
        with self._lock:
            for statistic, value in zip(self._running.values(), (mean, var), strict=False):
                statistic[...] = value
            self._tracked[...] = batches

    def _stores(self) -> tuple[dict[str, Array], ...]:
        """Running statistics move, too."""
        return (*super()._stores(), self._running)

    def _state(self) -> dict[str, Array]:
        """Parameters, running statistics and the number of batches in them."""
        counted = {"num_batches_tracked": self._tracked} if self._running else {}
        return {**self.params, **self._running, **counted}
