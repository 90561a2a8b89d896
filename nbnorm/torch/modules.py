"""PyTorch's normalization modules with nbnorm inside: same arguments, same state, same meaning.

Each class is one of `torch.nn`'s but for its `forward`, and adds no attribute to it: a module changes from one
to the other by its class alone.
"""

from __future__ import annotations

from torch import Tensor, nn

from nbnorm.torch import functional


class _Batch(nn.modules.batchnorm._BatchNorm):
    """What batch norm of all ranks has in common."""

    def forward(
        self, input: Tensor, *, activation: str | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Normalize a batch, and track its statistics in training; then add a residual, and apply an activation."""
        self._check_input_dim(input)
        tracking = self.training and self.track_running_stats
        momentum = self._count() if tracking else 0.0
        own = self.training or (self.running_mean is None and self.running_var is None)
        mean, var = (self.running_mean, self.running_var) if tracking or not own else (None, None)
        behind = {"activation": activation, "residual": residual}
        state = mean, var, self.weight, self.bias
        return functional.batch_norm(input, *state, own, momentum, self.eps, **behind)

    def _count(self) -> float:
        """Count a batch and return its weight in the running statistics."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum


class BatchNorm1d(_Batch, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, computed by nbnorm.

    Examples
    --------
    >>> import torch, nbnorm.torch
    >>> nbnorm.torch.BatchNorm1d(1, affine=False)(torch.tensor([[1.0], [3.0]]))
    tensor([[-1.0000],
            [ 1.0000]])
    """


class BatchNorm2d(_Batch, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, computed by nbnorm."""


class BatchNorm3d(_Batch, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, computed by nbnorm."""


class _Instance(nn.modules.instancenorm._InstanceNorm):
    """What instance norm of all ranks has in common; PyTorch's class checks the input and its batch axis."""

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        """Normalize every channel of every sample."""
        own = self.training or not self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        state = self.running_mean, self.running_var, self.weight, self.bias
        return functional.instance_norm(input, *state, own, momentum, self.eps)


class InstanceNorm1d(_Instance, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d`, computed by nbnorm."""


class InstanceNorm2d(_Instance, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d`, computed by nbnorm."""


class InstanceNorm3d(_Instance, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d`, computed by nbnorm."""


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`, computed by nbnorm."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize over the trailing axes."""
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm`, computed by nbnorm."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize groups of channels of every sample."""
        return functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`, computed by nbnorm."""

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root mean square over the trailing axes."""
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)


REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, ours.__name__): ours
    for ours in (
        BatchNorm1d, BatchNorm2d, BatchNorm3d, GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, LayerNorm,
        RMSNorm,
    )
}  # fmt: skip
"""PyTorch's classes and ours."""
