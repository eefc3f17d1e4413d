"""inspect, report and explain."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ingot.cli import main


def test_inspect_model(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "model", str(digits), "--steps", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["nodes"] == len(content["list"]) == 17 and content["operators"]["Conv"] == 3
    assert main(["inspect", "model", str(digits)]) == 0
    assert "nodes: 17" in capsys.readouterr().out


def test_inspect_engine(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "engine", str(engine), "--steps", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert all(e["passed"] for e in content["evidence"]) and content["variants"][0]["host_steps"] == 0
    assert main(["inspect", "engine", str(engine)]) == 0
    assert "evidence:" in capsys.readouterr().out


def test_inspect_capability(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "capability", str(digits), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["host_steps"] == 0 and content["native_steps"] == 6


class Page(HTMLParser):
    """Tags, attributes that could load something, and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in ("meta", "br", "rect", "path", "line", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_is_one_page(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "report.html"
    assert main(["report", str(engine), "-o", str(target), "--shapes", "image:8x1x8x8"]) == 0
    source = target.read_text()
    page = Page()
    page.feed(source)
    assert not page.open and not [link for link in page.links if not link.startswith("#")]
    assert not re.search(r"https?://(?!www\.w3\.org)", source) and "<script src" not in source
    assert page.count["svg"] >= 3, "the graph before and after, and memory over time"
    words = ("nodes of the model", "steps of the engine", "Medians of", "One arena of", "largest difference", "stem")
    assert not [word for word in words if word not in page.text]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_report_in_a_browser(engine: Path, tmp_path: Path) -> None:
    """Nothing sticks out of a window of 1280 pixels, and all three pictures have a size."""
    target = tmp_path / "report.html"
    assert main(["report", str(engine), "-o", str(target)]) == 0
    script = """<script>document.title = JSON.stringify({
        across: document.documentElement.scrollWidth,
        pictures: [...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().height)})</script>"""
    target.write_text(target.read_text().replace("</body>", script + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,900", "--dump-dom", f"file://{target}"]
    shown = subprocess.run(["chromium", *flags], capture_output=True, text=True, timeout=60, check=True).stdout
    title = re.search("<title>(.*?)</title>", shown)
    assert title is not None
    seen = json.loads(title[1])
    assert seen["across"] <= 1280 and len(seen["pictures"]) >= 3 and min(seen["pictures"]) > 50


def test_report_as_json(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(engine), "-o", str(tmp_path / "r.html"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["latency_us"] > 0 and figures["symbols"] == {"N": 1}
    nodes = [node for step in figures["steps"] for node in step["nodes"]]
    assert {"stem", "flatten_12"} & set(nodes) and all(step["microseconds"] > 0 for step in figures["steps"])


def test_explain(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(digits)]) == 0
    shown = capsys.readouterr().out
    assert "17 nodes become 7" in shown and "relu_3, stem_norm, stem" in shown
    assert main(["explain", str(digits), "--all", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    fired = {entry["rewrite"] for entry in content["fired"]}
    assert {"epilogue", "scaled weight"} <= fired
