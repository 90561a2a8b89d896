"""How do I standardize a data set that I read in pieces?
======================================================

Standardizing needs the mean and the standard deviation of each feature, and a data set that is read in
pieces has neither until the end. The formula of many scripts adds up x and x squared, piece by piece, and
takes mean(x²) - mean(x)². It fails quietly where a mean is large beside its standard deviation: times,
temperatures in kelvin, coordinates, prices.

`nbnorm.batch_moments` gives count, mean and squared deviations of a piece, and `Moments.merge` makes the
moments of all of them, in any order and for pieces of any size:

.. code-block:: python

    m = nbnorm.Moments.empty(num_features)
    for piece in pieces:
        m = m.merge(nbnorm.batch_moments(piece))
    y = nbnorm.batch_norm_inference(x, m.mean, m.var(), eps=0.0)

``m.to_dict()`` goes into a file or to another process.

The data are the 30 measurements of 569 tumors that come with scikit-learn, in pieces of 50. To get the
whole range of difficulties, each feature is also shifted by up to ten million of its standard deviations,
as if it were measured from a distant origin, and rounded to float32, as in a file. The truth is computed
from the same rounded numbers in extended precision.

**What to look at.** Sums of squares in float32 have lost all digits as soon as the mean is a thousand times
the deviation; in float64 they last for longer and fail as well. Merged moments stay right over the whole
range.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from sklearn.datasets import load_breast_cancer

import nbnorm
from networks import BLUE, GREEN, ORANGE, panels, parse, save

SHIFTS = 10.0 ** np.arange(8)


def pieces(x: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """Read a data set a few rows at a time; the last piece is a short one."""
    for start in range(0, len(x), rows):
        yield x[start : start + rows]


def by_moments(x: np.ndarray, rows: int) -> np.ndarray:
    """Standard deviations from merged moments, which went through a file in between."""
    m = nbnorm.Moments.empty(x.shape[1])
    for piece in pieces(x, rows):
        stored = json.dumps({name: np.asarray(v).tolist() for name, v in m.to_dict().items()})
        m = nbnorm.Moments.from_dict(json.loads(stored)).merge(nbnorm.batch_moments(piece))
    return m.std()


def by_squares(dtype: type) -> Callable[[np.ndarray, int], np.ndarray]:
    """Standard deviations from sums of x and of x squared, in a given type."""

    def deviations(x: np.ndarray, rows: int) -> np.ndarray:
        total = squares = np.zeros(x.shape[1], dtype)
        for piece in pieces(x.astype(dtype), rows):
            total, squares = total + piece.sum(axis=0), squares + (piece**2).sum(axis=0)
        with np.errstate(invalid="ignore"):  # the difference may be negative
            return np.sqrt(squares / len(x) - (total / len(x)) ** 2)

    return deviations


METHODS = {
    "squares, float32": (by_squares(np.float32), ORANGE),
    "squares, float64": (by_squares(np.float64), GREEN),
    "nbnorm.Moments": (by_moments, BLUE),
}


def main(argv: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Return the relative errors of the standard deviations, shape (shifts, features)."""
    options = parse(__doc__, argv, "standardize", rows=50)
    measured = load_breast_cancer().data
    mean, std = measured.mean(axis=0), measured.std(axis=0)
    results = {name: np.empty((len(SHIFTS), len(std))) for name in METHODS}
    for i, shift in enumerate(SHIFTS):
        x = (measured - mean + shift * std).astype(np.float32)
        truth = x.astype(np.longdouble).std(axis=0)
        for name, (deviations, _) in METHODS.items():
            error = np.abs(deviations(x, options.rows) / truth - 1).astype(float)
            results[name][i] = np.where(np.isfinite(error), error, 1.0)  # the root of a negative number

    print("mean / standard deviation" + "".join(f"{shift:>9.0e}" for shift in SHIFTS))
    for name, errors in results.items():
        print(f"{name:25}" + "".join(f"{value:9.1e}" for value in errors.max(axis=1)))
    x = measured.astype(np.float32)
    m = nbnorm.Moments.empty(x.shape[1])
    for piece in pieces(x, options.rows):
        m = m.merge(nbnorm.batch_moments(piece))
    y = nbnorm.batch_norm_inference(x, m.mean, m.var(), eps=0.0)
    print(
        f"standardized: means to {np.abs(y.mean(0)).max():.0e}, deviations 1 to {np.abs(y.std(0) - 1).max():.0e}"
    )

    figure, (axes,) = panels("Standard deviations of a data set read in pieces", width=6.5)
    for name, (_, color) in METHODS.items():
        errors = np.maximum(results[name], 1e-17)
        axes.fill_between(
            SHIFTS, errors.min(axis=1), errors.max(axis=1), color=color, alpha=0.15, linewidth=0
        )
        axes.plot(SHIFTS, errors.max(axis=1), "o-", color=color, label=name, markersize=4)
    axes.axhline(1e-2, color="0.6", linewidth=1, linestyle=":")
    axes.text(SHIFTS[0], 1.4e-2, "one per cent", color="0.4", fontsize=8)
    axes.set(
        xscale="log", yscale="log", ylim=(1e-17, 1e7), ylabel="relative error\n(line: worst of 30 features)"
    )
    axes.set_xlabel("mean / standard deviation")
    axes.legend(frameon=False, loc="upper left")
    save(figure, options.output)
    return results


if __name__ == "__main__":
    main()
