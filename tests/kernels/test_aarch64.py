"""Kernels for AArch64: emitted and disassembled for every node of the example models, and run under qemu-user."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ingot import compiler
from ingot.config import BuildConfig
from ingot.kernels import candidates, with_layouts
from ingot.kernels.cpu import isa
from ingot.kernels.cpu.compile import assembly, compile_object
from ingot.kernels.cpu.standalone import generate
from ingot.plan.lower import lower
from ingot.report import BuildLog
from tests.kernels import aarch64
from tests.kernels.aarch64 import NEON, emulator, linked
from tests.kernels.harness import node_of

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
MODELS = ["digits/digits.onnx", "tagger/tagger.onnx"]
BIAS_RELU = "Add %0 %1 -> float32; Relu $0 -> float32"


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(isa.BY_NAME, NEON.name, NEON)


def texts(model: str) -> Iterator[tuple[str, str]]:
    """(operator, text) of the first candidate of each kernel that takes a node of the model."""
    config, log = BuildConfig(), BuildLog()
    optimised = compiler.optimise(compiler.import_model(EXAMPLES / model, config, log), config, log)
    assert optimised is not None
    for work in lower(optimised, NEON).all_works():
        assert work.kind == "native" and work.node is not None, f"{work.op}: {work.reason}"
        for kernel in {choice.kernel.name: choice for choice in reversed(work.choices)}.values():
            yield work.op, generate(with_layouts(work.node, kernel.ports), kernel, NEON).text()


@pytest.mark.parametrize("model", MODELS)
def test_every_node_has_code_without_libraries(model: str) -> None:
    for op, text in texts(model):
        data = compile_object(text, NEON)
        assert struct.unpack_from("<H", data, 18) == (aarch64.MACHINE,)
        linked(data)  # KeyError: a symbol that nothing defines
        if op in ("Conv", "Linear"):
            written = assembly(text, NEON)
            assert "fmla\tv" in written and "ldr\tq" in written, op


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


CONV = {"strides": [1, 1], "pads": [1, 1, 1, 1], "dilations": [1, 1], "group": 1}
CASES = {
    "linear": ("Linear", [random(9, 33), random(33, 21), random(21)], {}, BIAS_RELU, (1,)),
    "conv": ("Conv", [random(1, 8, 9, 11), random(12, 8, 3, 3), random(12, 1, 1)], CONV, BIAS_RELU, (1, 2)),
    "conv of 3 channels": ("Conv", [random(1, 3, 9, 9), random(8, 3, 3, 3)], CONV, "", (1,)),
    "matmul": ("MatMul", [random(2, 7, 9), random(2, 9, 10)], {"transpose_a": 0, "transpose_b": 0}, "", ()),
    "softmax": ("Softmax", [random(5, 19)], {"axis": 1, "log": 0}, "", ()),
    "norm": ("Norm", [random(6, 24), random(24), random(24)],
             {"kind": "layer", "axis": 1, "epsilon": 1e-5, "groups": 1}, "", ()),
    "pointwise": ("Pointwise", [random(3, 41)], {}, "Gelu %0 -> float32; Exp $0 -> float32", ()),
    "pool": ("Pool", [random(1, 8, 8, 8)],
             {"kind": "max", "kernel": [2, 2], "strides": [2, 2], "pads": [0, 0, 0, 0], "dilations": [1, 1],
              "count_include_pad": 0, "p": 2}, "", ()),
    "attention": ("Attention", [random(1, 2, 9, 8), random(1, 2, 11, 8), random(1, 2, 11, 8)],
                  {"scale": 0.35, "causal": 0, "softcap": 0.0}, "", ()),
}  # fmt: skip


@pytest.mark.skipif(emulator() is None, reason="needs qemu-aarch64 (Debian: qemu-user)")
@pytest.mark.parametrize("name", CASES)
def test_emulated_results(name: str, tmp_path: Path) -> None:
    op, inputs, attributes, epilogue, constants = CASES[name]
    node, (expected, *_) = node_of(op, inputs, attributes, epilogue, constants)
    kernels = {candidate.kernel.name: candidate for candidate in candidates(node, "cpu", NEON)}
    assert kernels
    for kernel in kernels.values():
        mine = aarch64.run(node, kernel, inputs, tmp_path)
        allowed = 1e-5 + 4 * kernel.kernel.tolerance * float(np.abs(expected).max())
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=allowed, err_msg=kernel.label)
