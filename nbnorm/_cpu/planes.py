"""Walk along segments: a slot is ``outer`` segments of ``inner`` neighbours, ``run`` of which share a parameter.

The fused kernels take some neighbouring slots per task, whose second pass finds them in cache (forward: 1 read + 1
write of the tensor, backward: 2 reads + 1 write). If these are few or uneven, threads share chunks of them, pass after
pass. All walk along memory, slot after slot within a row of segments, so that only every few of them the next line is
far away. Chunks and tiles, blocks of whole segments or parts of one, are cut by the shape alone, and so are sums.

Tried and left out: second passes that walk backwards, into what has been read last (a quarter less slot by slot on
1 to 6 MB on Zen 3, no difference on Zen 4); fetching the next segment ahead (3 to 6 % of a reading pass on Zen 3,
nothing on Zen 4); fetching the next slot ahead (a third of a reading pass slot by slot of 14 x 14 on Zen 4, less than
walking along memory gains); streaming results from a piece in cache instead of from registers (`streams`; backward a
tenth longer on Zen 5, on Zen 3 longer than plain stores); asking for y, or for x of the next slot, before the
normalization of a slot (no difference for 16 KB on Emerald Rapids).
"""

from __future__ import annotations

from numba import prange

from nbnorm._cpu.cut import fused, geometry, neighbours, tasks, unpack
from nbnorm._cpu.launch import Twins
from nbnorm._cpu.scratch import scratch, wide
from nbnorm._cpu.slot_grads import (
    chunk_grad_sums,
    fill_for_sums,
    fill_terms,
    input_grad_chunk,
    slot_grad_sums,
)
from nbnorm._cpu.slots import apply_chunk, chunk_moments, fill_affine, merge_chunks

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
    """Some slots per task: their moments, then their normalization from cache."""
    cut = unpack(g)
    group, chunks, together, n = cut.group, cut.chunks, cut.slots, cut.slots * cut.width
    moments = wide((group * chunks, 4))
    for task in prange(-(-group // together)):
        first = task * together
        slots, terms = min(together, group - first), scratch((3, n), x)
        for chunk in range(chunks):
            chunk_moments(g, x, weights, first, slots, chunk, moments)
        merge_chunks(g, counts, first, slots, moments, eps, mean, m2, rstd)
        fill_affine(g, first, slots, mean, rstd, weight, bias, terms, 0)
        for chunk in range(chunks):
            apply_chunk(g, x, y, first, slots, chunk, terms, residual, activation)


@Twins
def passes_kernel(g, x, y, weight, bias, residual, activation, weights, counts, eps, mean, m2, rstd):
    """One chunk of some slots per task, pass after pass: x is read for moments, if there is an m2, and for y.

    Without eps there is no rstd of these moments; without moments, mean and rstd are given.
    """
    cut = unpack(g)
    group, together = cut.group, cut.slots
    if m2 is not None:
        moments = wide((group * cut.chunks, 4))
        for task in prange(tasks(g)):
            slot, slots, chunk = neighbours(g, task)
            chunk_moments(g, x, weights, slot, slots, chunk, moments)
        merge_chunks(g, counts, 0, group, moments, eps, mean, m2, rstd)
    if y is not None:
        terms = scratch((-(-group // together), 3, together * cut.width), x)
        for i in range(terms.shape[0]):
            slot = i * together
            fill_affine(g, slot, min(together, group - slot), mean, rstd, weight, bias, terms[i], 0)
        for task in prange(tasks(g)):
            slot, slots, chunk = neighbours(g, task)
            apply_chunk(g, x, y, slot, slots, chunk, terms[slot // together], residual, activation)


@Twins
def gradient_passes_kernel(
    g, x, dy, dx, dresidual, mean, rstd, weight, bias, residual, activation, weights, slot_sums,
    count, counts, constant,
):  # fmt: skip
    """One chunk of some slots per task, pass after pass: x and dy are read for their sums and for dx, if it is wanted.

    Where ``constant`` is None, sums are computed; else they are given, and it says whether statistics are constants.
    """
    cut = unpack(g)
    fixed = False if constant is None else constant
    group, together = cut.group, cut.slots
    blocks, n = -(-group // together), together * cut.width
    sums, terms = wide((blocks, cut.chunks if constant is None else 0, 4, n)), scratch((blocks, 8, n), x)
    for i in range(blocks):
        slot = i * together
        fill_for_sums(g, slot, min(together, group - slot), mean, rstd, weight, bias, activation, terms[i])
    if constant is None:
        for task in prange(tasks(g)):
            slot, slots, chunk = neighbours(g, task)
            i = slot // together
            chunk_grad_sums(
                g, x, dy, slot, slots, chunk, terms[i], residual, activation, weights, sums[i, chunk]
            )
    for i in prange(blocks):
        slot = i * together
        slots = min(together, group - slot)
        if constant is None:
            slot_grad_sums(g, slot, slots, mean, rstd, terms[i], sums[i], slot_sums)
        if dx is not None:
            fill_terms(g, slot, slots, mean, rstd, weight, weights, slot_sums, count, counts, fixed, terms[i])
    if dx is not None:
        for task in prange(tasks(g)):
            slot, slots, chunk = neighbours(g, task)
            input_grad_chunk(
                g, x, dy, dx, dresidual, slot, slots, chunk, terms[slot // together], residual, activation,
                weights, fixed,
            )  # fmt: skip


@Twins
def backward_kernel(
    g, x, dy, dx, dresidual, mean, rstd, weight, bias, residual, activation, weights, slot_sums,
    count, counts,
):  # fmt: skip
    """Some slots per task: their sums, then their dx from cache."""
    cut = unpack(g)
    group, chunks, together, n = cut.group, cut.chunks, cut.slots, cut.slots * cut.width
    for task in prange(-(-group // together)):
        first = task * together
        slots, sums, terms = min(together, group - first), wide((chunks, 4, n)), scratch((8, n), x)
        fill_for_sums(g, first, slots, mean, rstd, weight, bias, activation, terms)
        for chunk in range(chunks):
            chunk_grad_sums(g, x, dy, first, slots, chunk, terms, residual, activation, weights, sums[chunk])
        slot_grad_sums(g, first, slots, mean, rstd, terms, sums, slot_sums)
        fill_terms(g, first, slots, mean, rstd, weight, weights, slot_sums, count, counts, False, terms)
        for chunk in range(chunks):
            input_grad_chunk(
                g, x, dy, dx, dresidual, first, slots, chunk, terms, residual, activation, weights, False
            )
