"""Every kind of layer, and the functions it stands for."""

from dataclasses import dataclass

import numpy as np

import nbnorm


@dataclass(frozen=True)
class Kind:
    """How to make a layer for an array (N, C, H, W), and the calls of functions it must equal."""

    name: str
    layer: type
    sizes: object  # of the array's shape: the positional arguments of the layer
    forward: object  # of x, parameters and options
    backward: object

    def __str__(self):
        """Name the test."""
        return self.name

    def make(self, shape, **options):
        """Make a layer that has parameters."""
        affine = {"affine": True} if self.layer is nbnorm.InstanceNorm else {}
        return self.layer(*self.sizes(shape), **affine, **options)

    def drawn(self, shape, rng, **options):
        """Make a layer with drawn parameters."""
        layer = self.make(shape, **options)
        for parameter in layer.params.values():
            parameter[...] = rng.uniform(0.5, 2, parameter.shape) * rng.choice([-1, 1], parameter.shape)
        return layer


KINDS = [
    Kind(
        "batch",
        nbnorm.BatchNorm,
        lambda shape: (shape[1],),
        nbnorm.batch_norm_forward,
        nbnorm.batch_norm_backward,
    ),
    Kind(
        "layer",
        nbnorm.LayerNorm,
        lambda shape: (shape[2:],),
        lambda x, weight, bias, **options: nbnorm.layer_norm_forward(x, weight, bias, axis=(2, 3), **options),
        nbnorm.layer_norm_backward,
    ),
    Kind(
        "rms",
        nbnorm.RMSNorm,
        lambda shape: (list(shape[2:]),),
        lambda x, weight, **options: nbnorm.rms_norm_forward(x, weight, axis=(2, 3), **options),
        nbnorm.rms_norm_backward,
    ),
    Kind(
        "group",
        nbnorm.GroupNorm,
        lambda shape: (2, shape[1]),
        lambda x, weight, bias, **options: nbnorm.group_norm_forward(x, 2, weight, bias, **options),
        nbnorm.group_norm_backward,
    ),
    Kind(
        "instance",
        nbnorm.InstanceNorm,
        lambda shape: (shape[1],),
        nbnorm.instance_norm_forward,
        nbnorm.instance_norm_backward,
    ),
]
# Those with a channel axis, and so with an activation, a residual and a mask.
CHANNEL_KINDS = [kind for kind in KINDS if issubclass(kind.layer, nbnorm.batch_layer.ChannelLayer)]

SHAPE = (4, 6, 5, 3)


def drawn(rng, shape=SHAPE, dtype=np.float32):
    """Draw x and dy."""
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    return x * 1.5 + dtype(0.7), dy
