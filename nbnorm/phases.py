"""Batch norm in two phases, for a batch in parts: micro-batches, processes, files.

`batch_norm_forward` and `batch_norm_backward` give the same bits as these calls in a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nbnorm import _batch, _call, _checks, _gradients
from nbnorm._call import Activation
from nbnorm._dispatch import backend
from nbnorm.moments import GradSums, Moments
from nbnorm.saved import Saved

Array = np.ndarray


def batch_moments(x: Any, channel_axis: int = 1, mask: Any = None) -> Moments:
    """Count, mean and sum of squared deviations of each channel.

    Parameters
    ----------
    x : array_like, shape (N, C, ...) or any other with a channel axis
        float16, bfloat16 (of ml_dtypes), float32 or float64, with any strides.
    channel_axis : int
        The axis of the channels.
    mask : array_like, shape of x without the channels or broadcastable to it, optional
        Which positions count: booleans, or weights >= 0 that say how often.

    Returns
    -------
    Moments
        In float64.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        If an argument does not fit.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> nbnorm.batch_moments(np.array([[1.0, 2.0], [3.0, 6.0]])).mean
    array([2., 4.])
    """
    call = _call.batch_call(
        "batch_moments", x, None, None, 0.0, channel_axis, None, _call.options_of(mask=mask)
    )
    mean, m2 = backend(call.x).moments(call.view, call.x, True, call.mask)
    return Moments(_batch.count_of(call), mean, m2)


def batch_norm_apply(
    x: Any,
    m: Moments,
    weight: Any = None,
    bias: Any = None,
    *,
    constant: bool = False,
    eps: float = 1e-5,
    channel_axis: int = 1,
    activation: Activation = None,
    residual: Any = None,
    mask: Any = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Normalize a part of a batch by the moments of the whole batch.

    Parameters
    ----------
    x : array_like
        A part of the batch: float16, bfloat16 (of ml_dtypes), float32 or float64, with any strides.
    m : Moments
        Merged over all parts.
    weight, bias : array_like, shape (C,), optional
        Scale and shift; None stands for 1 and 0.
    constant : bool
        Whether backward takes the moments as constants.
    eps : float
        Added to the variance.
    channel_axis : int
        The axis of the channels.
    activation, residual
        As in `batch_norm_forward`.
    mask : array_like, optional
        The mask of the part's moments: what does not count gets no gradient from them.
    out : ndarray, optional
        Buffer for y, with the shape and dtype of x and any strides; it must not share memory with x.

    Returns
    -------
    y : ndarray
        With the shape, dtype and memory order of x.
    saved : Saved
        For `batch_norm_grad_sums` and `batch_norm_input_grad`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        If an argument does not fit; nothing has been written then.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> parts = np.array([[1.0], [2.0]]), np.array([[6.0]])
    >>> a, b = (nbnorm.batch_moments(part) for part in parts)
    >>> y, saved = nbnorm.batch_norm_apply(parts[1], a.merge(b), eps=0.0)
    >>> y.round(4)
    array([[1.3887]])
    """
    options = _call.options_of(activation, residual, mask)
    call = _call.batch_call("batch_norm_apply", x, weight, bias, eps, channel_axis, out, options)
    _checks.instance("m", m, Moments)
    _checks.shape("m.mean", m.mean, (call.view.slots,))
    if m.count == 0.0 and call.view.size:
        raise ValueError(
            f"m has count 0, expected the moments of the batch that x with shape {call.x.shape} is part of"
        )
    _call.keep_inputs(call)
    return _batch.forward_by_moments(call, m, constant)


def batch_norm_grad_sums(dy: Any, saved: Saved) -> GradSums:
    """Sums over the part that the gradient of the whole batch needs.

    Parameters
    ----------
    dy : array_like
        Gradient of the loss by y, with the shape and dtype of x and any strides.
    saved : Saved
        From the forward call.

    Returns
    -------
    GradSums
        In float64: ``sum_dz`` is dbias and ``sum_dz_x_hat`` is dweight, but for batch renormalization, whose
        dweight is r * sum_dz_x_hat + d * sum_dz.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> y, saved = nbnorm.batch_norm_forward(np.array([[1.0], [3.0]]), eps=0.0)
    >>> nbnorm.batch_norm_grad_sums(np.array([[1.0], [2.0]]), saved).sum_dz_x_hat
    array([1.])
    """
    _gradients.check_saved("batch_norm", saved)
    _gradients.check_whole(saved)
    return GradSums(*_gradients.grad_sums(_gradients.gradient(dy, saved), saved))


def batch_norm_input_grad(
    dy: Any, saved: Saved, sums: GradSums, *, out: Array | tuple[Array | None, Array | None] | None = None
) -> Array | tuple[Array, Array]:
    """Gradient by x, and by the residual if there was one, for given sums, which are divided by ``saved.count``.

    Parameters
    ----------
    dy : array_like
        Gradient of the loss by y, with the shape and dtype of x and any strides.
    saved : Saved
        From the forward call.
    sums : GradSums
        Merged over all parts of the batch.
    out : ndarray, optional
        Buffer for dx, with any strides; it may be dy. With a residual, a tuple of two, each of which may be None.

    Returns
    -------
    ndarray, or tuple of two with a residual
        dx, and dresidual, with the shape, dtype and memory order of x.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; nothing has been written then.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> x, dy = np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [0.0], [0.0]])
    >>> y, saved = nbnorm.batch_norm_forward(x)
    >>> dx = nbnorm.batch_norm_input_grad(dy, saved, nbnorm.batch_norm_grad_sums(dy, saved))
    >>> bool(abs(dx.sum()) < 1e-12)
    True
    """
    _gradients.check_saved("batch_norm", saved)
    _gradients.check_whole(saved)
    _checks.instance("sums", sums, GradSums)
    _checks.shape("sums.sum_dz", sums.sum_dz, saved.rstd.shape)
    dy = _gradients.gradient(dy, saved)
    outs = _gradients.input_buffers(out, saved)
    given = None if saved.constant else (sums.sum_dz, sums.sum_dz_x_hat)
    dx, dresidual = _gradients.input_grad(dy, saved, given, *outs, saved.with_residual)
    return dx if dresidual is None else (dx, dresidual)
