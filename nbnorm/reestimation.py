"""Population statistics for a trained network: running statistics measured anew over many batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from nbnorm import _checks
from nbnorm.batch_layer import BatchNorm
from nbnorm.moments import Moments
from nbnorm.phases import batch_moments
from nbnorm.running import Pair, update_running_stats


def reestimate(
    layer_or_layers: BatchNorm | Iterable[BatchNorm], batches: Iterable[Any], run: Callable[[Any], Any]
) -> None:
    """Replace running statistics by those of all the data together, as if it were one batch.

    Running statistics lag behind a network that learns: they average batches that older parameters saw, with equal
    weight whatever their sizes. Here all batches run through the network as it is, in training mode, and the
    moments of each layer's inputs are merged, weighted by their counts. Parameters and gradients stay, and
    ``num_batches_tracked`` becomes the number of batches.

    Parameters
    ----------
    layer_or_layers : BatchNorm or iterable of BatchNorm
        The layers to measure, all in one pass.
    batches : iterable
        What to run, of any type and of any sizes.
    run : callable
        Called with each batch: runs the network forward. Nothing else needs to be done, or returned.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or a layer has met no values.
    Exception
        Whatever ``batches`` or ``run`` raises. Every layer then has the running statistics it had, and modes are
        restored in any case.

    References
    ----------
    Wu, Johnson: Rethinking "Batch" in BatchNorm (2021), https://arxiv.org/abs/2105.07576 (precise BatchNorm).

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> bn = nbnorm.BatchNorm(1, ddof=0).eval()
    >>> nbnorm.reestimate(bn, [np.array([[0.0], [2.0]]), np.array([[4.0], [4.0], [5.0]])], bn)
    >>> bn.running_mean, bn.running_var, bn.training
    (array([3.], dtype=float32), array([3.2], dtype=float32), False)
    """
    layers = _checked(layer_or_layers)
    with ExitStack() as stack:
        populations = [stack.enter_context(_observed(layer)) for layer in layers]
        for batch in batches:
            run(batch)
    measured = [
        population.running() for population in populations
    ]  # all of them, before the first is written
    for population, pair in zip(populations, measured, strict=True):
        population.layer._replace_running(*pair, population.batches)


class Population:
    """The merged moments of everything a layer has been called with."""

    def __init__(self, layer: BatchNorm) -> None:
        self.layer = layer
        self.batches = 0
        self.moments = Moments.empty(layer.num_features)

    def add(self, x: np.ndarray, mask: Any) -> None:
        """Merge the moments of one more batch."""
        moments = batch_moments(x, self.layer.channel_axis, mask)
        self.moments = self.moments.merge(moments)
        self.batches += moments.count > 0

    def running(self) -> Pair:
        """Return the running statistics that these moments make."""
        if self.moments.count == 0:
            raise ValueError(f"{self.layer!r} has met no values: batches were empty, or run did not call it")
        state = self.layer.state_dict()
        pair = state["running_mean"], state["running_var"]
        update_running_stats(*pair, self.moments, 1.0, self.layer.ddof, nonfinite=self.layer.nonfinite)
        return pair


def _checked(layer_or_layers: Any) -> list[BatchNorm]:
    """Return every layer once."""
    layers = [layer_or_layers] if isinstance(layer_or_layers, BatchNorm) else list(layer_or_layers)
    for layer in layers:
        _checks.instance("every layer", layer, BatchNorm)
        if not layer.track_running_stats:
            raise ValueError(f"{layer!r} keeps no running statistics")
    return list({id(layer): layer for layer in layers}.values())


@contextmanager
def _observed(layer: BatchNorm) -> Iterator[Population]:
    """Have a layer train on what it meets without any update, and restore its mode."""
    mode, population = layer.training, Population(layer)
    layer.train()._observe = population.add
    try:
        yield population
    finally:
        layer.train(mode)._observe = None
