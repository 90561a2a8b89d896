"""Batch norm, the sum with a residual, and the activation behind them as one step.

Where `_tracing` vouches for a module's forward call, its graph is rewritten and runs instead, on the very same
submodules. In another state (eval, a submodule exchanged) the graph of that state runs, and the module's own forward
where there is none, where somebody hooked into the steps, and under torch.compile, which fuses by itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional

from nbnorm.torch import _tracing
from nbnorm.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d

_ACTIVATION_MODULES = {nn.ReLU: "relu", nn.SiLU: "silu"}
_ACTIVATION_FUNCTIONS: dict[Any, str] = {
    torch.relu: "relu", torch.relu_: "relu", functional.relu: "relu", functional.relu_: "relu",
    functional.silu: "silu",
}  # fmt: skip
_ACTIVATION_METHODS = {"relu": "relu", "relu_": "relu"}
_MAKE_NEW = (nn.modules.conv._ConvNd, nn.Linear)  # what these return is nobody else's
_SUMS = (operator.add, torch.add)
_SUMS_INTO_FIRST = (operator.iadd, "add_")


class Rewritten(NamedTuple):
    """A forward function that runs on the original module, the modules fused in it, and what was done."""

    forward: Callable[..., Any]
    parts: tuple[nn.Module, ...]
    fusions: tuple[str, ...]


class Fused:
    """What calls a module's forward, fused where that is known to be the same."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._by_state: dict[Any, Rewritten | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the present state, or the original."""
        rewritten = None if torch.compiler.is_compiling() else self.rewritten()
        if rewritten is None or any(map(_hooked, rewritten.parts)):
            return type(self.module).forward(self.module, *args, **kwargs)
        return rewritten.forward(self.module, *args, **kwargs)

    def rewritten(self) -> Rewritten | None:
        """Return the fused forward call for the module's present state."""
        state = _tracing.state(self.module)
        if state not in self._by_state:
            try:
                self._by_state[state] = rewrite(self.module)
            except _tracing.UntraceableError:
                self._by_state[state] = None
        return self._by_state[state]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was generated."""
        return {"module": self.module, "_by_state": {}}


def fuse(model: nn.Module) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Fuse what can be fused in each module of a model; return what was done and why the rest was not, by name."""
    fused, left = {}, {}
    for name, module in model.named_modules():
        container = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        if container or "forward" in module.__dict__ or not any(map(_is_norm, _tracing.steps(module))):
            continue
        try:
            rewritten = rewrite(module)
        except _tracing.UntraceableError as error:
            left[name] = str(error)
            continue
        if rewritten is not None:
            module.__dict__["forward"] = Fused(module)
            fused[name] = rewritten.fusions
    return fused, left


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), Fused):
            del module.__dict__["forward"]


def rewrite(module: nn.Module) -> Rewritten | None:
    """Trace a module and fuse; None where there is nothing to fuse."""
    graph = _tracing.trace(module)
    modules = dict(module.named_modules(remove_duplicate=False))
    parts: list[nn.Module] = []
    fusions = []
    for node in list(graph.nodes):
        norm = _norm_call(node, graph, modules)
        if norm is None:
            continue
        total, residual = _sum_behind(node)
        end = total.next
        activation = _activation(end, total, modules)
        if activation is None and total is not node:
            total, residual, end = node, None, node.next
            activation = _activation(end, total, modules)
        if activation is None:
            continue
        parts += [norm, *([modules[str(end.target)]] if end.op == "call_module" else [])]
        fusions.append(" + ".join([str(node.target), *(["add"] if residual is not None else []), activation]))
        _put_at(end, node, activation, residual, graph, (total,) if total is not node else ())
    if not fusions or any(map(_hooked, parts)):
        return None
    graph.lint()
    generated = fx.GraphModule(module, graph)
    return Rewritten(type(generated).forward, tuple(parts), tuple(fusions))


def _norm_call(node: fx.Node, graph: fx.Graph, modules: dict[str, nn.Module]) -> nn.Module | None:
    """Return the batch norm that a node calls, if it is called once and its x could be read later as well."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs or len(node.users) != 1:
        return None
    norm = modules[str(node.target)]
    calls = [n for n in graph.nodes if n.op == "call_module" and modules[str(n.target)] is norm]
    (x,) = node.args
    if not _is_norm(norm) or len(calls) > 1 or not isinstance(x, fx.Node):
        return None
    # The norm moves to the place of the activation. Until there nobody may change x: nobody else has it, or
    # nothing lies between.
    (user,) = node.users
    fresh = x.op == "call_module" and isinstance(modules[str(x.target)], _MAKE_NEW) and len(x.users) == 1
    return norm if fresh or user is node.next else None


def _sum_behind(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Return the sum that is the only use of a node, and what is added; the node itself if there is none."""
    (user,) = node.users
    target, plain = user.target, user.op in ("call_function", "call_method") and not user.kwargs
    if not plain or len(user.args) != 2 or len(user.users) != 1:
        return node, None
    first, second = user.args
    into_first = target in _SUMS_INTO_FIRST
    if not into_first and target not in _SUMS and (user.op, target) != ("call_method", "add"):
        return node, None
    other = second if first is node else first
    if other is node or not isinstance(other, fx.Node) or (into_first and first is not node):
        return node, None
    return user, other


def _activation(node: fx.Node, x: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """Return the activation that a node applies to x, if that is x's only use."""
    if list(x.users) != [node] or not node.args or node.args[0] is not x or len(node.args) > 1:
        return None
    if set(node.kwargs) - {"inplace"}:
        return None
    if node.op == "call_module":
        return _ACTIVATION_MODULES.get(type(modules[str(node.target)]))
    if node.op == "call_function":
        return _ACTIVATION_FUNCTIONS.get(node.target)
    return _ACTIVATION_METHODS.get(str(node.target)) if node.op == "call_method" else None


def _put_at(
    end: fx.Node, node: fx.Node, activation: str, residual: fx.Node | None, graph: fx.Graph,
    between: tuple[fx.Node, ...],
) -> None:  # fmt: skip
    """Put one call of the norm in the place of the activation, and remove the steps that it makes up for."""
    options = {"activation": activation} | ({} if residual is None else {"residual": residual})
    with graph.inserting_before(end):
        whole = graph.call_module(str(node.target), node.args, options)
    end.replace_all_uses_with(whole)
    for step in (end, *between, node):
        graph.erase_node(step)


def _is_norm(module: nn.Module | None) -> bool:
    return type(module) in (BatchNorm1d, BatchNorm2d, BatchNorm3d)


def _hooked(module: nn.Module) -> bool:
    """Whether somebody wants to see what goes in or comes out of a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )  # fmt: skip
