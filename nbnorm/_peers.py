"""What other libraries take for the same, on the same arrays: the columns of ``nbnorm bench --peers``.

A peer makes of a batch the calls of each direction, and none where it lacks the case. Where there are several ways,
plain and with ``out=`` for example, the fastest counts. No library is imported before it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from nbnorm._bench import EPS, Batch, Call, Calls, Peers

ALL = [True, True, True]  # dx, dweight and dbias


def numpy_calls(batch: Batch) -> Calls:
    """The norm as an expression of arrays."""
    formula = batch.case.expression()
    statistics = formula.forward(batch.x, *batch.parameters)[1:]
    return {
        "forward": [partial(formula.forward, batch.x, *batch.parameters)],
        "backward": [partial(formula.backward, batch.dy, batch.x, batch.parameters[0], *statistics)],
    }


def jax_calls(batch: Batch) -> Calls:
    """The same expression, compiled by XLA; backward from saved statistics."""
    jax, formula = import_module("jax"), batch.case.expression()
    x, dy, *parameters = map(jax.numpy.asarray, (batch.x, batch.dy, *batch.parameters))
    forward, backward = jax.jit(formula.forward), jax.jit(formula.backward)
    statistics = forward(x, *parameters)[1:]
    return {
        "forward": [lambda: jax.block_until_ready(forward(x, *parameters))],
        "backward": [lambda: jax.block_until_ready(backward(dy, x, parameters[0], *statistics))],
    }


def torch_calls(batch: Batch) -> Calls:
    """PyTorch's operators, with new results and, where there is such an overload, with given ones."""
    calls = {direction: operator.calls() for direction, operator in _operators(batch).items()}
    if batch.case.norm == "rms_norm":  # has no operator for backward on a CPU, but a graph
        calls["backward"] = [_rms_norm_graph(batch)]
    return calls


def compiled_calls(batch: Batch) -> Calls:
    """PyTorch's compiler on these operators, and on the expression that NumPy and JAX get."""
    torch, formula = import_module("torch"), batch.case.expression()
    torch.compiler.reset()  # or it gives up after some shapes
    compiled = partial(torch.compile, dynamic=False)
    x, dy, *parameters = map(torch.from_numpy, (batch.x, batch.dy, *batch.parameters))
    forward, backward = compiled(formula.forward), compiled(formula.backward)
    statistics = forward(x, *parameters)[1:]
    calls: dict[str, list[Call]] = {
        "forward": [partial(forward, x, *parameters)],
        "backward": [partial(backward, dy, x, parameters[0], *statistics)],
    }
    for direction, operator in _operators(batch).items():
        calls[direction].append(partial(compiled(operator.function), *operator.arguments))
    return calls


def onednn_calls(batch: Batch) -> Calls:
    """oneDNN, by way of PyTorch, on tensors in a format of its own: batch norm of images only."""
    if batch.case.norm != "batch_norm" or batch.x.ndim != 4:
        return {}
    return {direction: operator.calls() for direction, operator in _operators(batch, onednn=True).items()}


class Operator(NamedTuple):
    """An operator of PyTorch with its arguments."""

    function: Any
    arguments: tuple[Any, ...]

    def statistics(self) -> Any:
        """Mean, if there is one, and rstd, which forward returns after y."""
        return self.function(*self.arguments)[1:]

    def calls(self) -> list[Call]:
        """Call it as it is, and with results given; some lack that overload, and all of them for oneDNN."""
        plain = partial(self.function, *self.arguments)
        if "out" not in self.function.overloads() or self.arguments[0].is_mkldnn:
            return [plain]
        names = (argument.name for argument in self.function.out._schema.arguments if argument.kwarg_only)
        empty_like = import_module("torch").empty_like
        results = {name: empty_like(result) for name, result in zip(names, plain(), strict=True)}
        return [plain, partial(self.function.out, *self.arguments, **results)]


def _operators(batch: Batch, onednn: bool = False) -> dict[str, Operator]:
    """Return the operators of a norm with their arguments, over the memory of the batch."""
    torch, norm = import_module("torch"), batch.case.norm
    x, dy, *parameters = map(torch.from_numpy, (batch.x, batch.dy, *batch.parameters))
    if norm in ("layer_norm", "rms_norm"):
        return (_layer_norm if norm == "layer_norm" else _rms_norm)(torch.ops.aten, x, dy, *parameters)
    if batch.case.channel_axis == -1:
        x, dy = x.movedim(-1, 1), dy.movedim(-1, 1)  # with the strides of torch.channels_last
    if norm == "group_norm":
        return _group_norm(torch.ops.aten, batch.case.num_groups, x, dy, *parameters)
    if norm == "instance_norm":  # as PyTorch does it: a batch norm of one sample
        if not x.is_contiguous():
            return {}
        parameters = [values.repeat(len(x)) for values in parameters]
        x, dy = x.flatten(0, 1)[None], dy.flatten(0, 1)[None]
    if onednn:
        x, dy = x.to_mkldnn(), dy.to_mkldnn()
    return _batch_norm(torch.ops.aten, x, dy, *parameters)


def _batch_norm(aten: Any, x: Any, dy: Any, weight: Any, bias: Any) -> dict[str, Operator]:
    forward = Operator(aten.native_batch_norm, (x, weight, bias, None, None, True, 0.0, EPS))
    arguments = (dy, x, weight, None, None, *forward.statistics(), True, EPS, ALL)
    return {"forward": forward, "backward": Operator(aten.native_batch_norm_backward, arguments)}


def _layer_norm(aten: Any, x: Any, dy: Any, weight: Any, bias: Any) -> dict[str, Operator]:
    size = [weight.numel()]
    forward = Operator(aten.native_layer_norm, (x, size, weight, bias, EPS))
    arguments = (dy, x, size, *forward.statistics(), weight, bias, ALL)
    return {"forward": forward, "backward": Operator(aten.native_layer_norm_backward, arguments)}


def _rms_norm(aten: Any, x: Any, dy: Any, weight: Any) -> dict[str, Operator]:
    size = [weight.numel()]
    forward = Operator(aten._fused_rms_norm, (x, size, weight, EPS))
    arguments = (dy, x, size, *forward.statistics(), weight, ALL[:2])
    return {"forward": forward, "backward": Operator(aten._fused_rms_norm_backward, arguments)}


def _group_norm(aten: Any, groups: int, x: Any, dy: Any, weight: Any, bias: Any) -> dict[str, Operator]:
    sizes = (*x.shape[:2], x[0, 0].numel(), groups)
    forward = Operator(aten.native_group_norm, (x, weight, bias, *sizes, EPS))
    arguments = (dy, x, *forward.statistics(), weight, *sizes, ALL)
    return {"forward": forward, "backward": Operator(aten.native_group_norm_backward, arguments)}


def _rms_norm_graph(batch: Batch) -> Call:
    """Return backward on a graph that is kept."""
    torch = import_module("torch")
    x, dy, weight = map(torch.from_numpy, (batch.x, batch.dy, *batch.parameters))
    leaves = x.requires_grad_(), weight.requires_grad_()
    y = torch.nn.functional.rms_norm(x, (weight.numel(),), weight, EPS)
    return partial(torch.autograd.grad, y, leaves, dy, retain_graph=True)


class Peer(NamedTuple):
    """A library, or a way to use one; ``by_default`` says whether it is measured without being named."""

    package: str
    calls: Callable[[Batch], Calls]
    by_default: bool = True


PEERS = {
    "numpy": Peer("numpy", numpy_calls),
    "torch": Peer("torch", torch_calls),
    "compile": Peer("torch", compiled_calls, by_default=False),
    "onednn": Peer("torch", onednn_calls),
    "jax": Peer("jax", jax_calls),
}


def chosen(names: Collection[str], threads: int) -> Peers:
    """Return the peers of these names, or those installed that need no name, with as many threads as nbnorm has."""
    for name in names:
        if not _installed(name):
            package = PEERS[name].package
            raise ModuleNotFoundError(
                f"{name} is measured with the package {package}, which is not installed"
            )
    names = names or [name for name, peer in PEERS.items() if peer.by_default and _installed(name)]
    packages = {PEERS[name].package for name in names}
    if "torch" in packages:
        import_module("torch").set_num_threads(threads)
    if "jax" in packages:
        os.environ["PJRT_NPROC"] = str(threads)  # XLA reads it when it starts
    return {name: PEERS[name].calls for name in names}


def _installed(name: str) -> bool:
    """Whether the library of a peer is there."""
    return find_spec(PEERS[name].package) is not None
