"""A decoder as a graph over T tokens of S sequences: logits of R rows, keys and values in one pool per layer.

Inputs, all int32: token_ids, positions, slots, owners [T], tables [S, W], rows [R]; slots.1, tables.1 … where there are
several kinds of layers (`Decoder.windows`); then cache.0, cache.1 … [B, 2, G, block * depth], with B1 … in the place of
B for layers of those kinds, and states [E]. A negative position marks padding. Outputs, float32: logits [R, vocabulary]
and hidden [E, hidden], the hidden states, behind the last norm, of the tokens that `states` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from ingot.ir.graph import make_node, set_type
from ingot.ir.ops_paged import line_of
from ingot.ir.ops_sample import DRAW, EDIT
from ingot.ir.ops_table import TensorType
from ingot.llm.batch import input_of
from ingot.llm.decoder import Activation, Decoder, Experts, Layer, Matrix, Scale
from ingot.llm.formats import Format, Role

Array = np.ndarray[Any, Any]
_ACTIVATIONS: dict[Activation, str] = {
    "silu": "Sigmoid {0} -> float32; Mul {0} {1} -> float32",
    "gelu": "Gelu {0} -> float32",
    "gelu_tanh": "GeluTanh {0} -> float32",
    "relu": "Relu {0} -> float32",
}
BLOCK = 16  # tokens
_SCALE = f"Max %0 1e-30 -> float32; Mul $0 {1 / 127!r} -> float32"  # of a row, by its largest magnitude
_ROUND = "Quantize %0 %1 0 -> int8"
_TO_FLOAT = "Cast %0 -> float32; Mul $0 %1 -> float32"
GATHERED = ("logits.parts", "logits.rows", "logits")  # nodes behind the ranks' own logits


@dataclass(eq=False)
class Epilogue:
    """An expression that grows by one instruction after the other, with its operands after %0."""

    lines: list[str] = field(default_factory=list)
    extras: list[ir.Value] = field(default_factory=list)

    @property
    def last(self) -> str:
        """What the next instruction continues from."""
        return f"${len(self.lines) - 1}" if self.lines else "%0"

    def operand(self, value: ir.Value) -> str:
        """The name of one more operand."""
        self.extras.append(value)
        return f"%{len(self.extras)}"

    def then(self, op: str, *operands: str) -> None:
        """op(what is there, operands)"""
        self.lines.append(" ".join([op, self.last, *operands, "-> float32"]))

    def activate(self, kind: Activation) -> None:
        """The activation of what is there."""
        before, after = self.last, f"${len(self.lines)}"
        self.lines += [line.format(before, after).strip() for line in _ACTIVATIONS[kind].split(";")]

    def cap(self, limit: float) -> None:
        """limit * tanh(what is there / limit)"""
        if limit:
            self.then("Mul", repr(1 / limit))
            self.then("Tanh")
            self.then("Mul", repr(limit))

    @property
    def text(self) -> str:
        """The expression."""
        return "; ".join(self.lines)


@dataclass(eq=False)
class Writer:
    """Adds nodes and constants to a graph; `format` says how matrices are kept. inside: rows are rounded inside of
    products, not by steps before them."""

    decoder: Decoder
    format: Format
    graph: ir.Graph
    inside: bool = False
    _rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = field(default_factory=dict)

    def constant(self, array: Array, name: str) -> ir.Value:
        """An initializer; the array is not copied."""
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def add(self, op: str, inputs: Sequence[ir.Value | None], name: str, outputs: int = 1,
            **attributes: Any) -> ir.Node:  # fmt: skip
        """A canonical node at the end; its outputs are named after it."""
        node = make_node(op, inputs, attributes, outputs=outputs, name=name)
        self.graph.append(node)
        for index, value in enumerate(node.outputs):
            value.name = name if index == 0 else f"{name}.{index}"
        return node

    def value(self, op: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        """The only output of a new node."""
        return self.add(op, inputs, name, **attributes).outputs[0]

    def linear(
        self, x: ir.Value, matrix: Matrix, name: str, epilogue: Epilogue | None = None, role: Role = "plain"
    ) -> ir.Value:
        """x @ matrix with its bias, then the epilogue's instructions."""
        whole = Epilogue()
        if self.format.narrows(matrix, role) and not self.inside:
            return self._narrow_linear(x, matrix, name, epilogue)
        op, weights, attributes = self.format.linear(matrix, role)
        operands = [None if w is None else self.constant(w, f"{name}.{part}")
                    for part, w in weights.items() if part not in ("columns", "order")]  # fmt: skip
        if weights.get("order") is not None:
            order = self.constant(np.asarray(weights["order"]), f"{name}.order")
            x = self.value("Gather", [x, order], f"{name}.ordered", axis=1)
        if weights.get("columns") is not None:
            whole.then("Mul", whole.operand(self.constant(np.asarray(weights["columns"]), f"{name}.columns")))
        if matrix.biases:
            bias = np.concatenate(matrix.biases).astype(np.float32)
            whole.then("Add", whole.operand(self.constant(bias, f"{name}.bias")))
        if epilogue is not None:
            whole = _after(whole, epilogue)
        return self.value(op, [x, *operands, *whole.extras], name, **attributes, epilogue=whole.text)

    def _narrow_linear(self, x: ir.Value, matrix: Matrix, name: str, epilogue: Epilogue | None) -> ir.Value:
        """The same in integers: x rounded to eight bits row by row. Rows' scales come after the product."""
        if x not in self._rounded:
            self._rounded[x] = self._rows_rounded(x)
        rows, scale = self._rounded[x]
        _, weights, _ = self.format.linear(matrix)
        weight, columns = (self.constant(np.asarray(weights[part]), f"{name}.{part}") for part in ("weight", "columns"))
        product = self.value("Linear", [rows, weight, columns], f"{name}.product", epilogue=_TO_FLOAT)
        whole = Epilogue()
        whole.then("Mul", whole.operand(scale))
        if matrix.biases:
            bias = np.concatenate(matrix.biases).astype(np.float32)
            whole.then("Add", whole.operand(self.constant(bias, f"{name}.bias")))
        if epilogue is not None:
            whole = _after(whole, epilogue)
        return self.value("Pointwise", [product, *whole.extras], name, expression=whole.text)

    def _rows_rounded(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(x [T, K] as int8, scales [T, 1])"""
        size = self.value("Pointwise", [x], f"{x.name}.size", expression="Abs %0 -> float32")
        largest = self.value("Reduce", [size], f"{x.name}.largest", kind="max", axes=(1,), keepdims=1)
        scale = self.value("Pointwise", [largest], f"{x.name}.scale", expression=_SCALE)
        return self.value("Pointwise", [x, scale], f"{x.name}.rounded", expression=_ROUND), scale

    def norm(self, x: ir.Value, scale: Scale, name: str, residual: ir.Value | None = None) -> ir.Value:
        """The decoder's norm of x, plus the residual."""
        weight = scale.weight.astype(np.float32) + np.float32(scale.offset)
        operands: list[ir.Value | None] = [x, self.constant(weight, f"{name}.scale")]
        operands.append(None if scale.bias is None else self.constant(scale.bias.astype(np.float32), f"{name}.bias"))
        text = "" if residual is None else "Add %0 %1 -> float32"
        extras = [] if residual is None else [residual]
        return self.value("Norm", [*operands, *extras], name, kind=self.decoder.norm, axis=1, groups=1,
                          epsilon=self.decoder.epsilon, epilogue=text)  # fmt: skip


def _after(first: Epilogue, second: Epilogue) -> Epilogue:
    """The instructions of `first`, then those of `second` on its result."""
    shift, operands = len(first.lines), len(first.extras)

    def moved(word: str) -> str:
        if word == "%0":
            return first.last
        if word[0] == "$":
            return f"${int(word[1:]) + shift}"
        return f"%{int(word[1:]) + operands}" if word[0] == "%" else word

    lines = [" ".join(map(moved, line.split())) for line in second.lines]
    return Epilogue([*first.lines, *lines], [*first.extras, *second.extras])


@dataclass(frozen=True, eq=False)
class Step:
    """The graph's inputs, slots and tables of each kind of layers, and the rope tables as constants."""

    token_ids: ir.Value
    positions: ir.Value
    owners: ir.Value
    rows: ir.Value
    slots: tuple[ir.Value, ...]
    tables: tuple[ir.Value, ...]
    caches: tuple[ir.Value, ...]
    angles: dict[str, tuple[ir.Value, ir.Value]]


def graph_of(decoder: Decoder, kept: Format, name: str, inside: bool = False) -> ir.Model:
    """The whole step as a model of canonical operators; inside: as Writer's."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21, "ingot": 1}, name=name)
    writer = Writer(decoder, kept, graph, inside)
    step = _inputs(writer)
    stream = _embedded(writer, step)
    for number, layer in enumerate(decoder.layers):
        stream = _layer(writer, step, layer, number, stream)
    picked = writer.value("Gather", [stream, step.rows], "picked", axis=0)
    ending = Epilogue()
    ending.cap(decoder.final_softcap)
    graph.outputs.append(_logits(writer, writer.norm(picked, decoder.final, "final.norm"), ending))
    seen = writer.value("Gather", [stream, _input(writer.graph, "states", "int32", "E")], "seen", axis=0)
    graph.outputs.append(writer.norm(seen, decoder.final, "hidden"))
    return ir.Model(graph, ir_version=10)


def draw_tokens(model: ir.Model, vocabulary: int) -> None:
    """With inputs `draws` [Q, DRAW], one for each row or none, `edits` [D, EDIT], `masks` [M, words] and `told` [L]
    more; outputs `chosen` [R] and `likely` [L, LIKELY]."""
    graph, logits = model.graph, model.graph.outputs[0]
    shapes = {"draws": ("Q", DRAW), "edits": ("D", EDIT), "masks": ("M", -(-vocabulary // 32))}
    given = [_input(graph, name, "int32", *shape) for name, shape in shapes.items()]
    chosen = _output(graph, "Sample", [logits, *given], "chosen")
    _output(graph, "Likely", [logits, chosen, _input(graph, "told", "int32", "L")], "likely")


def _output(graph: ir.Graph, op: str, inputs: list[ir.Value], name: str) -> ir.Value:
    """A node whose output is one of the graph's."""
    node = make_node(op, inputs, name=name)
    node.outputs[0].name = name
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    return node.outputs[0]


def _logits(writer: Writer, x: ir.Value, ending: Epilogue) -> ir.Value:
    """Of all tokens, on every rank, whoever has their columns."""
    decoder = writer.decoder
    outputs = decoder.head.outputs
    if outputs == decoder.vocabulary:
        return writer.linear(x, decoder.head, "logits", ending, "head")
    own = writer.linear(x, decoder.head, "logits.own", ending, "head")
    parts = writer.value("AllGather", [own], "logits.parts", ranks=decoder.ranks)
    rows = writer.value("Transpose", [parts], "logits.rows", perm=(1, 0, 2))
    return writer.value("View", [rows], "logits", shape=("R", decoder.vocabulary))


def _input(graph: ir.Graph, name: str, dtype: str, *shape: int | str) -> ir.Value:
    """An input of the graph."""
    value = ir.Value(name=name)
    set_type(value, TensorType(dtype, shape))
    graph.inputs.append(value)
    return value


def _inputs(writer: Writer) -> Step:
    decoder, given = writer.decoder, partial(_input, writer.graph)
    width = -(-decoder.context // BLOCK)
    ids, positions, slots, owners = (
        given(name, "int32", "T") for name in ("token_ids", "positions", "slots", "owners")
    )
    tables, rows = given("tables", "int32", "S", width), given("rows", "int32", "R")
    more = [(given(input_of("slots", kind), "int32", "T"), given(input_of("tables", kind), "int32", "S", width))
            for kind in range(1, len(decoder.windows))]  # fmt: skip
    pool = (2, decoder.groups, line_of(BLOCK, decoder.depth, writer.format.cache))
    caches = tuple(given(f"cache.{n}", writer.format.cache, f"B{decoder.kind_of(layer) or ''}", *pool)
                   for n, layer in enumerate(decoder.layers))  # fmt: skip
    angles = {
        kind: (writer.constant(cosine, f"rope.{kind}.cosine"), writer.constant(sine, f"rope.{kind}.sine"))
        for kind, (cosine, sine) in decoder.rope.items()
    }
    slots_of, tables_of = zip((slots, tables), *more, strict=True)
    return Step(ids, positions, owners, rows, slots_of, tables_of, caches, angles)


def _embedded(writer: Writer, step: Step) -> ir.Value:
    decoder = writer.decoder
    table = writer.format.rows(decoder.embedding)
    operands = [writer.value("Gather", [writer.constant(table, "embedding"), step.token_ids], "embedded", axis=0)]
    chain = Epilogue()
    if table.dtype != np.float32:
        chain.then("Cast")
    if decoder.embedding_scale != 1.0:
        chain.then("Mul", repr(float(np.float32(decoder.embedding_scale))))
    if decoder.places is not None:
        places = writer.constant(decoder.places[: decoder.context].astype(np.float32), "places")
        chain.then("Add", "%1")
        operands.append(writer.value("Gather", [places, step.positions], "placed", axis=0))
    return writer.value("Pointwise", operands, "stream", expression=chain.text) if chain.lines else operands[0]


def _layer(writer: Writer, step: Step, layer: Layer, number: int, stream: ir.Value) -> ir.Value:
    name = f"layers.{number}"
    stream = _attention(writer, step, layer, number, stream)
    x = writer.norm(stream, layer.before_network, f"{name}.network.norm")
    if layer.experts is not None:
        return _experts(writer, layer.experts, x, stream, f"{name}.experts")
    network = Epilogue()
    assert layer.up is not None and layer.down is not None
    if layer.gate is None:
        network.activate(writer.decoder.activation)
        inner = writer.linear(x, layer.up, f"{name}.network.up", network)
    else:
        up = writer.linear(x, layer.up, f"{name}.network.up")
        network.activate(writer.decoder.activation)
        network.then("Mul", network.operand(up))
        inner = writer.linear(x, layer.gate, f"{name}.network.gate", network)
    return _joined(writer, inner, layer.down, layer.after_network, stream, f"{name}.network.down")


def _joined(writer: Writer, x: ir.Value, matrix: Matrix, scale: Scale | None, stream: ir.Value, name: str) -> ir.Value:
    """The stream plus x @ matrix, normalised first where there is a scale."""
    if scale is not None:
        return writer.norm(_summed(writer, writer.linear(x, matrix, name)), scale, f"{name}.norm", stream)
    return _summed(writer, writer.linear(x, matrix, name, _with_stream(writer, stream)))


def _with_stream(writer: Writer, stream: ir.Value) -> Epilogue:
    """Adds the stream; of several ranks each adds its share, so that all run the same code."""
    ending, ranks = Epilogue(), writer.decoder.ranks
    operand = ending.operand(stream)
    if ranks == 1:
        ending.then("Add", operand)
    else:
        ending.lines += [f"Mul {operand} {1 / ranks!r} -> float32", "Add %0 $0 -> float32"]
    return ending


def _summed(writer: Writer, part: ir.Value) -> ir.Value:
    """The sum of all ranks' parts."""
    ranks = writer.decoder.ranks
    return part if ranks == 1 else writer.value("AllReduce", [part], f"{part.name}.sum", ranks=ranks)


def _attention(writer: Writer, step: Step, layer: Layer, number: int, stream: ir.Value) -> ir.Value:
    decoder, name, kind = writer.decoder, f"layers.{number}.attention", writer.decoder.kind_of(layer)
    x = writer.norm(stream, layer.before_attention, f"{name}.norm")
    projected = _projected(writer, x, layer.projection, f"{name}.projection")
    cosine, sine = step.angles[layer.rope] if decoder.rope else (None, None)
    scales = [None if s is None else writer.constant(s.weight.astype(np.float32) + np.float32(s.offset), f"{name}.{n}")
              for n, s in (("query_scale", layer.query_scale), ("key_scale", layer.key_scale))]  # fmt: skip
    update = writer.add(
        "CacheUpdate", [step.caches[number], projected, step.positions, step.slots[kind], cosine, sine, *scales],
        f"{name}.cache", outputs=2, heads=decoder.heads, groups=decoder.groups, epsilon=decoder.epsilon,
    )  # fmt: skip
    cache, query = update.outputs
    seen = writer.value(
        "PagedAttention", [query, cache, step.positions, step.owners, step.tables[kind]], name,
        scale=decoder.scale, window=layer.window, softcap=decoder.softcap,
    )  # fmt: skip
    flat = writer.value("View", [seen], f"{name}.flat", shape=("T", decoder.heads * decoder.depth))
    return _joined(writer, flat, layer.output, layer.after_attention, stream, f"{name}.output")


def _projected(writer: Writer, x: ir.Value, matrix: Matrix, name: str) -> ir.Value:
    """Queries, keys and values side by side."""
    if not writer.format.parts_keys(matrix):
        return writer.linear(x, matrix, name, role="keys")
    queries = writer.decoder.heads * writer.decoder.depth
    parts = [writer.linear(x, matrix.picked([(0, queries)]), f"{name}.queries"),
             writer.linear(x, matrix.picked([(queries, matrix.outputs)]), f"{name}.keys", role="keys")]  # fmt: skip
    return writer.value("Concat", parts, name, axis=1)


def _experts(writer: Writer, experts: Experts, x: ir.Value, stream: ir.Value, name: str) -> ir.Value:
    scores = writer.linear(x, Matrix((experts.router,)), f"{name}.scores", role="router")
    stacks, scales = list[ir.Value](), list[ir.Value]()
    for which, part in (("gate", experts.gates), ("up", experts.ups), ("down", experts.downs)):
        weights, scale = writer.format.stack(part)
        stacks.append(writer.constant(weights, f"{name}.{which}"))
        scales += [] if scale is None else [writer.constant(scale, f"{name}.{which}.scale")]
    activation = Epilogue()
    activation.activate(writer.decoder.activation)
    mixed = writer.value("Experts", [x, scores, *stacks, *scales], name, chosen=experts.chosen,
                         normalised=int(experts.normalised), activation=activation.text)  # fmt: skip
    whole = _with_stream(writer, stream).text
    return _summed(writer, writer.value("Pointwise", [mixed, stream], f"{name}.stream", expression=whole))
