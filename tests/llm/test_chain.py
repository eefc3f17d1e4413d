"""Projections that follow each other become a chain where attention comes behind; numbers stay, nothing is left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from ingot.dtypes import numpy_dtype
from ingot.ir.graph import attributes, make_node, set_type
from ingot.ir.ops_table import TensorType
from ingot.ir.oracle import evaluate_model
from ingot.llm.build import BuildOptions, graph_for
from ingot.llm.chain import chain_projections
from ingot.llm.formats import FORMATS, with_cache
from ingot.llm.models import decoder_of
from ingot.llm.shards import shard
from ingot.llm.weights import open_checkpoint
from tests.llm.checkpoints import write_family
from tests.llm.test_cached_attention import BLOCK, DEPTH, GROUPS, HEADS, OPTIONS, UPDATE

Array = np.ndarray[Any, Any]
WIDE, INNER, LAST = 8, 12, (HEADS + 2 * GROUPS) * DEPTH
GATED = "Sigmoid %0 -> float32; Mul $0 %0 -> float32; Mul $1 %1 -> float32"
JOINED = "Add %0 %1 -> float32"


class Layer:
    """output with a residual, gate, down with a residual, the next layer's projection, an update of its cache."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(6)
        self.fed: dict[str, Array] = {}
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": 21, "ingot": 1}, name="layer")
        self.x, self.stream = self.input("x", (2, WIDE)), self.input("stream", (2, WIDE))
        self.output = self.product("output", self.x, WIDE, 1, False, JOINED, self.stream)
        self.gate = self.product("gate", self.output, INNER, 2, True, GATED)
        self.down = self.product("down", self.gate, WIDE, 1, False, JOINED, self.output)
        self.last = self.product("last", self.down, LAST, 1, True, "")
        self.behind = self.update(self.last)

    def input(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        self.fed[name] = self.rng.standard_normal(shape).astype(np.float32)
        return self.known(name, self.fed[name])

    def known(self, name: str, array: Array) -> ir.Value:
        value = ir.Value(name=name)
        set_type(value, TensorType(array.dtype.name, array.shape))
        self.graph.inputs.append(value)
        self.fed[name] = array
        return value

    def constant(self, name: str, array: Array) -> ir.Value:
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        set_type(value, TensorType(array.dtype.name, array.shape))
        self.graph.register_initializer(value)
        return value

    def product(self, name: str, x: ir.Value, columns: int, parts: int, normed: bool, text: str,
                *operands: ir.Value | None, early: int = 1) -> ir.Value:  # fmt: skip
        assert x.shape is not None
        depth = int(x.shape[-1])  # type: ignore[arg-type]
        weight = self.constant(f"{name}.weight", self.rng.standard_normal((depth, parts * columns)).astype(np.float32))
        norm = self.constant(f"{name}.norm", self.rng.standard_normal(depth).astype(np.float32)) if normed else None
        stated = {"parts": parts, "epsilon": 1e-5 * columns, "expression": text, "early": early}
        inputs = [x, weight, *([norm] if norm or operands else []), *operands]
        return self.node("Projection", inputs, stated, name)[0]

    def node(self, op: str, inputs: list[Any], stated: dict[str, Any], name: str, outputs: int = 1) -> Any:
        node = make_node(op, inputs, stated, outputs=outputs, name=name)
        self.graph.append(node)
        for number, value in enumerate(node.outputs):
            value.name = f"{name}.{number}"
        return node.outputs

    def update(self, projected: ir.Value) -> ir.Node:
        cache = np.zeros((3, 2, GROUPS, BLOCK * DEPTH), np.float32)
        inputs = [self.known("cache", cache), projected, self.known("positions", np.array([17, 18], np.int32)),
                  self.known("slots", np.array([1, 2], np.int32))]  # fmt: skip
        made = self.node("CacheUpdate", inputs, UPDATE, "update", 2)
        self.graph.outputs.extend(made)
        return made[0].producer()  # type: ignore[no-any-return]

    def pointwise(self, name: str, x: ir.Value) -> ir.Value:
        return self.node("Pointwise", [x], {"expression": "Relu %0 -> float32"}, name)[0]  # type: ignore[no-any-return]

    def before(self, value: ir.Value, of: ir.Value) -> None:
        """Moves the node that makes the one before the other's."""
        node, other = value.producer(), of.producer()
        assert node is not None and other is not None
        self.graph.remove(node)
        self.graph.insert_before(other, node)

    def names(self) -> list[str]:
        """Of its operators after the rewrite, which changes no number and leaves nothing that nobody reads."""
        model = ir.Model(self.graph, ir_version=10)
        wanted = evaluate_model(model, self.fed)
        count = chain_projections(model)
        found = evaluate_model(model, self.fed)
        assert list(found) == list(wanted)
        for name in found:
            np.testing.assert_array_equal(found[name], wanted[name])
        assert all(any(v.uses() or v.is_graph_output() for v in node.outputs) for node in self.graph)
        self.chains = [node for node in self.graph if node.op_type == "ProjectionChain"]
        assert len(self.chains) == count
        return [node.op_type for node in self.graph]

    def stated(self, key: str) -> Any:
        (chain,) = self.chains
        return attributes(chain)[key]


def _plain(layer: Layer) -> None:
    pass


def _told(layer: Layer) -> None:
    layer.graph.outputs.append(layer.gate)


def _read_elsewhere(layer: Layer) -> None:
    reader = layer.pointwise("elsewhere", layer.output)
    layer.before(reader, layer.down)
    layer.graph.outputs.append(reader)


def _second_reader_of_rows(layer: Layer) -> None:
    """A product whose result is no row of the chain's: it reads its row."""
    layer.graph.outputs.append(layer.node("View", [layer.down], {"shape": (WIDE * 2,)}, "view")[0])


def _known_before(layer: Layer) -> None:
    early = layer.pointwise("early", layer.x)
    layer.before(early, layer.output)
    layer.down.producer().replace_input_with(3, early)  # type: ignore[union-attr]


@pytest.mark.parametrize(("change", "results", "sources", "others"), [
    (_plain, (3,), (-1, 0), []), (_told, (1, 3), (-1, 0), []), (_read_elsewhere, (0, 3), (-1, 0), ["Pointwise"]),
    (_second_reader_of_rows, (2, 3), (-1, 0), ["View"]), (_known_before, (3,), (-1, -1), ["Pointwise"]),
])  # fmt: skip
def test_a_layer_becomes_a_chain(change: Any, results: tuple[int, ...], sources: tuple[int, ...],
                                 others: list[str]) -> None:  # fmt: skip
    """What others read are its results."""
    layer = Layer()
    change(layer)
    assert sorted(layer.names()) == sorted(["ProjectionChain", "CacheUpdate", *others])
    assert layer.stated("results") == results and layer.stated("sources") == sources
    assert layer.stated("parts") == (1, 2, 1, 1) and layer.stated("norms") == (0, 1, 0, 1)
    assert layer.stated("reads") == (1, 0, 1, 0) and layer.stated("expressions") == (JOINED, GATED, JOINED, "")
    np.testing.assert_allclose(layer.stated("epsilons"), [8e-5, 12e-5, 8e-5, LAST * 1e-5], rtol=1e-6)


def test_a_chain_begins_early_where_all_its_products_do() -> None:
    for early in (1, 0):
        layer = Layer()
        layer.gate.producer().attributes.add(ir.AttrInt64("early", early))  # type: ignore[union-attr]
        layer.names()
        assert layer.stated("early") == early


def _ends_elsewhere(layer: Layer) -> None:
    """As the last layer does."""
    layer.behind.replace_input_with(1, layer.input("other", (2, LAST)))
    layer.graph.outputs.append(layer.last)


def _forked(layer: Layer) -> None:
    layer.graph.outputs.append(layer.product("beside", layer.down, 4, 1, False, ""))


def _later(layer: Layer) -> None:
    """Made of the rows that the chain would make."""
    late = layer.pointwise("late", layer.output)
    layer.before(late, layer.down)
    layer.down.producer().replace_input_with(3, late)  # type: ignore[union-attr]


def _later_norm(layer: Layer) -> None:
    (late,) = layer.node("Reduce", [layer.output], {"kind": "mean", "axes": (0,), "keepdims": 0}, "late")
    layer.before(late, layer.gate)
    layer.gate.producer().replace_input_with(2, late)  # type: ignore[union-attr]


def _interrupted(layer: Layer) -> None:
    between = layer.pointwise("between", layer.gate)
    layer.before(between, layer.down)
    layer.down.producer().replace_input_with(0, between)  # type: ignore[union-attr]


@pytest.mark.parametrize(("change", "chains", "alone"), [
    (_ends_elsewhere, [], 4), (_forked, [], 5), (_later, [], 4), (_later_norm, [], 4), (_interrupted, [2], 2),
])  # fmt: skip
def test_products_that_cannot_be_in_one_stay(change: Any, chains: list[int], alone: int) -> None:
    layer = Layer()
    change(layer)
    names = layer.names()
    assert names.count("Projection") == alone
    assert [len(attributes(chain)["parts"]) for chain in layer.chains] == chains


def test_an_operand_that_is_missing_keeps_products_apart() -> None:
    """Wherever it is missing: inputs of a chain are all there."""
    for place in ("output", "down"):
        layer = Layer()
        getattr(layer, place).producer().replace_input_with(3, None)
        chain_projections(ir.Model(layer.graph, ir_version=10))
        kept = [node.name for node in layer.graph if node.op_type == "Projection"]
        assert place in kept, "the graph is no layer any more, but nothing was made of it"
        assert all(None not in node.inputs for node in layer.graph if node.op_type == "ProjectionChain")


def test_one_product_is_no_chain() -> None:
    layer = Layer()
    layer.graph.outputs.append(layer.last)
    alone = layer.product("alone", layer.x, LAST, 1, False, "")
    layer.before(alone, layer.output)
    layer.behind.replace_input_with(1, alone)
    assert layer.names().count("Projection") == 5 and not layer.chains


CHAINED = ("llama", "llama_tied_biased", "mistral", "qwen2", "qwen3", "gemma", "phi3")
NORMS_BEHIND = ("gemma2", "gemma3_text", "gpt2", "qwen3_moe", "mixtral")  # norms that are no scale, or experts, between


def _graph(folder: Path, family: str, precision: str = "fp8", **changes: Any) -> tuple[ir.Model, int]:
    options: BuildOptions = replace(OPTIONS, precision=precision, **changes)
    decoder = decoder_of(open_checkpoint(write_family(folder, family)), 64)
    return graph_for(decoder, with_cache(FORMATS[precision], None), family, options), len(decoder.layers)


@pytest.mark.parametrize(("family", "precision", "target", "variants", "chains"), [
    *((family, "fp8", "cuda:sm_90", (), True) for family in CHAINED),
    *((family, "fp8", "cuda:sm_90", (), False) for family in NORMS_BEHIND),
    ("llama", "fp8", "cuda:sm_100", (), True), ("llama", "fp8", "cuda", ("sm_90", "sm_100"), True),
    ("llama", "fp8_cache", "cuda:sm_90", (), True), ("llama", "fp8", "cuda", ("sm_90", "sm_120"), False),
    ("llama", "fp8", "cuda:sm_89", (), False), ("llama", "fp8", "cuda:sm_120", (), False),
    ("llama", "bf16", "cuda:sm_90", (), False), ("llama", "w8a8", "cuda:sm_90", (), False),
    ("llama", "bf16", "cpu", (), False),
])  # fmt: skip
def test_graphs_that_have_chains(family: str, precision: str, target: str, variants: tuple[str, ...], chains: bool,
                                 tmp_path: Path) -> None:  # fmt: skip
    """One between attention of two layers each, where nothing but products is there and all of them stream float8."""
    model, layers = _graph(tmp_path, family, precision, target=target, variants=variants)
    found = [node for node in model.graph if node.op_type == "ProjectionChain"]
    assert len(found) == (layers - 1 if chains else 0)
    assert all(attributes(node)["parts"] == (1, 2, 1, 1) and attributes(node)["results"] == (2, 3) for node in found)
    assert all(any(v.uses() or v.is_graph_output() for v in node.outputs) for node in model.graph)


def test_steps_of_many_tokens_have_none(tmp_path: Path) -> None:
    """Their weights lie in lines, where tiles find them sooner."""
    decoder = decoder_of(open_checkpoint(write_family(tmp_path, "llama")), 64)
    options = replace(OPTIONS, precision="fp8", typical=32)
    names = [node.op_type for node in graph_for(decoder, with_cache(FORMATS["fp8"], None), "llama", options).graph]
    assert "CachedAttention" in names and "ProjectionChain" not in names


def test_ranks_have_none(tmp_path: Path) -> None:
    """They add what they have behind every other product."""
    decoder = shard(decoder_of(open_checkpoint(write_family(tmp_path, "llama")), 64), 0, 2)
    options = replace(OPTIONS, precision="fp8", ranks=2)
    names = [node.op_type for node in graph_for(decoder, with_cache(FORMATS["fp8"], None), "llama", options).graph]
    assert "AllReduce" in names and "CachedAttention" in names and "ProjectionChain" not in names


def test_a_familys_chains_give_the_numbers_of_its_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole step of three tokens, two of them of one sequence, with the weights of the checkpoint."""
    chains, _ = _graph(tmp_path, "qwen2")
    monkeypatch.setattr("ingot.llm.build.chain_projections", lambda model: 0)
    plain, _ = _graph(tmp_path, "qwen2")
    given = {"token_ids": [7, 9, 11], "positions": [0, 1, 0], "slots": [16, 17, 32], "owners": [0, 0, 1],
             "tables": [[1, 0, 0, 0], [2, 0, 0, 0]], "rows": [1, 2], "states": [0]}  # fmt: skip
    feeds = {value.name or "": _fed(value, given) for value in plain.graph.inputs}
    ours, theirs = evaluate_model(chains, feeds), evaluate_model(plain, feeds)
    assert list(ours) == list(theirs) and np.ptp(np.asarray(ours["hidden"], np.float32)) > 1
    for name in ours:
        np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(theirs[name]))


def _fed(value: ir.Value, given: dict[str, Any]) -> Array:
    """What is given, or nothing: caches of three blocks, no draws."""
    assert value.shape is not None and value.dtype is not None
    shape = [{"B": 3}.get(str(extent), 0) if not isinstance(extent, int) else extent for extent in value.shape]
    dtype = numpy_dtype(value.dtype.numpy().name)
    return np.asarray(given[value.name], dtype) if value.name in given else np.zeros(shape, dtype)
