"""README tells the truth: its marked commands run, and its table is what the result files say."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.table import README, latency_table, rewritten

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(sh|python) test\n(.*?)^```", re.MULTILINE | re.DOTALL)


PAGES = [README, *(ROOT / "docs" / f"{name}.md" for name in ("build", "trtexec", "compare"))]


def marked_blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of every code block marked as a test, in order."""
    return ((match[1], match[2]) for match in BLOCK.finditer(page.read_text()))


def run(language: str, text: str) -> subprocess.CompletedProcess[str]:
    """Run from the repository root, the scripts of this environment first on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True)


def test_marked_blocks_run_in_order() -> None:
    (ROOT / "build").mkdir(exist_ok=True)
    blocks = [block for page in PAGES for block in marked_blocks(page)]
    assert len(blocks) >= 4 + len(PAGES) - 1
    for language, text in blocks:
        done = run(language, text)
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_table_is_what_the_results_say() -> None:
    assert README.read_text() == rewritten(README.read_text()), "run python -m benchmarks.table"


def test_table_without_results_says_so(tmp_path: Path) -> None:
    assert "Nothing measured" in "".join(latency_table(tmp_path))


@pytest.mark.parametrize("script", ["demo", "test", "check", "bench"])
def test_scripts_can_be_run(script: str) -> None:
    assert os.access(ROOT / "scripts" / script, os.X_OK)
    assert subprocess.run(["bash", "-n", ROOT / "scripts" / script]).returncode == 0


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README.read_text())
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
