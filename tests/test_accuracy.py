"""The accuracy of every norm on frozen inputs, in units of the last place, against results with 32 digits.

`python tests/test_accuracy.py` prints the table of docs/reliability.md.
"""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numba import config

import nbnorm

TABLE = json.loads((Path(__file__).parent / "data" / "accuracy.json").read_text())
SHAPE = (5, 6)
# The largest error that any row may have, in units of the last place of x's type: at the largest magnitude of the slot
# (y, dx), at the sum of the magnitudes of all terms (dweight, dbias), at the spread of the slot (mean), at rstd.
LIMITS = {"y": 2.0, "dx": 2.0, "dweight": 1.0, "dbias": 1.5, "mean": 1.0, "rstd": 1.0}


def call(row):
    """Run the norm of a row forward and backward."""
    dtype = np.dtype(row["dtype"])
    arrays = [
        np.array([float.fromhex(v) for v in row["inputs"][name]], dtype)
        for name in ("x", "dy", "weight", "bias")
    ]
    x, dy = (a.reshape(SHAPE) for a in arrays[:2])
    weight, bias = arrays[2:]
    if row["norm"] == "instance":
        x, dy = x[:, np.newaxis], dy[:, np.newaxis]
    options = {"group": (2, weight, bias), "rms": (weight,)}.get(row["norm"], (weight, bias))
    y, saved = getattr(nbnorm, f"{row['norm']}_norm_forward")(x, *options)
    gradients = getattr(nbnorm, f"{row['norm']}_norm_backward")(dy, saved)
    found = dict(zip(("dx", "dweight", "dbias"), gradients, strict=False))
    return {"y": y, "mean": saved.mean, "rstd": saved.rstd, **found}


def truth(row, name):
    """Return exact values, one per element."""
    return [
        Fraction(float.fromhex(high)) + Fraction(float.fromhex(low)) for high, low in row["results"][name]
    ]


def scale(row, name):
    """Return the magnitude whose last place is the unit, one per element of a result."""
    dy, weight = (np.array([float.fromhex(v) for v in row["inputs"][part]]) for part in ("dy", "weight"))
    value = np.array([float(v) for v in truth(row, name)])
    axis = 0 if row["norm"] == "batch" else 1
    if name in ("y", "dx"):
        spread = {"y": 1.0, "dx": rstd_times_g(row, dy, weight)}[name]
        largest = np.maximum(np.abs(value.reshape(SHAPE)), spread)
        if row["norm"] == "group":
            return np.repeat(largest.reshape(5, 2, 3).max(axis=2), 3, axis=1).ravel()
        return np.broadcast_to(largest.max(axis=axis, keepdims=True), SHAPE).ravel()
    if name in ("dweight", "dbias"):
        x_hat = 3.0 if name == "dweight" else 1.0
        sums = np.abs(dy).reshape(SHAPE).sum(axis=None if row["norm"] == "instance" else 0)
        return np.broadcast_to(sums * x_hat, value.shape)
    return 1 / np.array([float(v) for v in truth(row, "rstd")]) if name == "mean" else np.abs(value)


def rstd_times_g(row, dy, weight):
    """Return what the differences that make dx start from."""
    rstd = np.array([float(v) for v in truth(row, "rstd")])
    g = np.abs(dy.reshape(SHAPE) * (weight if row["norm"] != "instance" else weight[0]))
    if row["norm"] == "batch":
        return rstd * g
    return np.repeat(rstd.reshape(5, -1), 6 // (rstd.size // 5), axis=1) * g


def errors(row):
    """Return the largest error of each result of a row, in units of the last place."""
    found = {}
    for name, result in call(row).items():
        if result is None:
            continue
        eps, factor = np.finfo(row["dtype"]).eps, 1.0
        if row["dtype"] == "float64":
            # Subtracting a mean costs float64, which has no wider type, what the mean is larger than the spread.
            x = np.array([float.fromhex(v) for v in row["inputs"]["x"]])
            factor = max(1.0, np.abs(x).max() * max(float(v) for v in truth(row, "rstd")))
        off = [abs(Fraction(float(a)) - b) for a, b in zip(result.ravel(), truth(row, name), strict=True)]
        found[name] = max(float(e) / (eps * s * factor) for e, s in zip(off, scale(row, name), strict=True))
    return found


# NumPy's scalars, which kernels meet without the compiler, keep sums of float32 in float32.
TESTED = [row for row in TABLE if row["dtype"] == "float64" or not config.DISABLE_JIT]


@pytest.mark.parametrize("row", TESTED, ids=lambda row: f"{row['norm']} {row['dtype']} {row['kind']}")
def test_frozen_inputs(row):
    """No result is further from the truth than its limit."""
    found = errors(row)
    assert set(found) >= {"y", "dx", "dweight", "rstd"}
    worst = {name: error for name, error in found.items() if not error <= LIMITS[name]}
    assert not worst, f"units in the last place: {worst}, allowed {LIMITS}"


def test_the_table_covers_what_it_says():
    """Every norm, both types, every kind, results with more digits than float64 has."""
    assert len({(row["norm"], row["dtype"], row["kind"]) for row in TABLE}) == len(TABLE) == 60
    lows = [float.fromhex(low) for row in TABLE for _, low in row["results"]["y"]]
    assert np.count_nonzero(lows) > 0.9 * len(lows)


def main():
    """Print the largest errors by norm and type."""
    worst = {}
    for row in TABLE:
        for name, error in errors(row).items():
            key = row["norm"], row["dtype"]
            worst.setdefault(key, {})[name] = max(error, worst.get(key, {}).get(name, 0.0))
    print("| norm | type | " + " | ".join(LIMITS) + " |")
    print("|---" * (2 + len(LIMITS)) + "|")
    for (norm, dtype), found in worst.items():
        cells = [f"{found[name]:.2f}" if name in found else "" for name in LIMITS]
        print(f"| {norm} | {dtype} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
