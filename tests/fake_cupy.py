"""A stand-in for CuPy without a GPU: its arrays behave as CuPy's do towards the host code, in the simulator.

What matters is what they refuse: no silent way to NumPy, no mixing with NumPy arrays. NumPy's functions reach them
through the array protocols, as they reach CuPy.
"""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):  # noqa: N801
    """An array "on the device"."""

    def __init__(self, values, device=0):
        self._ary = values
        self.device = Device(device)
        self.data = SimpleNamespace(ptr=values.__array_interface__["data"][0])
        self.base = None if values.base is None else object()
        self.flags = SimpleNamespace(
            c_contiguous=values.flags.c_contiguous, f_contiguous=values.flags.f_contiguous
        )

    shape = property(lambda self: self._ary.shape)
    strides = property(lambda self: self._ary.strides)
    dtype = property(lambda self: self._ary.dtype)
    ndim = property(lambda self: self._ary.ndim)
    size = property(lambda self: self._ary.size)
    itemsize = property(lambda self: self._ary.itemsize)
    nbytes = property(lambda self: self._ary.nbytes)
    T = property(lambda self: _wrapped(self._ary.T))

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        if any(isinstance(x, np.ndarray) and x.ndim for x in inputs):
            return NotImplemented
        inputs = [_plain(x) for x in inputs]
        if "out" in options:
            options["out"] = tuple(_plain(x) for x in options["out"])
        return _wrapped(getattr(ufunc, method)(*inputs, **options))

    def __array_function__(self, function, types, args, options):
        if not all(issubclass(t, ndarray) for t in types) or not hasattr(
            sys.modules["cupy"], function.__name__
        ):
            return NotImplemented
        return getattr(sys.modules["cupy"], function.__name__)(*args, **options)

    def __getitem__(self, index):
        return _wrapped(self._ary[_plain(index)])

    def __setitem__(self, index, value):
        if isinstance(value, np.ndarray) and value.ndim:
            raise TypeError("a NumPy array cannot be assigned to a part of a CuPy array")
        self._ary[_plain(index)] = _plain(value)

    def __bool__(self):
        return bool(self._ary)

    def __float__(self):
        return float(self._ary)

    def __len__(self):
        return len(self._ary)

    def fill(self, value):
        self._ary.fill(value)

    def get(self):
        return self._ary.copy()

    def __getattr__(self, name):
        if name not in ("all", "any", "astype", "copy", "max", "min", "ravel", "reshape", "sum", "transpose"):
            raise AttributeError(name)
        method = getattr(self._ary, name)
        return lambda *args, **options: _wrapped(method(*args, **options))


def _plain(x):
    if isinstance(x, (tuple, list)):
        return type(x)(_plain(item) for item in x)
    return x._ary if isinstance(x, ndarray) else x


def _wrapped(x):
    if isinstance(x, tuple):
        return tuple(_wrapped(item) for item in x)
    return ndarray(np.asarray(x)) if isinstance(x, (np.ndarray, np.generic)) else x


class Device:
    """A device as a context, with the number of times it was entered."""

    def __init__(self, number):
        self.id = number

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def _function(name):
    function = getattr(np, name)

    def call(*args, **options):
        for x in args:
            if isinstance(x, np.ndarray) and x.ndim and name not in ("asarray", "ascontiguousarray"):
                raise TypeError(f"Unsupported type {type(x)}")
        if options.get("subok") is not None:
            raise TypeError("subok is not supported yet")
        options.pop("subok", None)
        return _wrapped(function(*(_plain(x) for x in args), **options))

    return call


def asarray(x, dtype=None):
    """Bring an array to the device; those that are there are seen, not copied."""
    return ndarray(np.asarray(getattr(x, "_ary", x), dtype))


def may_share_memory(a, b, max_work=None):
    return np.may_share_memory(_plain(a), _plain(b))


def _module():
    names = (
        "empty zeros ones full empty_like zeros_like ones_like ascontiguousarray broadcast_to clip expand_dims "
        "flatnonzero isfinite sqrt stack atleast_1d count_nonzero repeat"
    )
    functions = {name: _function(name) for name in names.split()}
    stream = SimpleNamespace(ptr=0)
    return SimpleNamespace(
        ndarray=ndarray, asarray=asarray, may_share_memory=may_share_memory, **functions,
        cuda=SimpleNamespace(get_current_stream=lambda: stream, Device=Device),
    )  # fmt: skip


@contextmanager
def installed():
    """Let ``import cupy`` give this stand-in."""
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = _module()
    try:
        yield sys.modules["cupy"]
    finally:
        if before is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = before
