"""The shared real models, each built into an engine and held against its data and onnxruntime.

    python -m benchmarks.assets ../shared/assets [--only mnist] [--level 1]

A row a model: what was measured, the host steps of its engine (none is wanted), PASS or FAIL. Exits 1 if a row fails.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import ingot
from benchmarks import asset_data
from benchmarks.runtimes import Arrays, Run, open_onnxruntime

Bounds = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
THREADS = 2
VAD_WINDOW, VAD_CONTEXT, VAD_RATE = 512, 64, 16000


@dataclass(frozen=True)
class Outcome:
    """What a model did and whether that is what is asked of it."""

    text: str
    passed: bool


@dataclass(frozen=True)
class Asset:
    """A model file, the profile its engine is built for, and the check of that engine beside onnxruntime."""

    path: str
    profile: Mapping[str, Bounds]
    check: Callable[[Run, Run, Path], Outcome]
    samples: Callable[[Path], Arrays] | None = (
        None  # inputs for the build's own verification, where random ones are illegal
    )


def fixed(*extents: int) -> Bounds:
    return (extents, extents, extents)


def only_output(run: Run, inputs: Arrays) -> np.ndarray:
    (output,) = run(inputs).values()
    return output


def check_mnist(ours: Run, _theirs: Run, assets: Path) -> Outcome:
    """98.9 % of the 10,000 test images."""
    images, labels = asset_data.mnist(assets)
    right = sum(
        only_output(ours, {"Input3": image[None]}).argmax() == label
        for image, label in zip(images, labels, strict=True)
    )
    return Outcome(f"accuracy {right / len(labels):.2%} on {len(labels):,} images", right / len(labels) >= 0.989)


def check_cifar(ours: Run, theirs: Run, assets: Path) -> Outcome:
    """The same prediction as onnxruntime for every one of the 3,000 images."""
    images, labels = asset_data.cifar(assets)
    batches = [{"input": images[start : start + 100]} for start in range(0, len(images), 100)]
    mine, reference = (
        np.concatenate([only_output(run, batch).argmax(1) for batch in batches]) for run in (ours, theirs)
    )
    same = int((mine == reference).sum())
    text = f"same prediction on {same:,} of {len(labels):,} images, accuracy {(mine == labels).mean():.2%}"
    return Outcome(text, same == len(labels) == 3000)


def top_classes(scores: np.ndarray) -> set[int]:
    """The classes with the largest score: several where 8-bit scores tie."""
    return set(np.flatnonzero(scores == scores.max()).tolist())


def check_quantised(extent: int) -> Callable[[Run, Run, Path], Outcome]:
    def check(ours: Run, theirs: Run, assets: Path) -> Outcome:
        """A top-1 class in common with onnxruntime on at least 99 % of 500 crops.

        The scores are uint8 with steps of 1/256, so that several classes are often first together; onnxruntime without
        its own graph optimisations picks another first index than with them on more than one crop in a hundred.
        """
        pairs = [
            [only_output(run, {"input": crop})[0] for run in (ours, theirs)]
            for crop in asset_data.crops(assets, extent, 500)
        ]
        same = float(np.mean([bool(top_classes(mine) & top_classes(reference)) for mine, reference in pairs]))
        first = float(np.mean([mine.argmax() == reference.argmax() for mine, reference in pairs]))
        return Outcome(f"same top-1 on {same:.1%} of {len(pairs)} crops ({first:.1%} by first index)", same >= 0.99)

    return check


def check_superres(ours: Run, theirs: Run, assets: Path) -> Outcome:
    """Three sizes through one engine, within 1e-4 of onnxruntime."""
    pictures = [asset_data.luminance(assets, extents) for extents in ((64, 64), (96, 160), (224, 224))]
    apart = [
        float(np.abs(only_output(ours, {"input": picture}) - only_output(theirs, {"input": picture})).max())
        for picture in pictures
    ]
    sizes = ", ".join("x".join(map(str, picture.shape[2:])) for picture in pictures)
    return Outcome(f"{sizes}: largest difference {max(apart):.1e}", max(apart) <= 1e-4)


def speech_probabilities(run: Run, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The probability of speech in every window, the state carried along, and the last state."""
    state, context = np.zeros((2, 1, 128), np.float32), np.zeros((1, VAD_CONTEXT), np.float32)
    probabilities = []
    for start in range(0, len(samples) - VAD_WINDOW + 1, VAD_WINDOW):
        window = np.concatenate([context, samples[None, start : start + VAD_WINDOW]], axis=1)
        outputs = run({"input": window, "state": state, "sr": np.array(VAD_RATE, np.int64)})
        probabilities.append(outputs["output"][0, 0])
        state, context = outputs["stateN"], window[:, -VAD_CONTEXT:]
    return np.array(probabilities), state


def check_speech(ours: Run, theirs: Run, assets: Path) -> Outcome:
    """Probabilities and final state within 1e-4 of onnxruntime over the whole recording."""
    recording = asset_data.recording(assets)
    (mine, my_state), (reference, state) = (speech_probabilities(run, recording) for run in (ours, theirs))
    apart = max(float(np.abs(mine - reference).max()), float(np.abs(my_state - state).max()))
    return Outcome(f"{len(mine):,} windows, largest difference {apart:.1e}", apart <= 1e-4)


def speech_samples(assets: Path) -> Arrays:
    window = asset_data.recording(assets)[None, 16000 : 16000 + VAD_WINDOW + VAD_CONTEXT]
    return {"input": window, "state": np.zeros((2, 1, 128), np.float32), "sr": np.array(VAD_RATE, np.int64)}


CIFAR_PROFILE = {"input": ((1, 3, 32, 32), (100, 3, 32, 32), (100, 3, 32, 32))}
SUPERRES_PROFILE = {"input": ((1, 1, 32, 32), (1, 1, 224, 224), (1, 1, 256, 256))}
SPEECH_PROFILE = {"input": fixed(1, VAD_CONTEXT + VAD_WINDOW), "state": fixed(2, 1, 128), "sr": fixed()}

ASSETS = {
    "mnist": Asset("vision/mnist/mnist.onnx", {}, check_mnist),
    "resnet20": Asset("vision/cifar10/resnet20_cifar10.onnx", CIFAR_PROFILE, check_cifar),
    "resnet56": Asset("vision/cifar10/resnet56_cifar10.onnx", CIFAR_PROFILE, check_cifar),
    "mobilenet_v1_qdq": Asset("vision/mobilenet/mobilenet_v1_0.25_128_quant_qdq.onnx", {}, check_quantised(128)),
    "mobilenet_v2_qdq": Asset("vision/mobilenet/mobilenet_v2_1.0_224_quant_qdq.onnx", {}, check_quantised(224)),
    "superres": Asset("vision/superres/superres_x3_core.onnx", SUPERRES_PROFILE, check_superres),
    "silero_vad": Asset("audio/silero_vad/silero_vad.onnx", SPEECH_PROFILE, check_speech, speech_samples),
    "silero_vad_16k": Asset("audio/silero_vad/silero_vad_16k_op15.onnx", SPEECH_PROFILE, check_speech, speech_samples),
}


def build(asset: Asset, assets: Path, target: str, level: int) -> ingot.Engine:
    config = ingot.BuildConfig(
        target=target,
        profiles=[ingot.Profile(**asset.profile)] if asset.profile else [],
        level=level,
        inputs=asset.samples(assets) if asset.samples else None,
    )
    return ingot.build(assets / asset.path, config)


def run_one(name: str, assets: Path, target: str, level: int) -> bool:
    """Build, check, print the row."""
    asset, start = ASSETS[name], time.perf_counter()
    engine = build(asset, assets, target, level)
    built = time.perf_counter() - start
    hosts = [step.step.op for step in engine.variants[0].plan.host_steps]
    with ingot.Session(engine, device="cpu", threads=THREADS) as session:
        outcome = asset.check(session.run, open_onnxruntime(assets / asset.path, THREADS), assets)
    passed, named = outcome.passed and not hosts, f" ({', '.join(sorted(set(hosts)))})" if hosts else ""
    verdict = "PASS" if passed else "FAIL"
    print(f"{name:<17} {outcome.text}; host steps {len(hosts)}{named}; built in {built:.1f} s  {verdict}", flush=True)
    return passed


def results(names: list[str], assets: Path, target: str, level: int) -> Iterator[bool]:
    """Whether each model passes; one that does not build or run has failed, and says why."""
    for name in names:
        try:
            yield run_one(name, assets, target, level)
        except ingot.IngotError as error:
            print(f"{name:<17} {error}  FAIL", flush=True)
            yield False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path, help="the folder of shared models")
    parser.add_argument("--only", choices=ASSETS, action="append", help="this model; may be repeated")
    parser.add_argument("--target", default="cpu", help='"host": every step on the oracle, slow')
    parser.add_argument("--level", type=int, default=1, help="how long to tune, 0 to 5")
    options = parser.parse_args()
    passed = list(results(options.only or list(ASSETS), options.assets, options.target, options.level))
    print(f"assets: {sum(passed)} of {len(passed)} passed")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
