"""Two real models become engine files; they are checked, timed beside onnxruntime and drawn.

    ./scripts/demo

Exits 1 if a check fails. Leaves build/demo/digits.engine, build/demo/minilm.engine and report.html.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference

import ingot
from benchmarks.runtimes import Run, open_onnxruntime
from benchmarks.timing import available_threads, paired
from examples.minilm import minilm_model, tokenize
from ingot.report import last_log
from ingot.tools.progress import build_progress

ROOT = Path(__file__).parent.parent
FOLDER, REPORT = ROOT / "build" / "demo", ROOT / "report.html"
Bounds = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # smallest, most common, largest
THREADS = min(2, available_threads())
ROUNDS = 9
SENTENCES = [
    "A cat sits on the mat.",
    "A kitten rests on a rug.",
    "The stock market fell sharply today.",
    "Shares lost value.",
]


@dataclass(frozen=True)
class Check:
    """Something the demo promises, and whether it holds."""

    text: str
    passed: bool


def say(text: str) -> None:
    print(text, flush=True)


def build(name: str, model: Path, **shapes: Bounds) -> ingot.Session:
    """The model as a file of its own, loaded again from it."""
    say(f"\n{name}: building build/demo/{name}.engine")
    start = time.perf_counter()
    config = ingot.BuildConfig(target="cpu", profiles=[ingot.Profile(**shapes)], level=1)
    with build_progress() as progress:
        engine = ingot.build(model, config, progress)
    engine.save(FOLDER / f"{name}.engine")
    say(f"  built, verified and saved in {time.perf_counter() - start:.1f} s")
    for notice in last_log().notices:
        if notice.kind in ("approximation", "host step", "dropped tactic"):
            say(f"  {notice}")
    return ingot.Session(ingot.Engine.load(FOLDER / f"{name}.engine"), device="cpu", threads=THREADS)


def compare_latency(name: str, runs: dict[str, Run], inputs: dict[str, np.ndarray]) -> None:
    timings = paired({runtime: partial(run, inputs) for runtime, run in runs.items()}, ROUNDS)
    times = ", ".join(f"{runtime} {timing.median:.3f} ms" for runtime, timing in timings.items())
    ratio = timings["ingot"].ratio(timings["onnxruntime"])
    say(f"  {name}, {THREADS} threads: {times} (Ingot is {ratio:.2f}x as fast)")


def digits() -> Iterator[Check]:
    """Accuracy on the held-out digits, beside the reference's."""
    path = ROOT / "examples" / "digits" / "digits.onnx"
    heldout = np.load(path.parent / "heldout.npz")
    inputs, labels = {"image": heldout["images"].astype(np.float32)}, heldout["labels"]
    evaluator: Any = onnx.reference.ReferenceEvaluator(onnx.load(path))
    (reference,) = evaluator.run(None, inputs)
    with build("digits", path, image=((1, 1, 8, 8), (1, 1, 8, 8), (512, 1, 8, 8))) as session:
        ours = session.run(inputs)["scores"].argmax(1)
        accuracy, wanted = (ours == labels).mean(), (reference.argmax(1) == labels).mean()
        yield Check(
            f"accuracy on {len(labels)} held-out digits {accuracy:.2%}, the reference's {wanted:.2%}",
            accuracy == wanted,
        )
        yield Check("every single prediction is the reference's", bool((ours == reference.argmax(1)).all()))
        one = {"image": inputs["image"][:1]}
        compare_latency("one digit", {"ingot": session.run, "onnxruntime": open_onnxruntime(path, THREADS)}, one)


def minilm() -> Iterator[Check]:
    """Sentence similarities beside onnxruntime's."""
    path, shapes = FOLDER / "minilm.onnx", ((1, 4), (1, 32), (16, 128))
    onnx.save(minilm_model(), path)
    names = ("input_ids", "attention_mask", "token_type_ids")
    with build("minilm", path, **dict.fromkeys(names, shapes)) as session:
        runs, inputs = {"ingot": session.run, "onnxruntime": open_onnxruntime(path, THREADS)}, tokenize(SENTENCES)
        vectors = {runtime: run(inputs)["sentence_embedding"] for runtime, run in runs.items()}
        ours, theirs = (vector @ vector.T for vector in vectors.values())
        say(f'  "{SENTENCES[0]}" is like "{SENTENCES[1]}": {ours[0, 1]:.3f}; like "{SENTENCES[2]}": {ours[0, 2]:.3f}')
        apart = float(np.abs(ours - theirs).max())
        yield Check(
            f"sentence similarities differ from onnxruntime's by at most {apart:.1e} (allowed: 1e-4)", apart <= 1e-4
        )
        compare_latency("one sentence of 32 tokens", runs, tokenize(SENTENCES[:1], length=32))


def report() -> Iterator[Check]:
    """The page that shows the graph before and after fusion, time per step, memory over time, evidence."""
    command = [str(Path(sys.executable).with_name("ingot")), "report", str(FOLDER / "minilm.engine"), "-o", str(REPORT)]
    REPORT.unlink(missing_ok=True)
    done = subprocess.run(command, cwd=ROOT, check=False)
    yield Check(f"report written: {REPORT.name}", done.returncode == 0 and REPORT.exists())


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    passed = []
    for part in (digits, minilm, report):
        for check in part():
            say(f"  {'PASS' if check.passed else 'FAIL'}  {check.text}")
            passed.append(check.passed)
    say(f"\ndemo: {sum(passed)} of {len(passed)} checks passed")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
