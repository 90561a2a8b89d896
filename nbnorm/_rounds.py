"""The promise that the rounds of a loop are independent: an element of a row that one writes no other accesses.

LLVM cannot know which rows overlap. Before a loop it compares what is written with all else, or gives up if that is
much. Told that it need not, it takes forward 0.88 to 0.98 of the time of rows of 32 to 256 values on one thread
(benchmarks/bench_norms.py, ShortRows), 0.83 to 0.9 of that of segments of 100 and 144 (bench_batch_norm.py,
ShortSegments; Zen 4, before and after).

See "llvm.loop.parallel_accesses" in LLVM's language reference. llvmlite has metadata, but none that is distinct.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from llvmlite.ir.values import MDValue


class _Distinct(MDValue):  # type: ignore[misc]
    """A node of metadata that is equal to no other."""

    def __init__(self, module: Any) -> None:
        super().__init__(module, (), name=str(len(module.metadata)))

    def descr(self, buf: Any) -> None:
        """Write it down."""
        buf += (f"distinct !{{ {', '.join(operand.get_reference() for operand in self.operands)} }}", "\n")


def element_access(instruction: Any) -> Any:
    """Note that an instruction, which it returns, reads or writes an element of a row."""
    module = instruction.parent.function.module
    if not hasattr(module, "element_accesses"):
        module.element_accesses = _Distinct(module)
    instruction.set_metadata("llvm.access.group", module.element_accesses)
    return instruction


def promise(module: Any, vectors: int | None) -> None:
    """Say of all loops in a module, where they jump back, that their rounds are independent.

    ``vectors`` are so many that LLVM shall take side by side.
    """
    if not hasattr(module, "element_accesses"):
        return
    accesses = module.add_metadata(["llvm.loop.parallel_accesses", module.element_accesses])
    wishes = []
    if vectors is not None:
        wishes.append(
            module.add_metadata(["llvm.loop.interleave.count", ir.Constant(ir.IntType(32), vectors)])
        )
    for function in module.functions:
        passed: set[str] = set()
        for block in function.blocks:
            passed.add(block.name)
            ways = () if block.terminator is None else block.terminator.operands
            if any(isinstance(way, ir.Block) and way.name in passed for way in ways):
                loop = _Distinct(module)
                loop.operands = (loop, accesses, *wishes)
                block.terminator.set_metadata("llvm.loop", loop)
