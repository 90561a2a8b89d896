"""Group and instance normalization as functions on arrays: channels of every sample over its positions."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from nbnorm import _call, _gradients, _samples
from nbnorm._call import Activation
from nbnorm._gradients import GRADIENTS
from nbnorm.saved import Saved

Array = np.ndarray


def group_norm_forward(
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    activation: Activation = None,
    residual: Any = None,
    mask: Any = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    r"""Normalize groups of neighbouring channels of every sample, then scale and shift each channel.

    .. math:: y = act\left(\frac{x - mean}{\sqrt{var + eps}} \cdot weight + bias + residual\right)

    with statistics over the channels of a group and all positions. One group is layer norm over a sample, a
    group per channel is instance norm.

    Parameters
    ----------
    x : array_like, shape (N, C, ...) or any other with a channel axis
        float16, bfloat16 (of ml_dtypes), float32 or float64, with any strides; samples lie on the first other
        axis.
    num_groups : int
        Number of groups G, a divisor of C.
    weight, bias : array_like, shape (C,), optional
        Scale and shift per channel; None stands for 1 and 0.
    eps : float
        Added to the variance.
    channel_axis : int
        The axis of the channels: 1 for channels first, -1 for channels last.
    activation, residual, mask
        As in `batch_norm_forward`.
    out : ndarray, optional
        Buffer for y, with the shape and dtype of x and any strides; it must not share memory with x.

    Returns
    -------
    y : ndarray
        With the shape, dtype and memory order of x.
    saved : Saved
        What `group_norm_backward` needs; its statistics have shape (N, G).

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        If an argument does not fit; nothing has been written then.

    References
    ----------
    Wu, He: Group Normalization (2018), https://arxiv.org/abs/1803.08494.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> y, saved = nbnorm.group_norm_forward(np.array([[1.0, 3.0, 10.0, 30.0]]), 2, eps=0.0)
    >>> y
    array([[-1.,  1., -1.,  1.]])
    """
    options = _call.options_of(activation, residual, mask)
    return _samples.over_groups("group_norm", x, num_groups, weight, bias, eps, channel_axis, out, options)


def group_norm_backward(
    dy: Any, saved: Saved, *, need: Collection[str] = GRADIENTS, out: tuple[Array | None, ...] | None = None
) -> tuple[Array | None, ...]:
    r"""Gradients of `group_norm_forward` by x, weight, bias and residual.

    .. math::
        dx = rstd \cdot \left(g - \overline{g} - \hat x \cdot \overline{g \hat x}\right),
        \quad g = dz \cdot weight

    with means over each group of a sample; dweight and dbias are sums of dz * x_hat and dz over each channel, where
    dz = dy * act'(z).

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
    dx, dweight, dbias : ndarray or None
        dx like x; dweight and dbias like weight and bias, summed in float64.
    dresidual : ndarray or None
        dz, like x; returned only if forward had a residual.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; nothing has been written then.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> x = np.array([[1.0, 3.0, 10.0, 30.0]])
    >>> y, saved = nbnorm.group_norm_forward(x, 2, bias=np.zeros(4))
    >>> nbnorm.group_norm_backward(np.array([[1.0, 2.0, 3.0, 4.0]]), saved, need=("dbias",))[2]
    array([1., 2., 3., 4.])
    """
    return _gradients.backward("group_norm", dy, saved, need, out)


def instance_norm_forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    activation: Activation = None,
    residual: Any = None,
    mask: Any = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    r"""Normalize every channel of every sample over its positions, then scale and shift each channel.

    .. math:: y = act\left(\frac{x - mean}{\sqrt{var + eps}} \cdot weight + bias + residual\right)

    Parameters
    ----------
    x : array_like, shape (N, C, ...) or any other with a channel axis
        float16, bfloat16 (of ml_dtypes), float32 or float64, with any strides; samples lie on the first other
        axis.
    weight, bias : array_like, shape (C,), optional
        Scale and shift per channel; None stands for 1 and 0.
    eps : float
        Added to the variance.
    channel_axis : int
        The axis of the channels: 1 for channels first, -1 for channels last.
    activation, residual, mask
        As in `batch_norm_forward`.
    out : ndarray, optional
        Buffer for y, with the shape and dtype of x and any strides; it must not share memory with x.

    Returns
    -------
    y : ndarray
        With the shape, dtype and memory order of x. A channel of one position gives ``bias``.
    saved : Saved
        What `instance_norm_backward` needs; its statistics have shape (N, C).

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        If an argument does not fit; nothing has been written then.

    References
    ----------
    Ulyanov, Vedaldi, Lempitsky: Instance Normalization (2016), https://arxiv.org/abs/1607.08022.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> y, saved = nbnorm.instance_norm_forward(np.array([[[1.0, 3.0], [10.0, 30.0]]]), eps=0.0)
    >>> y
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """
    options = _call.options_of(activation, residual, mask)
    return _samples.over_groups("instance_norm", x, None, weight, bias, eps, channel_axis, out, options)


def instance_norm_backward(
    dy: Any, saved: Saved, *, need: Collection[str] = GRADIENTS, out: tuple[Array | None, ...] | None = None
) -> tuple[Array | None, ...]:
    r"""Gradients of `instance_norm_forward` by x, weight, bias and residual.

    .. math::
        dx = rstd \cdot \left(g - \overline{g} - \hat x \cdot \overline{g \hat x}\right),
        \quad g = dz \cdot weight

    with means over each channel of a sample; dweight and dbias are sums of dz * x_hat and dz over each channel, where
    dz = dy * act'(z).

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
    dx, dweight, dbias : ndarray or None
        dx like x; dweight and dbias like weight and bias, summed in float64.
    dresidual : ndarray or None
        dz, like x; returned only if forward had a residual.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; nothing has been written then.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> y, saved = nbnorm.instance_norm_forward(np.array([[[1.0, 3.0]]]), bias=np.zeros(1))
    >>> nbnorm.instance_norm_backward(np.array([[[1.0, 2.0]]]), saved, need=("dbias",))[2]
    array([3.])
    """
    return _gradients.backward("instance_norm", dy, saved, need, out)
