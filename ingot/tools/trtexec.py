"""`ingot trtexec`: trtexec's flags, report and PASSED line, on Ingot's engines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import ingot
from ingot.config import BuildConfig, Profile
from ingot.engine import FORMAT
from ingot.errors import ConfigError
from ingot.precision import report as precision_report
from ingot.precision.user_code import module_of
from ingot.report import last_log
from ingot.tools import failures, files, latency, precision_flags, trtexec_report
from ingot.tools.accuracy import gate
from ingot.tools.build_engine import as_text, summarise, types_from
from ingot.tools.inputs import make_feeds, pairs
from ingot.tools.progress import build_progress
from ingot.tools.shapes import profile_from, sizes_of
from ingot.tools.trtexec_flags import FLAGS, memory_limit, notes, parse, setting

Array = np.ndarray[Any, Any]
Flags = Mapping[str, str]


def main(words: Sequence[str]) -> int:
    """One session of trtexec; its last line says PASSED or FAILED. Flags are `--flag=value`, read by their own
    table."""
    command = " ".join(["ingot trtexec", *words])
    try:
        flags = parse(words)
        if "help" in flags or not flags:
            print(help_text())
            return 0
        print(f"&&&& RUNNING Ingot.trtexec [v{ingot.__version__}] # {command}")
        passed = _execute(flags)
    except failures.EXPECTED as error:
        print(f"[E] {failures.sentence(error)}", file=sys.stderr)
        passed = False
    print(f"&&&& {'PASSED' if passed else 'FAILED'} Ingot.trtexec [v{ingot.__version__}] # {command}")
    return 0 if passed else 1


def help_text() -> str:
    """All flags with what they do here."""
    lines = ["example: ingot trtexec --onnx=model.onnx --saveEngine=model.engine --shapes=x:1x3x224x224", ""]
    for name, flag in FLAGS.items():
        value = f"=<{flag.value.removeprefix('choice:').replace(',', '|')}>" if flag.value else ""
        default = f" (default {flag.default})" if flag.default else ""
        lines.append(f"  --{name}{value}{default}" + (f"\n      accepted; {flag.here}" if flag.here else ""))
    return "\n".join(lines)


def _execute(flags: Flags) -> bool:
    for line in notes(flags):
        print(f"[I] {line}")
    for plugin in filter(None, [flags.get(k) for k in ("plugins", "staticPlugins", "dynamicPlugins")]):
        module_of(Path(plugin), f"the plugin {plugin}")
    engine = _engine(flags)
    if "getPlanVersionOnly" in flags:
        print(f"Plan format: {FORMAT}, built by Ingot {engine.details.get('toolchain', {}).get('ingot', 'unknown')}")
        return True
    if "timeDeserialize" in flags:
        return True
    if "skipInference" in flags:
        print("[I] Skipped inference phase since --skipInference is added.")
        return True
    threads = int(flags["cpuThreads"]) if "cpuThreads" in flags else None
    with ingot.Session(engine, threads=threads, streams=_streams(flags)) as session:
        return Inference(session, flags).report()


def _streams(flags: Flags) -> int | None:
    """Streams of throughput mode; None for one run at a time."""
    asked = int(flags.get("infStreams", flags.get("streams", "1")))
    return asked if asked > 1 else None


def _engine(flags: Flags) -> ingot.Engine:
    if ("onnx" in flags) == ("loadEngine" in flags):
        raise ConfigError("give either --onnx=<file> or --loadEngine=<file>")
    if "loadEngine" in flags:
        return _loaded(flags["loadEngine"])
    wanted = precision_flags.of_trtexec(flags)
    with build_progress() as progress:
        engine, precision, _ = precision_flags.build(flags["onnx"], _config(flags), wanted, progress)
    for line in [*(f"[W] {note}" for note in wanted.notes), *(f"[I] {line}" for line in _found(precision))]:
        print(line)
    target = Path(flags.get("saveEngine") or "")
    if "saveEngine" in flags:
        engine.save(target)
        print(f"[I] Engine written to {target}.")
    _report_build(engine, flags, target)
    return _loaded(str(target)) if "saveEngine" in flags else engine


def _found(precision: Mapping[str, Any] | None) -> list[str]:
    return [] if precision is None else precision_report.as_text(precision)


def _loaded(path: str) -> ingot.Engine:
    start = time.perf_counter()
    engine = ingot.Engine.load(path).verified()
    print(f"[I] Engine loaded in {time.perf_counter() - start:.4f} sec.")
    return engine


def _config(flags: Flags) -> BuildConfig:
    profile = profile_from(*(flags.get(k) for k in ("shapes", "minShapes", "optShapes", "maxShapes")))
    cache = None if "noBuilderCache" in flags else flags.get("timingCacheFile")
    if "errorOnTimingCacheMiss" in flags and not cache:
        raise ConfigError("--errorOnTimingCacheMiss needs --timingCacheFile=<file>")
    tolerance: dict[str, Any] = {k: float(flags[k]) for k in ("atol", "rtol") if k in flags}
    config = BuildConfig(
        profiles=(profile or _default_profile(flags),) if profile or _dynamic(flags) else (),
        level=int(setting(flags, "builderOptimizationLevel")), timing_cache=cache, memory_limit=memory_limit(flags),
        timing_cache_only="errorOnTimingCacheMiss" in flags, exact="noTF32" in flags,
        input_types=types_from(flags.get("inputIOFormats", "")),
        output_types=types_from(flags.get("outputIOFormats", "")),
    )  # fmt: skip
    return replace(config, **tolerance)


def _symbolic_inputs(flags: Flags) -> dict[str, tuple[int | str, ...]]:
    from ingot.importers import onnx as importer
    from ingot.ir.shapes import shape_of

    model = importer.load(flags["onnx"])
    return {v.name or "": shape_of(v) or () for v in model.graph.inputs}


def _dynamic(flags: Flags) -> bool:
    return any(isinstance(d, str) for shape in _symbolic_inputs(flags).values() for d in shape)


def _default_profile(flags: Flags) -> Profile:
    """As trtexec does, extents nobody gave are 1 (--batch: the first one)."""
    batch = int(flags.get("batch", "1"))
    sizes = {n: tuple(d if isinstance(d, int) else (batch if i == 0 else 1) for i, d in enumerate(s))
             for n, s in _symbolic_inputs(flags).items()}  # fmt: skip
    print("[W] Dynamic dimensions required for inputs, but no shapes were provided. Automatically overriding to: "
          + ", ".join(f"{n}:{'x'.join(map(str, s))}" for n, s in sizes.items()))  # fmt: skip
    return Profile(**sizes)


def _report_build(engine: ingot.Engine, flags: Flags, target: Path) -> None:
    log = last_log()
    verify = log.seconds.get("verify", 0.0)
    print(f"[I] Engine built in {sum(log.seconds.values()) - verify:.3f} sec., verified in {verify:.3f} sec.")
    if "saveEngine" in flags:
        print("\n".join(f"[I] {line}" for line in as_text(summarise(engine, log, target)).splitlines()))
    if "verbose" in flags:
        print("\n".join(f"[V] {notice}" for notice in log.notices))


@dataclass
class Inference:
    """Timing, exports and the accuracy gate for one session."""

    session: ingot.Session
    flags: Flags

    def report(self) -> bool:
        """Print and export what the flags ask for; False when the accuracy gate fails."""
        flags, feeds = self.flags, self._feeds()
        streams = self.session.streams or 1
        settings = latency.Settings(
            int(setting(flags, "iterations")), float(setting(flags, "warmUp")), float(setting(flags, "duration")),
            float(setting(flags, "sleepTime")), float(setting(flags, "idleTime")),
        )  # fmt: skip
        print(f"[I] Starting inference: {streams} stream(s), {self.session.threads} thread(s)")
        samples = latency.measure([lambda: self.session.run(feeds)] * streams, settings)
        percentiles = [float(p) for p in setting(flags, "percentile").split(",") if p]
        print("\n".join(trtexec_report.trace(samples, max(int(setting(flags, "avgRuns")), 1))))
        lines, data = trtexec_report.performance(samples, percentiles)
        print("\n".join(lines))
        self._memory(data)
        self._exports(samples, feeds)
        outputs = self.session.run(feeds)
        self._outputs(outputs)
        if "json" in flags:
            print(json.dumps(data))
        return gate(outputs, flags)

    def _memory(self, data: dict[str, Any]) -> None:
        held = self.session.memory_bytes
        data["memory_bytes"] = held
        parts = ", ".join(f"{name} {size / 2**20:.2f} MiB" for name, size in held.items())
        print(f"Peak memory: {sum(held.values()) / 2**20:.2f} MiB ({parts})")

    def _feeds(self) -> dict[str, Any]:
        profile = profile_from(*(self.flags.get(k) for k in ("shapes", "minShapes", "optShapes", "maxShapes")))
        return make_feeds(self.session.engine.inputs, sizes_of(profile), pairs(self.flags.get("loadInputs", "")))

    def _exports(self, samples: Sequence[latency.Sample], feeds: Mapping[str, Any]) -> None:
        flags, plan = self.flags, self.session.plan
        if path := flags.get("exportTimes"):
            files.write(path, files.json_text(trtexec_report.times_json(samples)) + "\n")
        if "dumpProfile" in flags or "exportProfile" in flags:
            count = max(int(setting(flags, "iterations")), 10)
            rows = trtexec_report.profile_json([self.session.profile(feeds) for _ in range(count)])
            if "dumpProfile" in flags:
                print("\n".join(trtexec_report.profile_table(rows)))
            if path := flags.get("exportProfile"):
                files.write(path, files.json_text(rows) + "\n")
        layers = trtexec_report.layers_json(plan, setting(flags, "profilingVerbosity") == "detailed")
        if "dumpLayerInfo" in flags:
            print("Layer Information:\n" + json.dumps(layers, indent=1))
        if path := flags.get("exportLayerInfo"):
            files.write(path, files.json_text(layers) + "\n")

    def _outputs(self, outputs: Mapping[str, Any]) -> None:
        if "dumpOutput" in self.flags:
            for name, y in outputs.items():
                print(f"Output Tensor {name}: {np.array2string(np.asarray(y), threshold=64)}")
        if path := self.flags.get("exportOutput"):
            rows = [
                {
                    "name": n,
                    "dimensions": "x".join(map(str, np.shape(y))),
                    "values": _values(np.asarray(y)),
                }
                for n, y in outputs.items()
            ]
            files.write(path, files.json_text(rows) + "\n")
        if "dumpRawBindingsToFile" in self.flags:
            for name, y in outputs.items():
                safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
                files.write(f"{safe}.{np.asarray(y).dtype}.raw", np.ascontiguousarray(y).tobytes())


def _values(y: Array) -> list[Any]:
    """Elements as JSON holds them: numbers, truth values as 0 and 1, texts."""
    return [str(v) for v in y.ravel()] if y.dtype.kind in "OUS" else y.astype(float).ravel().tolist()
