"""Layer and RMS normalization as functions on arrays: every sample over its trailing axes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from nbnorm import _gradients, _samples
from nbnorm._gradients import GRADIENTS, WITHOUT_BIAS
from nbnorm.saved import Saved

Array = np.ndarray


def layer_norm_forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    axis: int | Sequence[int] = -1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    r"""Normalize every sample over its trailing axes, then scale and shift each element.

    .. math:: y = \frac{x - mean}{\sqrt{var + eps}} \cdot weight + bias

    Parameters
    ----------
    x : array_like
        float16, bfloat16 (of ml_dtypes), float32 or float64, with any strides.
    weight, bias : array_like, shape of x on the normalized axes, optional
        Scale and shift; None stands for 1 and 0.
    axis : int or tuple of int
        The normalized axes: an int is the last axis, a tuple a set of trailing ones.
    eps : float
        Added to the variance.
    out : ndarray, optional
        Buffer for y, with the shape and dtype of x and any strides; it must not share memory with x.

    Returns
    -------
    y : ndarray
        With the shape, dtype and memory order of x.
    saved : Saved
        What `layer_norm_backward` needs; its statistics have the shape of x without the normalized axes.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        If an argument does not fit; nothing has been written then.

    References
    ----------
    Ba, Kiros, Hinton: Layer Normalization (2016), https://arxiv.org/abs/1607.06450.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> y, saved = nbnorm.layer_norm_forward(np.array([[1.0, 3.0], [10.0, 30.0]]), eps=0.0)
    >>> y
    array([[-1.,  1.],
           [-1.,  1.]])
    """
    return _samples.over_trailing_axes("layer_norm", x, axis, weight, bias, eps, out)


def layer_norm_backward(
    dy: Any, saved: Saved, *, need: Collection[str] = GRADIENTS, out: tuple[Array | None, ...] | None = None
) -> tuple[Array | None, Array | None, Array | None]:
    r"""Gradients of `layer_norm_forward` by x, weight and bias.

    .. math::
        dx = rstd \cdot \left(g - \overline{g} - \hat x \cdot \overline{g \hat x}\right),
        \quad g = dy \cdot weight

    with means over each sample; dweight and dbias are sums of dy * x_hat and dy over the samples.

    Parameters
    ----------
    dy : array_like
        Gradient of the loss by y, with the shape and dtype of x and any strides.
    saved : Saved
        From the forward call. It is not changed: backward may run again.
    need : collection of {"dx", "dweight", "dbias"}
        The gradients to compute; the others come back as None and cost nothing.
    out : tuple of (ndarray or None), optional
        Buffers for dx, dweight and dbias. dx may go into dy.

    Returns
    -------
    dx, dweight, dbias : ndarray or None
        dx like x; dweight and dbias like weight and bias, summed in float64.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; nothing has been written then.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> y, saved = nbnorm.layer_norm_forward(np.array([[1.0, 3.0]]), np.ones(2), np.zeros(2), eps=0.0)
    >>> dx, dweight, dbias = nbnorm.layer_norm_backward(np.array([[1.0, 2.0]]), saved)
    >>> dweight, dbias
    (array([-1.,  2.]), array([1., 2.]))
    """
    dx, dweight, dbias = _gradients.backward("layer_norm", dy, saved, need, out)
    return dx, dweight, dbias


def rms_norm_forward(
    x: Any, weight: Any = None, *, axis: int | Sequence[int] = -1, eps: float = 1e-6, out: Array | None = None
) -> tuple[Array, Saved]:
    r"""Divide every sample by its root mean square over the trailing axes, then scale each element.

    .. math:: y = \frac{x}{\sqrt{\overline{x^2} + eps}} \cdot weight

    Parameters
    ----------
    x : array_like
        float16, bfloat16 (of ml_dtypes), float32 or float64, with any strides.
    weight : array_like, shape of x on the normalized axes, optional
        Scale; None stands for 1.
    axis : int or tuple of int
        The normalized axes: an int is the last axis, a tuple a set of trailing ones.
    eps : float
        Added to the mean square.
    out : ndarray, optional
        Buffer for y, with the shape and dtype of x and any strides; it must not share memory with x.

    Returns
    -------
    y : ndarray
        With the shape, dtype and memory order of x.
    saved : Saved
        What `rms_norm_backward` needs; its mean is None.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        If an argument does not fit; nothing has been written then.

    References
    ----------
    Zhang, Sennrich: Root Mean Square Layer Normalization (2019), https://arxiv.org/abs/1910.07467.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> y, saved = nbnorm.rms_norm_forward(np.array([[1.0, 7.0]]), eps=0.0)
    >>> y
    array([[0.2, 1.4]])
    """
    return _samples.over_trailing_axes("rms_norm", x, axis, weight, None, eps, out, centered=False)


def rms_norm_backward(
    dy: Any,
    saved: Saved,
    *,
    need: Collection[str] = WITHOUT_BIAS,
    out: tuple[Array | None, ...] | None = None,
) -> tuple[Array | None, Array | None]:
    r"""Gradients of `rms_norm_forward` by x and weight.

    .. math:: dx = rstd \cdot \left(g - \hat x \cdot \overline{g \hat x}\right), \quad g = dy \cdot weight

    with means over each sample; dweight is the sum of dy * x_hat over the samples.

    Parameters
    ----------
    dy : array_like
        Gradient of the loss by y, with the shape and dtype of x and any strides.
    saved : Saved
        From the forward call. It is not changed: backward may run again.
    need : collection of {"dx", "dweight"}
        The gradients to compute; the others come back as None and cost nothing.
    out : tuple of (ndarray or None), optional
        Buffers for dx and dweight. dx may go into dy.

    Returns
    -------
    dx, dweight : ndarray or None
        dx like x; dweight like weight, summed in float64.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; nothing has been written then.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> y, saved = nbnorm.rms_norm_forward(np.array([[1.0, 7.0]]), np.ones(2), eps=0.0)
    >>> dx, dweight = nbnorm.rms_norm_backward(np.array([[1.0, 1.0]]), saved)
    >>> dweight
    array([0.2, 1.4])
    """
    dx, dweight = _gradients.backward("rms_norm", dy, saved, need, out, WITHOUT_BIAS)
    return dx, dweight
