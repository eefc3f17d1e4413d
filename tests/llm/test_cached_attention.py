"""The cache's update and attention become one operator where nobody else reads what lies between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from ingot.dtypes import numpy_dtype
from ingot.ir.graph import attributes, make_node, set_type
from ingot.ir.ops import meaning
from ingot.ir.ops_table import TensorType
from ingot.ir.oracle import evaluate_model
from ingot.llm import build
from ingot.llm.build import BuildOptions, build_llm, graph_for
from ingot.llm.cached_attention import attend_at_once
from ingot.llm.formats import FORMATS, with_cache
from ingot.llm.models import decoder_of
from ingot.llm.runner import EngineRunner
from ingot.llm.weights import open_checkpoint
from ingot.plan.plan import GraphSegment
from tests.llm import interpreted
from tests.llm.checkpoints import LOGITS, TOKENS, write_family
from tests.llm.test_families import batch_of

Array = np.ndarray[Any, Any]
HEADS, GROUPS, DEPTH, BLOCK = 4, 2, 8, 16
UPDATE = {"heads": HEADS, "groups": GROUPS, "epsilon": 1e-5}
READING = {"scale": 0.3, "window": 9, "softcap": 4.0}
OPTIONS = BuildOptions(target="cuda:sm_90", context=64, token_budget=48, sequence_budget=4, level=0)


class Written:
    """A layer's update and attention."""

    def __init__(self, pool: str = "float32", scaled: bool = False, half: int = 4) -> None:
        rng = np.random.default_rng(2)
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": 21, "ingot": 1}, name="attention")
        numbers: dict[str, Array | None] = {
            "cache": rng.standard_normal((3, 2, GROUPS, BLOCK * DEPTH)).astype(numpy_dtype(pool)),
            "projected": rng.standard_normal((2, (HEADS + 2 * GROUPS) * DEPTH)).astype(np.float32),
            "positions": np.array([17, 18], np.int32), "slots": np.array([1, 2], np.int32),
            "owners": np.zeros(2, np.int32), "tables": np.array([[2, 0]], np.int32),
            "cosine": rng.standard_normal((32, half)).astype(np.float32) if half else None,
            "sine": rng.standard_normal((32, half)).astype(np.float32) if half else None,
        }  # fmt: skip
        scales = {name: rng.standard_normal(DEPTH).astype(np.float32) for name in ("query", "key") if scaled}
        self.fed = {name: array for name, array in (numbers | scales).items() if array is not None}
        self.x = {name: self._input(name, array) for name, array in self.fed.items()}
        cache, projected, positions, slots, owners, tables = list(self.x.values())[:6]
        others = [self.x.get(name) for name in ("cosine", "sine", "query", "key")]
        self.pool, self.query = self._add("CacheUpdate", [cache, projected, positions, slots, *others], UPDATE, 2)
        (self.seen,) = self._add("PagedAttention", [self.query, self.pool, positions, owners, tables], READING, 1)
        self.graph.outputs.append(self.seen)

    def _input(self, name: str, array: Array) -> ir.Value:
        value = ir.Value(name=name)
        set_type(value, TensorType(array.dtype.name, array.shape))
        self.graph.inputs.append(value)
        return value

    def _add(self, op: str, inputs: list[ir.Value | None], stated: dict[str, Any],
             outputs: int) -> tuple[ir.Value, ...]:  # fmt: skip
        while inputs[-1] is None:
            inputs.pop()
        node = make_node(op, inputs, stated, outputs=outputs, name=op)
        self.graph.append(node)
        for number, value in enumerate(node.outputs):
            value.name = f"{op}.{number}"
        return tuple(node.outputs)

    @property
    def model(self) -> ir.Model:
        return ir.Model(self.graph, ir_version=10)

    def names(self) -> list[str]:
        """Of its operators, after the rewrite."""
        attend_at_once(self.model)
        return [node.op_type for node in self.graph]


@pytest.mark.parametrize("half", [4, 0])
def test_update_and_attention_are_one(half: int) -> None:
    written = Written(half=half)
    inputs = list(written.fed.values())
    given = [*inputs[:4], *inputs[6:], *[None] * (10 - len(inputs))]
    pool, query = meaning("CacheUpdate")(*given, **UPDATE)
    (seen,) = meaning("PagedAttention")(query, pool, inputs[2], *inputs[4:6], **READING)
    assert attend_at_once(written.model) == 1
    (node,) = written.graph
    assert node.op_type == "CachedAttention" and attributes(node) == UPDATE | READING | {"early": 0}
    assert node.name == "PagedAttention" and written.graph.outputs[0] is node.outputs[1]
    (found,) = evaluate_model(written.model, written.fed).values()
    np.testing.assert_array_equal(found, seen)


def _shared_query(written: Written) -> None:
    (value,) = written._add("View", [written.query], {"shape": (2, HEADS * DEPTH)}, 1)
    written.graph.outputs.append(value)


def _shared_pool(written: Written) -> None:
    x = written.x
    more = [written.query, written.pool, x["positions"], x["owners"], x["tables"]]
    written.graph.outputs.extend(written._add("PagedAttention", more, READING, 1))


def _told_pool(written: Written) -> None:
    written.graph.outputs.append(written.pool)


def _told_query(written: Written) -> None:
    written.graph.outputs.append(written.query)


def _other_positions(written: Written) -> None:
    written.seen.producer().replace_input_with(2, written.x["slots"])  # type: ignore[union-attr]


def _other_pool(written: Written) -> None:
    written.seen.producer().replace_input_with(1, written.x["cache"])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "change", [_shared_query, _shared_pool, _told_pool, _told_query, _other_positions, _other_pool]
)
def test_what_is_read_elsewhere_or_is_another_stays(change: Any) -> None:
    written = Written()
    change(written)
    assert "CachedAttention" not in written.names() and "CacheUpdate" in written.names()


@pytest.mark.parametrize("given", [{"scaled": True}, {"pool": "float8_e4m3fn"}])
def test_norms_and_pools_of_eight_bits_stay(given: dict[str, Any]) -> None:
    assert Written(**given).names() == ["CacheUpdate", "PagedAttention"]


@pytest.mark.parametrize(("family", "precision", "target", "variants", "early", "joined"), [
    ("llama", "fp8", "cuda:sm_90", (), True, True), ("gemma2", "fp8", "cuda:sm_100", (), True, True),
    ("gpt2", "fp8", "cuda:sm_90", (), True, True), ("llama", "fp8", "cuda", ("sm_90", "sm_100"), True, True),
    ("llama", "fp8_cache", "cuda:sm_90", (), True, False), ("qwen3", "fp8", "cuda:sm_90", (), True, False),
    ("llama", "bf16", "cuda:sm_90", (), False, False), ("llama", "w8a8", "cuda:sm_90", (), False, False),
    ("qwen3_moe", "fp8", "cuda:sm_90", (), False, False), ("llama", "bf16", "cpu", (), False, False),
    ("llama", "fp8", "cuda", ("sm_90", "sm_120"), False, False), ("llama", "fp8", "cuda:sm_89", (), False, False),
])  # fmt: skip
def test_graphs_that_have_it(family: str, precision: str, target: str, variants: tuple[str, ...], early: bool,
                             joined: bool, tmp_path: Path) -> None:  # fmt: skip
    """Every layer or none: by the GPU, the weights, the model's norms, and what keys are kept as. Products stay and let
    others begin at once where all are of float8."""
    options = replace(OPTIONS, precision=precision, target=target, variants=variants)
    decoder = decoder_of(open_checkpoint(write_family(tmp_path, family)), 64)
    graph = graph_for(decoder, with_cache(FORMATS[precision], None), family, options).graph
    names, layers = [node.op_type for node in graph], len(decoder.layers)
    assert names.count("CachedAttention") == (layers if joined else 0)
    assert names.count("CacheUpdate") == names.count("PagedAttention") == (0 if joined else layers)
    known = [node for node in graph if "early" in attributes(node)]
    assert len(known) > layers and {bool(attributes(node)["early"]) for node in known} == {early}


@pytest.mark.parametrize(("family", "precision", "within"), [("llama", "fp32", 5e-4), ("gemma2", "fp32", 5e-4),
                                                             ("gpt2", "fp32", 5e-4), ("phi3", "fp8", 0.8)])  # fmt: skip
def test_an_engine_gives_a_familys_logits(family: str, precision: str, within: float, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A prompt of two, then token by token, one of them beside another sequence's."""
    interpreted.use(monkeypatch)
    monkeypatch.setattr(build, "begin_early", lambda model: True)
    runner = EngineRunner(build_llm(write_family(tmp_path, family), replace(OPTIONS, precision=precision)))
    with np.load(LOGITS) as known:
        expected = known[family]
    for begin, end in ((0, 2), (2, 3), (3, 4)):
        found = runner.step(batch_of(runner, [(1, begin, TOKENS[begin:end])]))
        assert np.abs(found[-1] - expected[end - 1]).max() < within
    found = runner.step(batch_of(runner, [(0, 0, TOKENS[:1]), (1, 4, TOKENS[4:5])]))
    assert np.abs(found - expected[[0, 4]]).max() < within
    (segment,) = runner.session.plan.segments
    assert isinstance(segment, GraphSegment)
    kernels = {step.kernel for step in segment.steps}
    assert "cached_attention" in kernels and not kernels & {"cache_update", "paged_attention"}
    assert ("projection_chain" in kernels) == (family in ("llama", "phi3")), "others have norms between products"
