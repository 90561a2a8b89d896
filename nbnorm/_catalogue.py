"""The norms as one table, for tools that go through all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbnorm import functional, group_norms, layer_norms
from nbnorm.saved import Saved

LAYOUTS = ("channels_first", "channels_last")


@dataclass(frozen=True)
class Norm:
    """What the pair of functions of one norm takes."""

    name: str
    forward_call: Callable[..., tuple[np.ndarray, Saved]]
    backward_call: Callable[..., tuple[np.ndarray | None, ...]]
    by_channel: bool = True
    with_bias: bool = True
    with_groups: bool = False

    def parameters(self, x: np.ndarray, channel_axis: int) -> tuple[np.ndarray, ...]:
        """Return a weight of ones and, where the norm has one, a bias of zeros."""
        size = x.shape[channel_axis if self.by_channel else -1]
        dtype = np.float64 if x.dtype == np.float64 else np.float32
        ones, zeros = np.ones(size, dtype), np.zeros(size, dtype)
        return (ones, zeros) if self.with_bias else (ones,)

    def forward(
        self,
        x: np.ndarray,
        *parameters: np.ndarray,
        channel_axis: int = 1,
        num_groups: int = 1,
        **options: Any,
    ) -> tuple[np.ndarray, Saved]:
        """Call the forward function with the arguments that it knows."""
        groups = (num_groups,) if self.with_groups else ()
        if self.by_channel:
            options["channel_axis"] = channel_axis
        return self.forward_call(x, *groups, *parameters, **options)


NORMS = {
    norm.name: norm
    for norm in (
        Norm("batch_norm", functional.batch_norm_forward, functional.batch_norm_backward),
        Norm("layer_norm", layer_norms.layer_norm_forward, layer_norms.layer_norm_backward, by_channel=False),
        Norm(
            "rms_norm",
            layer_norms.rms_norm_forward,
            layer_norms.rms_norm_backward,
            by_channel=False,
            with_bias=False,
        ),
        Norm("group_norm", group_norms.group_norm_forward, group_norms.group_norm_backward, with_groups=True),
        Norm("instance_norm", group_norms.instance_norm_forward, group_norms.instance_norm_backward),
    )
}
