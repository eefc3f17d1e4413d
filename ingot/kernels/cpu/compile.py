"""LLVM IR text → relocatable objects, in this process or in a pool of children (llvmlite holds one global lock)."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import llvmlite.binding as llvm

from ingot.errors import BuildError
from ingot.kernels.cpu.isa import BY_NAME, Isa

# The generators advance pointers themselves; looking for better ones took most of the compile time of a tile.
llvm.set_option("ingot", "-disable-lsr")


@cache
def _machine(name: str, level: int) -> Any:
    isa = BY_NAME[name]
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.initialize_native_asmparser()  # the futex call is inline assembly
    return llvm.Target.from_triple(isa.triple).create_target_machine(
        cpu=isa.llvm_cpu, features=isa.llvm_features, opt=level, reloc="pic", codemodel="small"
    )


def compile_object(text: str, isa: Isa, level: int = 2) -> bytes:
    """One module's IR as an ELF object for the ISA. BuildError with LLVM's words and the offending line when it is
    invalid."""
    machine = _machine(isa.name, level)
    try:
        module = llvm.parse_assembly(text)
    except RuntimeError as error:
        raise BuildError(f"generated code is not valid LLVM IR, a bug in Ingot: {error}") from None
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    _optimise(module, machine, text, level)
    return machine.emit_object(module)


def _optimise(module: Any, machine: Any, text: str, level: int) -> None:
    """Kernels come out of the generators as they should be; LLVM's middle end took two thirds of the time and gained
    nothing measurable (convolutions of ResNet-50: 165–185 GFLOP/s with and without). Stack variables alone need it."""
    if "alloca" not in text:
        return
    options = llvm.create_pipeline_tuning_options(speed_level=level)
    options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)


def assembly(text: str, isa: Isa, level: int = 2) -> str:
    """The same as assembler text, to look at."""
    machine = _machine(isa.name, level)
    module = llvm.parse_assembly(text)
    _optimise(module, machine, text, level)
    return machine.emit_assembly(module)


def kernel_name(text: str, isa: Isa) -> str:
    """Content-addressed symbol: the same IR for the same ISA is the same kernel."""
    return "k" + hashlib.sha256(f"{isa.name}\n{text}".encode()).hexdigest()[:20]
