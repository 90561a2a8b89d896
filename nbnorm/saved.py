"""What a forward call hands to its backward call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nbnorm._view import View
from nbnorm.moments import Moments


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Saved:
    """Everything that backward needs of a forward call; pure, so backward may run twice.

    Attributes
    ----------
    norm : str
        Which norm made it: its backward call takes no other.
    x, weight, bias : ndarray or None
        The arrays of the forward call (x is the packed copy if one was made), which must not change before
        backward.
    mean, rstd : ndarray
        The statistics that normalized x, in float64: of the batch, or a snapshot of the running ones. Their shape
        is (C,) for batch norm, (N, C) for instance norm, (N, G) for group norm, and that of x without the
        normalized axes for layer and RMS norm, whose mean is None.
    count : float
        Number of values that share a mean and a variance.
    m2 : ndarray or None
        Sum of squared deviations behind rstd, for the training of batch norm.
    constant : bool
        Whether backward takes the statistics as constants, as in eval mode.
    view : View
        How x is walked.
    order : tuple of int or None
        Memory order of the results where it is not that of the packed x.
    """

    norm: str
    x: np.ndarray
    weight: np.ndarray | None
    bias: np.ndarray | None
    mean: np.ndarray | None
    rstd: np.ndarray
    count: float
    m2: np.ndarray | None
    constant: bool
    view: View
    order: tuple[int, ...] | None

    @property
    def moments(self) -> Moments | None:
        """The moments that normalized x in batch norm's training; None for other norms and for constants."""
        if self.m2 is None or self.mean is None:
            return None
        return Moments(self.count, self.mean, self.m2)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays that are kept alive."""
        arrays = (self.x, self.weight, self.bias, self.mean, self.rstd, self.m2)
        return sum(array.nbytes for array in arrays if array is not None)

    def __repr__(self) -> str:
        kind = "constant" if self.constant else "own"
        return (
            f"Saved({self.norm}, {kind} statistics{list(self.rstd.shape)}, count={self.count:g}, "
            f"x={self.x.dtype.name}{list(self.x.shape)}, nbytes={self.nbytes})"
        )
