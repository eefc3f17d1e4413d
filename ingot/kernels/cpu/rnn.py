"""RNN: the inputs of all time steps projected by one matrix product, then the steps, in work items of a few sequences.

Hidden units are kept in blocks of a vector; a block's gates lie side by side in packed weights and in the projection:
weights [directions, blocks, k, gates, lanes], projection [steps · batch, directions, blocks, gates, lanes].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ingot.ir.expression import Expression, Input, Result, append, apply
from ingot.ir.ops import complete
from ingot.kernels import kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.copying import multiply
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.cpu.render import can_render
from ingot.kernels.cpu.rnn_cells import Cell, accumulate, emit_sequence
from ingot.kernels.cpu.strided import guess
from ingot.kernels.node import Node
from ingot.plan.extent import ceil_div, product

Array = np.ndarray[Any, Any]
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
ACCUMULATORS = {32: 24, 16: 12}  # by the number of vector registers
FLOPS_PER_LANE = 10_000  # a microsecond
CACHE_BYTES = 80_000  # a microsecond, of recurrence weights that stay in the second level
STEP_MICROSECONDS = 0.2


# what applies


def _settings(node: Node) -> dict[str, Any]:
    return complete("RNN", node.attributes)


def activation_of(name: str, alpha: float, beta: float) -> Expression:
    """One of ONNX's recurrent activations as an expression of %0."""
    x, dtype = Input(0), "float32"
    match name:
        case "Affine":
            return append(apply("Mul", x, alpha, dtype=dtype), "Add", Result(0), beta, dtype=dtype)
        case "ScaledTanh":
            inner = append(apply("Mul", x, beta, dtype=dtype), "Tanh", Result(0), dtype=dtype)
            return append(inner, "Mul", Result(1), alpha, dtype=dtype)
        case "ThresholdedRelu":
            return append(apply("Greater", x, alpha, dtype="bool"), "Where", Result(0), x, 0.0, dtype=dtype)
        case "Softsign":
            inner = append(apply("Abs", x, dtype=dtype), "Add", Result(0), 1.0, dtype=dtype)
            return append(inner, "Div", x, Result(1), dtype=dtype)
        case "LeakyRelu" | "Elu":
            return apply(name, x, dtype=dtype, alpha=alpha)
        case "HardSigmoid":
            return apply(name, x, dtype=dtype, alpha=alpha, beta=beta)
    return apply(name, x, dtype=dtype)


def _activations(node: Node) -> list[tuple[Expression, ...]]:
    """Per direction."""
    settings = _settings(node)
    entries = zip(settings["activations"], settings["alphas"], settings["betas"], strict=True)
    functions = [activation_of(*entry) for entry in entries]
    per = len(functions) // _directions(node)
    return [tuple(functions[k : k + per]) for k in range(0, len(functions), per)]


def _directions(node: Node) -> int:
    return int(node.input(1).shape[0])


def _constant(node: Node, index: int) -> bool:
    return not node.has_input(index) or node.input(index).constant is not None


def _applies(node: Node, isa: Isa) -> bool:
    weights_known = node.has_input(1) and node.has_input(2) and all(_constant(node, i) for i in (1, 2, 3, 7))
    if node.dtype != "float32" or not weights_known or (node.has_input(4) and node.input(4).dtype != "int32"):
        return False
    if not isinstance(node.input(0).shape[2], int):
        return False
    activations = _activations(node)
    return all(one == activations[0] for one in activations) and all(can_render(e, ["float32"]) for e in activations[0])


def _cost(node: Node, isa: Isa, rows: int) -> float:
    steps, batch, inputs = (guess(extent) for extent in node.input(0).shape)
    directions, gates, hidden = node.input(2).shape
    products = 2 * product((steps, batch, directions, gates, inputs + int(hidden)))
    groups = -(-batch // rows)
    sums = guess(products) * groups * rows / max(batch, 1) / (FLOPS_PER_LANE * isa.lanes)
    reads = 4 * guess(product((directions, gates, hidden))) * steps * groups / CACHE_BYTES
    return 1 + max(sums, reads) + STEP_MICROSECONDS * steps


# packing


def _blocked(matrix: Array, gates: int, hidden: int, lanes: int) -> Array:
    """[D, gates·hidden, K] → [D, blocks, K, gates, lanes], zeros beyond the last unit."""
    directions, _, depth = matrix.shape
    blocks = -(-hidden // lanes)
    padded = np.zeros((directions, gates, blocks * lanes, depth), np.float32)
    padded[:, :, :hidden] = matrix.reshape(directions, gates, hidden, depth)
    return np.ascontiguousarray(padded.reshape(directions, gates, blocks, lanes, depth).transpose(0, 2, 4, 1, 3))


def _biases(node: Node, settings: Mapping[str, Any], lanes: int) -> tuple[Array, Array]:
    """(what the projection starts from, what a GRU's recurrence of the candidate starts from)."""
    gates, hidden = GATES[settings["kind"]], settings["hidden"]
    size = gates * hidden
    bias = node.input(3).constant if node.has_input(3) else np.zeros((_directions(node), 2 * size), np.float32)
    assert bias is not None
    from_input, from_state = bias[:, :size].copy(), bias[:, size:].copy()
    apart = settings["kind"] == "gru" and settings["linear_before_reset"]
    joined = 2 * hidden if apart else size
    from_input[:, :joined] += from_state[:, :joined]
    candidate = from_state[:, size - hidden :]
    return (_blocked(from_input[..., None], gates, hidden, lanes),
            _blocked(np.ascontiguousarray(candidate)[..., None], 1, hidden, lanes))  # fmt: skip


def _recurrences(node: Node, settings: Mapping[str, Any], lanes: int) -> list[Array]:
    """Packed recurrence weights per stage: a GRU's candidate is a stage of its own where it needs the reset state."""
    matrix, hidden = node.input(2).constant, settings["hidden"]
    assert matrix is not None
    if settings["kind"] == "gru" and not settings["linear_before_reset"]:
        first, second = matrix[:, : 2 * hidden], matrix[:, 2 * hidden :]
        return [_blocked(first, 2, hidden, lanes), _blocked(second, 1, hidden, lanes)]
    return [_blocked(matrix, GATES[settings["kind"]], hidden, lanes)]


def _cell(build: KernelBuilder, node: Node, rows: int, projection: Handle) -> Cell:
    settings, lanes = _settings(node), build.isa.lanes
    gates = GATES[settings["kind"]]
    _, start = _biases(node, settings, lanes)
    peephole = node.input(7).constant if node.has_input(7) else None
    packed_peephole = None if peephole is None else _blocked(peephole[..., None], 3, settings["hidden"], lanes)
    return Cell(
        settings["kind"], settings["hidden"], lanes, rows, gates, _directions(node), settings["direction"],
        _activations(node)[0], settings["clip"], bool(settings["linear_before_reset"]), bool(settings["input_forget"]),
        tuple(build.pack(matrix) for matrix in _recurrences(node, settings, lanes)), projection, build.pack(start),
        None if packed_peephole is None else build.pack(packed_peephole),
        _optional(build, 4), _optional(build, 5), _optional(build, 6),
        tuple(build.output(i) for i in range(len(node.outputs))),
    )  # fmt: skip


def _optional(build: KernelBuilder, index: int) -> Handle | None:
    return build.input(index) if build.node.has_input(index) else None


# the kernel


def _rows(node: Node, isa: Isa) -> tuple[int, ...]:
    """Batch rows that share one pass over the recurrence weights."""
    most = min(ACCUMULATORS[isa.registers] // GATES[node.attributes["kind"]], 8)
    batch = node.input(0).shape[1]
    if isinstance(batch, int):
        return tuple(sorted({1, *(min(batch, rows) for rows in (most // 2 + 1, most))}))
    return (1, most // 2 + 1)


@kernel("RNN", on="cpu", when=_applies, cost=_cost, space={"rows": _rows})
def rnn_f32(build: KernelBuilder, node: Node, rows: int) -> None:
    """Projection of x by the input weights, then all time steps; `rows` sequences go through the steps together."""
    settings = _settings(node)
    blocks = -(-settings["hidden"] // build.isa.lanes)
    width = _directions(node) * blocks * GATES[settings["kind"]] * build.isa.lanes
    steps, batch = node.input(0).shape[:2]
    projection = build.temporary(product((steps, batch, width, 4)))
    _project(build, node, settings, projection, width)
    emit_sequence(build, _cell(build, node, rows, projection), steps, batch)


def _project(build: KernelBuilder, node: Node, settings: Mapping[str, Any], projection: Handle, width: int) -> None:
    """projection[m, n] = bias[n] + Σ x[m, k] · weight[k, n]; work items are (panel, block of rows), rows fastest."""
    gates, lanes = GATES[settings["kind"]], build.isa.lanes
    steps, batch, depth = node.input(0).shape
    weight, total = node.input(1).constant, product((steps, batch))
    assert weight is not None and isinstance(depth, int)
    packed = build.pack(_blocked(weight, gates, settings["hidden"], lanes))
    start, source = build.pack(_biases(node, settings, lanes)[0]), build.input(0)
    most = ACCUMULATORS[build.isa.registers] // gates
    tile = min(most, 8, total) if isinstance(total, int) else min(most, 8)
    tile = max(tile, 1)
    panel = gates * lanes * 4
    row_blocks = ceil_div(total, tile)

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        def item(number: Value) -> None:
            column, row = f.divide(number, f.extent(row_blocks)), f.remainder(number, f.extent(row_blocks))
            last = f.extent(total) - 1
            rows = [f.minimum(multiply(row, tile) + k, last) for k in range(tile)]
            inputs = [f.at(f.pointer(source), multiply(m, depth * 4)) for m in rows]
            biases = [f.load(f"<{lanes} x float>", f.pointer(start), column * panel + g * lanes * 4, align=lanes * 4)
                      for g in range(gates)]  # fmt: skip
            weights = f.at(f.pointer(packed), multiply(column, depth * panel))
            results = accumulate(f, inputs, weights, depth, [list(biases) for _ in rows])
            for m, values in zip(rows, results, strict=True):
                target = f.at(f.pointer(projection), _place(m, width, column, panel))
                for g, value in enumerate(values):
                    f.store(value, target, g * lanes * 4, align=lanes * 4)

        f.loop(begin, end, item)

    work = 2 * tile * gates * lanes * depth
    build.phase(product((width * 4 // panel, row_blocks)), body, grain=max(200_000 // work, 1))


def _place(row: Index, width: int, column: Index, panel: int) -> Index:
    return multiply(row, width * 4) + multiply(column, panel)
