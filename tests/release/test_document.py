"""docs/release.md: its commands run, the files and verbs it names exist."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from benchmarks.server_load import free_port
from ingot.release.commands import VERBS
from tests.test_readme import marked_blocks, run

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = ROOT / "docs" / "release.md"


def test_its_commands_run(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "build").mkdir()
    blocks = list(marked_blocks(DOCUMENT))
    assert len(blocks) >= 3
    ports = {stated: str(free_port()) for stated in ("18010", "18080", "18081")}  # another checkout may use them
    for language, text in blocks:
        for stated, free in ports.items():
            text = text.replace(stated, free)
        done = run(language, text, tmp_path)
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr


def test_every_verb_is_named() -> None:
    text = DOCUMENT.read_text()
    assert [verb for verb in VERBS if f"`{verb}" not in text and f"release {verb}" not in text] == []


def test_every_block_of_commands_is_marked() -> None:
    assert not re.search(r"^```(sh|bash|python)\n", DOCUMENT.read_text(), re.MULTILINE)


def test_the_workflow_uses_flags_that_exist() -> None:
    """The commands of the GitHub Actions example, with their flags, as the command line knows them."""
    workflow = yaml.safe_load((ROOT / "examples" / "release" / "github-actions.yml").read_text())
    steps = " ".join(step.get("run", "") for step in workflow["jobs"]["publish"]["steps"])
    for verb in ("publish", "status"):
        words = re.search(rf"ingot release {verb} (.*?)(?:\n|$)", steps.replace("\\\n", " "))
        assert words is not None
        shown = run("sh", f"ingot release {verb} --help", ROOT).stdout
        assert [flag for flag in re.findall(r"--[\w-]+", words[1]) if flag not in shown] == []


@pytest.mark.parametrize("script", ["demo-release"])
def test_the_script_can_be_run(script: str) -> None:
    assert os.access(ROOT / "scripts" / script, os.X_OK)
    assert subprocess.run(["bash", "-n", ROOT / "scripts" / script], check=False).returncode == 0
