"""How runs on GPUs are put into the committed result: nothing that was measured is lost, and nothing counts twice."""

import json
from pathlib import Path
from typing import Any

from benchmarks import cuda_merge
from benchmarks.cuda_merge import merged
from benchmarks.cuda_rows import ROWS

ROW, NARROW, SINGLE = "bert_base b128", "bert_base b128 fp8", "unet_block b1"


BESIDE = {"torch imported": False, "first result s": 0.2, "python us": 4.0}
NOW = "2026-01-02 10:00 UTC"


def run(key: str, when: str = NOW, gpu: str = "one", **found: Any) -> dict[str, Any]:
    return {"machines": [{"devices": [gpu]}], "rows": {key: {"measured": when, **found}}}


def ours(key: str, ms: float, when: str = NOW, **more: Any) -> dict[str, Any]:
    return run(key, when, **{"graph ms": ms, "difference": 1e-3, **BESIDE, **more})


def row_of(whole: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in whole["rows"] if row["row"] == name)


def test_the_newest_time_counts_and_what_it_replaces_is_kept() -> None:
    first = merged({}, [ours(ROW, 6.5)])
    again = merged(first, [ours(ROW, 5.5, "2026-02-01 10:00 UTC"), ours(NARROW, 3.5)])
    assert row_of(again, ROW)["ours ms"] == 5.5 and row_of(again, ROW)["earlier ms"] == [6.5]
    assert row_of(again, NARROW)["ours ms"] == 3.5 and row_of(again, NARROW)["earlier ms"] == []


def test_an_older_run_and_the_same_run_change_nothing() -> None:
    runs = [ours(ROW, 5.5, "2026-02-01 10:00 UTC"), run(f"{ROW} compile", ms=6.6)]
    known = merged({}, runs)
    assert merged(known, [*runs, ours(ROW, 1.0)]) == known | {"ours on": [{"devices": ["one"]}]}


def test_the_best_of_a_peers_runs_counts() -> None:
    peers = [run(f"{ROW} compile", ms=ms) for ms in (7.0, 6.0, 6.5)]
    row = row_of(merged(merged({}, [ours(ROW, 5.0), peers[0]]), peers[1:]), ROW)
    assert row["peers ms"]["compile"] == 6.0 and row["ratio"] == 6.0 / 5.0
    assert row["peers alone ms"]["compile"] is None


def test_rows_of_one_item_are_held_alone_where_both_were_measured_so() -> None:
    in_row = merged({}, [ours(SINGLE, 1.0, NOW, **{"alone ms": 1.1}), run(f"{SINGLE} compile", ms=1.2)])
    assert row_of(in_row, SINGLE)["ratio"] == 1.2 and row_of(in_row, SINGLE)["passed"] is False
    alone = merged(in_row, [run(f"{SINGLE} compile", NOW, "one", ms=1.25, **{"alone ms": 1.65})])
    assert row_of(alone, SINGLE)["ratio"] == 1.65 / 1.1 and row_of(alone, SINGLE)["passed"]


def test_what_surrounds_a_run_is_held_too() -> None:
    peer = run(f"{ROW} compile", ms=6.6)
    assert row_of(merged({}, [ours(ROW, 5.5), peer]), ROW)["passed"]
    for worse in ({"torch imported": True}, {"first result s": 1.2}, {"python us": 16.0}):
        row = row_of(merged({}, [ours(ROW, 5.5, **worse), peer]), ROW)
        assert row["passed"] is False and list(row["checks"].values()).count(False) == 1


def test_what_failed_is_not_taken() -> None:
    known = merged({}, [ours(ROW, 5.5)])
    failed = run(ROW, "2026-03-01 10:00 UTC", failed="no memory")
    assert row_of(merged(known, [failed]), ROW) == row_of(known, ROW)


def test_a_narrow_row_is_held_against_the_wide_one_of_whichever_run() -> None:
    known = merged({}, [ours(ROW, 5.6)])
    assert row_of(merged({}, [ours(NARROW, 3.9)]), NARROW)["passed"] is None
    assert row_of(merged(known, [ours(NARROW, 3.9)]), NARROW)["passed"]
    assert row_of(merged(known, [ours(NARROW, 4.1)]), NARROW)["passed"] is False


def test_machines_are_those_of_ours_or_of_peers() -> None:
    whole = merged({}, [ours(ROW, 5.5), run(f"{ROW} compile", gpu="two", ms=6.0)])
    assert [m["devices"] for m in whole["ours on"]] == [["one"]] and whole["peers on"] == [{"devices": ["two"]}]


def test_the_file_is_gone_on_from(tmp_path: Path) -> None:
    result, file = tmp_path / "result.json", tmp_path / "ours.json"
    for ms, when in ((6.0, "2026-01-01"), (5.0, "2026-01-02")):
        file.write_text(json.dumps(ours(ROW, ms, when)))
        whole = cuda_merge.write(result, [file])
    assert json.loads(result.read_text()) == whole and row_of(whole, ROW)["earlier ms"] == [6.0]
    shown = list(cuda_merge.lines(whole))
    assert len(shown) == 1 + len(ROWS) and "not measured" in shown[1]
