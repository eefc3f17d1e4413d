"""What a user decides about a build, typed and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ingot.errors import ConfigError

Shape = tuple[int, ...]
TARGETS = ("cpu", "host", "cuda")
PRECISIONS = {"cpu": ("fp32", "bf16"), "host": ("fp32",), "cuda": ("fp32", "tf32", "fp16", "bf16")}
# Errors of products in two bfloat16 parts and in one, relative to the magnitudes multiplied.
SPLIT_ERROR, BFLOAT16_ERROR = 2.0**-15, 2.0**-8
_ROUNDING = {"fp16": 2.0**-10, "bf16": BFLOAT16_ERROR}  # of a product of two float16, each rounded by 2^-11
FLOATS = ("float32", "float16", "bfloat16", "float64")
LIBRARIES = ("cublaslt", "cudnn")


class Profile:
    """Shapes per input for which an engine is sized and tuned: `Profile(x=(min, opt, max))` or `Profile(x=shape)`."""

    def __init__(self, **shapes: Sequence[Any]) -> None:
        self.shapes: dict[str, tuple[Shape, Shape, Shape]] = {name: _triple(name, s) for name, s in shapes.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and self.shapes == other.shapes

    def __repr__(self) -> str:
        return f"Profile({', '.join(f'{k}={v}' for k, v in self.shapes.items())})"


def _triple(name: str, given: Sequence[Any]) -> tuple[Shape, Shape, Shape]:
    shapes = [tuple(given)] * 3 if all(isinstance(n, int) for n in given) else [tuple(s) for s in given]
    if len(shapes) != 3 or len({len(s) for s in shapes}) != 1:
        raise ConfigError(f"profile for input {name!r}: give one shape or (min, opt, max) of equal rank, not {given!r}")
    low, best, high = shapes
    if any(not 0 <= a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
        raise ConfigError(f"profile for input {name!r}: min ≤ opt ≤ max does not hold for {low}, {best}, {high}")
    return low, best, high


@dataclass(frozen=True)
class BuildConfig:
    """Options of `build`.

    target: "cpu", "host" (every step on the oracle), "cuda" (the GPU that is here) or "cuda:sm_90" (built on any
    machine). precision, for cuda: "fp32"; "tf32" (products of 10 bits); "fp16", "bf16" (tensors in 16 bits, sums in
    float32; inputs and outputs stay as they are); for cpu: "fp32"; "bf16" (factors of products may be in bfloat16, sums
    and all else in float32). variants: ISA names to hold, best first; default the best of
    this machine. level 0–5: how much is timed (0 nothing, 3 default). threads: what the engine is tuned for. exact: no
    kernel that adds an error of its own to float32 (products in bfloat16 parts, 2^-15; noted in the report). verify:
    compare with the reference at build; atol, rtol: its tolerance, None for the dtype's default. timing_cache: file of
    measured times; timing_cache_only: refuse to measure what it lacks. memory_limit: bytes the build may plan for one
    arena. seed: of generated verification inputs. overflows: tensors by name, with the range observed, that a 16-bit
    type cannot hold: with fp16 the steps that write or read them stay in float32 (`ingot.precision.overflow`).
    libraries: whose tactics may be timed beside generated kernels, on a GPU that is here, where they are installed.
    input_types, output_types: floating types in which inputs are given and outputs come, where they are not to be the
    model's: one for each ("" as the model has it), or one for all.
    """

    target: str = "cpu"
    precision: str = "fp32"
    profiles: Sequence[Profile] = ()
    level: int = 3
    variants: Sequence[str] = ()
    threads: int | None = None
    exact: bool = False
    verify: bool = True
    atol: float | None = None
    rtol: float | None = None
    timing_cache: str | Path | None = None
    timing_cache_only: bool = False
    inputs: Mapping[str, Any] | None = field(default=None, compare=False)
    memory_limit: int | None = None
    seed: int = 0
    libraries: Sequence[str] = LIBRARIES
    input_types: Sequence[str] = ()
    output_types: Sequence[str] = ()
    overflows: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind, _, named = self.target.partition(":")
        if kind not in TARGETS or (named and kind != "cuda"):
            raise ConfigError(f"target {self.target!r} is not known; use one of {', '.join(TARGETS)}, cuda:sm_90")
        if self.precision not in PRECISIONS[kind]:
            raise ConfigError(f"precision {self.precision!r} is not known for target {kind}; "
                              f"it has {', '.join(PRECISIONS[kind])}")  # fmt: skip
        if self.exact and (kind, self.precision) == ("cpu", "bf16"):
            raise ConfigError("exact allows no products in bfloat16; leave out one of the two")
        if not 0 <= self.level <= 5:
            raise ConfigError(f"level must be 0 to 5, not {self.level}")
        if unknown := set(self.libraries) - set(LIBRARIES):
            known = ", ".join(LIBRARIES)
            raise ConfigError(f"there is no library {min(unknown)!r} with tactics; there is {known}")
        if unknown := {*self.input_types, *self.output_types} - {"", *FLOATS}:
            raise ConfigError(f"inputs and outputs cannot be given as {min(unknown)!r}; use one of {', '.join(FLOATS)}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, not {self.threads}")
        for name, tolerance in (("atol", self.atol), ("rtol", self.rtol)):
            if tolerance is not None and not tolerance >= 0:
                raise ConfigError(f"{name} must be 0 or more, not {tolerance}")

    @property
    def tolerance(self) -> float:
        """Error that a kernel may add to its operator's, relative to the magnitudes multiplied."""
        return 0.0 if self.exact else _ROUNDING.get(self.precision, SPLIT_ERROR)

    def described(self) -> dict[str, Any]:
        """What of the configuration changes the engine, as JSON."""
        skipped = {"timing_cache", "timing_cache_only", "inputs", "profiles", "verify", "memory_limit"}
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skipped}
        return {
            **{
                k: list(v) if isinstance(v, tuple) else dict(v) if isinstance(v, Mapping) else v
                for k, v in plain.items()
            },
            "profiles": [p.shapes for p in self.profiles],
        }
