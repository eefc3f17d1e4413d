"""README and the how-tos tell the truth: their commands run, and the table is what the result files say."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.table import README, TABLES, reservations, rewritten

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(sh|python) test\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = "build profiles timing_cache trtexec compare precision calibration serving operations llm".split()
HOW_TOS = [ROOT / "docs" / f"{name}.md" for name in PAGES]


def marked_blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of every code block marked as a test, in order."""
    return ((match[1], match[2]) for match in BLOCK.finditer(page.read_text()))


def run(language: str, text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run in a folder that looks like the repository's root, the scripts of this environment first on the path."""
    variables = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
    }
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("page", [README, *HOW_TOS, ROOT / "docs" / "python_models.md"], ids=lambda page: page.stem)
def test_marked_blocks_run_in_order(page: Path, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "build").mkdir()
    blocks = list(marked_blocks(page))
    assert blocks
    for language, text in blocks:
        done = run(language, text, tmp_path)
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr


def test_every_command_of_the_how_tos_is_marked() -> None:
    assert [page.stem for page in HOW_TOS if re.search(r"^```(sh|python|bash)\n", page.read_text(), re.MULTILINE)] == []


def test_readme_names_every_how_to() -> None:
    text = README.read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in text] == []


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.stem)
def test_tables_are_what_the_results_say(page: Path) -> None:
    assert page.read_text() == rewritten(page.read_text(), table=TABLES[page]), "run python -m benchmarks.table"


def test_table_says_what_is_not_alike() -> None:
    assert "two bfloat16 parts" in "".join(reservations({"load": 0.5, "instruction_sets": ["avx2", "amx_bf16"]}))
    assert "bfloat16" not in "".join(reservations({"load": 0.5, "instruction_sets": ["avx2"]}))


def test_table_without_results_says_so(tmp_path: Path) -> None:
    for table in TABLES.values():
        assert "Nothing measured" in "".join(table(tmp_path))


@pytest.mark.parametrize("script", ["demo", "test", "check", "bench"])
def test_scripts_can_be_run(script: str) -> None:
    assert os.access(ROOT / "scripts" / script, os.X_OK)
    assert subprocess.run(["bash", "-n", ROOT / "scripts" / script]).returncode == 0


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README.read_text())
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
