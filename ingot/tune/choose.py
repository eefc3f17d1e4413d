"""One candidate per work for a whole graph: the sum of prices and of the layout conversions between works, minimised.

Per work only the cheapest candidate of each combination of port layouts matters; those are relaxed by sweeps in graph
order
until nothing moves (iterated conditional modes: Besag 1986). A tie goes to the layout the input already has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ingot.kernels import Candidate, Ports
from ingot.plan.extent import evaluate, symbols_of
from ingot.plan.lower import Module, Tensor, Work
from ingot.tune.binding import DEFAULT_EXTENT

Price = Callable[[Work, Candidate], float]
_REORDER_BYTES_PER_MICROSECOND = 6000.0
_REORDER_FIXED = 1.0
_SWEEPS = 12


@dataclass(frozen=True, eq=False)
class Option:
    """The cheapest candidate with certain layouts."""

    candidate: Candidate
    microseconds: float

    @property
    def ports(self) -> Ports:
        """Its layouts."""
        return self.candidate.ports


@dataclass(eq=False)
class Choice:
    """What was chosen, and the runners-up per work for a report."""

    candidates: dict[Work, Candidate] = field(default_factory=dict)
    microseconds: float = 0.0


def choose(module: Module, price: Price, symbols: Mapping[str, int]) -> Choice:
    """A candidate for every native work of the module and of its bodies."""
    works = [w for w in module.works if w.kind == "native"]
    options = {w: _options(w, price) for w in works}
    current = {w: min(o, key=lambda option: option.microseconds) for w, o in options.items()}
    relaxation = _Relaxation(module, current, symbols)
    for _ in range(_SWEEPS):
        improved = [relaxation.improve(w, options[w]) for w in works if len(options[w]) > 1]
        if True not in improved:
            break
    choice = Choice({w: o.candidate for w, o in current.items()}, sum(o.microseconds for o in current.values()))
    for work in module.works:
        for body in work.bodies:
            inner = choose(body, price, symbols)
            choice.candidates |= inner.candidates
            choice.microseconds += inner.microseconds
    return choice


def _options(work: Work, price: Price) -> list[Option]:
    best: dict[Ports, Option] = {}
    for candidate in work.choices:
        cost = price(work, candidate)
        if candidate.ports not in best or cost < best[candidate.ports].microseconds:
            best[candidate.ports] = Option(candidate, cost)
    return list(best.values())


class _Relaxation:
    def __init__(self, module: Module, current: dict[Work, Option], symbols: Mapping[str, int]) -> None:
        self.current, self.symbols = current, symbols
        self.producer: dict[Tensor, tuple[Work, int]] = {}
        self.readers: dict[Tensor, list[tuple[Work | None, int]]] = {}
        for work in module.works:
            self.producer.update({t: (work, i) for i, t in enumerate(work.outputs)})
            for index, tensor in enumerate(work.inputs):
                if tensor is not None:
                    # A view must be read in plain order whatever its reader would like.
                    reader = work if tensor.alias is None else None
                    self.readers.setdefault(tensor.root, []).append((reader, index))
            for captured in (t for group in work.captures for t in group):
                self.readers.setdefault(captured.root, []).append((None, 0))
        for tensor in module.outputs:
            self.readers.setdefault(tensor.root, []).append((None, 0))

    def improve(self, work: Work, options: Sequence[Option]) -> bool:
        """Move one work to its best option given its neighbours; whether it moved."""
        before = self.current[work]
        ranked = [(self._cost(work, o), self._mismatches(work, o), i) for i, o in enumerate(options)]
        best = options[min(ranked)[2]]
        self.current[work] = best
        return best is not before

    def _cost(self, work: Work, option: Option) -> float:
        total = option.microseconds
        for index, tensor in enumerate(work.inputs):
            if tensor is not None and _wanted(option, index) != self._home(tensor):
                total += self._conversion(tensor)
        for index, tensor in enumerate(work.outputs):
            given = option.ports.outputs[index] if index < len(option.ports.outputs) else "plain"
            wanted = {self._reader_layout(reader, i) for reader, i in self.readers.get(tensor, ())}
            total += len(wanted - {given or "plain"}) * self._conversion(tensor)
        return round(total, 6)

    def _mismatches(self, work: Work, option: Option) -> int:
        return sum(t is not None and _wanted(option, i) != self._home(t) for i, t in enumerate(work.inputs))

    def _home(self, tensor: Tensor) -> str:
        if tensor.alias is not None or tensor not in self.producer:
            return "plain"
        work, index = self.producer[tensor]
        if work not in self.current:
            return "plain"
        layouts = self.current[work].ports.outputs
        return (layouts[index] if index < len(layouts) else "") or "plain"

    def _reader_layout(self, reader: Work | None, index: int) -> str:
        return "plain" if reader is None or reader not in self.current else _wanted(self.current[reader], index)

    def _conversion(self, tensor: Tensor) -> float:
        if tensor.constant is not None:
            return 0.0
        size = tensor.root.port().bytes
        free = {s: DEFAULT_EXTENT for s in symbols_of(size) if s not in self.symbols}
        return _REORDER_FIXED + 2 * evaluate(size, {**self.symbols, **free}) / _REORDER_BYTES_PER_MICROSECOND


def _wanted(option: Option, index: int) -> str:
    layouts = option.ports.inputs
    return (layouts[index] if index < len(layouts) else "") or "plain"
