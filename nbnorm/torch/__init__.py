"""PyTorch on a CPU with nbnorm's kernels: modules, functions, and `replace` for an existing model."""

from importlib.util import find_spec

if find_spec("torch") is None:
    raise ImportError("nbnorm.torch needs PyTorch: pip install 'nbnorm[torch]'")

from nbnorm.torch.folding import fold
from nbnorm.torch.functional import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from nbnorm.torch.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    RMSNorm,
)
from nbnorm.torch.replacing import Replaced, replace, restore

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
    "Replaced",
    "batch_norm",
    "fold",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "replace",
    "restore",
    "rms_norm",
]
