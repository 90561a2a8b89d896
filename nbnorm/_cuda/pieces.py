"""A piece of a slot in the registers of a team: where its elements lie, its moments, its epilogue.

Thread t of a team holds ``steps`` vectors of ``width`` neighbours, ``team`` vectors apart, so that a warp reads
512 neighbouring bytes at a time. A slot is seen as one line of positions; its segments of ``length`` neighbours
lie ``pitch`` apart, and a vector never crosses from one into the next.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from nbnorm._activation import activate, activation_gradient, marker
from nbnorm._cuda.collective import WARP, team_max, team_sums
from nbnorm._cuda.memory import device, get, load, real
from nbnorm._math import affine, normalize

SLOT, RUN, ELEMENT = range(3)
ABSENT = -1


class Build(NamedTuple):
    """What a kernel is compiled for; every field is a constant in it.

    Attributes
    ----------
    kind : int
        Type of x, dy and the results (see `memory`).
    width : int
        Elements of a vector; 1 is the scalar build, for any address and size.
    steps, warps, blocks : int
        Vectors that a thread holds, warps of a team's block and blocks of a team.
    rule : {SLOT, RUN, ELEMENT}
        Whether a parameter belongs to a slot, to a run of elements or to one.
    weight, bias : int
        Type of the parameters, `ABSENT` without.
    has_residual, has_mask, centered : bool
        The options of the call.
    activation : tuple of str and float, or None
        Name and slope.
    whole : bool
        Whether a slot is one segment, so that every place lies at a constant distance from the first.
    """

    kind: int
    width: int
    steps: int
    warps: int
    rule: int = SLOT
    weight: int = ABSENT
    bias: int = ABSENT
    has_residual: bool = False
    activation: tuple[str, float] | None = None
    has_mask: bool = False
    centered: bool = True
    whole: bool = False
    blocks: int = 1

    @property
    def span(self) -> int:
        """Elements that a thread holds."""
        return self.width * self.steps

    @property
    def team(self) -> int:
        """Threads of a team."""
        return self.blocks * self.warps * WARP

    @property
    def stride(self) -> int:
        """Positions from one vector of a thread to its next."""
        return self.team * self.width

    @property
    def needs_z(self) -> bool:
        """Whether the gradient depends on what the activation was given."""
        return self.activation is not None


@lru_cache(maxsize=256)
def places_of(whole: bool, stride: int) -> tuple[Any, Any]:
    """Return the functions that find a position of a slot, and the one ``stride`` positions further.

    A place is an index and the column in its segment. ``turn`` columns and the whole rows in ``jump`` make a stride.
    """

    @device
    def first_place(position, origin, length, pitch):
        if whole:
            return origin + position, position
        row = position // length
        column = position - row * length
        return origin + row * pitch + column, column

    @device
    def next_place(index, column, jump, turn, length, pitch):
        if whole:
            return index + stride, column + stride
        index += jump
        column += turn
        if column >= length:
            column -= length
            index += pitch - length
        return index, column

    return first_place, next_place


@device
def vectors(thread, start, end, team, width):
    """Vectors of a thread that begin before ``end``."""
    stride = team * width
    return max(0, (end - start - thread * width + stride - 1) // stride)


@lru_cache(maxsize=256)
def reader(kind: int, width: int, steps: int, whole: bool, stride: int) -> Any:
    """Return the function that brings a thread's part of a piece into registers."""
    _, next_place = places_of(whole, stride)

    @device
    def read(values, source, index, column, valid, jump, turn, length, pitch):
        for k in range(steps):
            if k < valid:
                load(values, k * width, source, index, kind, width)
            index, column = next_place(index, column, jump, turn, length, pitch)

    return read


@lru_cache(maxsize=256)
def mask_reader(kind: int, width: int, steps: int, stride: int, rule: int) -> Any:
    """Return the function that reads the weights of a thread's part of a piece, 0 behind its end."""
    number = real(kind)
    weights_kind = kind if number is np.float64 else 2

    @device
    def read_mask(weights, mask, row, position, valid, run):
        for k in range(steps):
            for i in range(width):
                weights[k * width + i] = number(0)
            if k < valid:
                if rule == SLOT:
                    load(weights, k * width, mask, row + position, weights_kind, width)
                elif rule == RUN:
                    load(weights, k * width, mask, row + position % run, weights_kind, width)
                else:
                    for i in range(width):
                        weights[k * width + i] = number(get(mask, row, weights_kind))
            position += stride

    return read_mask


@lru_cache(maxsize=256)
def moments_of(b: Build) -> Any:
    """Return the function that gives count, mean and m2 of a piece, in two passes over registers.

    The mean is taken relative to ``base``, an element of the piece, so that equal values have it exactly; what
    rounding leaves in it is put back in float64. Squares that leave the range of the type are summed again in
    units of the largest deviation.
    """
    number, width, steps, warps, blocks = real(b.kind), b.width, b.steps, b.warps, b.blocks
    has_mask, centered = b.has_mask, b.centered
    smallest = number(1e-30 if number is np.float32 else 1e-290)
    tiny, infinite, zero = (1e-25 if number is np.float32 else 1e-280), np.inf, number(0)

    @device
    def largest_counted(values, weights, shared):
        top = number(-infinite)
        for i in range(width * steps):
            if weights[i] > zero:
                top = max(top, values[i])
        top = team_max(top, shared, warps, blocks)
        return top if top > number(-infinite) else zero

    @device
    def moments(values, weights, valid, base, n, shared):
        mean_hi, total, squares, counted = zero, zero, zero, zero
        if has_mask:
            base = largest_counted(values, weights, shared)
        if centered:
            for k in range(steps):
                if k < valid:
                    for i in range(k * width, (k + 1) * width):
                        if has_mask:
                            counted += weights[i]
                            total += weights[i] * (values[i] - base) if weights[i] > zero else zero
                        else:
                            total += values[i] - base
            sum_about_base, weight = team_sums(total, counted, shared, warps, blocks)
            if has_mask:
                n = weight
            mean_hi = number(np.float64(base) + (sum_about_base / n if n > 0.0 else 0.0))
        total = zero
        for k in range(steps):
            if k < valid:
                for i in range(k * width, (k + 1) * width):
                    d = values[i] - mean_hi
                    if has_mask:
                        d = d if weights[i] > zero else zero
                        total += weights[i] * d
                        squares += weights[i] * d * d
                    else:
                        total += d
                        squares += d * d
        rest, m2 = team_sums(total, squares, shared, warps, blocks)
        if not tiny <= m2 < infinite:
            top = zero
            for k in range(steps):
                if k < valid:
                    for i in range(k * width, (k + 1) * width):
                        if not has_mask or weights[i] > zero:
                            top = max(top, abs(values[i] - mean_hi))
            top = max(team_max(top, shared, warps, blocks), smallest)
            scale = number(1) / top
            squares = zero
            for k in range(steps):
                if k < valid:
                    for i in range(k * width, (k + 1) * width):
                        d = (values[i] - mean_hi) * scale
                        if has_mask:
                            d = d if weights[i] > zero else zero
                            squares += weights[i] * d * d
                        else:
                            squares += d * d
            m2, _ = team_sums(squares, zero, shared, warps, blocks)
            m2 = m2 * np.float64(top) * np.float64(top)
        if not centered:
            return n, 0.0, m2
        if not n > 0.0:
            return 0.0, 0.0, 0.0
        correction = rest / n
        m2 -= rest * correction
        return n, np.float64(mean_hi) + correction, 0.0 if m2 < 0.0 else m2

    return moments


@lru_cache(maxsize=256)
def coefficients_of(kind: int, rule: int, weight_kind: int, bias_kind: int) -> Any:
    """Return the function that gives mean_hi, scale and shift of `normalize`, parameters of a slot folded in."""

    @device
    def coefficients(mean, rstd, weight, bias, parameter, like):
        w, b = 1.0, 0.0
        if rule == SLOT:
            if weight_kind != ABSENT:
                w = get(weight, parameter, weight_kind)
            if bias_kind != ABSENT:
                b = get(bias, parameter, bias_kind)
        return affine(mean, rstd, w, b, like)

    return coefficients


@lru_cache(maxsize=256)
def parameters_of(kind: int, width: int, rule: int, parameter_kind: int) -> Any:
    """Return the function that brings the parameters of one vector into registers, unless `coefficients` has them."""
    number = real(kind)

    @device
    def parameters(values, source, first, column, run):
        if parameter_kind != ABSENT:
            if rule == ELEMENT:
                load(values, 0, source, first + column, parameter_kind, width)
            elif rule == RUN:
                shared_value = number(get(source, first + column // run, parameter_kind))
                for i in range(width):
                    values[i] = shared_value

    return parameters


@lru_cache(maxsize=256)
def before_activation(rule: int, has_weight: bool, has_bias: bool, has_residual: bool) -> Any:
    """Return the function that gives z = x_hat * weight + bias + residual of one element."""
    own_weight, own_bias = has_weight and rule != SLOT, has_bias and rule != SLOT

    @device
    def affine_of(x, mean_hi, scale, shift, weight, bias, residual, i):
        z = normalize(x, mean_hi, scale, shift)
        if own_weight:
            z *= weight[i]
        if own_bias:
            z += bias[i]
        if has_residual:
            z += residual
        return z

    return affine_of


@lru_cache(maxsize=256)
def activation_of(activation: tuple[str, float] | None, kind: int) -> tuple[Any, Any]:
    """Return act(z) and dy * act'(z) as functions of an element, the activation being a constant in them."""
    mark = None if activation is None else marker(*activation, real(kind) is np.float64)

    @device
    def value(z):
        return activate(z, mark)

    @device
    def gradient(dy, z):
        return activation_gradient(dy, z, mark)

    return value, gradient
