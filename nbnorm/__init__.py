"""Normalization layers on plain arrays, forward and backward."""

from nbnorm.conventions import convert_state_dict, fold_batch_norm, preset
from nbnorm.functional import batch_norm_backward, batch_norm_forward, batch_norm_inference
from nbnorm.group_norms import (
    group_norm_backward,
    group_norm_forward,
    instance_norm_backward,
    instance_norm_forward,
)
from nbnorm.layer_norms import layer_norm_backward, layer_norm_forward, rms_norm_backward, rms_norm_forward
from nbnorm.layers import BatchNorm
from nbnorm.moments import GradSums, Moments
from nbnorm.phases import batch_moments, batch_norm_apply, batch_norm_grad_sums, batch_norm_input_grad
from nbnorm.running import update_running_stats
from nbnorm.saved import Saved
from nbnorm.tools import info, warmup

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "GradSums",
    "Moments",
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
    "rms_norm_backward",
    "rms_norm_forward",
    "update_running_stats",
    "warmup",
]
