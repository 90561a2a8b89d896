"""Rows, as kernels know what `memory.row` returns: a type of their own beside Numba's arrays."""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import AttributeTemplate
from numba.extending import (
    infer_getattr,
    lower_builtin,
    lower_getattr,
    models,
    register_model,
    type_callable,
)

from nbnorm._rounds import element_access


class Row(types.Type):
    """Neighbours in memory that somebody else owns: where they begin and how many there are.

    An array is seven words, a counted reference among them, and takes negative indices from its end. A row does not, so
    that a kernel full of rows is less code and compiles sooner (benchmarks/bench_start.py, before and after).
    """

    def __init__(self, dtype: Any, mutable: bool, aligned: bool = True) -> None:
        self.dtype, self.mutable, self.aligned = dtype, mutable, aligned
        super().__init__(f"Row({dtype}, {mutable}, {aligned})")


@register_model(Row)
class _Model(models.StructModel):
    def __init__(self, manager: Any, row: Row) -> None:
        super().__init__(manager, row, [("data", types.CPointer(row.dtype)), ("size", types.intp)])


@infer_getattr
class _Attributes(AttributeTemplate):
    key = Row

    def resolve_shape(self, row: Row) -> Any:
        return types.UniTuple(types.intp, 1)

    def resolve_itemsize(self, row: Row) -> Any:
        return types.intp


@lower_getattr(Row, "shape")
def _shape(context, builder, row, value):
    return context.make_tuple(builder, types.UniTuple(types.intp, 1), [size_of(context, builder, row, value)])


@lower_getattr(Row, "itemsize")
def _itemsize(context, builder, row, value):
    return element_size(context, row)


@type_callable(operator.getitem)
def _element(context):
    return lambda row, index: row.dtype if _fits(row, index) else None


@type_callable(operator.setitem)
def _assignment(context):
    return lambda row, index, value: types.none if _fits(row, index) and row.mutable else None


def _fits(row, index):
    return isinstance(row, Row) and isinstance(index, types.Integer)


@lower_builtin(operator.getitem, Row, types.Integer)
def _getitem(context, builder, signature, args):
    row, index = signature.args
    return element(context, builder, row, args[0], context.cast(builder, args[1], index, types.intp))


@lower_builtin(operator.setitem, Row, types.Integer, types.Any)
def _setitem(context, builder, signature, args):
    row, index, value = signature.args
    at = context.cast(builder, args[1], index, types.intp)
    cast = context.cast(builder, args[2], value, row.dtype)
    place = builder.gep(data_of(context, builder, row, args[0]), [at])
    element_access(builder.store(cast, place, align=_alignment(row)))
    return context.get_dummy_value()


def _alignment(x):
    """Return by how many bytes elements are aligned, None for as many as they have."""
    return None if x.aligned else 1


def element(context: Any, builder: Any, x: Any, value: Any, at: Any) -> Any:
    """Emit an element of a row, or of an array of one dimension."""
    place = builder.gep(data_of(context, builder, x, value), [at])
    return element_access(builder.load(place, align=_alignment(x)))


def element_size(context: Any, x: Any) -> Any:
    """Return the bytes of an element as a constant."""
    return context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(x.dtype)))


def data_of(context: Any, builder: Any, x: Any, value: Any) -> Any:
    """Emit where a row or an array begins."""
    if isinstance(x, Row):
        return builder.extract_value(value, 0)
    return context.make_array(x)(context, builder, value).data


def size_of(context: Any, builder: Any, x: Any, value: Any) -> Any:
    """Emit how many elements a row has, or entries the first dimension of an array."""
    if isinstance(x, Row):
        return builder.extract_value(value, 1)
    return builder.extract_value(context.make_array(x)(context, builder, value).shape, 0)


def emit_row(context: Any, builder: Any, row: Row, data: Any, size: Any) -> Any:
    """Emit a row over memory that it neither owns nor counts references of."""
    empty = ir.Constant(context.get_value_type(row), ir.Undefined)
    return builder.insert_value(builder.insert_value(empty, data, 0), size, 1)
