"""RNN: the inputs of all time steps projected by one product, then a launch for each step (two for a GRU whose
candidate needs the reset state), all of them in the graph. Hidden states are float32 in two buffers that take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ingot.ir.expression import Expression
from ingot.ir.ops import complete
from ingot.ir.ops_rnn import GATES
from ingot.kernels import kernel
from ingot.kernels.cpu.rnn import activation_of
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.pointwise import block_for, element_index
from ingot.kernels.cuda.render import NARROW, can_render, converted, render
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, ceil_div, product

_MOST_STEPS = 1024  # launches of a graph
_ROWS, _UNITS, _DEEP = 16, 16, 32  # sequences and hidden units of a block, units of the state before at once
_PROJECTED = (64, 64, 32)
_FLOAT = 4


@dataclass(frozen=True)
class Layer:
    """Sizes and settings of the node; `columns` of the projection are directions by gates by units."""

    node: Node
    kind: str
    steps: int
    batch: Extent
    inputs: int
    hidden: int
    directions: int
    settings: dict[str, Any]

    @property
    def gates(self) -> int:
        """Of one direction."""
        return GATES[self.kind]

    @property
    def columns(self) -> int:
        """Of the projection."""
        return self.directions * self.gates * self.hidden

    @property
    def states(self) -> Extent:
        """Elements of the hidden states of all directions."""
        return product((self.directions, self.batch, self.hidden))

    @property
    def activations(self) -> list[Expression]:
        """Of one direction."""
        s = self.settings
        entries = zip(s["activations"], s["alphas"], s["betas"], strict=True)
        return [activation_of(*entry) for entry in entries][: len(s["activations"]) // self.directions]

    @property
    def apart(self) -> bool:
        """Whether the candidate waits for the reset state of all units."""
        return self.kind == "gru" and not self.settings["linear_before_reset"]

    @property
    def precision(self) -> str:
        """Of products: those with 16-bit weights need no more than their digits."""
        return "tf32" if self.node.dtype in NARROW else "tf32x3"


def _layer(node: Node) -> Layer:
    steps, batch, inputs = node.input(0).shape
    settings = complete("RNN", node.attributes)
    return Layer(node, settings["kind"], int(steps), batch, int(inputs), int(settings["hidden"]),
                 int(node.input(1).shape[0]), settings)  # fmt: skip


def _applies(node: Node, target: Any) -> bool:
    steps, _, inputs = node.input(0).shape
    if node.dtype not in (*NARROW, "float32") or not isinstance(steps, int) or not isinstance(inputs, int):
        return False
    layer = _layer(node)
    s, own = layer.settings, layer.activations
    per = len(own)
    entries = list(zip(s["activations"], s["alphas"], s["betas"], strict=True))
    alike = all(entries[k : k + per] == entries[:per] for k in range(0, len(entries), per))
    typed = all(node.input(k).dtype == node.dtype for k in (1, 2, 3, 5, 6, 7) if node.has_input(k))
    lengths = not node.has_input(4) or node.input(4).dtype in ("int32", "int64")
    return alike and typed and lengths and 0 < steps <= _MOST_STEPS and all(can_render(e, ["float32"]) for e in own)


@kernel("RNN", on="cuda", when=_applies)
def rnn(build: CudaBuilder, node: Node) -> None:
    """y, the last hidden state and, for lstm, the last cell state"""
    layer = _layer(node)
    projected = build.temporary(product((layer.steps, layer.batch, layer.columns, _FLOAT)), "float32")
    hidden = build.temporary(product((2, layer.states, _FLOAT)), "float32")
    state = build.temporary(product((layer.states, _FLOAT)), "float32") if layer.kind == "lstm" else None
    _project(build, layer, projected)
    for target, index in ((hidden, 5), (state, 6)):
        if target is not None:
            _begin(build, layer, target, index)
    stages = _stages(build, layer, projected, hidden, state)
    build.launches += [stage(step) for step in range(layer.steps) for stage in stages]
    for source, index, start in ((hidden, 1, layer.steps % 2), (state, 2, 0)):
        if source is not None and index < len(node.outputs):
            _end(build, layer, source, index, start)


def _project(build: CudaBuilder, layer: Layer, projected: Handle) -> None:
    """projected[t · B + b, c] = x[t, b] · weight[c] + the input's bias[c]"""
    rows, columns, deep = _PROJECTED
    f, count = build.function(warps=4, stages=3), product((layer.steps, layer.batch))
    across = ceil_div(layer.columns, columns)
    f.emit(f"number = tl.program_id(0)\nrow = (number // {across}) * {rows} + tl.arange(0, {rows})")
    f.emit(f"column = (number % {across}) * {columns} + tl.arange(0, {columns})\ndepths = tl.arange(0, {deep})")
    f.emit(f"down = row < {f.extent(count)}\nalong = column < {layer.columns}")
    f.emit(f"sums = tl.zeros(({rows}, {columns}), tl.float32)")
    with f.block(f"for start in range(0, {layer.inputs}, {deep}):"):
        f.emit(f"depth = start + depths\nexists = depth < {layer.inputs}")
        f.emit(f"a = tl.load({f.pointer(build.input(0))} + row[:, None] * {layer.inputs} + depth[None, :], "
               "down[:, None] & exists[None, :], other=0)")  # fmt: skip
        f.emit(f"b = tl.load({f.pointer(build.input(1))} + column[None, :] * {layer.inputs} + depth[:, None], "
               "along[None, :] & exists[:, None], other=0)")  # fmt: skip
        f.emit("sums = tl.dot(a, b, sums" + ', input_precision="tf32x3")' * (layer.node.dtype == "float32")
               + ")" * (layer.node.dtype != "float32"))  # fmt: skip
    if layer.node.has_input(3):
        size = layer.gates * layer.hidden
        f.emit(f"sums += tl.load({f.pointer(build.input(3))} + (column // {size}) * {2 * size} + column % {size}, "
               "along, other=0).to(tl.float32)[None, :]")  # fmt: skip
    f.emit(f"tl.store({f.pointer(projected)} + row[:, None] * {layer.columns} + column[None, :], sums, "
           "down[:, None] & along[None, :])")  # fmt: skip
    f.launch(product((ceil_div(count, rows), across)))


def _begin(build: CudaBuilder, layer: Layer, target: Handle, index: int) -> None:
    """The state before the first step: input `index`, zeros without it."""
    f, at, mask, block = _elements(build, layer)
    read = f"tl.load({f.pointer(build.input(index))} + {at}, {mask}).to(tl.float32)" if layer.node.has_input(
        index) else f"tl.zeros(({block},), tl.float32)"  # fmt: skip
    f.emit(f"tl.store({f.pointer(target)} + {at}, {read}, {mask})")
    f.launch(ceil_div(layer.states, block))


def _end(build: CudaBuilder, layer: Layer, source: Handle, index: int, turn: int) -> None:
    """A state after the last step as output `index`."""
    f, at, mask, block = _elements(build, layer)
    start = f.extent(product((turn, layer.states)))
    f.emit(f"value = tl.load({f.pointer(source)} + {start} + {at}, {mask})")
    f.emit(f"tl.store({f.pointer(build.output(index))} + {at}, {converted('value', 'float32', layer.node.dtype)}, "
           f"{mask})")  # fmt: skip
    f.launch(ceil_div(layer.states, block))


def _elements(build: CudaBuilder, layer: Layer) -> tuple[FunctionBuilder, str, str, int]:
    block = block_for(layer.states, build.target.processors)
    f = build.function(warps=max(block // 256, 1))
    return f, *element_index(f, layer.states, block), block


# a step


@dataclass(frozen=True)
class Stage:
    """A function of one step being written: its gates' sums over the state before are in `sums{gate}`."""

    build: CudaBuilder
    f: FunctionBuilder
    layer: Layer
    projected: Handle

    def gate(self, gate: int, recurrent: str = "") -> str:
        """A variable with the gate's sum: input, biases, and the state before (or what is given in its place)."""
        f, layer = self.f, self.layer
        column = f"direction * {layer.gates * layer.hidden} + {gate * layer.hidden} + unit"
        x = f.let(f"tl.load({f.pointer(self.projected)} + (time * {f.extent(layer.batch)} + row)[:, None] * "
                  f"{layer.columns} + ({column})[None, :], inside, other=0)")  # fmt: skip
        return f.let(f"{x} + {recurrent or self.recurrent(gate)}")

    def recurrent(self, gate: int) -> str:
        """A variable with the state's part of a gate, and its bias."""
        f, layer = self.f, self.layer
        if not layer.node.has_input(3):
            return f"sums{gate}"
        size = layer.gates * layer.hidden
        place = f"direction * {2 * size} + {size + gate * layer.hidden} + unit"
        bias = f"tl.load({f.pointer(self.build.input(3))} + {place}, unit < {layer.hidden}, other=0)"
        return f.let(f"sums{gate} + {bias}.to(tl.float32)[None, :]")

    def peephole(self, part: int, state: str) -> str:
        """Text of the state times its weights for a gate; nothing without them."""
        layer = self.layer
        if not layer.node.has_input(7):
            return ""
        place = f"direction * {3 * layer.hidden} + {part * layer.hidden} + unit"
        pointer = self.f.pointer(self.build.input(7))
        return f" + {state} * tl.load({pointer} + {place}, unit < {layer.hidden}, other=0).to(tl.float32)[None, :]"

    def activated(self, which: int, text: str, limited: bool = True) -> str:
        """A variable with an activation of the value, which is kept within the clip."""
        clip = float(self.layer.settings["clip"])
        if limited and clip != float("inf"):
            text = f"tl.minimum(tl.maximum({text}, {-clip}), {clip})"
        return render(self.f, self.layer.activations[which], [self.f.let(text)], ["float32"])

    def states(self, handle: Handle, turn: str = "") -> str:
        """Text of the block's places in a buffer of states."""
        layer, f = self.layer, self.f
        offset = f"{turn} * {f.extent(layer.states)} + " if turn else ""
        line = f"(direction * {f.extent(layer.batch)} + row)[:, None] * {layer.hidden}"
        return f"{f.pointer(handle)} + {offset}{line} + unit[None, :]"

    def load(self, handle: Handle, turn: str = "") -> str:
        """A variable with the block's part of a buffer of states."""
        return self.f.let(f"tl.load({self.states(handle, turn)}, inside, other=0)")

    def finish(self) -> Callable[[int], Any]:
        """The function's launch for a step."""
        layer = self.layer
        blocks = product((ceil_div(layer.batch, _ROWS), ceil_div(layer.hidden, _UNITS)))
        return self.f.repeated(blocks, layer.directions)


def _open(build: CudaBuilder, layer: Layer, projected: Handle, source: tuple[Handle, str],
          gates: Sequence[int]) -> Stage:  # fmt: skip
    """A function that has found its place and summed the gates over the buffer of states."""
    f, hidden = build.function(warps=4, stages=3), layer.hidden
    across, deep = ceil_div(hidden, _UNITS), min(max(power_of_two(hidden), 16), _DEEP)
    f.emit(f"number = tl.program_id(0)\ndirection = tl.program_id(1)\ndepths = tl.arange(0, {deep})")
    f.emit(f"row = (number // {across}) * {_ROWS} + tl.arange(0, {_ROWS})\nheld = row < {f.extent(layer.batch)}")
    f.emit(f"unit = (number % {across}) * {_UNITS} + tl.arange(0, {_UNITS})")
    f.emit(f"inside = held[:, None] & (unit < {hidden})[None, :]")
    backward = {"forward": "0", "reverse": "1"}.get(layer.settings["direction"], "direction")
    f.emit(f"time = count + {backward} * ({layer.steps - 1} - 2 * count)\nturn = count % 2")
    for gate in gates:
        f.emit(f"sums{gate} = tl.zeros(({_ROWS}, {_UNITS}), tl.float32)")
    stage = Stage(build, f, layer, projected)
    handle, turn = source
    start = f"{turn} * {f.extent(layer.states)} + " if turn else ""
    with f.block(f"for start in range(0, {hidden}, {deep}):"):
        f.emit(f"depth = start + depths\nexists = depth < {hidden}")
        f.emit(f"before = tl.load({f.pointer(handle)} + {start}(direction * {f.extent(layer.batch)} + row)[:, None] * "
               f"{hidden} + depth[None, :], held[:, None] & exists[None, :], other=0)")  # fmt: skip
        for gate in gates:
            line = f"((direction * {layer.gates} + {gate}) * {hidden} + unit)[None, :] * {hidden}"
            f.emit(f"weight = tl.load({f.pointer(build.input(2))} + {line} + depth[:, None], "
                   f"(unit < {hidden})[None, :] & exists[:, None], other=0).to(tl.float32)")  # fmt: skip
            f.emit(f'sums{gate} = tl.dot(before, weight, sums{gate}, input_precision="{layer.precision}")')
    return stage


def _stages(build: CudaBuilder, layer: Layer, projected: Handle, hidden: Handle,
            state: Handle | None) -> list[Callable[[int], Any]]:  # fmt: skip
    """What is launched for every step, in order."""
    if layer.apart:
        size = product((layer.states, _FLOAT))
        kept, reset = build.temporary(size, "float32"), build.temporary(size, "float32")
        return [_gates_of_gru(build, layer, projected, hidden, (kept, reset)),
                _candidate_of_gru(build, layer, projected, hidden, (kept, reset))]  # fmt: skip
    stage = _open(build, layer, projected, (hidden, "turn"), range(layer.gates))
    before = stage.load(hidden, "turn")
    if layer.kind == "lstm":
        assert state is not None
        after = _lstm(stage, state)
    else:
        after = _gru(stage, before) if layer.kind == "gru" else stage.activated(0, stage.gate(0))
    _store(stage, hidden, before, after)
    return [stage.finish()]


def _lstm(stage: Stage, state: Handle) -> str:
    """The new hidden state; the cell state is stored."""
    f, cell = stage.f, stage.load(state)
    into = stage.activated(0, stage.gate(0) + stage.peephole(0, cell))
    forget = f"1.0 - {into}" if stage.layer.settings["input_forget"] else stage.activated(
        0, stage.gate(2) + stage.peephole(2, cell))  # fmt: skip
    new = f.let(f"({forget}) * {cell} + {into} * {stage.activated(1, stage.gate(3))}")
    out = stage.activated(0, stage.gate(1) + stage.peephole(1, new))
    f.emit(f"tl.store({stage.states(state)}, {_alive(stage, new, cell)}, inside)")
    return f.let(f"{out} * {stage.activated(2, new, limited=False)}")


def _gru(stage: Stage, before: str) -> str:
    """The new hidden state where the reset gate is applied to the candidate's sums."""
    update, reset = stage.activated(0, stage.gate(0)), stage.activated(0, stage.gate(1))
    candidate = stage.activated(1, stage.gate(2, f"{reset} * {stage.recurrent(2)}"))
    return stage.f.let(f"(1.0 - {update}) * {candidate} + {update} * {before}")


def _gates_of_gru(build: CudaBuilder, layer: Layer, projected: Handle, hidden: Handle,
                  buffers: tuple[Handle, Handle]) -> Callable[[int], Any]:  # fmt: skip
    """The update gate, and the reset gate times the state before."""
    stage = _open(build, layer, projected, (hidden, "turn"), (0, 1))
    update, reset = stage.activated(0, stage.gate(0)), stage.activated(0, stage.gate(1))
    stage.f.emit(f"tl.store({stage.states(buffers[0])}, {update}, inside)")
    stage.f.emit(f"tl.store({stage.states(buffers[1])}, {reset} * {stage.load(hidden, 'turn')}, inside)")
    return stage.finish()


def _candidate_of_gru(build: CudaBuilder, layer: Layer, projected: Handle, hidden: Handle,
                      buffers: tuple[Handle, Handle]) -> Callable[[int], Any]:  # fmt: skip
    """The new hidden state from what the first stage left."""
    stage = _open(build, layer, projected, (buffers[1], ""), (2,))
    before, update = stage.load(hidden, "turn"), stage.load(buffers[0])
    candidate = stage.activated(1, stage.gate(2))
    _store(stage, hidden, before, stage.f.let(f"(1.0 - {update}) * {candidate} + {update} * {before}"))
    return stage.finish()


def _alive(stage: Stage, new: str, old: str) -> str:
    """Text of the new value where the sequence is that long, of the old one beyond."""
    if not stage.layer.node.has_input(4):
        return new
    lengths = stage.f.pointer(stage.build.input(4))
    return f"tl.where((time < tl.load({lengths} + row, held, other=0))[:, None], {new}, {old})"


def _store(stage: Stage, hidden: Handle, before: str, after: str) -> None:
    """The hidden state for the next step, and its place in y, which is 0 beyond the sequence's length."""
    f, layer, y = stage.f, stage.layer, stage.build.output()
    f.emit(f"tl.store({stage.states(hidden, '(1 - turn)')}, {_alive(stage, after, before)}, inside)")
    line = f"((time * {layer.directions} + direction) * {f.extent(layer.batch)} + row)[:, None] * {layer.hidden}"
    shown = f.let(_alive(stage, after, f"tl.zeros_like({after})"))
    f.emit(f"tl.store({f.pointer(y)} + {line} + unit[None, :], {converted(shown, 'float32', layer.node.dtype)}, "
           "inside)")  # fmt: skip
