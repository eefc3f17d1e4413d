"""What a user decides layer by layer: trtexec's --layerPrecisions, --layerOutputTypes and --precisionConstraints.

`name:precision,name:precision`, read from left to right, later ones override; a name may hold one `*`. None of it
counts unless the constraints are "prefer" (where it can be had) or "obey" (or no engine is made).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import onnx_ir

from ingot.errors import ConfigError

KINDS = ("none", "obey", "prefer")
_KNOWN = ("fp32", "fp16", "bf16", "fp8", "int8", "int4", "int32", "int64", "bool")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Constraints:
    """`precisions` of nodes, `outputs` types of what nodes write; both as (pattern, precision), in the user's order."""

    kind: str = "none"
    precisions: Sequence[tuple[str, str]] = ()
    outputs: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Settled:
    """Nodes that are computed in a narrow format whatever it costs, and nodes that stay wide."""

    narrow: Mapping[str, str] = field(default_factory=dict)
    wide: frozenset[str] = frozenset()


def parse(kind: str, precisions: str, outputs: str) -> Constraints:
    """From the flags' texts; ConfigError names what cannot be read."""
    if kind not in KINDS:
        raise ConfigError(f"--precisionConstraints={kind}: choose from {', '.join(KINDS)}")
    return Constraints(kind, _pairs("layerPrecisions", precisions), _pairs("layerOutputTypes", outputs))


def _pairs(flag: str, text: str) -> list[tuple[str, str]]:
    found = []
    for part in filter(None, text.split(",")):
        name, colon, precision = part.strip().rpartition(":")
        types = precision.split("+")
        if not colon or not name or any(kind not in _KNOWN for kind in types):
            raise ConfigError(f"--{flag}: {part!r} should read layer:precision, with one of {', '.join(_KNOWN)}")
        if name.count("*") > 1:
            raise ConfigError(f"--{flag}: {name!r} has more than one *")
        found.append((name, types[0]))  # a layer's further outputs are whole numbers, which keep their type
    return found


def settle(
    constraints: Constraints, model: onnx_ir.Model, available: Mapping[str, Sequence[str]], rest: str, tell: Tell
) -> Settled:
    """What the constraints mean for a model whose nodes `available` may be narrow, in the formats it names.

    `rest`: the precision of what is wide. With "obey" what cannot be had is a ConfigError, with "prefer" it is told.
    """
    if constraints.kind == "none":
        if constraints.precisions or constraints.outputs:
            tell("--layerPrecisions and --layerOutputTypes count only with --precisionConstraints=prefer or obey")
        return Settled()
    refuse = _refusing if constraints.kind == "obey" else tell
    narrow: dict[str, str] = {}
    wide: set[str] = set()
    can = {node: {*formats, "fp32", rest} for node, formats in available.items()}
    asked = [*_asked_outputs(constraints, model, available), *_asked(constraints.precisions, model, can)]
    for node, precision in asked:
        if precision in available.get(node, ()):
            narrow[node] = precision
            wide.discard(node)
        elif precision in ("fp32", rest):
            wide.add(node)
            narrow.pop(node, None)
        else:
            refuse(_reason(node, precision, available.get(node, ()), rest))
    return Settled(narrow, frozenset(wide))


def _refusing(reason: str) -> None:
    raise ConfigError(f"{reason}; --precisionConstraints=prefer goes on without it")


def _reason(node: str, precision: str, formats: Sequence[str], rest: str) -> str:
    known = ", ".join(dict.fromkeys([*formats, rest, "fp32"]))
    return f"layer {node!r} cannot be computed in {precision} here, it has {known}"


def _asked(
    pairs: Sequence[tuple[str, str]], model: onnx_ir.Model, can: Mapping[str, set[str]] | None = None
) -> Iterator[tuple[str, str]]:
    """(layer, precision) in order; a pattern means those of its layers that `can`, if there are any."""
    names = [node.name or "" for node in model.graph]
    for pattern, precision in pairs:
        matching = [name for name in names if name == pattern or fnmatchcase(name, _as_pattern(pattern))]
        if not matching:
            raise ConfigError(f"no layer of the model is called {pattern!r}; `ingot inspect model --steps` lists them")
        able = [name for name in matching if can is None or precision in can.get(name, ())]
        yield from ((name, precision) for name in (able if "*" in pattern and able else matching))


def _as_pattern(name: str) -> str:
    """Only `*` is special."""
    return name.replace("[", "[[]").replace("?", "[?]")


def _asked_outputs(
    constraints: Constraints, model: onnx_ir.Model, available: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, str]]:
    """A tensor has the type that its readers compute in: they are asked for."""
    readers = {node.name or "": [n.name or "" for v in node.outputs for n, _ in v.uses()] for node in model.graph}
    for node, precision in _asked(constraints.outputs, model):
        yield from ((reader, precision) for reader in readers[node] if reader in available)
