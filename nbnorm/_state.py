"""What every layer holds: parameters and gradients, a mode, and how they are stored, copied, moved and shown."""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar, TypeVar, overload

import numpy as np

from nbnorm import _checks
from nbnorm._libraries import is_cuda

Array = np.ndarray
StateT = TypeVar("StateT", bound="State")


class Entry:
    """An array of the state as an attribute, None where there is none; assigning copies the values."""

    def __init__(self, what: str) -> None:
        self.__doc__ = what

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, holder: None, owner: type) -> Entry: ...
    @overload
    def __get__(self, holder: State, owner: type) -> Array | None: ...
    def __get__(self, holder: State | None, owner: type) -> Entry | Array | None:
        return self if holder is None else holder._state().get(self._name)

    def __set__(self, holder: State, value: Any) -> None:
        holder._assign(self._name, value)


class State:
    """Parameters of one shape with their gradients, and whatever arrays a kind of layer adds to them.

    Every argument of a constructor is an attribute of the same name, which is what `__repr__` shows.
    """

    weight = Entry("The scale, None if there is none; assigning copies the values.")
    bias = Entry("The shift, None if there is none; assigning copies the values.")
    # Attributes of `_begin`, which do not travel with a copy.
    _transient: ClassVar[tuple[str, ...]] = ("_lock",)

    def __init__(
        self, shape: tuple[int, ...], affine: bool, center: bool, scale: bool, dtype: Any, xp: ModuleType
    ) -> None:
        self.affine, self.center, self.scale = bool(affine), bool(center), bool(scale)
        self.dtype = _checks.parameter_dtype(dtype)
        self.xp = _checks.array_library("xp", xp)
        self.training = True
        self.params: dict[str, Array] = {}
        if affine and scale:
            self.params["weight"] = xp.ones(shape, self.dtype)
        if affine and center:
            self.params["bias"] = xp.zeros(shape, self.dtype)
        self.grads: dict[str, Array] = {name: xp.zeros_like(value) for name, value in self.params.items()}
        self._begin()

    def _begin(self) -> None:
        """Make what no two copies share."""
        self._lock = threading.Lock()

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for gradient in self.grads.values():
            gradient[...] = 0

    def train(self: StateT, mode: bool = True) -> StateT:
        """Go to training mode, which matters to batch norm only; return the layer."""
        self.training = bool(mode)
        return self

    def eval(self: StateT) -> StateT:
        """Go to eval mode, in which batch norm uses its running statistics; return the layer."""
        return self.train(False)

    def to(self: StateT, xp: ModuleType) -> StateT:
        """Move all arrays to another library, numpy or cupy, and forget calls in flight; return the layer.

        The dictionaries `params` and `grads` stay, with new arrays.
        """
        xp = _checks.array_library("xp", xp)
        if xp is not self.xp:
            with self._lock:
                moved = [
                    {name: xp.asarray(_host(a)) for name, a in arrays.items()} for arrays in self._stores()
                ]
                for arrays, new in zip(self._stores(), moved, strict=True):
                    arrays.update(new)
                self.xp = xp
            self._begin()
        return self

    def state_dict(self) -> dict[str, Array]:
        """Return copies of parameters, and of running statistics where there are any, under PyTorch's names."""
        with self._lock:
            return {name: array.copy() for name, array in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state of `state_dict`'s form into the layer: all of it, or nothing if a part does not fit.

        Raises
        ------
        KeyError
            If names are missing or unexpected.
        ValueError
            If an entry has another shape, is not numeric, or holds NaN or a negative running variance.
        """
        arrays = self._state()
        _checks.keys("state", state, arrays)
        values = {name: self._checked(name, state[name], array) for name, array in arrays.items()}
        with self._lock:
            for name, array in arrays.items():
                array[...] = values[name]

    def _stores(self) -> tuple[dict[str, Array], ...]:
        """Every dictionary of arrays that move with the layer."""
        return self.params, self.grads

    def _state(self) -> dict[str, Array]:
        """Every array of the layer's state by name."""
        return self.params

    def _assign(self, name: str, value: Any) -> None:
        """Copy a checked value into one array of the state."""
        array = self._state().get(name)
        if array is None:
            raise AttributeError(f"this layer has no {name} to set")
        checked = self._checked(name, value, array)
        with self._lock:
            array[...] = checked

    def _checked(self, name: str, value: Any, array: Array) -> Any:
        """Return an entry of a state that fits one array, in that array's library."""
        value = _host(value)
        if array.dtype.kind == "i":
            return _checks.count(name, value)
        return self.xp.asarray(_checks.state(name, value, array))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out locks and calls in flight; a module travels by its name."""
        kept = {name: value for name, value in self.__dict__.items() if name not in self._transient}
        return kept | {"xp": self.xp.__name__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin anew with the state of another layer."""
        self.__dict__.update(state, xp=importlib.import_module(state["xp"]))
        self._begin()

    def __repr__(self) -> str:
        shown = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name, parameter.default)
            if parameter.default is parameter.empty:
                shown.append(repr(value))
            elif value != parameter.default:
                shown.append(f"{name}={_short(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _short(value: Any) -> str:
    """Return what a reader would write for a setting."""
    if isinstance(value, ModuleType):
        return value.__name__
    return repr(value.name if isinstance(value, np.dtype) else value)


def _host(value: Any) -> Any:
    """Bring an array of a device to the host; CuPy does so by no other call."""
    return value.get() if is_cuda(value) and hasattr(value, "get") else value
