"""The fastest engine within a budget: the digits, calibrated, searched, proved on held-out samples."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest

import ingot
from ingot.cli import main
from ingot.errors import BuildError, ConfigError
from ingot.precision import budget, constraints, mixed
from ingot.precision.metric import Answer
from ingot.precision.mixed import Bench
from ingot.precision.request import Request
from ingot.precision.trials import Trials

FOLDER = Path(__file__).parent.parent.parent / "examples" / "digits"
MODEL, DATA, METRIC = (FOLDER / name for name in ("digits.onnx", "samples.py", "accuracy.py"))
PRODUCTS = {"stem", "first", "second", "hidden", "scores"}
CONFIG = ingot.BuildConfig(level=0, profiles=[ingot.Profile(image=((1, 1, 8, 8), (1, 1, 8, 8), (8, 1, 8, 8)))])


def request(**options: object) -> Request:
    return Request(**{"formats": ("int8",), "data": DATA, "metric": METRIC, "calibrator": "minmax", **options})


@pytest.fixture(scope="module")
def bench() -> Bench:
    return mixed.prepare(MODEL, CONFIG, request())


def test_every_layer_has_its_noise_and_groups_add_up(bench: Bench) -> None:
    ranked = bench.ranked(budget.parse("1%", bench.trials.metric))
    assert {layer.node for layer in ranked} == PRODUCTS
    assert all(0 < layer.noise < 0.01 for layer in ranked)
    assert sum(g.expected for g in bench._groups) == pytest.approx(sum(layer.noise for layer in ranked))


def test_the_engine_keeps_the_budget_on_samples_it_has_not_seen(bench: Bench) -> None:
    outcome = bench.best(budget.parse("1%", bench.trials.metric))
    report = outcome.report
    assert report.heldout["score"] >= report.heldout_reference["score"] - 0.01
    assert report.samples == report.heldout["samples"] == 225
    assert set(report.chosen) | set(report.wide) == PRODUCTS
    timed = [t for t in report.trials if t.within and t.microseconds is not None]
    assert report.microseconds <= min(t.microseconds for t in timed if t.narrow == 0)
    assert outcome.engine.details["precision"]["nodes"] == dict(report.chosen)
    assert all(entry["passed"] for entry in outcome.engine.details["evidence"])


def test_what_is_not_faster_when_measured_again_is_not_taken(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trials, "microseconds", lambda self, choice: 100.0 - len(choice.nodes))
    monkeypatch.setattr(Trials, "ratio", lambda self, choice, other: 1.5)
    report = bench.best(budget.parse("1%", bench.trials.metric)).report
    assert report.chosen == {} and report.microseconds == 100.0
    assert any(note.endswith("not faster than float32 when measured again") for note in report.notes)


def test_an_impossible_budget_leaves_everything_wide(bench: Bench) -> None:
    never = budget.Budget("drop", 0.0, "nothing")
    exact = mixed.prepare(MODEL, CONFIG, request(metric="snr", data=list(bench.trials.samples)))
    report = exact.best(budget.Budget("at least", 199.0, "199dB")).report
    assert report.chosen == {} and report.wide and report.heldout["decibels"] == 200.0
    said = next(note for note in report.notes if note.startswith("no narrow choice keeps the budget 199dB"))
    assert {name for name in PRODUCTS if name in said} == PRODUCTS, "the layers in the way"
    assert never.allows(1.0, 1.0)


def test_a_budget_that_forced_layers_break_is_refused_with_them() -> None:
    rules = constraints.parse("obey", "second:int8,first:int8", "")
    forced = mixed.prepare(MODEL, CONFIG, request(metric="snr", constraints=rules))
    with pytest.raises(BuildError, match=r"no engine keeps the budget 120dB .* best that could be had is \d.*first"):
        forced.best(budget.parse("120dB", forced.trials.metric))


def test_of_several_formats_a_layer_takes_the_cheapest(bench: Bench) -> None:
    rules = constraints.parse("obey", "stem:fp32,first:fp32,second:fp32", "")
    several = mixed.prepare(MODEL, CONFIG, request(formats=("int8", "int4"), data=some(bench), constraints=rules))
    limit = budget.parse("1%", several.trials.metric)
    ranked = several.ranked(limit)
    assert {(s.node, s.precision) for s in several._measured} == set(product(("hidden", "scores"), ("int8", "int4")))
    assert all(s.price == min(m.price for m in several._measured if m.node == s.node) for s in ranked)
    report = several.best(limit).report
    assert len(ranked) == 2 and {("int4",), ("int8",)} <= {trial.kinds for trial in report.trials}


def some(bench: Bench) -> list[Answer]:
    return list(bench.trials.samples)[:24]


def test_few_samples_prove_little(bench: Bench) -> None:
    few = mixed.prepare(MODEL, CONFIG, request(data=list(bench.trials.samples)[:1]))
    assert any("one sample only" in note for note in few.notes)
    none = mixed.prepare(MODEL, CONFIG, Request(("int8",)))
    assert any("drawn inputs" in note for note in none.notes)


@pytest.mark.parametrize(("options", "said"), [({"formats": ("int7",)}, "no format 'int7'"),
                                               ({"data": None}, "need samples"),
                                               ({"confidence": 1.0}, "confidence")])  # fmt: skip
def test_what_makes_no_sense_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        request(**options)


def test_the_command_writes_engine_report_and_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine, quantized = tmp_path / "digits.engine", tmp_path / "digits_int8.onnx"
    words = [
        "build", str(MODEL), "-o", str(engine), "--int8", "--data", str(DATA), "--metric", str(METRIC), "--budget",
        "1%", "--level", "0", "--save-model", str(quantized), "--quiet", "--shapes", "image:1x1x8x8",
    ]  # fmt: skip
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "precision: of 5 layers" in said and "on 225 held-out samples" in said
    report = json.loads((tmp_path / "digits.engine.precision.json").read_text())
    assert report["budget"] == "1%" and report["speedup"] > 0
    onnx.checker.check_model(onnx.load(quantized), full_check=True)
    with ingot.Session(ingot.Engine.load(engine)) as session:
        scores = session.run({"image": np.zeros((1, 1, 8, 8), np.float32)})["scores"]
    assert np.isfinite(scores).all()


def test_a_metric_without_a_narrower_precision_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(MODEL), "--metric", str(METRIC)]) == 1
    assert "--metric needs a narrower precision" in capsys.readouterr().err


def test_what_a_target_lacks_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(MODEL), "--fp8", "--data", str(DATA)]) == 1
    assert "--fp8 has no kernels on target cpu; it has int8, int4" in capsys.readouterr().err


def test_smoothing_is_of_integers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(MODEL), "--int4", "--smooth", "--data", str(DATA)]) == 1
    assert "give it with --int8" in capsys.readouterr().err
