"""Make accuracy.json: small inputs of every norm and what mpmath makes of them with 50 digits.

    python tests/data/make_accuracy.py

Inputs are written as the hexadecimal digits of their type, results as the sum of two float64 numbers, which is good to
32 digits. The file is in the repository, so that the tests need no mpmath and no run of this script changes the truth.
"""

import json
from pathlib import Path

import mpmath
import numpy as np
from mpmath import mpf

mpmath.mp.dps = 50
ROWS, COLUMNS = 5, 6  # x is (5, 6): 5 samples, 6 channels or elements; groups of 3 channels
EPS = {"batch": 1e-5, "layer": 1e-5, "rms": 1e-6, "group": 1e-5, "instance": 1e-5}
# Values that lose digits in one way each; the seeds are part of the file.
KINDS = {
    "ordinary": lambda rng: rng.standard_normal((ROWS, COLUMNS)),
    "offset": lambda rng: 1e3 + rng.standard_normal((ROWS, COLUMNS)),
    "far offset": lambda rng: -1e6 + rng.standard_normal((ROWS, COLUMNS)),
    "small": lambda rng: 1e-3 * rng.standard_normal((ROWS, COLUMNS)),
    "large": lambda rng: 1e15 * rng.standard_normal((ROWS, COLUMNS)),
    "outlier": lambda rng: np.where(
        np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) % 11 == 3, 1e4, rng.standard_normal((ROWS, COLUMNS))
    ),
}


def slots(norm):
    """Return the index pairs of every slot."""
    rows, columns = range(ROWS), range(COLUMNS)
    if norm == "batch":
        return [[(i, j) for i in rows] for j in columns]
    width = {"layer": COLUMNS, "rms": COLUMNS, "group": 3, "instance": COLUMNS}[norm]
    return [[(i, j) for j in range(first, first + width)] for i in rows for first in range(0, COLUMNS, width)]


def parameter(norm, index):
    """Return which parameter an element has: instance norm's x is (5, 1, 6), its one channel a row."""
    return 0 if norm == "instance" else index[1]


def differentiate(norm, x, dy, weight, bias):
    """Normalize and differentiate by the formulas, slot by slot."""
    y, dx, means, rstds = {}, {}, [], []
    dweight, dbias = ([mpf(0)] * len(weight) for _ in range(2))
    for slot in slots(norm):
        n = len(slot)
        mean = mpf(0) if norm == "rms" else mpmath.fsum(x[i] for i in slot) / n
        rstd = 1 / mpmath.sqrt(mpmath.fsum((x[i] - mean) ** 2 for i in slot) / n + mpf(EPS[norm]))
        x_hat = {i: (x[i] - mean) * rstd for i in slot}
        g = {i: dy[i] * weight[parameter(norm, i)] for i in slot}
        c1 = mpf(0) if norm == "rms" else mpmath.fsum(g.values()) / n
        c2 = mpmath.fsum(g[i] * x_hat[i] for i in slot) / n
        for i in slot:
            p = parameter(norm, i)
            y[i] = x_hat[i] * weight[p] + (0 if norm == "rms" else bias[p])
            dx[i] = rstd * (g[i] - c1 - x_hat[i] * c2)
            dweight[p] += dy[i] * x_hat[i]
            dbias[p] += dy[i]
        means.append(mean)
        rstds.append(rstd)
    order = [(i, j) for i in range(ROWS) for j in range(COLUMNS)]
    return {
        "y": [y[i] for i in order], "dx": [dx[i] for i in order], "dweight": dweight, "dbias": dbias,
        "mean": means, "rstd": rstds,
    }  # fmt: skip


def exact(value):
    """Write a number as the sum of two float64 numbers."""
    high = float(value)
    return [high.hex(), float(value - mpf(high)).hex()]


def entry(norm, dtype, kind, seed):
    """Make one row of the table."""
    rng = np.random.default_rng(seed)
    draw = [KINDS[kind](rng), *(rng.standard_normal((ROWS, COLUMNS)) for _ in range(3))]
    x, dy = (np.asarray(a, dtype) for a in draw[:2])
    weight, bias = (np.asarray(a[0, : 1 if norm == "instance" else COLUMNS], dtype) for a in draw[2:])
    numbers = [
        {(i, j): mpf(float(a[i, j])) for i in range(ROWS) for j in range(COLUMNS)} for a in (x, dy)
    ] + [[mpf(float(v)) for v in a] for a in (weight, bias)]
    results = differentiate(norm, *numbers)
    arrays = {"x": x, "dy": dy, "weight": weight, "bias": bias}
    return {
        "norm": norm,
        "dtype": dtype,
        "kind": kind,
        "inputs": {name: [float(v).hex() for v in a.ravel()] for name, a in arrays.items()},
        "results": {name: [exact(v) for v in values] for name, values in results.items()},
    }


if __name__ == "__main__":
    rows = [
        entry(norm, dtype, kind, seed)
        for norm in EPS
        for dtype in ("float32", "float64")
        for seed, kind in enumerate(KINDS)
    ]
    path = Path(__file__).with_name("accuracy.json")
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(f"{len(rows)} rows, {path.stat().st_size} bytes")
