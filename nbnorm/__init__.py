"""Normalization layers on plain arrays, forward and backward."""

from nbnorm._dispatch import lent as _lent
from nbnorm.batch_layer import BatchNorm
from nbnorm.conventions import convert_state_dict, fold_batch_norm, preset
from nbnorm.functional import batch_norm_backward, batch_norm_forward, batch_norm_inference
from nbnorm.group_norms import (
    group_norm_backward,
    group_norm_forward,
    instance_norm_backward,
    instance_norm_forward,
)
from nbnorm.layer_norms import layer_norm_backward, layer_norm_forward, rms_norm_backward, rms_norm_forward
from nbnorm.layers import GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from nbnorm.moments import GradSums, Moments
from nbnorm.phases import batch_moments, batch_norm_apply, batch_norm_grad_sums, batch_norm_input_grad
from nbnorm.reestimation import reestimate
from nbnorm.running import update_running_stats
from nbnorm.saved import Saved
from nbnorm.tools import info, warmup

__version__ = "0.1.0"

# The public functions take the arrays of every library on a device; inside there are NumPy's and CuPy's only.
batch_moments = _lent(batch_moments)
batch_norm_apply = _lent(batch_norm_apply)
batch_norm_backward = _lent(batch_norm_backward)
batch_norm_forward = _lent(batch_norm_forward)
batch_norm_grad_sums = _lent(batch_norm_grad_sums)
batch_norm_inference = _lent(batch_norm_inference)
batch_norm_input_grad = _lent(batch_norm_input_grad)
group_norm_backward = _lent(group_norm_backward)
group_norm_forward = _lent(group_norm_forward)
instance_norm_backward = _lent(instance_norm_backward)
instance_norm_forward = _lent(instance_norm_forward)
layer_norm_backward = _lent(layer_norm_backward)
layer_norm_forward = _lent(layer_norm_forward)
rms_norm_backward = _lent(rms_norm_backward)
rms_norm_forward = _lent(rms_norm_forward)
update_running_stats = _lent(update_running_stats)

__all__ = [
    "BatchNorm",
    "GradSums",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "Moments",
    "RMSNorm",
    "Saved",
    "batch_moments",
    "batch_norm_apply",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_norm_grad_sums",
    "batch_norm_inference",
    "batch_norm_input_grad",
    "convert_state_dict",
    "fold_batch_norm",
    "group_norm_backward",
    "group_norm_forward",
    "info",
    "instance_norm_backward",
    "instance_norm_forward",
    "layer_norm_backward",
    "layer_norm_forward",
    "preset",
    "reestimate",
    "rms_norm_backward",
    "rms_norm_forward",
    "update_running_stats",
    "warmup",
]
