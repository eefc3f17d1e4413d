"""Scores of answers: built-in ones, a user's file, what changed, what may be lost."""

import math
from pathlib import Path

import numpy as np
import pytest

from ingot.errors import ConfigError
from ingot.precision import budget, metric


def answers(*rows: list[float]) -> list[dict[str, np.ndarray]]:
    return [{"scores": np.array([row], np.float32)} for row in rows]


REFERENCE = answers([1, 0, 0], [0, 2, 0], [0, 0, 3])


def test_equal_answers_are_perfect() -> None:
    scores = {name: judged(REFERENCE, [], REFERENCE) for name, judged in metric.BUILT_IN.items()}
    assert scores == {"cosine": 1.0, "snr": 200.0, "agreement": 1.0}


def test_signal_to_noise_is_the_ratio_of_powers() -> None:
    noisy = answers([1, 0.1, 0], [0, 2, 0.2], [0.3, 0, 3])
    power, noise = 1 + 4 + 9, 0.01 + 0.04 + 0.09
    assert metric.decibels(noisy, REFERENCE) == pytest.approx(10 * math.log10(power / noise), rel=1e-6)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_scores_lowest(broken: float) -> None:
    found = answers([1, 0, 0], [0, broken, 0], [0, 0, 3])
    assert metric.cosines(found, REFERENCE)[1] == 0.0 and metric.decibels(found, REFERENCE) == -math.inf


def test_agreement_is_the_share_of_equal_decisions() -> None:
    found = answers([0.9, 0, 0.2], [3, 2, 0], [0, 0, 3])
    assert metric.BUILT_IN["agreement"](found, [], REFERENCE) == pytest.approx(2 / 3)


def test_changes_name_the_sample_and_the_decision() -> None:
    (change,) = metric.changes(REFERENCE, answers([1, 0.01, 0], [3, 2, 0], [0, 0, 3]))
    assert (change.index, change.output, change.was, change.now) == (1, "scores", "1", "0")


def test_changed_whole_numbers_and_shapes_are_changes() -> None:
    before = [{"label": np.array([1, 2])}, {"label": np.array([3])}]
    after = [{"label": np.array([1, 5])}, {"label": np.array([3, 4])}]
    assert [(c.index, c.was, c.now) for c in metric.changes(before, after)] == [
        (0, "1, 2", "1, 5"), (1, "shape [1]", "shape [2]"),
    ]  # fmt: skip


def test_a_users_metric_sees_labels(tmp_path: Path) -> None:
    file = tmp_path / "accuracy.py"
    right = "sum(o['scores'].argmax() == s['label'] for o, s in zip(outputs, samples))"
    file.write_text(f"def metric(outputs, samples):\n    return {right} / len(samples)")
    samples = [{"x": np.zeros(1), "label": np.array(label)} for label in (0, 1, 1)]
    assert metric.load(file)(REFERENCE, samples, REFERENCE) == pytest.approx(2 / 3)
    assert not metric.load(file).relative


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "has no function `metric"),
        ("def metric(", "cannot be loaded: SyntaxError"),
        ("def metric(outputs, samples):\n    return outputs[0]['nothing']", "failed: KeyError: 'nothing'"),
        ("def metric(outputs, samples):\n    return float('nan')", "gave nan, a number is needed"),
        ("def metric(outputs, samples):\n    return None", "gave None, a number is needed"),
    ],
)
def test_a_metric_that_cannot_judge_is_named(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"wrong\.py") as caught:
        metric.load(file)(REFERENCE, [], REFERENCE)
    assert said in str(caught.value)


def test_an_unknown_metric_is_refused_with_the_known() -> None:
    with pytest.raises(ConfigError, match="cosine, snr, agreement"):
        metric.load("cosinus")


COSINE, SNR = metric.BUILT_IN["cosine"], metric.BUILT_IN["snr"]


@pytest.mark.parametrize(
    ("text", "judged", "reference", "floor"),
    [("0.5%", COSINE, 0.9, 0.895), ("0.02", COSINE, 0.9, 0.88), ("30dB", SNR, 200.0, 30.0), ("0", COSINE, 1.0, 1.0)],
)
def test_budgets_are_read(text: str, judged: metric.Metric, reference: float, floor: float) -> None:
    found = budget.parse(text, judged)
    assert found.floor(reference) == pytest.approx(floor)
    assert found.allows(floor, reference) and not found.allows(floor - 1e-6, reference)


@pytest.mark.parametrize(("text", "judged"), [("half", COSINE), ("-1%", COSINE), ("30dB", COSINE), ("0.5%", SNR),
                                              ("inf", COSINE), ("", COSINE)])  # fmt: skip
def test_budgets_that_mean_nothing_are_refused(text: str, judged: metric.Metric) -> None:
    with pytest.raises(ConfigError, match="budget"):
        budget.parse(text, judged)


def test_without_a_budget_everything_goes() -> None:
    assert budget.parse(None, COSINE).allows(-1e9, 1.0)
