"""What a forward call hands to its backward call."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nbnorm._options import Epilogue, Mask
from nbnorm._view import View
from nbnorm.moments import Moments


class Saved(NamedTuple):
    """Everything that backward needs of a forward call; pure, so backward may run twice.

    It is a tuple because that is made sooner than a frozen dataclass, which a small call notices
    (benchmarks/small_call.py, what backward needs); two are equal if they are the same.

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
    count : float or ndarray
        Number of values that share a mean and a variance: with a mask, the sum of weights, one for each sample in
        instance and group norm.
    m2 : ndarray or None
        Sum of squared deviations behind rstd, for the training of batch norm.
    constant : bool
        Whether backward takes the statistics as constants, as in eval mode.
    view : View
        How x is walked.
    order : tuple of int or None
        Memory order of the results where it is not that of the packed x.
    epilogue : Epilogue
        What has followed x_hat, renormalization included; the residual if an activation follows it: then z is computed
        again.
    with_residual : bool
        Whether backward returns dresidual.
    mask : Mask or None
        The weights, in the order of memory, and their sums.
    correction : tuple of ndarray or None
        r and d of batch renormalization, shape (C,).
    parts : tuple of Saved
        What each virtual batch has saved; mean and rstd then have the shape (K, C).
    places : tuple
        Where in x each of them lies.
    whole : Moments or None
        The moments of all virtual batches together.
    """

    norm: str
    x: np.ndarray
    weight: np.ndarray | None
    bias: np.ndarray | None
    mean: np.ndarray | None
    rstd: np.ndarray
    count: Any
    m2: np.ndarray | None
    constant: bool
    view: View
    order: tuple[int, ...] | None
    epilogue: Epilogue
    with_residual: bool
    mask: Mask | None = None
    correction: tuple[np.ndarray, np.ndarray] | None = None
    parts: tuple[Saved, ...] = ()
    places: tuple[tuple[slice, ...], ...] = ()
    whole: Moments | None = None

    @property
    def moments(self) -> Moments | None:
        """The moments of x in batch norm's training, of all virtual batches together; else None."""
        if self.m2 is None or self.mean is None:
            return self.whole
        return Moments(self.count, self.mean, self.m2)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays that are kept alive."""
        arrays = [self.x, self.weight, self.bias, *self._small()]
        for part in self.parts:
            arrays += part._small()
        return sum(array.nbytes for array in {id(a): a for a in arrays if a is not None}.values())

    def _small(self) -> list[Any]:
        """Return the arrays that are its own."""
        own = [self.mean, self.rstd, self.m2, *(self.mask or ()), *(self.correction or ())]
        return [*own, *self.epilogue[:3]]

    def _counts(self) -> str:
        """Write one count, or the range of several."""
        counts = np.atleast_1d(self.count.get() if hasattr(self.count, "get") else self.count)
        ends = (counts.min(initial=np.inf), counts.max(initial=0.0)) if counts.size else (0.0, 0.0)
        return " to ".join(dict.fromkeys(f"{end:g}" for end in ends))

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __hash__(self) -> int:
        return object.__hash__(self)

    def __repr__(self) -> str:
        kind = "constant" if self.constant else "own"
        return (
            f"Saved({self.norm}, {kind} statistics{list(self.rstd.shape)}, count={self._counts()}, "
            f"x={self.x.dtype.name}{list(self.x.shape)}, nbytes={self.nbytes})"
        )
