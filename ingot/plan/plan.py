"""The plan: what a runtime executes, as frozen dataclasses that travel as JSON.

A value is a typed view of a storage; a storage is bytes in one place. Native code receives one pointer per storage and
one
int64 per extent; host steps receive numpy views. Indices refer to the tuples of the same plan.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from ingot.errors import EngineError
from ingot.plan.extent import Extent

Place = Literal["input", "output", "arena", "weight", "host"]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output as the user sees it; min, opt, max are None unless a profile bounds a symbolic shape."""

    name: str
    dtype: str
    shape: tuple[Extent, ...]
    min: tuple[int, ...] | None = None
    opt: tuple[int, ...] | None = None
    max: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Storage:
    """Bytes in one place. `offset` is into the weights section for weights; arenas have theirs in MemoryPlan."""

    place: Place
    bytes: Extent
    offset: int = 0
    first: int = 0
    last: int = 0


@dataclass(frozen=True)
class Value:
    """A typed, row-major view of a storage; `layout` says how native code orders it ("plain", "blocked",
    "channels_last")."""

    name: str
    dtype: str
    shape: tuple[Extent, ...]
    storage: int
    layout: str = "plain"


@dataclass(frozen=True)
class Step:
    """One kernel or host operator, with the user's nodes it computes. `bytes` and `flops` are per run."""

    name: str
    op: str
    nodes: tuple[str, ...]
    kernel: str
    tactic: Mapping[str, Any]
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    bytes: Extent = 0
    flops: Extent = 0


@dataclass(frozen=True)
class NativeSegment:
    """Steps compiled into one function of the code section; `phases` counts the cache lines of counters by which
    threads share them (0: not worth sharing)."""

    kind: Literal["native"] = field(default="native", init=False)
    symbol: str
    phases: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Launch:
    """One GPU kernel: `entry` names it in the code section, `step` the step of its segment that it belongs to. Its
    arguments are the addresses of storages (`pointers`), then numbers of the plan's table (`extents`)."""

    entry: str
    step: int
    grid: tuple[Extent, ...]
    pointers: tuple[int, ...]
    extents: tuple[int, ...]


@dataclass(frozen=True)
class LibraryCall:
    """What a library computes in the place of a step's launches, where it is there: `recipe` is its own description,
    `pointers` the storages whose addresses it takes, `entry` its plan in the code section ("" for none)."""

    library: str
    step: int
    recipe: Mapping[str, Any]
    pointers: tuple[int, ...]
    entry: str = ""


@dataclass(frozen=True)
class GraphSegment:
    """Steps on a GPU, captured into one graph per set of shapes. `lanes`: so many of those that do not need each other
    may run side by side."""

    kind: Literal["graph"] = field(default="graph", init=False)
    steps: tuple[Step, ...]
    launches: tuple[Launch, ...]
    libraries: tuple[LibraryCall, ...] = ()
    lanes: int = field(default=1, metadata={"newer": True})  # files from before lanes lack it


@dataclass(frozen=True)
class HostSegment:
    """One operator computed by the oracle. `node` is a base64 NodeProto, `opsets` what it is to be read with; `fused`
    ones are canonical ops, whose attributes may name size symbols."""

    kind: Literal["host"] = field(default="host", init=False)
    step: Step
    node: str
    opsets: Mapping[str, int]
    reason: str = ""
    fused: bool = False


@dataclass(frozen=True)
class ControlSegment:
    """If, Loop or Scan over nested plans. `captures[k]` are the outer values bound to the last inputs of plans[k]."""

    kind: Literal["control"] = field(default="control", init=False)
    step: Step
    attributes: Mapping[str, Any]
    plans: tuple[Plan, ...]
    captures: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class CollectiveSegment:
    """What ranks that compute together tell each other, through the session's group: `operation` is its method."""

    kind: Literal["collective"] = field(default="collective", init=False)
    step: Step
    operation: Literal["all_reduce", "all_gather"]


Segment = NativeSegment | GraphSegment | HostSegment | ControlSegment | CollectiveSegment


def steps_of(segment: Segment) -> tuple[Step, ...]:
    """The steps of a segment; a host, control or collective segment is one step."""
    return segment.steps if isinstance(segment, NativeSegment | GraphSegment) else (segment.step,)


@dataclass(frozen=True)
class MemoryPlan:
    """Arena offsets per storage (None: not in the arena), for shapes up to `bounds` (symbol → largest extent)."""

    bounds: Mapping[str, int]
    offsets: tuple[int | None, ...]
    bytes: int
    lower_bound: int


@dataclass(frozen=True)
class Demand:
    """Two extents that `node` takes to be equal, which only a run's sizes can tell."""

    left: Extent
    right: Extent
    node: str


@dataclass(frozen=True)
class Plan:
    """A whole model or the body of a control step. `extents` is the table native code indexes; `derived` symbols that
    host steps define (data-dependent) are bound when they run. `scratch` is bytes per thread."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    values: tuple[Value, ...]
    storages: tuple[Storage, ...]
    segments: tuple[Segment, ...]
    extents: tuple[Extent, ...] = ()
    memory: tuple[MemoryPlan, ...] = ()
    derived: tuple[str, ...] = ()
    scratch: int = 0
    demands: tuple[Demand, ...] = ()

    @property
    def host_steps(self) -> tuple[HostSegment, ...]:
        """Host segments, those of nested plans included."""
        nested = (s for c in self.segments if isinstance(c, ControlSegment) for p in c.plans for s in p.host_steps)
        return (*(s for s in self.segments if isinstance(s, HostSegment)), *nested)


def to_json(plan: Plan) -> str:
    """Canonical JSON: same plan, same text."""
    return json.dumps(dataclasses.asdict(plan), sort_keys=True, separators=(",", ":"))


def from_json(text: str | bytes) -> Plan:
    """Inverse of to_json; EngineError when the text is not a plan."""
    try:
        return decode(Plan, json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise EngineError(f"the plan inside the engine cannot be read ({error}); rebuild the engine") from None


_SEGMENTS: dict[str, type] = {
    "native": NativeSegment, "graph": GraphSegment, "host": HostSegment, "control": ControlSegment,
    "collective": CollectiveSegment,
}  # fmt: skip


@cache
def _fields(kind: type) -> dict[str, tuple[Any, bool]]:
    """Annotated type of each field, and whether older files lack it."""
    hints = typing.get_type_hints(kind)
    return {f.name: (hints[f.name], "newer" in f.metadata) for f in dataclasses.fields(kind) if f.init}


def decode(kind: Any, data: Any) -> Any:
    """`data` (from JSON) as an instance of the annotated type `kind`; TypeError or KeyError where it does not fit."""
    if kind == Segment:
        return decode(_SEGMENTS[data["kind"]], data)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        fields = _fields(kind).items()
        return kind(**{name: decode(hint, data[name]) for name, (hint, newer) in fields if name in data or not newer})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return _decode_tuple(arguments, data)
    if origin in (types.UnionType, typing.Union):
        return _decode_union(arguments, data)
    if origin is not None and isinstance(data, dict) and issubclass(origin, Mapping):
        return {k: decode(arguments[1], v) for k, v in data.items()}
    return _decode_plain(kind, data)


def _decode_tuple(arguments: tuple[Any, ...], data: Any) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise TypeError(f"expected a list, found {type(data).__name__}")
    return tuple(decode(arguments[0], item) for item in data)


def _decode_union(arguments: tuple[Any, ...], data: Any) -> Any:
    if data is None:
        if type(None) not in arguments:
            raise TypeError("unexpected null")
        return None
    for option in arguments:
        if option is type(None) or (option in (int, str) and not isinstance(data, option)):
            continue
        return decode(option, data)
    raise TypeError(f"unexpected {type(data).__name__}")


def _decode_plain(kind: Any, data: Any) -> Any:
    if typing.get_origin(kind) is Literal:
        if data not in typing.get_args(kind):
            raise TypeError(f"{data!r} is not one of {typing.get_args(kind)}")
    elif kind is not Any and (not isinstance(data, kind) or (isinstance(data, bool) and kind is int)):
        raise TypeError(f"expected {kind.__name__}, found {type(data).__name__}")
    return data
