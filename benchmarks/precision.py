"""Narrow precisions of the shared real models beside their float32 form: what is lost, and what is gained.

    python -m benchmarks.precision ../shared/assets [--only resnet56] [--json benchmarks/results/precision.json]

A row a model and format: calibrated on samples that are not evaluated, built, held against float32 on this CPU.
PASS needs the accuracy and the speed that the row names. Exits 1 if a row fails.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

import ingot
from benchmarks import asset_data, timing
from benchmarks.assets import only_output, speech_probabilities, speech_samples
from benchmarks.runtimes import Arrays, Run
from examples import minilm
from ingot.importers import onnx as importer
from ingot.ir import shapes
from ingot.precision import formats
from ingot.precision.calibrate import calibrate

THREADS = 2
ROUNDS = 15
CALIBRATED = 256
SLOWEST = 0.97
TOKENS = 128


@dataclass(frozen=True)
class Outcome:
    """What was compared, in words and as a number, and whether it is what is asked."""

    text: str
    value: float
    passed: bool


@dataclass(frozen=True)
class Case:
    """A model, its samples for calibration, the inputs that are timed, and the judgement of both engines. Nodes with
    `wide` in their name stay in float32."""

    source: Callable[[Path], Any]
    samples: Callable[[Path], Iterator[Arrays]]
    timed: Callable[[Path], Arrays]
    judge: Callable[[Run, Run, Path], Outcome]
    format: str = "int8"
    faster: float = SLOWEST
    profile: dict[str, Any] | None = None
    wide: str | None = None


@dataclass(frozen=True)
class Row:
    """A case as measured."""

    model: str
    format: str
    outcome: str
    value: float
    milliseconds: dict[str, float]
    faster: float
    wanted: float
    passed: bool
    load: float  # of the machine, as the row was done


# images


def shuffled(count: int) -> np.ndarray:
    """A fixed order, so that calibration sees every class: the first CALIBRATED are its, the rest are evaluated."""
    return np.random.default_rng(0).permutation(count)


def mnist_samples(assets: Path) -> Iterator[Arrays]:
    images, _ = asset_data.mnist(assets)
    return ({"Input3": images[i][None]} for i in shuffled(len(images))[:CALIBRATED])


def mnist_drop(wide: Run, narrow: Run, assets: Path) -> Outcome:
    """At most 0.1 points on the images that were not calibrated on."""
    images, labels = asset_data.mnist(assets)
    kept = shuffled(len(images))[CALIBRATED:]
    right = [np.mean([only_output(run, {"Input3": images[i][None]}).argmax() == labels[i] for i in kept])
             for run in (wide, narrow)]  # fmt: skip
    return dropped(right, len(kept), 0.1)


def cifar_samples(assets: Path) -> Iterator[Arrays]:
    images, _ = asset_data.cifar(assets)
    return ({"input": images[i][None]} for i in shuffled(len(images))[:CALIBRATED])


def cifar_drop(wide: Run, narrow: Run, assets: Path) -> Outcome:
    """At most 0.3 points on the images that were not calibrated on."""
    images, labels = asset_data.cifar(assets)
    kept = shuffled(len(images))[CALIBRATED:]
    right = [np.mean(predictions(run, images[kept]) == labels[kept]) for run in (wide, narrow)]
    return dropped(right, len(kept), 0.3)


def predictions(run: Run, images: np.ndarray) -> np.ndarray:
    batches = (images[start : start + 32] for start in range(0, len(images), 32))
    return np.concatenate([only_output(run, {"input": batch}).argmax(1) for batch in batches])


def dropped(right: list[Any], count: int, most: float) -> Outcome:
    points = float(right[0] - right[1]) * 100
    text = f"accuracy {right[0]:.2%} -> {right[1]:.2%} on {count:,} images, drop {points:+.2f} points (at most {most})"
    return Outcome(text, points, points <= most)


def crop(pixels: np.ndarray) -> Arrays:
    """MobileNet's input from bytes."""
    return {"input": (pixels.astype(np.float32) - 128) / 128}


def crop_samples(assets: Path) -> Iterator[Arrays]:
    return map(crop, asset_data.crops(assets, 128, CALIBRATED, seed=1))


def crops_agree(wide: Run, narrow: Run, assets: Path) -> Outcome:
    """The same class first on at least 95 % of 500 crops."""
    pairs = [[only_output(run, crop(pixels)).argmax() for run in (wide, narrow)]
             for pixels in asset_data.crops(assets, 128, 500)]  # fmt: skip
    same = float(np.mean([a == b for a, b in pairs]))
    return Outcome(f"same top-1 on {same:.1%} of {len(pairs)} crops (at least 95 %)", same, same >= 0.95)


# text


def sentences(assets: Path) -> list[str]:
    """Different sentences of the stories, in a fixed order."""
    text = (assets / "text" / "tinystories_sample.txt").read_text().replace("\n", " ").replace("<|endoftext|>", " ")
    found = sorted({part.strip() + "." for part in text.split(".") if 30 <= len(part) <= 300})
    return [found[i] for i in shuffled(len(found))]


def sentence_model(assets: Path) -> Any:
    return minilm.minilm_model(("N", "S"))


def sentence_samples(assets: Path) -> Iterator[Arrays]:
    return (minilm.tokenize([sentence]) for sentence in sentences(assets)[: CALIBRATED // 2])


def sentence_timed(assets: Path) -> Arrays:
    return minilm.tokenize([" ".join(sentences(assets)[:12])], TOKENS)


def sentences_close(least: float, ranked: float, wide: Run, narrow: Run, assets: Path) -> Outcome:
    """Mean cosine of 200 embeddings, and Spearman's correlation of all their similarities."""
    chosen = sentences(assets)[CALIBRATED // 2 :][:200]
    both = [np.concatenate([only_output(run, minilm.tokenize([s], TOKENS)) for s in chosen]) for run in (wide, narrow)]
    unit = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in both]
    cosine = float((unit[0] * unit[1]).sum(1).mean())
    pairs = np.triu_indices(len(chosen), 1)
    ranks = [(vectors @ vectors.T)[pairs].argsort().argsort() for vectors in unit]
    correlation = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
    text = (f"mean cosine {cosine:.4f} on {len(chosen)} sentences (at least {least}), rank correlation of similarities "
            f"{correlation:.4f} (at least {ranked})")  # fmt: skip
    return Outcome(text, cosine, cosine >= least and correlation >= ranked)


# speech


def speech_windows(assets: Path) -> tuple[np.ndarray, np.ndarray]:
    """The recording: a quarter to calibrate on, the rest to judge by."""
    recording = asset_data.recording(assets)
    return recording[: len(recording) // 4], recording[len(recording) // 4 :]


def speech_feeds(assets: Path) -> Iterator[Arrays]:
    """The inputs of every window of the first quarter, the state as onnxruntime carries it."""
    from benchmarks.runtimes import open_onnxruntime

    run, feeds = open_onnxruntime(assets / "audio/silero_vad/silero_vad.onnx", THREADS), list[Arrays]()

    def recorded(inputs: Arrays) -> dict[str, np.ndarray]:
        feeds.append(inputs)
        return dict(run(inputs))

    speech_probabilities(recorded, speech_windows(assets)[0])
    return iter(feeds)


def speech_agrees(wide: Run, narrow: Run, assets: Path) -> Outcome:
    """Speech or none, the same for at least 98 % of the windows."""
    decisions = [speech_probabilities(run, speech_windows(assets)[1])[0] >= 0.5 for run in (wide, narrow)]
    same = float(np.mean(decisions[0] == decisions[1]))
    return Outcome(f"same decision in {same:.2%} of {len(decisions[0]):,} windows (at least 98 %)", same, same >= 0.98)


def stored(path: str, assets: Path) -> Any:
    return assets / path


def first(samples: Callable[[Path], Iterator[Arrays]], assets: Path) -> Arrays:
    return next(samples(assets))


def cifar_timed(assets: Path) -> Arrays:
    return {"input": asset_data.cifar(assets)[0][:32]}


CIFAR = {"input": ((1, 3, 32, 32), (32, 3, 32, 32), (32, 3, 32, 32))}
SENTENCE = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (1, TOKENS))
SPEECH = {"input": (1, 576), "state": (2, 1, 128), "sr": ()}
CASES = {
    "mnist": Case(partial(stored, "vision/mnist/mnist.onnx"), mnist_samples, partial(first, mnist_samples), mnist_drop),
    "resnet20": Case(
        partial(stored, "vision/cifar10/resnet20_cifar10.onnx"), cifar_samples, cifar_timed, cifar_drop, profile=CIFAR
    ),
    "resnet56": Case(
        partial(stored, "vision/cifar10/resnet56_cifar10.onnx"), cifar_samples, cifar_timed, cifar_drop,
        faster=1.8, profile=CIFAR,
    ),
    "mobilenet_v1": Case(
        partial(stored, "vision/mobilenet/mobilenet_v1_0.25_128_quant_fp32.onnx"), crop_samples,
        partial(first, crop_samples), crops_agree, profile={"input": (1, 128, 128, 3)},
    ),
    "minilm": Case(
        sentence_model, sentence_samples, sentence_timed, partial(sentences_close, 0.99, 0.98),
        faster=1.8, profile=SENTENCE,
    ),
    "minilm_int4": Case(
        sentence_model, sentence_samples, sentence_timed, partial(sentences_close, 0.97, 0.95),
        "int4_awq", profile=SENTENCE,
    ),
    "silero_vad": Case(
        partial(stored, "audio/silero_vad/silero_vad.onnx"), speech_feeds, speech_samples, speech_agrees,
        profile=SPEECH, wide="/stft/",  # one channel of 16-bit samples: little to gain from bytes, and much to lose
    ),
}  # fmt: skip


def engines(case: Case, assets: Path, calibrator: str, level: int) -> tuple[ingot.Engine, ingot.Engine]:
    """The float32 engine, and the one with all that can be narrow in the case's format."""
    source = importer.load(case.source(assets))
    shapes.infer(source)
    ranges = calibrate(source, case.samples(assets), calibrator)
    narrow = formats.apply(source, narrowed(source, case, ranges), ranges)
    config = ingot.BuildConfig(
        profiles=[ingot.Profile(**case.profile)] if case.profile else [], level=level, threads=THREADS,
        inputs=case.timed(assets),
    )  # fmt: skip
    return ingot.build(source, config), ingot.build(narrow, config)


def narrowed(source: onnx_ir.Model, case: Case, ranges: Any) -> dict[str, str]:
    """Every node whose input calibration has seen, but what stays wide."""
    names = (name for name in formats.quantizable(source, ranges) if case.wide is None or case.wide not in name)
    return dict.fromkeys(names, case.format)


def measure(name: str, assets: Path, calibrator: str, level: int) -> Row:
    """Calibrate, build, judge, time in turns."""
    case = CASES[name]
    with ExitStack() as stack:
        wide, narrow = (stack.enter_context(ingot.Session(engine, device="cpu", threads=THREADS))
                        for engine in engines(case, assets, calibrator, level))  # fmt: skip
        outcome = case.judge(wide.run, narrow.run, assets)
        feeds = case.timed(assets)
        times = timing.paired({"fp32": partial(wide.run, feeds), case.format: partial(narrow.run, feeds)}, ROUNDS)
    faster = times[case.format].ratio(times["fp32"])
    spent = {key: round(value.median, 4) for key, value in times.items()}
    passed = outcome.passed and faster >= case.faster
    return Row(name, case.format, outcome.text, outcome.value, spent, round(faster, 2), case.faster, passed,
               round(os.getloadavg()[0], 1))  # fmt: skip


def describe(row: Row) -> str:
    times = " -> ".join(f"{value:.3g}" for value in row.milliseconds.values())
    verdict = "PASS" if row.passed else "FAIL"
    speed = f"{times} ms, {row.faster:.2f}x (at least {row.wanted}x)"
    return f"{row.model:<13} {row.format:<9} {row.outcome}; {speed}  {verdict}"


def write(path: Path, rows: list[Row]) -> None:
    """The rows, in the order of the table; what the file has of other models stays."""
    known = {row["model"]: row for row in (json.loads(path.read_text())["rows"] if path.exists() else [])}
    known |= {row.model: asdict(row) for row in rows}
    timing.write_json(path, "narrow precisions beside float32", [known[name] for name in CASES if name in known])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path, help="the folder of shared models")
    parser.add_argument("--only", choices=CASES, action="append", help="this model; may be repeated")
    parser.add_argument("--calibrator", default="auto")
    parser.add_argument("--level", type=int, default=3, help="how long to tune, 0 to 5")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows = []
    for name in options.only or list(CASES):
        rows.append(measure(name, options.assets, options.calibrator, options.level))
        print(describe(rows[-1]), flush=True)
        if options.json:
            write(options.json, rows)
    print(f"precision: {sum(row.passed for row in rows)} of {len(rows)} passed")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
