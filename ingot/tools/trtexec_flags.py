"""trtexec's flags: which are real here, and what the others do. One row each; any other flag is refused with the
nearest."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ingot.errors import ConfigError


@dataclass(frozen=True)
class Flag:
    """`value`: how its value is read ("" for a switch). `here`: what it does on this target when it is not real."""

    value: str = ""
    here: str = ""
    default: str = ""


_GPU = "concerns GPUs; nothing on the CPU"
_NO_ARITHMETIC = "a CPU has no arithmetic of that kind; layers stay in float32, or what else is allowed"

FLAGS: Mapping[str, Flag] = {
    # model and build
    "onnx": Flag("file"),
    "saveEngine": Flag("file"),
    "loadEngine": Flag("file"),
    "minShapes": Flag("shapes"),
    "optShapes": Flag("shapes"),
    "maxShapes": Flag("shapes"),
    "shapes": Flag("shapes"),
    "batch": Flag("count"),
    "profile": Flag("count", "the profile that fits the shapes is taken by itself"),
    "inputIOFormats": Flag("text"),
    "outputIOFormats": Flag("text"),
    "workspace": Flag("text"),
    "memPoolSize": Flag("text"),
    "avgTiming": Flag("count", "the builder takes as many samples as the level allows"),
    "profilingVerbosity": Flag("choice:layer_names_only,detailed,none", default="layer_names_only"),
    "refit": Flag("", "weights are part of the engine; build again, the timing cache makes it quick"),
    "stripWeights": Flag("", "weights are part of the engine"),
    "refitFromOnnx": Flag("file", "weights are part of the engine"),
    "versionCompatible": Flag("", "an engine says which format it has; another one is refused in a sentence"),
    "sparsity": Flag("choice:disable,enable,force", "structured sparsity has no CPU kernel"),
    "noTF32": Flag(),
    "stronglyTyped": Flag(),
    "tacticSources": Flag("text", "all CPU kernels are generated; there are no library tactics to switch"),
    "timingCacheFile": Flag("file"),
    "noBuilderCache": Flag(),
    "errorOnTimingCacheMiss": Flag(),
    "builderOptimizationLevel": Flag("count", default="3"),
    "maxTactics": Flag("count", "the level bounds how many are timed"),
    "hardwareCompatibilityLevel": Flag(
        "choice:none,ampere+,sameComputeCapability", _GPU + "; see --variants of `ingot build`"
    ),
    "maxAuxStreams": Flag("count", _GPU),
    "allowWeightStreaming": Flag("", "weights are mapped from the file and paged in as they are read"),
    "markDebug": Flag("text", "use `ingot compare --layers` to see tensors inside"),
    "skipInference": Flag(),
    "getPlanVersionOnly": Flag(),
    "fp16": Flag("", _NO_ARITHMETIC),
    "bf16": Flag(),
    "int8": Flag(),
    "fp8": Flag("", _NO_ARITHMETIC),
    "int4": Flag(),
    "best": Flag(),
    "calib": Flag("file"),
    "calibrationData": Flag("file"),
    "layerPrecisions": Flag("text"),
    "layerOutputTypes": Flag("text"),
    "precisionConstraints": Flag("choice:none,obey,prefer", default="none"),
    # inference
    "loadInputs": Flag("text"),
    "iterations": Flag("count", default="10"),
    "warmUp": Flag("milliseconds", default="200"),
    "duration": Flag("seconds", default="3"),
    "sleepTime": Flag("milliseconds", default="0"),
    "idleTime": Flag("milliseconds", default="0"),
    "infStreams": Flag("count", default="1"),
    "streams": Flag("count", default="1"),
    "exposeDMA": Flag("", _GPU),
    "noDataTransfers": Flag("", "there are no transfers on the CPU"),
    "useSpinWait": Flag("", "worker threads spin briefly, then sleep"),
    "threads": Flag("", "every stream has a thread of its own anyway; --cpuThreads sets those of all streams"),
    "useCudaGraph": Flag("", _GPU),
    "noCudaGraph": Flag("", _GPU),
    "timeDeserialize": Flag(),
    "timeRefit": Flag("", "weights are part of the engine"),
    "separateProfileRun": Flag("", "always so"),
    "persistentCacheRatio": Flag("text", _GPU),
    "persistentCache": Flag("optional", _GPU),
    "useProfile": Flag("count", "the profile that fits the shapes is taken by itself"),
    "allocationStrategy": Flag("choice:static,profile,runtime", "one arena per concurrent run, sized by the profile"),
    # reporting and system
    "verbose": Flag(),
    "avgRuns": Flag("count", default="10"),
    "percentile": Flag("percentages", default="90,95,99"),
    "dumpRefit": Flag("", "weights are part of the engine"),
    "dumpOutput": Flag(),
    "dumpRawBindingsToFile": Flag(),
    "dumpProfile": Flag(),
    "dumpLayerInfo": Flag(),
    "exportTimes": Flag("file"),
    "exportOutput": Flag("file"),
    "exportProfile": Flag("file"),
    "exportLayerInfo": Flag("file"),
    "device": Flag("text", _GPU),
    "staticPlugins": Flag("file"),
    "plugins": Flag("file"),
    "dynamicPlugins": Flag("file"),
    # accuracy gate
    "loadRefOutputs": Flag("text"),
    "refPair": Flag("text"),
    "accuracyAlgorithm": Flag("choice:l0,l1,l2,lInf,cos", default="lInf"),
    "atol": Flag("number"),
    "rtol": Flag("number"),
    "accuracyThreshold": Flag("number"),
    # ours
    "cpuThreads": Flag("count"),
    "json": Flag(),
    "help": Flag(),
}

_SUFFIXES = {"K": 2**10, "M": 2**20, "G": 2**30}


def parse(words: Sequence[str]) -> dict[str, str]:
    """{flag: value} (switches: ""). ConfigError names an unknown flag and the nearest known one, or a value that does
    not fit."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("-") or word == "-h":
            name = "help" if word == "-h" else name
        if name not in FLAGS or not (word.startswith("--") or word == "-h"):
            raise ConfigError(_unknown(word, name))
        flag = FLAGS[name]
        if not flag.value and equals:
            raise ConfigError(f"--{name} is a switch and takes no value, not {value!r}")
        if flag.value and flag.value != "optional" and not value:
            raise ConfigError(f"--{name} needs a value: --{name}=<{flag.value.removeprefix('choice:')}>")
        _check(name, flag, value)
        found[name] = value
    return found


def _unknown(word: str, name: str) -> str:
    lowered = {flag.lower(): flag for flag in FLAGS}
    near = difflib.get_close_matches(name.lower(), lowered, 1)
    hint = f"; did you mean --{lowered[near[0]]}?" if near else "; see --help for all of them"
    return f"{word!r} is not a flag of trtexec{hint}"


def _check(name: str, flag: Flag, value: str) -> None:
    choices = flag.value.removeprefix("choice:").split(",") if flag.value.startswith("choice:") else []
    if choices and value not in choices:
        raise ConfigError(f"--{name}={value}: choose from {', '.join(choices)}")
    if flag.value in _NUMBERS and not _is_number(flag.value, value):
        raise ConfigError(f"--{name}={value}: {_NUMBERS[flag.value]} needed")


_NUMBERS = {
    "count": "a whole number is",
    "milliseconds": "a number of milliseconds is",
    "seconds": "a number of seconds is",
    "number": "a number of 0 or more is",
    "percentages": "percentages such as 90,99 are",
}


def _is_number(kind: str, value: str) -> bool:
    if kind == "count":
        return value.isdecimal()
    highest = 100.0 if kind == "percentages" else math.inf
    parts = value.split(",") if kind == "percentages" else [value]
    try:
        return all(0 <= float(part) <= highest for part in parts)
    except ValueError:
        return False


def notes(given: Mapping[str, str]) -> list[str]:
    """A line for each given flag that is accepted but not real here."""
    return [f"--{name}: {FLAGS[name].here}" for name in given if FLAGS[name].here]


def setting(given: Mapping[str, str], name: str) -> str:
    """A flag's value or its default."""
    return given.get(name, FLAGS[name].default)


def memory_limit(given: Mapping[str, str]) -> int | None:
    """Bytes of --memPoolSize=workspace:N or --workspace=N; a bare number counts MiB, as there."""
    text = given.get("workspace")
    for pool in filter(None, given.get("memPoolSize", "").split(",")):
        name, _, size = pool.partition(":")
        text = size if name == "workspace" else text
    if text is None:
        return None
    number = text.upper().removesuffix("IB").removesuffix("B")
    unit = _SUFFIXES.get(number[-1:])
    try:
        return int(float(number[:-1] if unit else number) * (unit or 2**20))
    except ValueError:
        raise ConfigError(f"{text!r} is not a memory size; write 1024 (MiB), 512M or 2G") from None
