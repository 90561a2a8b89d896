"""Layer, RMS, group and instance norm as layers: the norms without statistics of their own."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from nbnorm import _checks, group_norms, layer_norms
from nbnorm._layer import ChannelLayer, Layer
from nbnorm.saved import Saved

Array = np.ndarray


class TrailingLayer(Layer):
    """A norm over trailing axes, with a parameter per normalized element."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        *,
        eps: float = 1e-5,
        affine: bool = True,
        center: bool = True,
        scale: bool = True,
        dtype: Any = np.float32,
        xp: ModuleType = np,
        reuse_buffers: bool = False,
    ) -> None:
        self.normalized_shape = _checks.normalized_shape(normalized_shape)
        self._axis = tuple(range(-len(self.normalized_shape), 0))
        super().__init__(self.normalized_shape, affine, center, scale, eps, dtype, xp, reuse_buffers)

    def _forward(self, x: Any, out: Array | None, **options: Any) -> tuple[Array, Saved]:
        """Compare the trailing dimensions of x with the layer's."""
        x = _checks.array("x", x)
        _checks.trailing_shape(self.normalized_shape, x)
        return super()._forward(x, out, **options)


class LayerNorm(TrailingLayer):
    r"""Layer normalization: every sample over its trailing axes, with a scale and a shift per element.

    .. math:: y = \frac{x - mean}{\sqrt{var + eps}} \cdot weight + bias

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The lengths of the trailing axes that are normalized.
    eps : float
        Added to the variance.
    affine : bool
        Whether there are a scale and a shift at all; False overrides ``center`` and ``scale``.
    center, scale : bool
        Whether there is a shift (``bias``) and a scale (``weight``).
    dtype : dtype
        Of the parameters, float32 or float64; x may have another.
    xp : module
        The library of the parameters, numpy or cupy.
    reuse_buffers : bool
        Whether results are written into the same arrays again and again, see `BatchNorm`.

    Attributes
    ----------
    params, grads : dict of str to ndarray
        ``weight`` and ``bias`` and their gradients, for an optimizer that updates them in place.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    References
    ----------
    Ba, Kiros, Hinton: Layer Normalization (2016), https://arxiv.org/abs/1607.06450.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> norm = nbnorm.LayerNorm(2, eps=0.0)
    >>> norm(np.array([[1.0, 3.0], [10.0, 30.0]]))
    array([[-1.,  1.],
           [-1.,  1.]])
    """

    _differentiate = staticmethod(layer_norms.layer_norm_backward)

    def _normalize(self, x: Array, out: Array | None, **options: Any) -> tuple[Array, Saved]:
        weight, bias = self.params.get("weight"), self.params.get("bias")
        return layer_norms.layer_norm_forward(
            x, weight, bias, axis=self._axis, eps=self.eps, out=out, **options
        )


class RMSNorm(TrailingLayer):
    r"""Root mean square normalization: layer norm that neither subtracts a mean nor adds a shift.

    .. math:: y = \frac{x}{\sqrt{\overline{x^2} + eps}} \cdot weight

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The lengths of the trailing axes that are normalized.
    eps : float
        Added to the mean square.
    affine : bool
        Whether there is a scale (``weight``).
    dtype, xp, reuse_buffers
        As in `LayerNorm`.

    Attributes
    ----------
    params, grads : dict of str to ndarray
        ``weight`` and its gradient, for an optimizer that updates it in place.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    References
    ----------
    Zhang, Sennrich: Root Mean Square Layer Normalization (2019), https://arxiv.org/abs/1910.07467.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> norm = nbnorm.RMSNorm(2, eps=0.0)
    >>> norm(np.array([[3.0, 3.0], [-5.0, 5.0]]))
    array([[ 1.,  1.],
           [-1.,  1.]])
    """

    _differentiate = staticmethod(layer_norms.rms_norm_backward)
    _parameters = ("weight",)

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        *,
        eps: float = 1e-6,
        affine: bool = True,
        dtype: Any = np.float32,
        xp: ModuleType = np,
        reuse_buffers: bool = False,
    ) -> None:
        settings = {"dtype": dtype, "xp": xp, "reuse_buffers": reuse_buffers}
        super().__init__(normalized_shape, eps=eps, affine=affine, center=False, **settings)

    def _normalize(self, x: Array, out: Array | None, **options: Any) -> tuple[Array, Saved]:
        weight = self.params.get("weight")
        return layer_norms.rms_norm_forward(x, weight, axis=self._axis, eps=self.eps, out=out, **options)


class GroupNorm(ChannelLayer):
    r"""Group normalization: groups of neighbouring channels of each sample, with a scale and a shift per channel.

    .. math:: y = act\left(\frac{x - mean}{\sqrt{var + eps}} \cdot weight + bias + residual\right)

    Parameters
    ----------
    num_groups : int
        Number of groups.
    num_channels : int
        Number of channels, a multiple of it.
    eps : float
        Added to the variance.
    affine : bool
        Whether there are a scale and a shift at all; False overrides ``center`` and ``scale``.
    center, scale : bool
        Whether there is a shift (``bias``) and a scale (``weight``).
    channel_axis : int
        The axis of the channels: 1 for channels first, -1 for channels last.
    activation : None, "relu", ("leaky_relu", slope) or "silu"
        Applied in the same pass.
    dtype, xp, reuse_buffers
        As in `LayerNorm`.

    Attributes
    ----------
    params, grads : dict of str to ndarray
        ``weight`` and ``bias`` and their gradients, for an optimizer that updates them in place.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    References
    ----------
    Wu, He: Group Normalization (2018), https://arxiv.org/abs/1803.08494.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> norm = nbnorm.GroupNorm(2, 4, eps=0.0)
    >>> norm(np.array([[1.0, 3.0, 10.0, 30.0]]))
    array([[-1.,  1., -1.,  1.]])
    """

    _differentiate = staticmethod(group_norms.group_norm_backward)

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        center: bool = True,
        scale: bool = True,
        channel_axis: int = 1,
        activation: Any = None,
        dtype: Any = np.float32,
        xp: ModuleType = np,
        reuse_buffers: bool = False,
    ) -> None:
        self.num_channels = _checks.positive_integer("num_channels", num_channels)
        self.num_groups = _checks.num_groups(num_groups, self.num_channels)
        super().__init__(
            self.num_channels, affine, center, scale, eps, channel_axis, activation, dtype, xp, reuse_buffers
        )

    def _normalize(self, x: Array, out: Array | None, **options: Any) -> tuple[Array, Saved]:
        weight, bias = self.params.get("weight"), self.params.get("bias")
        options |= {"eps": self.eps, "channel_axis": self.channel_axis}
        return group_norms.group_norm_forward(x, self.num_groups, weight, bias, out=out, **options)


class InstanceNorm(ChannelLayer):
    r"""Instance normalization: every channel of each sample by itself.

    .. math:: y = act\left(\frac{x - mean}{\sqrt{var + eps}} \cdot weight + bias + residual\right)

    Parameters
    ----------
    num_features : int
        Number of channels.
    eps : float
        Added to the variance.
    affine : bool
        Whether there are a scale and a shift at all; False, as in PyTorch, overrides ``center`` and ``scale``.
    center, scale, channel_axis, activation, dtype, xp, reuse_buffers
        As in `GroupNorm`.

    Attributes
    ----------
    params, grads : dict of str to ndarray
        ``weight`` and ``bias`` and their gradients, for an optimizer that updates them in place.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    References
    ----------
    Ulyanov, Vedaldi, Lempitsky: Instance Normalization (2016), https://arxiv.org/abs/1607.08022.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> norm = nbnorm.InstanceNorm(2, eps=0.0)
    >>> norm(np.array([[[1.0, 3.0], [10.0, 30.0]]]))
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """

    _differentiate = staticmethod(group_norms.instance_norm_backward)

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = False,
        center: bool = True,
        scale: bool = True,
        channel_axis: int = 1,
        activation: Any = None,
        dtype: Any = np.float32,
        xp: ModuleType = np,
        reuse_buffers: bool = False,
    ) -> None:
        self.num_features = _checks.positive_integer("num_features", num_features)
        super().__init__(
            self.num_features, affine, center, scale, eps, channel_axis, activation, dtype, xp, reuse_buffers
        )

    def _normalize(self, x: Array, out: Array | None, **options: Any) -> tuple[Array, Saved]:
        weight, bias = self.params.get("weight"), self.params.get("bias")
        options |= {"eps": self.eps, "channel_axis": self.channel_axis}
        return group_norms.instance_norm_forward(x, weight, bias, out=out, **options)
