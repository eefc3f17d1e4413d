"""The console in a real Chromium: what it shows, its buttons, the keyboard alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.release import browser
from examples.release.browser import Page
from ingot.release import events
from ingot.release.windows import Counters, Observation
from tests.release.test_api import Served, begun, served

__all__ = ["served"]
pytestmark = pytest.mark.skipif(
    browser.installed() is None, reason="no Chromium here: apt install chromium (.ci/run does so)"
)


@pytest.fixture(scope="module")
def browsing() -> Iterator[Page]:
    with browser.page() as page:
        yield page


@pytest.fixture
def page(browsing: Page, served: Served) -> Page:
    begun(served)
    figures = {"v1": Counters(requests=950, errors=9, latency_sum=9.0, histogram={210: 941}),
               "v2": Counters(requests=50, errors=5, histogram={240: 45}, mirrored=20, agreed=18)}  # fmt: skip
    import time

    served.store.observe({"digits": Observation("g", time.time() - 60, {})})
    served.store.observe({"digits": Observation("g", time.time() - 1, figures, 2, {"v2": 40, "v1": 700})})
    browsing.open(f"http://127.0.0.1:{served.port}/#digits")
    browsing.until("document.getElementById('phase').textContent == 'Paused'")
    browsing.evaluate("Boolean(document.activeElement.blur())")
    return browsing


def text(page: Page, selector: str) -> str:
    return str(page.evaluate(f"document.querySelector('{selector}').innerText"))


def test_it_shows_steps_weights_figures_and_evidence(page: Page, served: Served, tmp_path: Path) -> None:
    assert "digits: v1 → v2" in text(page, "#title")
    assert page.evaluate("document.querySelector('#weights').getAttribute('aria-label')") == (
        "Weights: v1 95 percent, v2 5 percent"
    )
    assert page.evaluate("document.querySelector('#steps li.current').innerText") == "pause {}"
    rows = page.evaluate("[...document.querySelectorAll('#versions tr')].map(row => row.innerText)")
    assert rows[2].startswith("v2\t5\t10.0 %") and "90.0 %" in rows[2]
    assert page.evaluate("document.querySelectorAll('#charts svg path').length") == 8
    served.store.submit("digits", events.Abort(), "ann")
    page.until("document.getElementById('phase').textContent == 'Degraded'")
    page.until("document.querySelector('#history').innerText.includes('ann')")
    page.photograph(tmp_path / "console.png")
    assert (tmp_path / "console.png").read_bytes()[:4] == b"\x89PNG"


def test_a_verdict_opens_with_its_evidence(page: Page, served: Served) -> None:
    spec = served.store.load("digits")[0].spec  # type: ignore[union-attr]
    assert spec.model == "digits"
    served.ask("POST", "/api/rollouts/digits/abort", "{}")
    extra = "metrics: {errors: {kind: errorRate}}\nanalysis: {metrics: [errors]}\n"
    from tests.release.test_api import SPEC

    served.ask("POST", "/api/rollouts", SPEC + extra)
    served.store.submit("digits", events.Ready("v2"), "controller")
    served.store.submit(
        "digits", events.Judged(0, "errors", "v2", "Failed", "10 % of 50", {"canary": 0.1}), "controller"
    )
    page.until("document.querySelector('#verdicts summary') != null")
    assert "Failed errors of v2: 10 % of 50" in text(page, "#verdicts summary")
    page.evaluate("document.querySelector('#verdicts summary').focus()")
    page.press("Enter")
    page.until("document.querySelector('#verdicts details').open")
    assert '"canary": 0.1' in text(page, "#verdicts pre")


def test_the_keyboard_is_enough(page: Page, served: Served) -> None:
    """Tab reaches every command; Enter and Space press; a dialogue asks before an abort, and Escape leaves it."""
    reached = []
    for _ in range(12):
        page.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"skip", "model-digits", "do-promote", "do-pause", "do-abort", "weight"} <= set(reached)
    page.evaluate("document.getElementById('do-abort').focus()")
    page.press("Enter")
    page.until("document.getElementById('confirm').open")
    page.press("Escape")
    page.until("!document.getElementById('confirm').open")
    assert served.store.load("digits")[0].stage == "steps"  # type: ignore[union-attr]
    page.evaluate("document.getElementById('do-abort').focus()")
    page.press(" ")
    page.until("document.getElementById('confirm').open")
    page.evaluate("document.getElementById('confirm-yes').focus()")
    page.press("Enter")
    page.until("document.getElementById('phase').textContent == 'Degraded'")
    assert served.store.history("digits")[-1].actor == "local"


def test_a_question_is_not_answered_by_the_one_before(page: Page, served: Served) -> None:
    """The first dialogue's close event arrives when the second is open already."""
    page.evaluate("document.getElementById('do-abort').click()")
    page.evaluate("document.getElementById('confirm').close(); document.getElementById('do-abort').click()")
    page.evaluate("new Promise((done) => setTimeout(done, 50))")
    page.evaluate("document.getElementById('confirm-yes').click()")
    page.until("document.getElementById('phase').textContent == 'Degraded'")
    assert served.store.load("digits")[0].stage == "aborted"  # type: ignore[union-attr]


def test_weights_are_set_from_the_page(page: Page, served: Served) -> None:
    page.evaluate("document.getElementById('weight').focus()")
    page.type("25")
    page.press("Enter")
    page.until("document.getElementById('weights').getAttribute('aria-label').includes('v2 25 percent')")
    assert served.store.history("digits")[-1].event == events.SetWeight({"v2": 25})


def test_what_is_not_legal_now_cannot_be_pressed(page: Page) -> None:
    disabled = page.evaluate("[...document.querySelectorAll('#buttons button:disabled')].map(b => b.innerText)")
    assert disabled == ["Retry"]


def test_a_key_is_asked_for(page: Page, served: Served) -> None:
    served.store.add_key("secret", "olga", "operator")
    page.until("!document.getElementById('key-form').hidden")
    page.evaluate("document.getElementById('key').focus()")
    page.type("secret")
    page.press("Enter")
    page.until("document.getElementById('key-form').hidden && document.getElementById('connection').textContent == ''")
    page.evaluate("sessionStorage.clear()")


def test_every_part_has_a_name(page: Page) -> None:
    """What a screen reader would stumble over: controls without a label, figures without a description."""
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, svg, section')].filter(e => !(e.innerText || e.ariaLabel || "
        "e.getAttribute('aria-labelledby') || (e.labels && e.labels.length))).map(e => e.outerHTML)"
    )
    assert unnamed == []
