"""Batch normalization as functions on arrays: check, plan, delegate to the backend."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from nbnorm import _batch, _call, _checks, _ghost, _gradients
from nbnorm._call import Activation
from nbnorm._gradients import GRADIENTS
from nbnorm.saved import Saved

Array = np.ndarray


def batch_norm_forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    ddof: int = 1,
    eps: float = 1e-5,
    channel_axis: int = 1,
    activation: Activation = None,
    residual: Any = None,
    mask: Any = None,
    renorm: tuple[float, float] | None = None,
    virtual_batch_size: int | None = None,
    small_batch: str = "error",
    nonfinite: str = "propagate",
    out: Array | None = None,
) -> tuple[Array, Saved]:
    r"""Normalize each channel of a batch, scale and shift it, and update the running statistics.

    .. math:: y = act\left(\frac{x - mean}{\sqrt{var + eps}} \cdot weight + bias + residual\right)

    where mean and (biased) var are taken over all axes but the channels', or, with ``training=False``,
    are the running ones.

    Parameters
    ----------
    x : array_like, shape (N, C, ...) or any other with a channel axis
        float16, bfloat16 (of ml_dtypes), float32 or float64, with any strides. Halves are computed in float32.
    weight, bias : array_like, shape (C,), optional
        Scale and shift per channel; None stands for 1 and 0.
    running_mean, running_var : ndarray, shape (C,), optional
        float32 or float64, both or neither; updated in place, last and only if all else succeeded:
        ``running = (1 - momentum) * running + momentum * batch``.
    training : bool
        Whether the statistics are those of the batch.
    momentum : float
        Weight of the new value, from 0 (leave the running statistics alone) to 1 (assign).
    ddof : {0, 1}
        The running variance is m2 / (count - ddof): 1 stores the unbiased one (PyTorch, Chainer), 0 the
        biased one (Keras, Flax). Normalization itself always uses the biased one.
    eps : float
        Added to the variance.
    channel_axis : int
        The axis that keeps its own statistics: 1 for channels first, -1 for channels last.
    activation : {None, "relu", "silu"} or ("leaky_relu", slope)
        Computed in the same pass; backward recomputes its sign instead of keeping a mask.
    residual : array_like, optional
        Added before the activation, with the shape and dtype of x. Backward then returns its gradient, too.
    mask : array_like, shape of x without the channels or broadcastable to it, optional
        Which positions count in the statistics: booleans, or weights >= 0 that say how often. What does not count
        (NaN padding, say) is normalized, but has no part in the statistics.
    renorm : (r_max, d_max), optional
        Batch renormalization: the output is brought near that of the running statistics, by a factor within
        [1 / r_max, r_max] and a shift within [-d_max, d_max], both constants in backward. Needs running
        statistics; ignored in eval mode.
    virtual_batch_size : int, optional
        Ghost batch norm: so many consecutive samples share statistics, as if they were a batch; the last such
        group may be smaller. The running statistics see the whole batch. Ignored in eval mode.
    small_batch : {"error", "warn", "zero", "running"}
        What happens in training when a channel has one value only: a ValueError; the output ``bias`` without
        an update of the running statistics, with or without a warning; or normalization by the running
        statistics, which are then updated by ``running_var = (1 - m) * (running_var + m * (x - old_mean)**2)``.
    nonfinite : {"propagate", "skip", "raise"}
        What a NaN or infinite batch statistic, or one that overflows the running buffer, does to the running
        ones: enters them; leaves the channel's old ones; raises before anything is written.
    out : ndarray, optional
        Buffer for y, with the shape and dtype of x and any strides; it must not share memory with x, nor, below
        an activation, with the residual.

    Returns
    -------
    y : ndarray
        With the shape, dtype and memory order of x.
    saved : Saved
        What `batch_norm_backward` needs.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        If an argument does not fit; nothing has been written then.
    FloatingPointError
        With ``nonfinite="raise"``.

    Warns
    -----
    RuntimeWarning
        With ``small_batch="warn"``, and for 0 / 0 where ``eps=0`` meets a constant channel.

    References
    ----------
    Ioffe, Szegedy: Batch Normalization (2015), https://arxiv.org/abs/1502.03167.
    Ioffe: Batch Renormalization (2017), https://arxiv.org/abs/1702.03275.
    Hoffer, Hubara, Soudry: Train longer, generalize better (2017; ghost batch norm), https://arxiv.org/abs/1705.08741.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, saved = nbnorm.batch_norm_forward(x, eps=0.0)
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> saved.mean
    array([ 2., 20.])
    """
    options = _call.options_of(activation, residual, mask)
    settings = _batch.training(momentum, ddof, small_batch, nonfinite, renorm)
    size = _checks.virtual_batch_size(virtual_batch_size)
    given = "batch_norm_forward", x, weight, bias, eps, channel_axis, out, options
    if not training:
        return _batch.forward_eval(_call.batch_call(*given), running_mean, running_var)
    y, saved, _ = _ghost.forward_training(*given, running_mean, running_var, size, settings)
    return y, saved


def batch_norm_inference(
    x: Any,
    mean: Any,
    var: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    activation: Activation = None,
    residual: Any = None,
    out: Array | None = None,
) -> Array:
    r"""Normalize each channel by given statistics, as a trained network does.

    .. math:: y = act\left(\frac{x - mean}{\sqrt{var + eps}} \cdot weight + bias + residual\right)

    Parameters
    ----------
    x : array_like, shape (N, C, ...) or any other with a channel axis
        float16, bfloat16 (of ml_dtypes), float32 or float64, with any strides.
    mean, var : array_like, shape (C,)
        Statistics of each channel, usually the running ones.
    weight, bias : array_like, shape (C,), optional
        Scale and shift; None stands for 1 and 0.
    eps : float
        Added to the variance.
    channel_axis : int
        The axis of the channels.
    activation : {None, "relu", "silu"} or ("leaky_relu", slope)
        Computed in the same pass.
    residual : array_like, optional
        Added before the activation, with the shape and dtype of x.
    out : ndarray, optional
        Buffer for y, with the shape and dtype of x and any strides; it may be x itself, or the residual.

    Returns
    -------
    ndarray
        With the shape, dtype and memory order of x. A negative variance gives NaN.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        If an argument does not fit; nothing has been written then.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> nbnorm.batch_norm_inference(np.array([[1.0], [5.0]]), [3.0], [4.0], eps=0.0)
    array([[-1.],
           [ 1.]])
    """
    options = _call.options_of(activation, residual, None)
    call = _call.batch_call("batch_norm_inference", x, weight, bias, eps, channel_axis, out, options)
    mean = _checks.statistic("mean", mean, call.view.slots)
    return _batch.forward_by_constants(call, mean, _checks.statistic("var", var, call.view.slots))[0]


def batch_norm_backward(
    dy: Any,
    saved: Saved,
    *,
    need: Collection[str] = GRADIENTS,
    out: tuple[Array | None, ...] | None = None,
) -> tuple[Array | None, ...]:
    r"""Gradients of `batch_norm_forward` by x, weight, bias and residual.

    .. math::
        dx = rstd \cdot \left(g - \overline{g} - \hat x \cdot \overline{g \hat x}\right),
        \quad g = dz \cdot weight, \quad dweight = \sum dz \, \hat x, \quad dbias = \sum dz

    with means and sums over each channel, and dz = dy * act'(z), the gradient by what the activation takes;
    constant statistics (eval) leave dx = rstd * g.

    Parameters
    ----------
    dy : array_like
        Gradient of the loss by y, with the shape and dtype of x and any strides.
    saved : Saved
        From the forward call. It is not changed: backward may run again.
    need : collection of {"dx", "dweight", "dbias", "dresidual"}
        The gradients to compute; the others come back as None and cost nothing. All of the first three stand for
        all that there are.
    out : tuple of (ndarray or None), optional
        Buffers for the gradients, as many as are returned. dx may go into dy.

    Returns
    -------
    dx : ndarray or None
        With the shape, dtype and memory order of x.
    dweight, dbias : ndarray or None
        Summed in float64, with the dtypes of weight and bias; None where forward had none.
    dresidual : ndarray or None
        dz, with the shape, dtype and memory order of x; returned only if forward had a residual.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; nothing has been written then.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, saved = nbnorm.batch_norm_forward(x, np.ones(1), np.zeros(1))
    >>> dx, dweight, dbias = nbnorm.batch_norm_backward(np.array([[1.0], [0.0], [0.0]]), saved)
    >>> dbias
    array([1.])
    """
    return _gradients.backward("batch_norm", dy, saved, need, out)
