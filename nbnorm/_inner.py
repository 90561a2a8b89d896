"""How kernels are compiled, and functions that only kernels call: these into what a kernel takes in, and no further.

All but backward's loops that also go over short rows are compiled for vectors as wide as the machine has. LLVM takes
half of AVX-512 for Intel's processors, since the first that had it slowed down: in cache, halves take a tenth to a
quarter less time with all of it, float32 up to a tenth (Emerald Rapids). Rows of 96 once took a tenth more; forward of
rows of 20 to 256 values took 0.94 to 1.11 of the time with float32, 0.83 to 1 with float16, in trials there.

Numba optimizes every function and turns it into machine code, and each of its callers does so again with all that it
calls: what lies five calls deep is optimized six times, in a parallel loop nine times. When that ended here, serial
kernels compiled in two thirds of the time, parallel ones in half (benchmarks/bench_start.py, before and after).
"""

from __future__ import annotations

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.registry import cpu_target

from nbnorm._rounds import promise

# Passes of Numba that look for comprehensions, functions inlined by it, expressions of whole arrays and `with`.
_NEEDLESS = {
    "inline_closure_likes", "inline_inlinables", "inline_overloads", "nopython_rewrites", "with_lifting",
}  # fmt: skip


def processor_has(*features: str) -> bool:
    """Whether the processor that Numba compiles for has all of some features, as LLVM calls them."""
    known = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return all(f"+{feature}" in known for feature in features)


class WideCode(JITCodeLibrary):
    """Code whose loops may use the widest vectors."""

    bits = 512  # of a vector, where the machine has as many

    def add_ir_module(self, module: Any) -> None:
        """Take a module in."""
        for function in module.functions:
            if not function.is_declaration:  # an attribute of LLVM that llvmlite does not know
                set.add(function.attributes, f'"prefer-vector-width"="{self.bits}"')
        super().add_ir_module(module)  # type: ignore[no-untyped-call]


class ElementCode(WideCode):
    """Code with loops over elements of rows, whose rounds are independent."""

    vectors: int | None = None  # side by side in a round, if it is not for LLVM to choose

    def add_ir_module(self, module: Any) -> None:
        """Take a module in."""
        promise(module, self.vectors)
        super().add_ir_module(module)


class PartCode(WideCode):
    """Code that does not run by itself, so that there is no machine code of it."""

    def get_pointer_to_function(self, name: str) -> int:
        """Return that there is no machine code."""
        return 0


class LoopCode(ElementCode, PartCode):
    """Code that is optimized with all that it calls before a kernel takes it in."""

    def _finalize_final_module(self) -> None:
        self._finalized = True


class FourVectorsCode(LoopCode):
    """Such code of loops that take four vectors side by side, whatever else they compute.

    LLVM would choose by the registers that are left, so that the order of a sum would depend on what is summed.
    """

    vectors = 4


class NarrowLoopCode(LoopCode):
    """Such code of loops that also go over short rows, which four of the widest vectors, LLVM's choice, would not fill.

    Two at a time, backward of rows of 32 to 96 values takes 0.88 to 0.9 of the time (benchmarks/bench_norms.py,
    ShortRows, before and after; Zen 5); half as wide, rows of 96 in memory took 0.72 to 0.86 of it in trials, those in
    cache as long (Zen 4).
    """

    bits, vectors = 256, 2


class InnerCode(PartCode):
    """Code that is left as it is; what it calls is put beside it when a kernel takes it in, not earlier."""

    def finalize(self) -> None:
        """Take the code as it is."""
        self._finalized = True

    def _get_module_for_linking(self) -> Any:
        if self._shared_module is None:
            self._shared_module = self._whole()
        return self._shared_module

    def _whole(self) -> Any:
        """Own code and all that it calls, each function once, for several such modules to meet in a kernel."""
        inner = self._called({self: None})
        outer = {library: None for one in inner for library in one._linking_libraries if library not in inner}
        module = self._final_module.clone()
        for library in list(inner)[1:]:
            module.link_in(library._final_module, preserve=True)
        # Of these, which may come along several ways, the linker takes only what has been called so far.
        for library in outer:
            module.link_in(library._get_module_for_linking(), preserve=True)
        for function in module.functions:
            if not function.is_declaration and function.linkage.name == "external":
                function.linkage = "linkonce_odr"
        return module

    def _called(self, found: dict[InnerCode, None]) -> dict[InnerCode, None]:
        """Add all inner code that this calls to what has been found."""
        for library in self._linking_libraries:
            if isinstance(library, InnerCode) and library not in found:
                found[library] = None
                library._called(found)
        return found


class InlinedCode(ElementCode, InnerCode):
    """Inner code with loops over elements."""


class CalledCode(InlinedCode):
    """Such code that a kernel has once and calls, wherever it is used."""

    def add_ir_module(self, module: Any) -> None:
        """Take a module in."""
        for function in module.functions:
            if not function.is_declaration:
                function.attributes.add("noinline")
        super().add_ir_module(module)


class Codegen:
    """Numba's generator of code, but what it makes is code of ours."""

    def __init__(self, codegen: Any, code: type[WideCode]) -> None:
        self._own, self._code = codegen, code

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def create_library(self, name: str) -> WideCode:
        """Make room for the code of a function."""
        return self._code(self, name)

    def set_env(self, name: str, env: Any) -> None:
        """Set the environment of code that Python calls; a part has none."""
        if not issubclass(self._code, PartCode):
            self._own.set_env(name, env)


class Wide(Compiler):
    """Numba's compiler for what Python calls."""

    code: type[WideCode] = WideCode

    def define_pipelines(self) -> Any:
        """Return Numba's own pipelines, after a change of the context, of which each compilation has its own copy."""
        context: Any = self.state.targetctx
        context._internal_codegen = Codegen(context.codegen(), self.code)
        return super().define_pipelines()  # type: ignore[no-untyped-call]


class Part(Wide):
    """Numba's compiler for what kernels call."""

    def define_pipelines(self) -> Any:
        """Return Numba's own pipelines without what looks for things that are not there."""
        pipelines = super().define_pipelines()
        for pipeline in pipelines:
            pipeline.passes = [one for one in pipeline.passes if one[0].name() not in _NEEDLESS]
        return pipelines


class Loop(Part):
    """Numba's compiler for loops that kernels take in."""

    code = LoopCode


class FourVectors(Part):
    """Numba's compiler for loops that take four vectors side by side."""

    code = FourVectorsCode


class NarrowLoop(Part):
    """Numba's compiler for loops over short rows."""

    code = NarrowLoopCode


class Inner(Part):
    """Numba's compiler for all else that kernels take in."""

    code = InnerCode


class Inlined(Part):
    """Numba's compiler for loops over elements that kernels take in as they are."""

    code = InlinedCode


class Called(Part):
    """Numba's compiler for those that kernels call and do not take in."""

    code = CalledCode


class Outer(Wide):
    """Numba's compiler for kernels, whose parallel loops, a function in three wrappers each, are inner code."""

    code = InnerCode

    def define_pipelines(self) -> Any:
        """Return Numba's own pipelines; the kernel itself is what Numba makes of it."""
        state: Any = self.state
        state.library = Codegen(state.targetctx.codegen(), WideCode).create_library(
            state.func_id.func_qualname
        )
        state.library.enable_object_caching()
        return super().define_pipelines()
