"""The time steps of RNN: per block of hidden units the gates' sums, then what the cell does with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isinf

from ingot.ir.expression import Expression
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.copying import multiply
from ingot.kernels.cpu.llvm import Function, Index, Value, vector
from ingot.kernels.cpu.render import render_expression
from ingot.plan.extent import Extent, ceil_div, product

LATENCY = 8  # independent sums that keep the multipliers busy


@dataclass(frozen=True)
class Cell:
    """What is known of a recurrent layer at build time, and where its operands are."""

    kind: str
    hidden: int
    lanes: int
    rows: int
    gates: int
    directions: int
    direction: str
    activations: tuple[Expression, ...]
    clip: float
    linear_before_reset: bool
    input_forget: bool
    recurrences: tuple[Handle, ...]
    projection: Handle
    candidate_bias: Handle
    peephole: Handle | None
    lengths: Handle | None
    initial_h: Handle | None
    initial_c: Handle | None
    outputs: tuple[Handle, ...]

    @property
    def blocks(self) -> int:
        """Vectors of hidden units."""
        return -(-self.hidden // self.lanes)

    @property
    def vector(self) -> str:
        """LLVM type of a block."""
        return vector("float", self.lanes)

    @property
    def row_bytes(self) -> int:
        """A state in scratch memory."""
        return self.blocks * self.lanes * 4

    def stage_gates(self, stage: int) -> int:
        """Gates whose sums a stage computes."""
        if len(self.recurrences) == 1:
            return self.gates
        return 2 if stage == 0 else 1


@dataclass(frozen=True)
class States:
    """Scratch of a work item: rows of hidden states before and after the step, cell states, two more of a GRU."""

    before: Value
    after: Value
    cell: Value
    update: Value
    reset: Value


@dataclass(frozen=True)
class Step:
    """One time step of a work item: its direction, time, batch rows, whether each row's sequence still runs."""

    direction: Value
    time: Value
    batch: Index
    rows: Sequence[Index]
    alive: Sequence[Value] | None
    states: States


def accumulate(f: Function, inputs: Sequence[Value], weights: Value, depth: int,
               start: list[list[Value]]) -> list[list[Value]]:  # fmt: skip
    """start[r][g] + Σ inputs[r][k] · weights[k][g] over k < depth; weights are dense vectors."""
    rows, gates, type_ = len(start), len(start[0]), start[0][0].type
    size = int(type_[1 : type_.index(" ")]) * 4
    chains = 2 if rows * gates < LATENCY and depth % 2 == 0 else 1
    zeros = [f.constant(type_, 0.0)] * (rows * gates * (chains - 1))

    def step(k: Value, *sums: Value) -> list[Value]:
        result = list(sums)
        for chain in range(chains):
            place = (k + chain) * (gates * size)
            columns = [f.load(type_, weights, place + g * size, align=size) for g in range(gates)]
            for r, pointer in enumerate(inputs):
                value = f.splat(f.load("float", pointer, (k + chain) * 4), size // 4)
                for g, column in enumerate(columns):
                    at = (chain * rows + r) * gates + g
                    result[at] = f.fma(value, column, result[at])
        return result

    flat = f.loop(0, depth, step, [value for row in start for value in row] + zeros, step=chains)
    first, second = flat[: rows * gates], flat[rows * gates :]
    joined = [a + b for a, b in zip(first, second, strict=True)] if chains == 2 else list(first)
    return [joined[r * gates : (r + 1) * gates] for r in range(rows)]


def emit_sequence(build: KernelBuilder, cell: Cell, steps: Extent, batch: Extent) -> None:
    """The phase of all time steps: a work item is one direction of `rows` sequences, the last of which may repeat."""
    size = cell.rows * cell.row_bytes
    places = [build.scratch(size) for _ in range(5)]

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        def item(number: Value) -> None:
            count = f.extent(ceil_div(batch, cell.rows))
            direction, group = f.index(f.divide(number, count)), f.remainder(number, count)
            extent = f.extent(batch)
            rows = [f.minimum(multiply(group, cell.rows) + k, extent - 1) for k in range(cell.rows)]
            _emit_item(f, cell, direction, f.extent(steps), extent, rows, [f.at(f.scratch, p) for p in places])

        f.loop(begin, end, item)

    build.phase(product((cell.directions, ceil_div(batch, cell.rows))), body)


def _emit_item(f: PhaseFunction, cell: Cell, direction: Value, steps: Index, batch: Index, rows: Sequence[Index],
               scratch: Sequence[Value]) -> None:  # fmt: skip
    first, second, cells, update, reset = scratch
    _load_states(f, cell, cell.initial_h, direction, batch, rows, first)
    if cell.kind == "lstm":
        _load_states(f, cell, cell.initial_c, direction, batch, rows, cells)
    lengths = None if cell.lengths is None else [_length(f, cell.lengths, row) for row in rows]

    def step(number: Value, before: Value, after: Value) -> tuple[Value, Value]:
        time = _time(f, cell, direction, number, steps)
        alive = None if lengths is None else [f.compare("slt", time, length) for length in lengths]
        states = States(before, after, cells, update, reset)
        _emit_step(f, cell, Step(direction, time, batch, rows, alive, states))
        return after, before

    last, _ = f.loop(0, steps, step, (first, second))
    finals = [(cell.outputs[1:2], last), (cell.outputs[2:3], cells)]
    for outputs, state in finals:
        for handle in outputs:
            _store_states(f, cell, handle, direction, batch, rows, state)


def _length(f: PhaseFunction, lengths: Handle, row: Index) -> Value:
    return f.cast("sext", f.load("i32", f.pointer(lengths), multiply(row, 4)), "i64")


def _time(f: PhaseFunction, cell: Cell, direction: Value, number: Value, steps: Index) -> Value:
    backward = f.index(steps) - 1 - number
    if cell.direction == "bidirectional":
        return f.select(f.compare("eq", direction, 1), backward, number)
    return backward if cell.direction == "reverse" else number


# states in memory


def _per_block(f: PhaseFunction, cell: Cell, body: Callable[[Value, Value | None], None]) -> None:
    """body(block, mask of the existing units or None when all exist) for every block of hidden units."""
    partial = cell.hidden % cell.lanes

    def one(block: Value) -> None:
        body(block, f.first_lanes(cell.hidden - block * cell.lanes, cell.lanes) if partial else None)

    f.loop(0, cell.blocks, one)


def _state_place(cell: Cell, direction: Value, batch: Index, row: Index) -> Index:
    """Byte offset of a row of [directions, batch, hidden]."""
    return (multiply(direction, batch) + row) * (cell.hidden * 4)


def _load_states(f: PhaseFunction, cell: Cell, handle: Handle | None, direction: Value, batch: Index,
                 rows: Sequence[Index], target: Value) -> None:  # fmt: skip
    """Initial states (zeros without an operand) into scratch."""

    def copy(block: Value, mask: Value | None) -> None:
        for k, row in enumerate(rows):
            value = f.constant(cell.vector, 0.0)
            if handle is not None:
                source = f.at(f.pointer(handle), _state_place(cell, direction, batch, row))
                value = _load(f, cell, source, block, mask)
            f.store(value, target, block * (cell.lanes * 4) + k * cell.row_bytes, align=cell.lanes * 4)

    _per_block(f, cell, copy)


def _store_states(f: PhaseFunction, cell: Cell, handle: Handle, direction: Value, batch: Index, rows: Sequence[Index],
                  source: Value) -> None:  # fmt: skip
    def copy(block: Value, mask: Value | None) -> None:
        for k, row in enumerate(rows):
            target = f.at(f.pointer(handle), _state_place(cell, direction, batch, row))
            _store(f, cell, _state(f, cell, source, block, k), target, block, mask)

    _per_block(f, cell, copy)


def _load(f: PhaseFunction, cell: Cell, pointer: Value, block: Value, mask: Value | None) -> Value:
    offset = block * (cell.lanes * 4)
    if mask is None:
        return f.load(cell.vector, pointer, offset)
    return f.load_masked(cell.vector, pointer, mask, offset)


def _store(f: PhaseFunction, cell: Cell, value: Value, pointer: Value, block: Value, mask: Value | None) -> None:
    offset = block * (cell.lanes * 4)
    if mask is None:
        f.store(value, pointer, offset)
    else:
        f.store_masked(value, pointer, mask, offset)


def _state(f: PhaseFunction, cell: Cell, pointer: Value, block: Value, row: int) -> Value:
    return f.load(cell.vector, pointer, block * (cell.lanes * 4) + row * cell.row_bytes)


def _keep(f: PhaseFunction, cell: Cell, value: Value, pointer: Value, block: Value, row: int) -> None:
    f.store(value, pointer, block * (cell.lanes * 4) + row * cell.row_bytes)


# one step


def _emit_step(f: PhaseFunction, cell: Cell, step: Step) -> None:
    for stage in range(len(cell.recurrences)):
        source = step.states.before if stage == 0 else step.states.reset

        def block(number: Value, mask: Value | None, stage: int = stage, source: Value = source) -> None:
            sums = _sums(f, cell, step, stage, source, number)
            for row, values in enumerate(sums):
                _CELLS[cell.kind](f, cell, step, stage, number, row, values, mask)

        _per_block(f, cell, block)


def _projected(f: PhaseFunction, cell: Cell, step: Step, block: Value, row: int, gate: int) -> Value:
    """What the input contributes to a gate."""
    line = f.index(multiply(step.time, step.batch)) + step.rows[row]
    unit = (line * cell.directions + step.direction) * cell.blocks + block
    return f.load(cell.vector, f.pointer(cell.projection), (unit * cell.gates + gate) * (cell.lanes * 4))


def _sums(f: PhaseFunction, cell: Cell, step: Step, stage: int, source: Value, block: Value) -> list[list[Value]]:
    """The stage's gates before their activations; a GRU's candidate without its input where the reset comes first."""
    gates = cell.stage_gates(stage)
    first = 2 if stage else 0
    start = [[_projected(f, cell, step, block, row, first + gate) for gate in range(gates)] for row in range(cell.rows)]
    if cell.kind == "gru" and cell.linear_before_reset:
        place = (step.direction * cell.blocks + block) * (cell.lanes * 4)
        bias = f.load(cell.vector, f.pointer(cell.candidate_bias), place)
        start = [[*values[:2], bias] for values in start]
    unit = step.direction * cell.blocks + block
    weights = f.at(f.pointer(cell.recurrences[stage]), unit * (cell.hidden * gates * cell.lanes * 4))
    inputs = [f.at(source, row * cell.row_bytes) for row in range(cell.rows)]
    return accumulate(f, inputs, weights, cell.hidden, start)


def _activated(f: PhaseFunction, cell: Cell, value: Value, which: int) -> Value:
    """The activation of a value within the clip."""
    if not isinf(cell.clip):
        value = f.call("llvm.minnum", value.type, f.call("llvm.maxnum", value.type, value, -cell.clip), cell.clip)
    return _function(f, cell, value, which)


def _function(f: PhaseFunction, cell: Cell, value: Value, which: int) -> Value:
    return render_expression(f, cell.activations[which], [value], ["float32"], cell.lanes)


def _finish(f: PhaseFunction, cell: Cell, step: Step, block: Value, row: int, hidden: Value,
            mask: Value | None) -> None:  # fmt: skip
    """The new hidden state to the next step and to y[time, direction, row]; a sequence that ended keeps its state."""
    line = (step.time * cell.directions + step.direction) * step.batch + step.rows[row]
    result = hidden
    if step.alive is not None:
        result = f.select(step.alive[row], hidden, f.constant(cell.vector, 0.0))
        hidden = f.select(step.alive[row], hidden, _state(f, cell, step.states.before, block, row))
    _keep(f, cell, hidden, step.states.after, block, row)
    _store(f, cell, result, f.at(f.pointer(cell.outputs[0]), line * (cell.hidden * 4)), block, mask)


def _rnn(f: PhaseFunction, cell: Cell, step: Step, stage: int, block: Value, row: int, sums: Sequence[Value],
         mask: Value | None) -> None:  # fmt: skip
    _finish(f, cell, step, block, row, _activated(f, cell, sums[0], 0), mask)


def _gru(f: PhaseFunction, cell: Cell, step: Step, stage: int, block: Value, row: int, sums: Sequence[Value],
         mask: Value | None) -> None:  # fmt: skip
    """h' = (1 - update) · candidate + update · h."""
    states, before = step.states, _state(f, cell, step.states.before, block, row)
    if stage == 1:
        update, total = _state(f, cell, states.update, block, row), sums[0]
    else:
        update, reset = (_activated(f, cell, value, 0) for value in sums[:2])
        if not cell.linear_before_reset:
            _keep(f, cell, update, states.update, block, row)
            _keep(f, cell, reset * before, states.reset, block, row)
            return
        total = f.fma(reset, sums[2], _projected(f, cell, step, block, row, 2))
    candidate = _activated(f, cell, total, 1)
    _finish(f, cell, step, block, row, f.fma(update, before - candidate, candidate), mask)


def _lstm(f: PhaseFunction, cell: Cell, step: Step, stage: int, block: Value, row: int, sums: Sequence[Value],
          mask: Value | None) -> None:  # fmt: skip
    """c' = forget · c + into · new; h' = out · emit(c')."""
    state = _state(f, cell, step.states.cell, block, row)

    def peeped(value: Value, which: int, seen: Value) -> Value:
        if cell.peephole is None:
            return value
        place = ((step.direction * cell.blocks + block) * 3 + which) * (cell.lanes * 4)
        return f.fma(f.load(cell.vector, f.pointer(cell.peephole), place), seen, value)

    into = _activated(f, cell, peeped(sums[0], 0, state), 0)
    forget = 1.0 - into if cell.input_forget else _activated(f, cell, peeped(sums[2], 2, state), 0)
    new = f.fma(forget, state, into * _activated(f, cell, sums[3], 1))
    emitted = _activated(f, cell, peeped(sums[1], 1, new), 0) * _function(f, cell, new, 2)
    kept = new if step.alive is None else f.select(step.alive[row], new, state)
    _keep(f, cell, kept, step.states.cell, block, row)
    _finish(f, cell, step, block, row, emitted, mask)


_CELLS: dict[str, Callable[..., None]] = {"rnn": _rnn, "gru": _gru, "lstm": _lstm}
