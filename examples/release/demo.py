"""Three rollouts of the digits model under load: a good version is promoted, a slower and a wrong one go back.

    ./scripts/demo-release

No GPU, under two minutes. Prints the timeline as it happens; exits 1 if something ended otherwise. Leaves
build/demo-release/console.png, a screenshot of the console, where Chromium is installed.
"""

import asyncio
import collections
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.release_load import Load, Sample, inference, percentile
from examples.release import browser, versions
from examples.release.processes import ROOT, Ports, gateway, model_server, release_server, wait_until_answers
from ingot.release.access import Remote

FOLDER = ROOT / "build" / "demo-release"
RATE = 120.0
LONGEST = 60.0  # seconds of one rollout
CASES = (("original", "good", "Healthy"), ("good", "slower", "Degraded"), ("good", "wrong", "Degraded"))


@dataclass
class Stage:
    """What the rollouts are played on."""

    ports: Ports
    load: Load
    remote: Remote
    begun: float = field(default_factory=time.monotonic)
    passed: list[bool] = field(default_factory=list)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begun:6.1f} s  {text}", flush=True)

    def check(self, text: str, passed: bool) -> None:
        print(f"          {'PASS' if passed else 'FAIL'}  {text}", flush=True)
        self.passed.append(passed)


def rollout(stable: str, candidate: str, ports: Ports) -> str:
    """examples/release/rollout.yaml with these versions and ports."""
    text = (Path(__file__).parent / "rollout.yaml").read_text()
    text = text.replace(":8000", f":{ports.server}").replace(":8002", f":{ports.metrics}")
    content = yaml.safe_load(text)
    names = {"v1": stable, "v2": candidate}
    content["versions"] = {
        names[old]: {**one, "model": f"digits_{names[old]}"} for old, one in content["versions"].items()
    }
    content |= {"stable": stable, "candidates": [candidate]}
    for rule in content["routing"]["rules"]:
        rule["version"] = candidate
    return json.dumps(content)


def repository(folder: Path) -> Path:
    """A model repository with the four versions as ONNX files; the server compiles one when it is loaded."""
    for name, path in versions.write(folder / "onnx").items():
        place = folder / "models" / f"digits_{name}" / "1"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / "model.onnx")
    return folder / "models"


def bodies() -> list[bytes]:
    """Held-out digits as KServe v2 requests."""
    images = np.load(ROOT / "examples" / "digits" / "heldout.npz")["images"].astype(np.float32)[:200]
    return [
        json.dumps(
            {"inputs": [{"name": "image", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": image.ravel().tolist()}]}
        ).encode()
        for image in images
    ]


def watch(stage: Stage, already: int) -> dict[str, Any]:
    """Print the log as it grows until the rollout has ended."""
    shown, end = already, time.monotonic() + LONGEST
    while True:
        found = stage.remote.get("digits")
        for entry in stage.remote.history("digits")[shown:]:
            shown += 1
            stage.say(f"{entry['what']}: {entry['why']}"[:150])
        shares = " ".join(f"{version} {weight:g} %" for version, weight in found["weights"].items())
        if found["phase"] in ("Healthy", "Degraded") or time.monotonic() > end:
            stage.say(f"{found['phase']}: {found['message'][:110]} | weights {shares}")
            return found
        time.sleep(0.25)


def play(stage: Stage, stable: str, candidate: str, expected: str) -> None:
    """One rollout, and what its users saw of it."""
    stage.say(f"--- {stable} -> {candidate}")
    already = len(stage.remote.history("digits")) if stage.remote.rollouts() else 0
    first = len(stage.load.samples)
    stage.remote.apply(rollout(stable, candidate, stage.ports), "the demo's rollout")  # the same one again: no change
    found = watch(stage, already)
    time.sleep(1.0)
    stage.check(f"{candidate} ended {found['phase']} (expected {expected})", found["phase"] == expected)
    told(stage, stage.load.samples[first:], candidate)
    winner = candidate if expected == "Healthy" else stable
    last = {sample.version for sample in stage.load.samples[-40:]}
    stage.check(
        f"all requests are served by {winner} again" if winner == stable else f"{winner} serves all", last == {winner}
    )


def told(stage: Stage, samples: list[Sample], candidate: str) -> None:
    """Requests, failures, latencies and users by version."""
    by_version = collections.defaultdict(list)
    for sample in samples:
        by_version[sample.version].append(sample)
    for version, found in sorted(by_version.items()):
        latencies = [1e3 * sample.seconds for sample in found]
        users = len({sample.user for sample in found})
        stage.say(f"{version}: {len(found)} requests of {users} users, P50 {percentile(latencies, 0.5):.2f} ms, "
                  f"P99 {percentile(latencies, 0.99):.2f} ms")  # fmt: skip
    failed = [sample for sample in samples if sample.status != 200]
    stage.check(
        f"{len(samples)} requests, {len(failed)} failed, {len(stage.load.lost)} lost",
        not failed and not stage.load.lost,
    )


def screenshot(stage: Stage) -> None:
    """The console as a browser shows it."""
    if browser.installed() is None:
        stage.say("no screenshot: Chromium is not installed")
        return
    target = FOLDER / "console.png"
    with browser.page() as page:
        page.open(f"http://127.0.0.1:{stage.ports.console}/#digits")
        page.until(
            "document.querySelectorAll('#charts svg').length == 4 && document.querySelector('#history tr + tr') != null"
        )
        page.photograph(target)
    stage.check(f"screenshot of the console: {target.relative_to(ROOT)}", target.exists())


def loaded(load: Load) -> Iterator[None]:
    """The load runs in a thread meanwhile."""
    thread = threading.Thread(target=lambda: asyncio.run(load.run()))
    thread.start()
    try:
        yield
    finally:
        load.stopped = True
        thread.join()


def main() -> int:
    import contextlib

    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    ports, store = Ports.free(), f"sqlite:///{FOLDER}/release.db"
    models = repository(FOLDER)
    load = Load(ports.gateway, inference("/v2/models/digits/infer", bodies()), RATE)
    stage = Stage(ports, load, Remote(f"http://127.0.0.1:{ports.console}"))
    stage.say("starting a model server, the release server and a gateway")
    with model_server(models, FOLDER, ports, "digits_original"), release_server(store, FOLDER, ports):
        stage.say(f"console: http://127.0.0.1:{ports.console}/")
        with gateway(store, FOLDER, ports):
            first = rollout(*CASES[0][:2], ports)
            stage.say(f"{RATE:g} requests/s from {load.users} users")
            stage.remote.apply(first, "the demo's rollout")
            wait_until_answers(f"http://127.0.0.1:{ports.gateway}/v2/models/digits", FOLDER / "gateway.log")
            with contextlib.contextmanager(loaded)(load):
                for case in CASES:
                    play(stage, *case)
                screenshot(stage)
    fault = load.lost[:3]
    stage.check(f"nothing lost in {len(load.samples)} requests {fault or ''}", not load.lost)
    took = time.monotonic() - stage.begun
    print(f"\ndemo-release: {sum(stage.passed)} of {len(stage.passed)} checks passed in {took:.0f} s")
    return 0 if all(stage.passed) else 1


if __name__ == "__main__":
    sys.exit(main())
