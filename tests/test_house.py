"""The house rules that can be measured: length of functions and files."""

import ast
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("ingot", "benchmarks", "examples", "tests")
LONGEST_FUNCTION, LONGEST_KERNEL, LONGEST_FILE = 60, 120, 500


@dataclass(frozen=True)
class Function:
    """One function: where it stands, its lines without decorators, whether it is a kernel or lies within one."""

    place: str
    lines: int
    kernel: bool


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    targets = (decorator.func if isinstance(decorator, ast.Call) else decorator for decorator in node.decorator_list)
    return any(ast.unparse(target).split(".")[-1] in ("kernel", "jit") for target in targets)


def functions(node: ast.AST, path: Path, kernel: bool = False) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        inside = kernel
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = kernel or is_kernel(child)
            place = f"{path.relative_to(ROOT)}:{child.lineno} {child.name}"
            yield Function(place, (child.end_lineno or child.lineno) - child.lineno + 1, inside)
        yield from functions(child, path, inside)


def files(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def all_functions(*rooms: str) -> list[Function]:
    return [function for path in files(*rooms) for function in functions(ast.parse(path.read_text()), path)]


def test_no_function_is_too_long() -> None:
    offenders = [
        f"{function.place}: {function.lines} lines"
        for function in all_functions(*ROOMS)
        if function.lines > (LONGEST_KERNEL if function.kernel else LONGEST_FUNCTION)
    ]
    assert not offenders, "\n".join(offenders)


@pytest.mark.parametrize("room", ["ingot", "benchmarks", "examples"])
def test_functions_are_short(room: str) -> None:
    lengths = sorted(function.lines for function in all_functions(room) if not function.kernel)
    nine_in_ten = lengths[len(lengths) * 9 // 10]
    assert statistics.median(lengths) < 10, f"half of the functions of {room} have {statistics.median(lengths)} lines"
    assert nine_in_ten < 30, f"one in ten of the functions of {room} has {nine_in_ten} lines or more"


def test_no_file_is_too_long() -> None:
    lengths = {path: path.read_text().count("\n") for path in files(*ROOMS)}
    offenders = [f"{path.relative_to(ROOT)}: {count} lines" for path, count in lengths.items() if count >= LONGEST_FILE]
    assert not offenders, "\n".join(offenders)
