"""Imports go one way only: a module imports from its own rank or an earlier one (ranks: the architecture's list)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# One row a rank; the longest matching prefix decides. A new module that no row covers fails: give it its place here.
RANKS: list[set[str]] = [
    {"ingot.errors", "ingot.dtypes"},
    {"ingot.plan", "ingot.engine", "ingot.config", "ingot.report", "ingot.client"},
    {"ingot.runtime"},
    {"ingot.ir", "ingot.plugins"},
    {"ingot.importers", "ingot.passes", "ingot.precision.half", "ingot.precision.maps"},
    {"ingot.kernels"},
    {"ingot.plan.lower", "ingot.plan.assemble", "ingot.plan.memory"},
    {"ingot.tune"},
    {"ingot.build", "ingot.compiler", "ingot.evidence", "ingot.retune", "ingot.stepwise"},
    {"ingot.precision", "ingot.tools"},
    {"ingot.llm"},
    {"ingot.server", "ingot.release", "ingot.llm.serve", "ingot.llm.metrics", "ingot.llm.commands_serve"},
    {"ingot.cli", "ingot.__main__", "ingot.__init__"},
]
RANK_OF = {prefix: rank for rank, prefixes in enumerate(RANKS) for prefix in prefixes}

# Against the order, inside a function only: an engine with host steps needs the oracle, and only then.
LAZY = {("ingot.runtime.host", "ingot.ir.oracle")}

HEAVY = {"onnx", "onnx_ir", "llvmlite", "torch", "triton"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def rank_of(module: str) -> int | None:
    """The rank of the longest prefix of `module` in the table; None where no row covers it."""
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 1, -1))
    return next((RANK_OF[prefix] for prefix in prefixes if prefix in RANK_OF), None)


def absolute(node: ast.ImportFrom, path: Path) -> str:
    if not node.level:
        return node.module or ""
    package = path.relative_to(ROOT).parts[: -node.level]
    return ".".join((*package, node.module) if node.module else package)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def imported(node: ast.AST, path: Path) -> Iterator[str]:
    """The modules of this project that an import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.startswith("ingot"))
    elif isinstance(node, ast.ImportFrom) and (base := absolute(node, path)).split(".")[0] == "ingot":
        for alias in node.names:
            yield name if is_module(name := f"{base}.{alias.name}") else base


def imports(node: ast.AST, path: Path, lazy: bool = False) -> Iterator[tuple[str, int, bool]]:
    """(module, line, whether inside a function) of every import of this project's modules below `node`."""
    for child in ast.iter_child_nodes(node):
        yield from ((name, child.lineno, lazy) for name in imported(child, path) if isinstance(child, ast.stmt))
        yield from imports(child, path, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def against_the_order(path: Path) -> list[str]:
    """One line for each import in `path` of a module of a later rank."""
    module = module_name(path)
    rank = rank_of(module)
    if rank is None:
        return [f"{module} has no rank: put its room into RANKS of {Path(__file__).name}"]
    return [
        f"{path.relative_to(ROOT)}:{line} {module} (rank {rank}) imports {name} (rank {rank_of(name)})"
        for name, line, lazy in imports(ast.parse(path.read_text()), path)
        if name != "ingot"
        and ((other := rank_of(name)) is None or other > rank)
        and not (lazy and (module, name) in LAZY)
    ]


def test_imports_go_one_way() -> None:
    offences = [line for path in sorted((ROOT / "ingot").rglob("*.py")) for line in against_the_order(path)]
    assert not offences, "\n".join(offences)


def test_a_wrong_import_is_found() -> None:
    path = ROOT / "ingot" / "runtime" / "imagined.py"
    tree = ast.parse("from ..passes import fold\ndef late():\n    from ingot.ir import oracle\nimport ingot.errors")
    assert sorted((name, lazy) for name, _, lazy in imports(tree, path)) == [
        ("ingot.errors", False),
        ("ingot.ir" + (".oracle" if is_module("ingot.ir.oracle") else ""), True),
        ("ingot.passes" + (".fold" if is_module("ingot.passes.fold") else ""), False),
    ]
    assert rank_of("ingot.plan.lower") == rank_of("ingot.plan.memory.intervals")
    assert rank_of("ingot.unheard_of") is None


@pytest.mark.parametrize("module", ["ingot", "ingot.runtime", "ingot.engine"])
def test_running_needs_little(module: str) -> None:
    script = f"import {module}, sys; print(*sorted({HEAVY!r} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not loaded.strip(), f"import {module} loads {loaded}"
