"""Walk down columns: rows of lanes lie one after the other, and every lane belongs to one slot (`grid`).

The fused kernels take a block per task with all of its rows; otherwise a task is a chunk of rows of a block, pass
after pass.
"""

from __future__ import annotations

from numba import prange

from nbnorm._cpu.blocks import (
    apply_chunk,
    block_grad_sums,
    block_moments,
    block_rstd,
    chunk_grad_sums,
    chunk_moments,
    input_grad_chunk,
    spread_affine,
    spread_for_sums,
    spread_gradient_terms,
    term_length,
)
from nbnorm._cpu.grid import fused, geometry, place, unpack
from nbnorm._cpu.launch import Twins
from nbnorm._cpu.scratch import scratch, wide

__all__ = [
    "backward_kernel",
    "forward_kernel",
    "fused",
    "geometry",
    "gradient_passes_kernel",
    "passes_kernel",
]


@Twins
def forward_kernel(g, x, y, weight, bias, residual, activation, weights, counts, eps, mean, m2, rstd):
    """One block per task: its moments, then its normalization from cache."""
    cut = unpack(g)
    chunks, block, length = cut.chunks, cut.block, term_length(cut, x)
    for index in prange(cut.batch * cut.blocks):
        pool, moments, terms = wide((4, block)), wide((chunks, 2, block)), scratch((3, length), x)
        for chunk in range(chunks):
            chunk_moments(g, x, weights, index, chunk, pool, moments)
        block_moments(g, x, weights, index, pool, moments, mean, m2)
        block_rstd(g, counts, index, m2, eps, rstd)
        spread_affine(g, index, mean, rstd, weight, bias, terms, 0)
        for chunk in range(chunks):
            apply_chunk(g, x, y, residual, activation, index, chunk, terms)


@Twins
def passes_kernel(g, x, y, weight, bias, residual, activation, weights, counts, eps, mean, m2, rstd):
    """One chunk of a block per task, pass after pass: x is read for moments, if there is an m2, and for y.

    Without eps there is no rstd of these moments; without moments, mean and rstd are given.
    """
    cut = unpack(g)
    blocks, chunks, block, length = cut.batch * cut.blocks, cut.chunks, cut.block, term_length(cut, x)
    # Room for both in any case: Numba's parallel loops cannot take an array that may be None.
    moments, terms = wide((blocks, chunks, 2, block)), scratch((blocks, 3, length), x)
    if m2 is not None:
        for task in prange(blocks * chunks):
            (index, chunk), pool = place(g, task), wide((4, block))
            chunk_moments(g, x, weights, index, chunk, pool, moments[index])
    for index in prange(blocks):
        if m2 is not None:
            block_moments(g, x, weights, index, wide((4, block)), moments[index], mean, m2)
            if eps is not None:
                block_rstd(g, counts, index, m2, eps, rstd)
        if y is not None:
            spread_affine(g, index, mean, rstd, weight, bias, terms[index], 0)
    if y is not None:
        for task in prange(blocks * chunks):
            index, chunk = place(g, task)
            apply_chunk(g, x, y, residual, activation, index, chunk, terms[index])


@Twins
def gradient_passes_kernel(
    g, x, dy, dx, dresidual, mean, rstd, weight, bias, residual, activation, weights, slot_sums,
    count, counts, constant,
):  # fmt: skip
    """One chunk of a block per task, pass after pass: x and dy are read for their sums and for dx, if it is wanted.

    Where ``constant`` is None, sums are computed; else they are given, and it says whether statistics are constants.
    """
    cut = unpack(g)
    blocks, chunks, block, length = cut.batch * cut.blocks, cut.chunks, cut.block, term_length(cut, x)
    fixed = False if constant is None else constant
    lane_sums = wide((blocks, chunks if constant is None else 0, 4, block))
    terms = scratch((blocks, 8, length), x)
    if constant is None:
        for task in prange(blocks * chunks):
            # Terms once more for each chunk: a pass of their own would start the threads once more.
            (index, chunk), own = place(g, task), scratch((8, length), x)
            spread_for_sums(g, index, mean, rstd, weight, bias, activation, own)
            chunk_grad_sums(g, x, dy, residual, activation, weights, index, chunk, own, lane_sums[index])
    for index in prange(blocks):
        own, pool = terms[index], wide((4, block))
        spread_for_sums(g, index, mean, rstd, weight, bias, activation, own)
        if constant is None:
            block_grad_sums(g, index, mean, rstd, own, lane_sums[index], slot_sums)
        if dx is not None:
            spread_gradient_terms(
                g, index, mean, rstd, weight, weights, slot_sums, count, counts, fixed, pool, own
            )
    if dx is not None:
        for task in prange(blocks * chunks):
            index, chunk = place(g, task)
            input_grad_chunk(
                g, x, dy, dx, dresidual, residual, activation, weights, index, chunk, terms[index], fixed
            )


@Twins
def backward_kernel(
    g, x, dy, dx, dresidual, mean, rstd, weight, bias, residual, activation, weights, slot_sums,
    count, counts,
):  # fmt: skip
    """One block per task: its sums, then its dx from cache."""
    cut = unpack(g)
    chunks, block, length = cut.chunks, cut.block, term_length(cut, x)
    for index in prange(cut.batch * cut.blocks):
        pool, lane_sums, terms = wide((4, block)), wide((chunks, 4, block)), scratch((8, length), x)
        spread_for_sums(g, index, mean, rstd, weight, bias, activation, terms)
        for chunk in range(chunks):
            chunk_grad_sums(g, x, dy, residual, activation, weights, index, chunk, terms, lane_sums)
        block_grad_sums(g, index, mean, rstd, terms, lane_sums, slot_sums)
        spread_gradient_terms(
            g, index, mean, rstd, weight, weights, slot_sums, count, counts, False, pool, terms
        )
        for chunk in range(chunks):
            input_grad_chunk(
                g, x, dy, dx, dresidual, residual, activation, weights, index, chunk, terms, False
            )
