"""The kernel registry: `@kernel("Linear", on="cpu", when=…, space=…)` above a generator is all a new kernel takes."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ingot.kernels.node import Node

Layouts = tuple[str, ...]


@dataclass(frozen=True)
class Ports:
    """One way to lay out a kernel's feature maps: a layout per input and per output; "" leaves an operand plain."""

    inputs: Layouts
    outputs: Layouts


Generator = Callable[..., None]
Tolerance = float | Callable[[Node], float]
PLAIN = Ports((), ())


@dataclass(frozen=True)
class Kernel:
    """A registered generator. `when(node, isa)` says whether it applies; `space` maps tactic parameters to values (or
    to a
    function of (node, isa)); `prune(node, isa, **tactic)` drops points; `cost(node, isa, **tactic)` estimates
    microseconds on
    one core for level 0; `layouts(node, isa)` lists the port layouts it can do; `in_place` names inputs whose storage
    the
    first output may take; `library` is what computes it in the place of what is generated, if any; `tolerance` says
    what error it may add to its op's, relative to the magnitudes multiplied (0: as exact as any order of sums);
    `instead_of` names kernels that are left out where this one may be taken: it is never slower."""

    op: str
    target: str
    name: str
    generate: Generator
    when: Callable[[Node, Any], bool]
    space: Mapping[str, Any]
    prune: Callable[..., bool]
    cost: Callable[..., float] | None
    layouts: Callable[[Node, Any], Sequence[Ports]]
    in_place: Callable[[Node], Sequence[int]]
    library: str | None = None
    tolerance: Tolerance = 0.0
    instead_of: Sequence[str] = ()

    def error(self, node: Node) -> float:
        """Its tolerance for a node whose weights are there."""
        return self.tolerance(node) if callable(self.tolerance) else self.tolerance


@dataclass(frozen=True)
class Candidate:
    """A kernel at one point of its space, with one choice of port layouts."""

    kernel: Kernel
    tactic: Mapping[str, Any] = field(default_factory=dict)
    ports: Ports = PLAIN

    @property
    def label(self) -> str:
        """`linear_f32(rows=6, vectors=2)`."""
        return f"{self.kernel.name}({', '.join(f'{k}={v}' for k, v in self.tactic.items())})"


_TABLE: dict[tuple[str, str], list[Kernel]] = {}


def kernel(
    op: str,
    on: str,
    *,
    when: Callable[[Node, Any], bool] = lambda node, isa: True,
    space: Mapping[str, Any] | None = None,
    prune: Callable[..., bool] = lambda node, isa, **tactic: False,
    cost: Callable[..., float] | None = None,
    layouts: Callable[[Node, Any], Sequence[Ports]] = lambda node, isa: (PLAIN,),
    in_place: Callable[[Node], Sequence[int]] = lambda node: (),
    library: str | None = None,
    tolerance: Tolerance = 0.0,
    instead_of: Sequence[str] = (),
) -> Callable[[Generator], Generator]:
    """Register a generator `(build, node, **tactic) -> None` for a canonical op on a target."""

    def register(generate: Generator) -> Generator:
        name = generate.__name__
        entry = Kernel(
            op, on, name, generate, when, space or {}, prune, cost, layouts, in_place, library, tolerance,
            instead_of,
        )  # fmt: skip
        _TABLE.setdefault((op, on), []).append(entry)
        return generate

    return register


def registered(op: str, target: str, name: str) -> Kernel:
    """The kernel of a name."""
    return next(entry for entry in _TABLE[op, target] if entry.name == name)


def kernels_for(node: Node, target: str, isa: Any) -> list[Kernel]:
    """Registered kernels that apply to the node, in order of registration."""
    _load(target)
    return [k for k in _TABLE.get((node.op, target), ()) if k.when(node, isa)]


def others_apply(generate: Generator, node: Node, target: str, isa: Any) -> bool:
    """Whether a kernel other than `generate` has a candidate for the node: what a kernel of last resort asks."""
    found = (k for k in _TABLE.get((node.op, target), ()) if k.generate is not generate and k.when(node, isa))
    shaped = ((k, with_layouts(node, ports)) for k in found for ports in k.layouts(node, isa))
    return any(True for k, laid in shaped for _ in tactics(k, laid, isa))


def candidates(node: Node, target: str, isa: Any) -> Iterator[Candidate]:
    """Every kernel, layout and tactic that applies to the node."""
    for entry in kernels_for(node, target, isa):
        for ports in entry.layouts(node, isa):
            shaped = with_layouts(node, ports)
            for tactic in tactics(entry, shaped, isa):
                yield Candidate(entry, tactic, ports)


def tactics(entry: Kernel, node: Node, isa: Any) -> Iterator[dict[str, Any]]:
    """Points of the kernel's space that its prune keeps; a kernel without a space has one empty tactic."""
    axes = {k: (v(node, isa) if callable(v) else v) for k, v in entry.space.items()}
    for point in itertools.product(*axes.values()):
        tactic = dict(zip(axes, point, strict=True))
        if not entry.prune(node, isa, **tactic):
            yield tactic


def with_layouts(node: Node, ports: Ports) -> Node:
    """The node with its ports' layouts set as the candidate wants them."""
    from dataclasses import replace

    def laid(port: Any, layouts: Layouts, index: int) -> Any:
        wanted = layouts[index] if index < len(layouts) and layouts[index] else "plain"
        return port if port is None or port.layout == wanted else replace(port, layout=wanted)

    inputs = tuple(laid(p, ports.inputs, i) for i, p in enumerate(node.inputs))
    outputs = tuple(laid(p, ports.outputs, i) for i, p in enumerate(node.outputs))
    return replace(node, inputs=inputs, outputs=outputs)


def _load(target: str) -> None:
    """Import every kernel file of a target once."""
    package = importlib.import_module(f"ingot.kernels.{target}")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
