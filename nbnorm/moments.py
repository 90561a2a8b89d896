"""Statistics that can be merged: `Moments` of the forward pass and `GradSums` of the backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbnorm import _checks
from nbnorm._dispatch import backend, library
from nbnorm._libraries import is_cupy


def _wide(values: Any) -> np.ndarray:
    """Return statistics as a contiguous float64 array where they are."""
    xp = library(values) if is_cupy(values) else np
    return xp.ascontiguousarray(values, dtype=np.float64)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    r"""Count, mean and sum of squared deviations of each channel.

    .. math:: mean = \frac{1}{n}\sum_i x_i, \qquad m2 = \sum_i (x_i - mean)^2

    Moments of disjoint parts of a batch merge into the moments of the whole, whatever the sizes of the
    parts: micro-batches of gradient accumulation, shards of several processes, pieces of a file.

    Parameters
    ----------
    count : float
        Number n of values per channel; 0 for no data.
    mean, m2 : array_like, shape (C,)
        Mean and sum of squared deviations, kept in float64.

    Raises
    ------
    ValueError
        If the shapes of mean and m2 differ or the count is negative or not finite.

    References
    ----------
    Chan, Golub, LeVeque: Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (1979).

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> x = np.array([[1.0], [2.0], [3.0], [6.0]])
    >>> whole = nbnorm.batch_moments(x[:1]).merge(nbnorm.batch_moments(x[1:]))
    >>> float(whole.count), whole.mean, whole.var()
    (4.0, array([3.]), array([3.5]))
    """

    count: float
    mean: np.ndarray
    m2: np.ndarray

    def __post_init__(self) -> None:
        count = np.float64(self.count)
        mean, m2 = _wide(self.mean), _wide(self.m2)
        if mean.shape != m2.shape:
            raise ValueError(f"m2 has shape {m2.shape}, expected {mean.shape}, the shape of mean")
        if not (0.0 <= count < np.inf):
            raise ValueError(f"count must be a finite number >= 0, got {self.count}")
        for name, value in (("count", count), ("mean", mean), ("m2", m2)):
            object.__setattr__(self, name, value)

    @classmethod
    def empty(cls, num_features: int) -> Moments:
        """Return the moments of no data, the identity of `merge`."""
        return cls(0.0, np.zeros(num_features), np.zeros(num_features))

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Moments:
        """Rebuild moments from the dictionary of `to_dict`."""
        _checks.keys("d", d, {"count", "mean", "m2"})
        return cls(d["count"], d["mean"], d["m2"])

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"count": float, "mean": array, "m2": array}``, for files and messages between processes."""
        return {"count": float(self.count), "mean": self.mean.copy(), "m2": self.m2.copy()}

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of values together.

        Merging is symmetric to the last bit; over several parts a fixed order gives fixed bits.
        """
        _checks.instance("other", other, Moments)
        _checks.shape("other.mean", other.mean, self.mean.shape)
        if type(self.mean) is not type(other.mean) and 0.0 in (self.count, other.count):
            return self if other.count == 0.0 else other  # `empty` is anywhere
        _checks.together(("self.mean", "other.mean"), (self.mean, other.mean))
        merged = backend(self.mean).merge_moments(
            self.count, self.mean, self.m2, other.count, other.mean, other.m2
        )
        return Moments(*merged)

    def var(self, ddof: int = 0) -> np.ndarray:
        """Return m2 / (count - ddof): biased for ``ddof=0``, unbiased for ``ddof=1``; NaN without enough data."""
        freedom = self.count - ddof
        if freedom <= 0.0:
            return library(self.m2).full(self.m2.shape, np.nan)  # type: ignore[no-any-return]
        return library(self.m2).asarray(self.m2 / freedom)  # type: ignore[no-any-return]

    def std(self, ddof: int = 0) -> np.ndarray:
        """Return the square root of `var`."""
        return library(self.m2).sqrt(self.var(ddof))  # type: ignore[no-any-return]

    def rstd(self, eps: float) -> np.ndarray:
        """Return 1 / sqrt(var + eps), the factor that normalizes."""
        return backend(self.m2).rstd(self.m2, self.count, _checks.eps(eps))  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True, eq=False)
class GradSums:
    """Sums over each channel that the gradient needs: of dz and of dz * x_hat.

    They are the gradients of bias and weight, and merge by addition.

    Parameters
    ----------
    sum_dz, sum_dz_x_hat : ndarray, shape (C,)
        Sums in float64; dz is the gradient of the loss by the normalized, scaled and shifted value.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> a = nbnorm.GradSums(np.array([1.0]), np.array([2.0]))
    >>> a.merge(a).sum_dz
    array([2.])
    """

    sum_dz: np.ndarray
    sum_dz_x_hat: np.ndarray

    def __post_init__(self) -> None:
        for name in ("sum_dz", "sum_dz_x_hat"):
            object.__setattr__(self, name, _wide(getattr(self, name)))
        _checks.shape("sum_dz_x_hat", self.sum_dz_x_hat, self.sum_dz.shape)

    def merge(self, other: GradSums) -> GradSums:
        """Return the sums over both sets of values together."""
        _checks.instance("other", other, GradSums)
        _checks.shape("other.sum_dz", other.sum_dz, self.sum_dz.shape)
        return GradSums(self.sum_dz + other.sum_dz, self.sum_dz_x_hat + other.sum_dz_x_hat)
