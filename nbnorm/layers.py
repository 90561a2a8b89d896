"""Layers: parameters, gradients and running statistics around the functions, for hand-written loops."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from nbnorm import _batch, _call, _checks, _ghost, functional
from nbnorm.saved import Saved

Array = np.ndarray


class BatchNorm:
    r"""Batch normalization with learned scale and shift and running statistics.

    .. math:: y = \frac{x - mean}{\sqrt{var + eps}} \cdot weight + bias

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
    ddof : {0, 1}
        1 keeps the unbiased running variance (PyTorch), 0 the biased one (Keras).
    small_batch : {"error", "warn", "zero", "running"}
        What happens in training when a channel has one value only, see `batch_norm_forward`.
    nonfinite : {"propagate", "skip", "raise"}
        What a NaN or infinite batch statistic does to the running ones, see `batch_norm_forward`.
    dtype : dtype
        Of parameters and running statistics, float32 or float64; x may have either.

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
        ddof: int = 1,
        small_batch: str = "error",
        nonfinite: str = "propagate",
        dtype: Any = np.float32,
    ) -> None:
        self.num_features = _checks.positive_integer("num_features", num_features)
        self.eps = _checks.eps(eps)
        self.momentum = None if momentum is None else _checks.momentum(momentum)
        self.channel_axis = _checks.integer("channel_axis", channel_axis)
        self.ddof = _checks.ddof(ddof)
        self.small_batch = _checks.choice("small_batch", small_batch, _checks.SMALL_BATCH)
        self.nonfinite = _checks.choice("nonfinite", nonfinite, _checks.NONFINITE)
        self.dtype = _checks.parameter_dtype(dtype)
        self.training = True
        self.skipped_updates = 0
        self.params: dict[str, Array] = {}
        if affine and scale:
            self.params["weight"] = np.ones(self.num_features, self.dtype)
        if affine and center:
            self.params["bias"] = np.zeros(self.num_features, self.dtype)
        self.grads = {name: np.zeros_like(value) for name, value in self.params.items()}
        self._running: tuple[Array, Array] | None = None
        if track_running_stats:
            self._running = (np.zeros(self.num_features, self.dtype), np.ones(self.num_features, self.dtype))
        self.num_batches_tracked = 0
        self._saved: Saved | None = None
        self._lock = threading.Lock()

    @property
    def weight(self) -> Array | None:
        """The scale, None if there is none; assigning copies the values."""
        return self.params.get("weight")

    @weight.setter
    def weight(self, value: Any) -> None:
        self._assign("weight", value)

    @property
    def bias(self) -> Array | None:
        """The shift, None if there is none; assigning copies the values."""
        return self.params.get("bias")

    @bias.setter
    def bias(self, value: Any) -> None:
        self._assign("bias", value)

    @property
    def running_mean(self) -> Array | None:
        """Running mean, None if none is kept; assigning copies the values."""
        return None if self._running is None else self._running[0]

    @running_mean.setter
    def running_mean(self, value: Any) -> None:
        self._assign("running_mean", value)

    @property
    def running_var(self) -> Array | None:
        """Running variance, None if none is kept; assigning copies the values."""
        return None if self._running is None else self._running[1]

    @running_var.setter
    def running_var(self, value: Any) -> None:
        self._assign("running_var", value)

    def __call__(self, x: Any, *, out: Array | None = None, keep: bool = True) -> Array:
        """Normalize x and, with ``keep``, remember what `backward` needs."""
        self._saved = None  # a call that fails must not leave the one before to backward
        y, saved = self.forward(x, out=out)
        self._saved = saved if keep else None
        return y

    def forward(self, x: Any, *, out: Array | None = None) -> tuple[Array, Saved]:
        """Normalize x; return y and what `backward` needs, for several calls in flight."""
        options = _call.Options()
        call = _call.batch_call(
            "BatchNorm",
            x,
            self.weight,
            self.bias,
            self.eps,
            self.channel_axis,
            out,
            options,
            self.num_features,
        )
        _call.keep_x(call)
        with self._lock:
            if self.training or self._running is None:
                return self._train_on(call, options)
            mean, var = (statistic.copy() for statistic in self._running)
        return _batch.forward_eval(call, mean, var)

    def _train_on(self, call: _call.Call, options: _call.Options) -> tuple[Array, Saved]:
        """Normalize by the batch and track it; under the lock, so that threads lose no update."""
        momentum = 1.0 / (self.num_batches_tracked + 1) if self.momentum is None else self.momentum
        settings = _batch.training(momentum, self.ddof, self.small_batch, self.nonfinite)
        mean, var = self._running or (None, None)
        y, saved, update = _ghost.forward_training(
            call, None, self.channel_axis, options, mean, var, settings
        )
        self.num_batches_tracked += update is not None
        self.skipped_updates += update or 0
        return y, saved

    def backward(
        self, dy: Any, saved: Saved | None = None, *, accumulate: bool = False, out: Array | None = None
    ) -> Array:
        """Return dx and put the parameters' gradients into `grads`, or add them with ``accumulate``.

        Without ``saved`` the last call of the layer that kept its state is meant.
        """
        saved = self._saved if saved is None else saved
        if saved is None:
            raise RuntimeError("backward called before forward, or after a call with keep=False")
        into = (None, None) if accumulate else (self.grads.get("weight"), self.grads.get("bias"))
        dx, *gradients = functional.batch_norm_backward(dy, saved, out=(out, *into))[:3]
        if accumulate:
            for name, gradient in zip(("weight", "bias"), gradients, strict=True):
                if gradient is not None:
                    self.grads[name] += gradient
        assert dx is not None
        return dx

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for gradient in self.grads.values():
            gradient[...] = 0

    def train(self, mode: bool = True) -> BatchNorm:
        """Use the statistics of each batch, and track them; return the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> BatchNorm:
        """Use the running statistics; return the layer."""
        return self.train(False)

    def reset_running_stats(self) -> None:
        """Forget all batches: running mean 0, running variance 1."""
        with self._lock:
            for statistic, value in zip(self._running or (), (0, 1), strict=False):
                statistic[...] = value
            self.num_batches_tracked = 0

    def state_dict(self) -> dict[str, Array]:
        """Return copies of parameters and running statistics under PyTorch's names."""
        with self._lock:
            state = {name: value.copy() for name, value in self._arrays().items()}
            if self._running is not None:
                state["num_batches_tracked"] = np.array(self.num_batches_tracked, np.int64)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state of `state_dict`'s form into the layer: all of it, or nothing if a part does not fit.

        Raises
        ------
        KeyError
            If names are missing or unexpected.
        ValueError
            If an entry has another shape, is not numeric, or holds NaN or a negative running variance.
        """
        arrays = self._arrays()
        tracked = {"num_batches_tracked"} if self._running is not None else set()
        _checks.keys("state", state, arrays.keys() | tracked)
        values = {name: _checks.state(name, state[name], array) for name, array in arrays.items()}
        count = _checks.count("num_batches_tracked", state["num_batches_tracked"]) if tracked else 0
        with self._lock:
            for name, array in arrays.items():
                array[...] = values[name]
            self.num_batches_tracked = count

    def _arrays(self) -> dict[str, Array]:
        """Every array of the layer's state by name."""
        names = ("running_mean", "running_var")
        return self.params | dict(zip(names, self._running or (), strict=False))

    def _assign(self, name: str, value: Any) -> None:
        """Copy a checked value into one array of the state."""
        arrays = self._arrays()
        if name not in arrays:
            raise AttributeError(f"this layer has no {name} to set")
        checked = _checks.state(name, value, arrays[name])
        with self._lock:
            arrays[name][...] = checked

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock and the arrays of calls in flight."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_saved")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a new lock."""
        self.__dict__.update(state, _saved=None, _lock=threading.Lock())

    def __repr__(self) -> str:
        settings = {name: getattr(self, name) for name in ("eps", "momentum", "channel_axis", "ddof")}
        settings |= {"scale": self.weight is not None, "center": self.bias is not None}
        settings |= {"track_running_stats": self._running is not None, "small_batch": self.small_batch}
        settings |= {"nonfinite": self.nonfinite, "dtype": self.dtype.name}
        listed = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        return f"BatchNorm({self.num_features}, {listed})"
