"""The example models as files, and an engine of one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import ingot
from ingot import kernels
from ingot.kernels.cpu.build import KernelBuilder, PhaseFunction
from ingot.kernels.cpu.llvm import Value
from ingot.kernels.node import Node

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture(scope="session")
def digits() -> Path:
    return EXAMPLES / "digits" / "digits.onnx"


@pytest.fixture(scope="session")
def tagger() -> Path:
    return EXAMPLES / "tagger" / "tagger.onnx"


@pytest.fixture(scope="session")
def engine(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "digits.engine"
    ingot.build(digits, level=0).save(path)
    return path


@pytest.fixture
def wrong_sin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A kernel, cheaper than any other, that takes what has a Sin for the identity."""
    kernels._load("cpu")
    monkeypatch.setattr(kernels, "_TABLE", {key: list(entries) for key, entries in kernels._TABLE.items()})

    def applies(node: Node, isa: object) -> bool:
        return "Sin" in [step.op for step in node.epilogue.instructions]

    @kernels.kernel("Pointwise", on="cpu", when=applies, cost=lambda node, isa, **tactic: 0.0)
    def identity(build: KernelBuilder, node: Node) -> None:
        x, y = build.input(0), build.output(0)

        def body(f: PhaseFunction, begin: Value, end: Value) -> None:
            def one(i: Value) -> None:
                f.store(f.load("float", f.pointer(x), i * 4), f.pointer(y), i * 4)

            f.loop(begin, end, one)  # type: ignore[arg-type]

        build.phase(node.output.elements, body)

    yield
