"""rollout.yaml: what is refused, and that the sentence names the key's path."""

import json
from pathlib import Path

import pytest

from ingot.release import conditions, spec
from ingot.release.spec import SpecError, parse, read, seconds

ROOT = Path(__file__).parent.parent.parent
GOOD = """
model: digits
stable: v1
candidates: [v2]
versions:
  v1: {endpoints: [{url: 'http://h:1'}]}
  v2: {endpoints: [{url: 'http://h:2'}]}
metrics:
  errors: {kind: errorRate}
  load: {kind: prometheus, address: 'http://p:9090', query: up, failureCondition: result > 1}
steps: [{setWeight: 5}, {analysis: {metrics: [errors]}}]
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("setWeight: 5", "setWeigth: 5", r"unknown field `setWeigth` - at `\$.steps\[0\]`"),
        ("kind: errorRate", "kind: errorRate, taü: 1", r"unknown field `taü` - at `\$.metrics"),
        ("setWeight: 5", "setWeight: 101", r"<= 100.0 - at `\$.steps\[0\].setWeight`"),
        ("setWeight: 5", "setWeights: {v2: 60, v1: 50}", "weights sum to 110, over 100"),
        ("setWeight: 5", "setWeight: 5, pause: {}", "exactly one of"),
        ("setWeight: 5", "setWeight: 0.001", "hundredth of a percent"),
        ("setWeight: 5", "pause: {duration: 5 minutes}", r"steps\[0\].pause.duration"),
        ("candidates: [v2]", "candidates: [v9]", "names the version 'v9', there are only v1, v2"),
        ("candidates: [v2]", "candidates: [v1]", "cannot be a candidate"),
        ("metrics: [errors]", "metrics: [errros]", "names the metric 'errros', there is none"),
        ("result > 1", "__import__('os')", "is not allowed"),
        ("result > 1", "result >", "condition"),
        ("http://h:2", "h:2", r"endpoints\[0\].url"),
        ("model: digits", "model: digits\nmodel: other", "the key 'model' stands twice"),
        ("model: digits", "model: [", "is no YAML"),
        ("model: digits", "", "missing required field `model`"),
    ],
)
def test_mistakes_are_named_with_their_path(old: str, new: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse(GOOD.replace(old, new))


def test_rules_name_known_segments_and_versions() -> None:
    rule = "routing: {rules: [{name: r, version: v2, match: {segment: beta}}]}"
    with pytest.raises(SpecError, match="names the segment 'beta'"):
        parse(GOOD + rule)
    parse(GOOD + rule.replace("rules:", "segments: {beta: [{header: x-beta}]}, rules:"))
    with pytest.raises(SpecError, match="regex"):
        parse(GOOD + rule.replace("{segment: beta}", "{header: x, regex: '('}"))


@pytest.mark.parametrize(("text", "value"), [("500ms", 0.5), ("30s", 30), ("1.5m", 90), ("2h", 7200), ("1d", 86400)])
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == value


def test_the_published_schema_is_the_programs() -> None:
    published = (ROOT / "ingot" / "release" / "rollout.schema.json").read_text()
    assert published == spec.schema_text(), "python -m ingot release schema > ingot/release/rollout.schema.json"
    rollout = json.loads(published)["$defs"]["Rollout"]
    assert rollout["additionalProperties"] is False and "stable" in rollout["required"]


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "release").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_legal(path: Path) -> None:
    assert read(path).stable


def test_a_spec_survives_its_own_json() -> None:
    rollout = parse(GOOD)
    assert parse(json.dumps(spec.plain(rollout))) == rollout


@pytest.mark.parametrize(
    ("text", "result", "truth"),
    [
        ("result < 0.05", 0.04, True), ("0 <= result < 1", 1.0, False), ("result > 1 or isnan(result)", 0.5, False),
        ("not result == 2 and abs(result - 1) * 2 <= 1", 1.5, True), ("-result < 0", 1.0, True),
    ],
)  # fmt: skip
def test_conditions(text: str, result: float, truth: bool) -> None:
    assert conditions.holds(text, result) is truth


def test_a_condition_that_cannot_be_computed_is_an_error() -> None:
    with pytest.raises(ValueError, match="division by zero"):
        conditions.holds("1 / result < 2", 0.0)
