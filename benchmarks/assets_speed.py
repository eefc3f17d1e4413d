"""Latency of the shared real models beside onnxruntime and OpenVINO, paired: 8-bit MobileNets, residual nets, speech.

    python -m benchmarks.assets_speed ../shared/assets [--threads 1] [--only resnet20] [--steps] [--json results.json]

The last line is the claim: `worst ratio vs onnxruntime: R`, R = onnxruntime's time / Ingot's, over all rows.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

import ingot
from benchmarks import asset_data
from benchmarks.assets import ASSETS, VAD_CONTEXT, VAD_RATE, VAD_WINDOW, Asset
from benchmarks.runtimes import Arrays, installed_peers
from benchmarks.timing import paired, pinned, write_json


@dataclass(frozen=True)
class Row:
    """One model: medians in milliseconds, and speed ratios (above 1: Ingot is faster)."""

    model: str
    threads: int
    milliseconds: Mapping[str, float]
    ratios: Mapping[str, float]


def inputs_of(name: str, assets: Path) -> Arrays:
    """One input as the model meets it."""
    if name == "mnist":
        return {"Input3": asset_data.mnist(assets)[0][:1]}
    if name.startswith("resnet"):
        return {"input": asset_data.cifar(assets)[0][:1]}
    if name.startswith("mobilenet"):
        return {"input": next(asset_data.crops(assets, 128 if "v1" in name else 224, 1))}
    if name == "superres":
        return {"input": asset_data.luminance(assets, (224, 224))}
    window = asset_data.recording(assets)[None, VAD_RATE : VAD_RATE + VAD_WINDOW + VAD_CONTEXT]
    return {"input": window, "state": np.zeros((2, 1, 128), np.float32), "sr": np.array(VAD_RATE, np.int64)}


def build(asset: Asset, assets: Path, level: int) -> ingot.Engine:
    config = ingot.BuildConfig(
        target="cpu",
        level=level,
        verify=False,  # benchmarks.assets checks the results
        profiles=[ingot.Profile(**asset.profile)] if asset.profile else [],
        timing_cache=Path("build/timing.cache"),
    )
    return ingot.build(assets / asset.path, config)


def measure(name: str, assets: Path, threads: int, level: int, rounds: int, steps: bool) -> Row:
    asset, inputs = ASSETS[name], inputs_of(name, assets)
    engine = build(asset, assets, level)
    with pinned(threads), ingot.Session(engine, threads=threads) as session:
        runs: dict[str, Callable[[Arrays], Arrays]] = {"ingot": session.run}
        runs |= {peer: opener(assets / asset.path, threads) for peer, opener in installed_peers().items()}
        timings = paired({runtime: partial(run, inputs) for runtime, run in runs.items()}, rounds)
        if steps:
            show_steps(session, inputs)
    ours = timings["ingot"]
    ratios = {peer: round(ours.ratio(timing), 3) for peer, timing in timings.items() if peer != "ingot"}
    return Row(name, threads, {runtime: round(timing.median, 4) for runtime, timing in timings.items()}, ratios)


def show_steps(session: ingot.Session, inputs: Arrays) -> None:
    """The slowest steps with what they do per second: the median of eleven profiled runs."""
    runs = [session.profile(dict(inputs)) for _ in range(11)]
    medians = [float(np.median([run[k].microseconds for run in runs])) for k in range(len(runs[0]))]
    print(f"  {len(medians)} steps, {sum(medians):.0f} µs")
    for k in np.argsort(medians)[::-1][:15]:
        step, time = runs[0][k], max(medians[k], 1e-3)
        rates = f"{step.flops / time / 1e3:7.1f} GFLOP/s {step.bytes / time / 1e3:7.1f} GB/s"
        print(f"  {medians[k]:8.1f} µs {rates}  {step.kernel:<24} {', '.join(step.nodes)[:70]}")


def report(rows: Iterator[Row]) -> list[Row]:
    """Print each row as it is measured."""
    done = []
    for row in rows:
        times = "".join(f"  {runtime} {time:.3f} ms" for runtime, time in row.milliseconds.items())
        ratios = "".join(f"  vs {peer} {ratio:.2f}x" for peer, ratio in row.ratios.items())
        print(f"{row.model:<18}{row.threads} thread{times}{ratios}", flush=True)
        done.append(row)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path, help="the folder of shared models")
    parser.add_argument("--only", choices=ASSETS, action="append", help="this model; may be repeated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--level", type=int, default=3, help="how long to tune, 0 to 5")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", action="store_true", help="the slowest steps of each model")
    parser.add_argument("--json", type=Path, help="write the figures here")
    chosen = parser.parse_args()
    settings = (chosen.assets, chosen.threads, chosen.level, chosen.rounds, chosen.steps)
    rows = report(measure(name, *settings) for name in chosen.only or ASSETS)
    worst = min((row.ratios["onnxruntime"] for row in rows if "onnxruntime" in row.ratios), default=None)
    if chosen.json:
        claim = "latency of real models at batch 1 beside other runtimes"
        write_json(chosen.json, claim, [asdict(row) for row in rows], worst=worst)
    print(f"worst ratio vs onnxruntime: {'not measured' if worst is None else f'{worst:.2f}'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
