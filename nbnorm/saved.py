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
    x, weight, bias : ndarray or None
        The arrays of the forward call (x is the packed copy if one was made), which must not change before
        backward.
    mean, rstd : ndarray, shape (C,)
        The statistics that normalized x, in float64: of the batch, or a snapshot of the running ones.
    count : float
        Number of values per channel that the statistics cover.
    m2 : ndarray or None
        Sum of squared deviations behind rstd; None where backward takes the statistics as constants.
    view : View
        How x is walked.
    """

    x: np.ndarray
    weight: np.ndarray | None
    bias: np.ndarray | None
    mean: np.ndarray
    rstd: np.ndarray
    count: float
    m2: np.ndarray | None
    view: View

    @property
    def constant(self) -> bool:
        """Whether backward takes the statistics as constants, as in eval mode."""
        return self.m2 is None

    @property
    def moments(self) -> Moments | None:
        """The moments that normalized x; None where the statistics were constants."""
        return None if self.m2 is None else Moments(self.count, self.mean, self.m2)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays that are kept alive."""
        arrays = (self.x, self.weight, self.bias, self.mean, self.rstd, self.m2)
        return sum(array.nbytes for array in arrays if array is not None)

    def __repr__(self) -> str:
        kind = "constant" if self.constant else "batch"
        return (
            f"Saved({kind} statistics of {self.mean.size} channels, count={self.count:g}, "
            f"x={self.x.dtype.name}{list(self.x.shape)}, nbytes={self.nbytes})"
        )
