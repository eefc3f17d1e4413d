"""`ingot llm …` with the tiny model: built once, asked, served to a client."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from examples.tiny_llm import FOLDER
from ingot.cli import main
from ingot.llm.build import BuildOptions


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llm") / "tiny.engine"
    assert main(["llm", "build", str(FOLDER), "-o", str(path), "--level", "0", "--quiet"]) == 0
    return path


def test_where_an_engine_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told before anything is built: there is no checkpoint either."""
    assert main(["llm", "build", str(tmp_path / "none"), "-o", str(tmp_path / "nowhere" / "x.engine")]) == 1
    assert "nowhere is no folder that one may write to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folder", "at", "name"),
    [("Llama-3.1-8B", ".", "Llama-3.1-8B.engine"), (".", "Llama-3.1-8B", "../Llama-3.1-8B.engine")],
)
def test_an_engine_is_named_as_the_folder(
    folder: str, at: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole: what follows a point is part of the name."""
    (tmp_path / "Llama-3.1-8B").mkdir()
    monkeypatch.chdir(tmp_path / at)
    given = list[Path]()

    def built(checkpoint: Path, options: BuildOptions, *_: Any) -> list[Any]:
        assert options.typical == 512
        given.append(checkpoint)
        return [SimpleNamespace(save=lambda path: given.append(Path(path)))]

    monkeypatch.setattr("ingot.llm.commands_build.build_ranks", built)
    monkeypatch.setattr("ingot.llm.commands_build.as_text", lambda engine, path: "")
    assert main(["llm", "build", folder, "--quiet", "--typical", "512"]) == 0
    assert given[0] == Path(folder) and given[1].resolve() == (tmp_path / at / name).resolve()


def test_a_checkpoint_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"precious")
    assert main(["llm", "build", str(tmp_path), "-o", str(weights)]) == 1
    assert "is a file of the checkpoint; give the engine another name" in capsys.readouterr().err
    assert weights.read_bytes() == b"precious"


def test_files_that_are_no_engines(engine: Path, tmp_path: Path) -> None:
    """A checkpoint's folder; an engine of which a byte of weights is another one."""

    def said_of(path: Path) -> str:
        words = [sys.executable, "-m", "ingot", "llm", "generate", str(path), "x"]
        return subprocess.run(words, capture_output=True, text=True, timeout=120).stderr

    assert f"make an engine of the checkpoint first, `ingot llm build {FOLDER}`" in said_of(FOLDER)
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "damaged.engine").write_bytes(data)
    (line,) = said_of(tmp_path / "damaged.engine").splitlines()
    assert line.startswith("ingot: error: ") and "weight chunk 0 is damaged; copy or build it again" in line


def test_a_text_is_streamed(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["llm", "generate", str(engine), "--chat", "Who are you?", "--threads", "1"]) == 0
    told = capsys.readouterr()
    assert told.out == "I am a tiny model with a million weights. Ingot's own script trained me.\n"
    assert re.search(r"\d+ tokens, first after \d+ ms, then \d+ a second", told.err)


def test_several_as_json_with_drafts(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["llm", "generate", str(engine), "--chat", "Count to five.", "Count to five.", "--json", "--drafts", "3"]
    assert main(words) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["text"] for answer in answers] == ["one, two, three, four and five."] * 2
    assert answers[0]["finish"] == "stop"


def test_an_answer_that_must_match(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"legs": {"type": "integer"}}, "required": ["legs"]}')
    asked = ["llm", "generate", str(engine), "--chat", "Describe a fox as JSON.", "--max-tokens", "100"]
    assert main([*asked, "--json-schema", str(schema), "--regex", "x"]) == 1
    assert "one of --json-schema, --regex and --choice" in capsys.readouterr().err
    assert main([*asked, "--json-schema", str(engine)]) == 1
    assert "tiny.engine is no text in UTF-8" in capsys.readouterr().err
    assert main([*asked, "--json-schema", schema.read_text()]) == 0
    assert "legs" in json.loads(capsys.readouterr().out)
    assert main([*asked, "--choice", "four", "--choice", "six"]) == 0
    assert capsys.readouterr().out.strip() in ("four", "six")


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [([], 0, "ingot llm build"), (["unheard"], 2, "there is no command 'unheard'"), (["--help"], 0, "usage")],
)
def test_overview(words: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["llm", *words]) == code
    captured = capsys.readouterr()
    assert told in captured.out + captured.err


def test_serve_until_told_to_end(engine: Path) -> None:
    command = [sys.executable, "-m", "ingot", "llm", "serve", str(engine), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            place = next(match[0] for line in server.stderr if (match := re.search(r"http://\S+/v1", line)))
            body = {"messages": [{"role": "user", "content": "Hello!"}], "temperature": 0}
            request = urllib.request.Request(f"{place}/chat/completions", json.dumps(body).encode())
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["choices"][0]["message"]["content"].startswith("Hello!")
        finally:
            server.send_signal(signal.SIGTERM)
        assert "ending: 0 requests" in server.stderr.read()
    assert server.returncode == 0
