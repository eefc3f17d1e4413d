"""One candidate per work for a whole graph: the sum of prices and of the layout conversions between works, minimised.

Per work only the cheapest candidate of each combination of port layouts matters. From several beginnings, each work in
turn takes the option that is best given all others, until nothing moves (iterated conditional modes: Besag 1986); the
cheapest end wins. No beginning ends dearer than it was, so the choice is never worse than any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ingot.kernels import Candidate, Ports
from ingot.kernels.target import Pace
from ingot.plan.extent import evaluate, symbols_of
from ingot.plan.lower import Module, Tensor, Work
from ingot.tune.binding import DEFAULT_EXTENT

Price = Callable[[Work, Candidate], float]
Taste = Callable[["Option"], int]
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

    @property
    def special(self) -> int:
        """How many of its ports are not row-major."""
        return sum(layout not in ("", "plain") for layout in (*self.ports.inputs, *self.ports.outputs))


Selection = dict[Work, Option]
# What a selection to improve may begin with: the cheapest of what is most to its taste. The last one is for works that
# want several inputs in one layout: no single move of theirs, or of what writes those, would pay.
_BEGINNINGS: tuple[Taste, ...] = (lambda option: 0, lambda option: option.special > 0,
                                  lambda option: option.special == 0, lambda option: option.special)  # fmt: skip


@dataclass(eq=False)
class Choice:
    """What was chosen, and the sum of its prices and conversions."""

    candidates: dict[Work, Candidate] = field(default_factory=dict)
    microseconds: float = 0.0


def choose(module: Module, price: Price, symbols: Mapping[str, int], pace: Pace) -> Choice:
    """A candidate for every native work of the module and of its bodies; `pace` says what conversions cost."""
    options = {w: _options(w, price) for w in module.works if w.kind == "native"}
    layouts = Layouts(module, symbols, pace)
    ends = [_improved(_beginning(options, taste), options, layouts) for taste in _BEGINNINGS]
    best = min(ends, key=layouts.total)
    choice = Choice({w: o.candidate for w, o in best.items()}, layouts.total(best))
    for body in (body for work in module.works for body in work.bodies):
        inner = choose(body, price, symbols, pace)
        choice.candidates |= inner.candidates
        choice.microseconds += inner.microseconds
    return choice


def _options(work: Work, price: Price) -> list[Option]:
    best: dict[Ports, Option] = {}
    for candidate in work.choices:
        cost = price(work, candidate)
        if candidate.ports not in best or cost < best[candidate.ports].microseconds:
            best[candidate.ports] = Option(candidate, cost)
    usable = [option for option in best.values() if math.isfinite(option.microseconds)]
    return usable or list(best.values())


def _beginning(options: Mapping[Work, Sequence[Option]], taste: Taste) -> Selection:
    return {w: min(mine, key=lambda option: (-taste(option), option.microseconds)) for w, mine in options.items()}


def _improved(selection: Selection, options: Mapping[Work, Sequence[Option]], layouts: Layouts) -> Selection:
    """The selection after as many moves as help."""
    for _ in range(_SWEEPS):
        moved = [layouts.improve(selection, w, mine) for w, mine in options.items() if len(mine) > 1]
        if True not in moved:
            break
    return selection


class Layouts:
    """Which works write and read each tensor, and what it costs to have it in more than one layout."""

    def __init__(self, module: Module, symbols: Mapping[str, int], pace: Pace) -> None:
        self._symbols, self._pace = symbols, pace
        self._producer: dict[Tensor, tuple[Work, int]] = {}
        self._readers: dict[Tensor, list[tuple[Work, int]]] = {}
        self._plain: set[Tensor] = set()  # to be had in the plain layout, whoever else reads them
        for work in module.works:
            self._producer.update({t: (work, i) for i, t in enumerate(work.outputs)})
            for index, tensor in enumerate(work.inputs):
                self._add_reader(work, index, tensor)
            self._plain.update(t.root for group in work.captures for t in group)
        self._plain.update(t.root for t in module.outputs)

    def _add_reader(self, work: Work, index: int, tensor: Tensor | None) -> None:
        if tensor is None:
            return
        if tensor.alias is not None or work.kind != "native":
            self._plain.add(tensor.root)
        if work.kind == "native":
            self._readers.setdefault(tensor, []).append((work, index))

    def total(self, selection: Selection) -> float:
        """Prices and conversions of a selection in microseconds."""
        tensors = {**dict.fromkeys(self._readers), **dict.fromkeys(self._producer)}
        return sum(o.microseconds for o in selection.values()) + sum(self._conversions(t, selection) for t in tensors)

    def improve(self, selection: Selection, work: Work, options: Sequence[Option]) -> bool:
        """Move one work to its best option given all others; whether it moved. A tie goes to the layouts at hand."""
        before = selection[work]
        ranked = []
        for index, option in enumerate(options):
            selection[work] = option
            ranked.append((self._cost(selection, work), self._mismatches(selection, work), index))
        selection[work] = options[min(ranked)[2]]
        return selection[work] is not before

    def _cost(self, selection: Selection, work: Work) -> float:
        """What of the total depends on the work's option."""
        return round(
            selection[work].microseconds + sum(self._conversions(t, selection) for t in dict.fromkeys(_ports(work))), 6
        )

    def _mismatches(self, selection: Selection, work: Work) -> int:
        pairs = ((t, _wanted(selection[work], i)) for i, t in enumerate(work.inputs) if t is not None)
        return sum(wanted != self._home(t, selection) for t, wanted in pairs)

    def _conversions(self, tensor: Tensor, selection: Selection) -> float:
        if tensor.constant is not None:  # packed at build in the layout it is wanted in
            return 0.0
        wanted = {_wanted(selection[work], index) for work, index in self._readers.get(tensor, ())}
        if tensor in self._plain:
            wanted.add("plain")
        count = len(wanted - {self._home(tensor, selection)})
        return count * self._conversion(tensor) if count else 0.0

    def _home(self, tensor: Tensor, selection: Selection) -> str:
        """The layout it is written in; views, inputs and constants are plain."""
        work, index = self._producer.get(tensor, (None, 0))
        if work is None or work not in selection or tensor.alias is not None:
            return "plain"
        return _layout(selection[work].ports.outputs, index)

    def _conversion(self, tensor: Tensor) -> float:
        size = tensor.port().bytes
        free = {s: DEFAULT_EXTENT for s in symbols_of(size) if s not in self._symbols}
        moved = 2 * evaluate(size, {**self._symbols, **free})
        return self._pace.reorder + moved / self._pace.reorder_bytes


def _ports(work: Work) -> Iterator[Tensor]:
    yield from (t for t in work.inputs if t is not None)
    yield from work.outputs


def _wanted(option: Option, index: int) -> str:
    return _layout(option.ports.inputs, index)


def _layout(layouts: Sequence[str], index: int) -> str:
    return (layouts[index] if index < len(layouts) else "") or "plain"
