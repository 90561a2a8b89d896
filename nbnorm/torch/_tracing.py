"""The graph of one module's forward call, where it is certain that every later call runs the same one.

`torch.fx` records a single run: a branch on a random number, a counter or an optional argument would be baked in
without notice. So the source is read first, and only straight code passes: calls of submodules and of PyTorch's
functions on local values; branches and loops on the module's own plain attributes, which `state` puts in one key; no
effects but on local names.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, NoReturn

import torch
from torch import fx, nn

_PLAIN = (bool, int, float, str, type(None))
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_STRAIGHT = (
    ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.If,
    ast.For, ast.Pass, ast.Name, ast.Attribute, ast.Call, ast.keyword, ast.Constant, ast.Tuple, ast.List, ast.BinOp,
    ast.UnaryOp, ast.Subscript, ast.Slice, ast.operator, ast.unaryop, ast.expr_context,
)  # fmt: skip
_TESTS = (ast.BoolOp, ast.boolop, ast.Compare, ast.cmpop, ast.UnaryOp, ast.unaryop, ast.Constant)
_LEAVE_PYTHON = {"item", "tolist", "numpy", "data_ptr", "requires_grad_", "register_hook", "backward"}


class UntraceableError(Exception):
    """Says why a module has no graph that can be relied on."""


class _Tracer(fx.Tracer):
    """Take every submodule as one step."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def trace(module: nn.Module) -> fx.Graph:
    """Return the graph of a module's forward call in its present `state`."""
    _Reader(module, type(module).forward, set()).read()
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # whatever a stranger's code does with a proxy
        raise UntraceableError(f"torch.fx cannot trace it: {error}") from error
    if any(node.op == "get_attr" and "_tensor_constant" in str(node.target) for node in graph.nodes):
        raise UntraceableError("forward makes a tensor that does not depend on its arguments")
    return graph


def state(module: nn.Module) -> tuple[Any, ...]:
    """Return all that may steer the forward call: plain attributes, and which submodules there are."""
    own = module.__dict__
    plain = tuple((name, value) for name, value in own.items() if isinstance(value, _PLAIN))
    return plain, tuple(map(id, steps(module)))


def steps(module: nn.Module) -> Iterator[nn.Module | None]:
    """Return the submodules that forward can call by itself, inside lists and dictionaries too."""
    for child in module._modules.values():
        yield child
        if isinstance(child, _CONTAINERS):
            yield from steps(child)


class _Reader:
    """Reads the source of one function that gets the module as its first argument."""

    def __init__(self, module: nn.Module, function: Callable[..., Any], known: set[CodeType]) -> None:
        if not isinstance(function, FunctionType) or function.__closure__:
            raise UntraceableError(f"its forward is no plain method, or calls super() ({function!r})")
        self.module, self.function, self.known = module, function, known
        self.locals = set(function.__code__.co_varnames)
        self.loop_names: set[str] = set()

    def read(self) -> None:
        """Raise unless the function is straight code."""
        if self.function.__code__ in self.known:
            return
        self.known.add(self.function.__code__)
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(self.function))).body
        except (OSError, TypeError, SyntaxError, ValueError) as error:
            raise UntraceableError("the source of its forward is not to be had") from error
        if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
            raise UntraceableError("its forward is decorated")
        if tree.args.vararg or tree.args.kwarg or not tree.args.args:
            raise UntraceableError("its forward takes any number of arguments")
        self.self_name = tree.args.args[0].arg
        for statement in tree.body:
            self._visit(statement)

    def _visit(self, node: ast.AST) -> None:
        """Raise for the first piece of code that is not straight."""
        if not isinstance(node, _STRAIGHT):
            self._refuse(node, f"holds {type(node).__name__}")
        if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            self._refuse(node, "writes beyond local names")
        if isinstance(node, ast.Name) and node.id not in self.locals:
            self._refuse(node, f"reads {node.id}")
        for child in self._parts(node):
            self._visit(child)

    def _parts(self, node: ast.AST) -> list[ast.AST]:
        """Check what this kind of node must fulfil, and return what is to be visited in it."""
        if isinstance(node, ast.If):
            self._test(node.test)
            return [*node.body, *node.orelse]
        if isinstance(node, ast.For):
            self._loop(node)
            return [*node.body, *node.orelse]
        if isinstance(node, ast.Call):
            self._call(node)
            of_value = isinstance(node.func, ast.Attribute) and _chain(node.func) is None
            return [*node.args, *node.keywords, *(ast.iter_child_nodes(node.func) if of_value else ())]
        if isinstance(node, ast.AnnAssign):
            return [node.value] if node.value else []
        chain = _chain(node)
        if chain is not None and len(chain) > 1:
            self._value(node, chain)
            return []
        return list(ast.iter_child_nodes(node))

    def _test(self, node: ast.AST) -> None:
        """A condition may look at plain attributes and submodules of the module, and at constants."""
        chain = _chain(node)
        if chain is not None:
            value = self._own(chain)
            if not isinstance(value, (*_PLAIN, nn.Module)):
                self._refuse(node, "has a condition on more than its own state")
        elif isinstance(node, _TESTS):
            for child in ast.iter_child_nodes(node):
                self._test(child)
        else:
            self._refuse(node, "has a condition on more than its own state")

    def _loop(self, node: ast.For) -> None:
        """A loop may go over submodules of the module."""
        chain = _chain(node.iter)
        over = None if chain is None else self._own(chain)
        listed = isinstance(over, nn.ModuleList) and len(chain or ()) == 2
        itself = over is self.module and isinstance(over, nn.Sequential)
        if not (listed or itself) or not isinstance(node.target, ast.Name):
            self._refuse(node, "loops over more than its modules")
        self.loop_names.add(node.target.id)

    def _call(self, node: ast.Call) -> None:
        """A call may go to a submodule, a method of the module, a function of PyTorch's, a method of a tensor."""
        chain = _chain(node.func)
        if chain is None:
            allowed = isinstance(node.func, ast.Attribute) and node.func.attr not in _LEAVE_PYTHON
        elif chain[0] == self.self_name:
            target = self._own(chain)
            allowed = target is None or isinstance(target, nn.Module)  # None in a branch not taken
            if inspect.ismethod(target) and len(chain) == 2 and target.__self__ is self.module:
                _Reader(self.module, target.__func__, self.known).read()
                return
        elif len(chain) == 1 and chain[0] in self.locals:
            allowed = chain[0] in self.loop_names
        elif chain[0] in self.locals:
            allowed = chain[-1] not in _LEAVE_PYTHON
        else:  # without a local value it would run when the graph is made, and never again
            allowed = self._from_pytorch(chain) and any(map(self._depends, [*node.args, *node.keywords]))
        if not allowed:
            self._refuse(node, f"calls {ast.unparse(node.func)}")

    def _value(self, node: ast.AST, chain: list[str]) -> None:
        """A value may be a plain attribute or a tensor of the module, or belong to a local value or to PyTorch."""
        if chain[0] == self.self_name:
            allowed = isinstance(self._own(chain), (*_PLAIN, torch.Tensor, nn.Module))
        else:
            allowed = chain[0] in self.locals or self._from_pytorch(chain)
        if not allowed:
            self._refuse(node, f"reads {ast.unparse(node)}")

    def _own(self, chain: list[str]) -> Any:
        """Return what ``self.a.b`` stands for, `_refused` unless each part but the last is a module.

        Plain values count in the module's own dictionary only: that is what `state` watches.
        """
        value: Any = self.module
        if chain[0] != self.self_name:
            return _refused
        for depth, name in enumerate(chain[1:]):
            owner, value = value, getattr(value, name, _refused) if isinstance(value, nn.Module) else _refused
            if isinstance(value, _PLAIN) and (depth or name not in owner.__dict__):
                listed = value is None and any(name in kept for kept in (owner._modules, owner._parameters))
                value = value if listed and not depth else _refused
        return value

    def _depends(self, node: ast.AST) -> bool:
        """Whether an expression holds a local value other than the module itself."""
        names = (n.id for n in ast.walk(node) if isinstance(n, ast.Name))
        return any(name in self.locals and name != self.self_name for name in names)

    def _from_pytorch(self, chain: list[str]) -> bool:
        """Whether a chain of global names leads into PyTorch, its utilities aside."""
        value = self.function.__globals__.get(chain[0])
        for name in chain[1:]:
            value = getattr(value, name, None) if isinstance(value, ModuleType) else None
        home = getattr(value, "__module__", None) or ""
        known = home.startswith("torch") or getattr(torch, chain[-1], None) is value
        return value is not None and known and "utils" not in home

    def _refuse(self, node: ast.AST, what: str) -> NoReturn:
        """Raise, and say where."""
        line = self.function.__code__.co_firstlineno + getattr(node, "lineno", 1) - 1
        raise UntraceableError(f"its {self.function.__name__} {what} (line {line})")


def _refused() -> None:
    """Stand for a value that no condition or call may use."""


def _chain(node: ast.AST) -> list[str] | None:
    """Return the names of ``a.b.c``."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else None
