"""The shared real models and the examples on a GPU: built, verified, held against their data and onnxruntime.

    python -m benchmarks.cuda_assets ASSETS --out DIR [--only mnist] [--target cuda:sm_90]

A row a model and precision. Without a GPU here (--target names one) engines are built and their host steps listed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ingot
from benchmarks import assets as shared
from benchmarks.runtimes import open_onnxruntime
from ingot.compiler import toolchain
from ingot.errors import IngotError
from ingot.runtime import cuda

EXAMPLES = Path(__file__).parent.parent / "examples"
PROFILES: dict[str, tuple[str, dict[str, shared.Bounds]]] = {
    "digits": ("digits/digits.onnx", {"image": ((1, 1, 8, 8), (16, 1, 8, 8), (64, 1, 8, 8))}),
    "tagger": ("tagger/tagger.onnx", {"ids": ((1, 1), (4, 16), (16, 64))}),
}
PRECISIONS = ("fp32", "fp16")


def gpu() -> bool:
    """Whether there is one here."""
    try:
        return bool(cuda.devices())
    except IngotError:
        return False


def config(name: str, precision: str, options: argparse.Namespace) -> tuple[Path, ingot.BuildConfig]:
    """The model's file and how it is built."""
    asset = shared.ASSETS.get(name)
    path = options.assets / asset.path if asset else EXAMPLES / PROFILES[name][0]
    profile = asset.profile if asset else PROFILES[name][1]
    samples = asset.samples(options.assets) if asset and asset.samples else None
    return path, ingot.BuildConfig(
        target=options.target, precision=precision, profiles=[ingot.Profile(**profile)] if profile else [],
        level=options.level, inputs=samples, verify=gpu(),
    )  # fmt: skip


def row(name: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Build and, where there is a GPU, check; what failed is part of the row."""
    found: dict[str, Any] = {"model": name, "precision": precision}
    start = time.perf_counter()
    try:
        path, settings = config(name, precision, options)
        engine = ingot.build(path, settings)
        hosts = [step.step.op for step in engine.variants[0].plan.host_steps]
        evidence = engine.details.get("evidence", [])
        found |= {"host steps": hosts, "built s": round(time.perf_counter() - start, 1), "evidence": evidence,
                  "largest difference": max((e["largest"] for e in evidence), default=None)}  # fmt: skip
        if gpu() and name in shared.ASSETS and precision == "fp32":
            with ingot.Session(engine, device="cuda") as session:
                outcome = shared.ASSETS[name].check(session.run, open_onnxruntime(path, 8), options.assets)
            found |= {"check": outcome.text, "passed": outcome.passed}
    except IngotError as error:
        found["failed"] = " ".join(str(error).split())
    return found


def line(found: dict[str, Any]) -> str:
    """A row for people."""
    head = f"{found['model']:<17} {found['precision']}"
    if "failed" in found:
        return f"{head} FAILED {found['failed'][:400]}"
    steps = f"host steps {len(found['host steps'])} {sorted(set(found['host steps'])) or ''}"
    return f"{head} difference {found['largest difference']}, {steps}, built in {found['built s']} s; " \
           f"{found.get('check', '')} {found.get('passed', '')}"  # fmt: skip


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All of them, printed as they come."""
    for name in options.only or [*PROFILES, *shared.ASSETS]:
        for precision in PRECISIONS:
            found = row(name, precision, options)
            print(line(found), flush=True)
            yield found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path, help="the folder of shared models")
    parser.add_argument("--out", type=Path, help="writes h200-assets.json there")
    parser.add_argument("--only", choices=[*PROFILES, *shared.ASSETS], action="append")
    parser.add_argument("--target", default="cuda")
    parser.add_argument("--level", type=int, default=0)
    options = parser.parse_args()
    found = list(rows(options))
    if options.out:
        where = {"devices": [str(d) for d in cuda.devices()] if gpu() else [],
                 "toolchain": toolchain(("triton", "cuda-bindings"))}  # fmt: skip
        text = json.dumps({**where, "rows": found}, indent=1, default=str)
        (options.out / "h200-assets.json").write_text(text + "\n")
    bad = [r for r in found if "failed" in r or r.get("passed") is False]
    print(f"{len(found) - len(bad)} of {len(found)} right, {sum(not r.get('host steps', [1]) for r in found)} without "
          "host steps")  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
