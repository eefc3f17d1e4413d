"""The comparison with other runtimes: its cases, what counts, and how a file keeps rows of several runs."""

from pathlib import Path

import pytest

from benchmarks import cpu_peers
from benchmarks.cpu_peers import Row, save, stored_rows, summary
from benchmarks.peer_cases import BENCHMARKS, cases
from benchmarks.runtimes import UNASKED


def row(model: str, precision: str, family: str, ratio: float, threads: int = 2) -> Row:
    ratios = {"onnxruntime": 3.0, "openvino": ratio, UNASKED: 0.1}
    return Row(model, precision, family, threads, {"ingot": 1.0}, ratios, 1e-4, 0.0)


ROWS = [
    row("resnet50", "int8", "convolution", 1.2),
    row("bert_base", "int8", "transformer", 1.5),
    row("resnet50", "fp32", "convolution", 0.9),
]


def test_summary_counts_the_fastest_peer_that_computes_alike() -> None:
    *_, transformer, worst, claim = summary(ROWS)
    assert transformer == "int8 transformer nets, geometric mean 1.50 over 1"
    assert worst == "worst row: resnet50 fp32 2 threads, 0.90x"
    assert claim == "best peer beaten on 2 of 3, geometric mean 1.17"


def test_a_row_that_computes_something_else_fails() -> None:
    assert not Row("a", "fp32", "convolution", 1, {}, {}, 2e-3, 0.0).passed
    assert Row("a", "bf16", "convolution", 1, {}, {}, 2e-3, 0.0).passed


def test_a_file_keeps_the_rows_that_were_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    save(path, ROWS)
    save(path, [row("resnet50", "fp32", "convolution", 1.1)])
    assert [(r.model, r.precision) for r in stored_rows(path)] == [
        ("resnet50", "fp32"), ("resnet50", "int8"), ("bert_base", "int8"),
    ]  # fmt: skip
    assert stored_rows(path)[0].best == 1.1


def test_rows_of_another_machine_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    save(path, ROWS)
    elsewhere = cpu_peers.machine() | {"processor": "another"}
    monkeypatch.setattr(cpu_peers, "machine", lambda: elsewhere)
    assert stored_rows(path) == []


def test_every_model_of_the_issue_has_its_rows() -> None:
    labels = {case.label for case in cases()}
    assert {"resnet50 int8", "resnet50 b8 bf16", "mobilenet_v2 int8", "bert_base bf16", "minilm int8"} <= labels
    assert len({case.label for case in cases()}) == len(cases()) and set(BENCHMARKS) >= {"mnist"}
