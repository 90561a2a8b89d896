"""Can a batch be cut into parts and still be normalized as one?
=============================================================

A batch that does not fit in memory is cut into micro-batches, whose gradients are added up. With dense
layers that gives the gradient of the whole batch; with batch norm it does not, for each micro-batch is
normalized by its own mean and variance. The same happens when a batch is spread over several processes.

nbnorm has batch norm in two phases, between which the parts exchange two vectors per direction:

.. code-block:: python

    m = nbnorm.batch_moments(part_a).merge(nbnorm.batch_moments(part_b))       # of the whole batch
    y_a, saved_a = nbnorm.batch_norm_apply(part_a, m, weight, bias)
    ...
    sums = nbnorm.batch_norm_grad_sums(dy_a, saved_a).merge(nbnorm.batch_norm_grad_sums(dy_b, saved_b))
    dx_a = nbnorm.batch_norm_input_grad(dy_a, saved_a, sums)

The parts have to walk through the network side by side, layer by layer. So this saves the memory of the
temporary arrays within the layers (the windows of a convolution, say), not that of the activations that
backward needs.

**What to look at.** Left: the gradient of a batch of 256 digits, cut into parts of 2 to 64. In two phases
it is that of the whole batch to the last digits, for any size of the parts. With statistics of their own it
is another gradient, and for parts of 2 it has little to do with the right one. Right: what comes of
training with each. It is less dramatic than the gradients let one expect: parts of 8 already train well,
only parts of 2 do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np

import nbnorm
from networks import BLUE, GRAY, ORANGE, cross_entropy, digits, mini_batches, panels, parse, save

BATCH = 256
PARTS = (2, 4, 8, 16, 32, 64)
SIZES = (64, 128, 64)

Parts = list[np.ndarray]
Params = dict[str, np.ndarray]


def first_params(rng: np.random.Generator) -> Params:
    """Weights of two hidden layers with batch norm and of the layer for the logits."""
    params = {}
    for i, (inputs, outputs) in enumerate(zip(SIZES, (*SIZES[1:], 10), strict=True)):
        params[f"dense{i}"] = rng.normal(0, np.sqrt(2 / inputs), (inputs, outputs)).astype(np.float32)
        if i < len(SIZES) - 1:
            params[f"weight{i}"], params[f"bias{i}"] = np.ones(outputs, "f4"), np.zeros(outputs, "f4")
    return params


def exact_norm(parts: Parts, weight: np.ndarray, bias: np.ndarray) -> tuple[Parts, list[nbnorm.Saved]]:
    """First phase: moments of every part, merged; then every part is normalized by them."""
    moments = reduce(nbnorm.Moments.merge, [nbnorm.batch_moments(part) for part in parts])
    y, saved = zip(*(nbnorm.batch_norm_apply(part, moments, weight, bias) for part in parts), strict=True)
    return list(y), list(saved)


def exact_norm_backward(dy: Parts, saved: list[nbnorm.Saved]) -> tuple[Parts, np.ndarray, np.ndarray]:
    """Second phase: sums over every part, merged; they are dweight and dbias, too."""
    sums = reduce(nbnorm.GradSums.merge, map(nbnorm.batch_norm_grad_sums, dy, saved))
    dx = [nbnorm.batch_norm_input_grad(part, s, sums) for part, s in zip(dy, saved, strict=True)]
    return dx, sums.sum_dz_x_hat, sums.sum_dz


def own_norm(parts: Parts, weight: np.ndarray, bias: np.ndarray) -> tuple[Parts, list[nbnorm.Saved]]:
    """Every part is normalized by itself."""
    y, saved = zip(*(nbnorm.batch_norm_forward(part, weight, bias) for part in parts), strict=True)
    return list(y), list(saved)


def own_norm_backward(dy: Parts, saved: list[nbnorm.Saved]) -> tuple[Parts, np.ndarray, np.ndarray]:
    """Every part has a gradient of its own; those of the parameters are added up."""
    gradients = zip(*map(nbnorm.batch_norm_backward, dy, saved), strict=True)
    dx, dweight, dbias = (list(parts) for parts in gradients)
    return dx, sum(dweight), sum(dbias)


KINDS = {"two phases": (exact_norm, exact_norm_backward), "own statistics": (own_norm, own_norm_backward)}


def gradients(kind: str, params: Params, parts: Parts, labels: Parts) -> Params:
    """Gradient of the mean loss over all parts by every parameter."""
    norm, norm_backward = KINDS[kind]
    h, kept, hidden = parts, [], len(SIZES) - 1
    for i in range(hidden):
        z, saved = norm([x @ params[f"dense{i}"] for x in h], params[f"weight{i}"], params[f"bias{i}"])
        kept.append((h, z, saved))
        h = [np.maximum(part, 0) for part in z]
    total, grads = sum(map(len, parts)), {}
    dy = []
    for part, label in zip(h, labels, strict=True):
        gradient = cross_entropy(part @ params[f"dense{hidden}"], label)[1]
        dy.append(gradient * np.float32(len(part) / total))
    grads[f"dense{hidden}"] = sum(x.T @ d for x, d in zip(h, dy, strict=True))
    dy = [d @ params[f"dense{hidden}"].T for d in dy]
    for i in reversed(range(hidden)):
        inputs, z, saved = kept[i]
        dy = [d * (part > 0) for d, part in zip(dy, z, strict=True)]
        dy, grads[f"weight{i}"], grads[f"bias{i}"] = norm_backward(dy, saved)
        grads[f"dense{i}"] = sum(x.T @ d for x, d in zip(inputs, dy, strict=True))
        dy = [d @ params[f"dense{i}"].T for d in dy]
    return grads


def cut(rows: np.ndarray, size: int) -> Parts:
    """Cut a batch into parts of nearly equal size."""
    return np.array_split(rows, max(1, round(len(rows) / size)))


def distance(grads: Params, expected: Params) -> float:
    """Relative distance of two gradients, all parameters taken together."""
    flat = [
        np.concatenate([g[name].ravel() for name in expected]).astype(np.float64) for g in (grads, expected)
    ]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))


def train(kind: str, size: int, epochs: int, data: tuple[np.ndarray, ...]) -> float:
    """Train with batches in parts; return the test accuracy, by the statistics of the whole training set."""
    x, x_test, labels, labels_test = data
    rng = np.random.default_rng(1)
    params = first_params(rng)
    for _ in range(epochs):
        for rows in mini_batches(len(x), BATCH, rng):
            parts = cut(rows, size)
            grads = gradients(kind, params, [x[part] for part in parts], [labels[part] for part in parts])
            for name, param in params.items():
                param -= np.float32(0.5) * grads[name].astype(np.float32)
    h, h_test = x, x_test
    for i in range(len(SIZES) - 1):
        h, h_test = h @ params[f"dense{i}"], h_test @ params[f"dense{i}"]
        m = nbnorm.batch_moments(h)
        scale_and_shift = params[f"weight{i}"], params[f"bias{i}"]
        h, h_test = (
            np.maximum(nbnorm.batch_norm_inference(part, m.mean, m.var(), *scale_and_shift), 0)
            for part in (h, h_test)
        )
    return float(np.mean((h_test @ params[f"dense{len(SIZES) - 1}"]).argmax(axis=1) == labels_test))


def main(argv: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Compare gradients and training; return both by kind, shape (2, sizes)."""
    options = parse(__doc__, argv, "accumulation", epochs=8, smallest=2)
    data, sizes = digits(), [size for size in PARTS if size >= options.smallest]
    x, _, labels, _ = data
    rng = np.random.default_rng(0)
    params, rows = first_params(rng), rng.permutation(len(x))[:BATCH]
    whole = gradients("two phases", params, [x[rows]], [labels[rows]])
    accuracy_whole = train("two phases", BATCH, options.epochs, data)
    results = {}
    for kind in KINDS:
        errors, accuracies = [], []
        for size in sizes:
            parts = cut(rows, size)
            grads = gradients(kind, params, [x[part] for part in parts], [labels[part] for part in parts])
            errors.append(distance(grads, whole))
            accuracies.append(train(kind, size, options.epochs, data))
        results[kind] = np.array([errors, accuracies])

    print(f"images in a part        {''.join(f'{size:>9}' for size in sizes)}     whole")
    for kind, (errors, accuracies) in results.items():
        print(f"{kind:14} gradient {''.join(f'{error:9.1e}' for error in errors)}         0")
        print(f"{kind:14} accuracy {''.join(f'{value:9.1%}' for value in accuracies)} {accuracy_whole:9.1%}")

    figure, (error_axes, axes) = panels(f"A batch of {BATCH} images, cut into parts", 2, width=4.4)
    for (kind, (errors, accuracies)), color in zip(results.items(), (BLUE, ORANGE), strict=True):
        error_axes.plot(sizes, errors, "o-", color=color, label=kind)
        axes.plot(sizes, accuracies, "o-", color=color, label=kind)
    axes.axhline(accuracy_whole, color=GRAY, linestyle="--", linewidth=1, label="whole batch")
    error_axes.set(
        yscale="log", title="gradient: distance from the whole batch's", ylabel="relative distance"
    )
    axes.set(title="test accuracy after training")
    for panel in (error_axes, axes):
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, sizes)
        panel.set_xlabel("images in a part")
    axes.legend(frameon=False, loc="lower right")
    save(figure, options.output)
    return results


if __name__ == "__main__":
    main()
