"""`ingot debug reduce model.onnx`: the smallest part of a model that still fails, with the inputs it fails on."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_ir
from onnx import helper, numpy_helper

import ingot
from ingot.errors import IngotError
from ingot.evidence import index_limits
from ingot.importers import onnx as importer
from ingot.ir import shapes
from ingot.ir.oracle import captures, compile_model, trace_model
from ingot.tools import files
from ingot.tools.accuracy import closeness
from ingot.tools.compare import specs_of
from ingot.tools.inputs import make_feeds, pairs
from ingot.tools.shapes import parse_shapes

T = TypeVar("T")
Feeds = Mapping[str, Any]
Failure = Callable[[onnx.ModelProto, Feeds], str]  # how a model fails on inputs; "" where it does not


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("model", help="an ONNX file that fails")
    parser.add_argument("-o", "--output", default="reduced.onnx", help="file to write; its inputs go beside it")
    parser.add_argument(
        "--check", metavar="COMMAND", help="a command that exits with other than 0 where it fails, {model} being the "
        "candidate's path; default: an engine that differs from the reference, or no engine"
    )  # fmt: skip
    parser.add_argument("--shapes", default="", help="input shapes, e.g. x:1x3x224x224")
    parser.add_argument("--load-inputs", default="", metavar="NAME:FILE", help="inputs from .npy files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atol", type=float, default=1e-4)
    parser.add_argument("--rtol", type=float, default=1e-3)
    parser.add_argument("--level", type=int, default=0, help="builder level of the engines (default 0)")


def run(arguments: argparse.Namespace) -> int:
    """Reduce, write, tell."""
    model = importer.load(arguments.model)
    shapes.infer(model)
    given = parse_shapes(arguments.shapes), pairs(arguments.load_inputs)
    feeds = make_feeds(specs_of(model), *given, arguments.seed, index_limits(model))
    whole = Parts(onnx_ir.to_proto(model), feeds)
    failure = _failure(arguments)
    reason = failure(whole.model, feeds)
    if not reason:
        print("the model does not fail: nothing to reduce")
        return 0
    print(f"the model of {len(whole.model.graph.node)} nodes fails: {reason}")
    smallest, small_feeds = whole.part(reduced(range(len(whole.model.graph.node)), whole.fails(failure, _kind(reason))))
    _write(smallest, small_feeds, Path(arguments.output), failure(smallest, small_feeds))
    return 0


def reduced(items: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> list[T]:
    """A subset that fails and of which no single chunk can be left out; `items` fails. (Zeller's ddmin.)"""
    kept, chunks = list(items), 2
    while len(kept) > 1:
        size = -(-len(kept) // chunks)
        pieces = [kept[i : i + size] for i in range(0, len(kept), size)]
        rests = [[x for piece in pieces if piece is not left_out for x in piece] for left_out in pieces]
        smaller = next((part for part in (*pieces, *rests) if len(part) < len(kept) and fails(part)), None)
        if smaller is not None:
            chunks = 2 if smaller in pieces else max(chunks - 1, 2)
            kept = smaller
        elif size == 1:
            break
        else:
            chunks = min(2 * chunks, len(kept))
    return kept


# -- parts of a model


@dataclass(frozen=True, eq=False)
class Parts:
    """A model whose nodes can be taken out in any number; what they then lack is fed as the whole computed it."""

    model: onnx.ModelProto
    feeds: Feeds
    _types: dict[str, onnx.TypeProto] = field(default_factory=dict)

    @cached_property
    def values(self) -> dict[str, Any]:
        """Every value of the whole model, by name."""
        return {**trace_model(self.model, self.feeds), **self.feeds}

    @cached_property
    def varying(self) -> set[str]:
        """Values that depend on the model's inputs."""
        found = set(self.feeds)
        for node in self.model.graph.node:
            if found & {*node.input, *captures(node)}:
                found |= set(node.output)
        return found

    def fails(self, failure: Failure, kind: str) -> Callable[[Sequence[int]], bool]:
        """Whether nodes at the given places fail as the whole did."""
        return lambda places: _kind(failure(*self.part(places))) == kind

    def part(self, places: Sequence[int]) -> tuple[onnx.ModelProto, dict[str, Any]]:
        """The model of these nodes alone and its inputs."""
        graph = self.model.graph
        nodes = [graph.node[i] for i in sorted(places)]
        made = {name for node in nodes for name in node.output if name}
        weights = {tensor.name: tensor for tensor in graph.initializer}
        read = dict.fromkeys(name for node in nodes for name in (*node.input, *captures(node)) if name)
        lacking = [name for name in read if name not in made and name not in weights]
        feeds = {name: self.values[name] for name in lacking if self._is_fed(name)}
        constants = [weights[n] for n in read if n in weights]
        constants += [numpy_helper.from_array(np.asarray(self.values[n]), n) for n in lacking if n not in feeds]
        part = helper.make_graph(
            nodes, graph.name or "reduced", [self._info(n) for n in feeds],
            [self._info(n) for n in self._written(places, made)], constants,
        )  # fmt: skip
        model = helper.make_model(part, opset_imports=self.model.opset_import, functions=self.model.functions)
        model.ir_version = max(self.model.ir_version, 10)
        return model, feeds

    def _is_fed(self, name: str) -> bool:
        """Whole numbers that were computed (shapes, axes) stay as they were: as inputs they would be another model."""
        value = self.values[name]
        floating = not isinstance(value, np.ndarray) or value.dtype.kind not in "iub"
        return name in self.varying and (floating or name in self.feeds)

    def _written(self, places: Sequence[int], made: set[str]) -> list[str]:
        chosen, graph = set(places), self.model.graph
        outside = {n for i, node in enumerate(graph.node) if i not in chosen for n in (*node.input, *captures(node))}
        wanted = outside | {value.name for value in graph.output}
        order = dict.fromkeys(n for i in sorted(chosen) for n in graph.node[i].output if n in made)
        return [n for n in order if n in wanted and n in self.values] or list(order)

    def _info(self, name: str) -> onnx.ValueInfoProto:
        if name not in self._types:
            self._types[name] = _type_of(self.values[name])
        return helper.make_value_info(name, self._types[name])


def _type_of(value: Any) -> onnx.TypeProto:
    if isinstance(value, list):
        element = _type_of(value[0]) if value else helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
        return helper.make_sequence_type_proto(element)
    array = np.asarray(value)
    return helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


# -- ways to fail


def _failure(arguments: argparse.Namespace) -> Failure:
    return _command(arguments.check) if arguments.check else _differing(arguments)


def _kind(reason: str) -> str:
    return reason.partition(":")[0]


def _differing(arguments: argparse.Namespace) -> Failure:
    """The engine cannot be built, cannot be run, or differs from the reference."""

    def fails(model: onnx.ModelProto, feeds: Feeds) -> str:
        try:
            wanted = compile_model(model)(feeds)
        except IngotError:
            return ""  # the reference has no answer to compare with: not the failure that is looked for
        try:
            with ingot.Session(ingot.build(model, level=arguments.level, verify=False)) as session:
                mine = session.run(feeds)
        except Exception as error:  # noqa: BLE001 - any at all is the failure that is being reduced
            return f"{type(error).__name__}: {error}"
        wrong = [name for name, y in wanted.items() if not _alike(mine[name], y, arguments)]
        return f"differs from the reference: output {wrong[0]}" if wrong else ""

    return fails


def _alike(mine: Any, wanted: Any, arguments: argparse.Namespace) -> bool:
    mine, wanted = np.asarray(mine), np.asarray(wanted)
    if mine.shape != wanted.shape or wanted.dtype == object:
        return mine.shape == wanted.shape and bool(np.array_equal(mine, wanted))
    return closeness(mine, wanted, arguments.atol, arguments.rtol).mismatched == 0


def _command(text: str) -> Failure:
    """The user's command says so, with an exit code other than 0."""
    command = text if "{model}" in text else f"{text} {{model}}"

    def fails(model: onnx.ModelProto, feeds: Feeds) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "candidate.onnx"
            path.write_bytes(model.SerializeToString())
            shell = ["/bin/sh", "-c", command.replace("{model}", shlex.quote(str(path)))]
            done = subprocess.run(shell, stdout=subprocess.DEVNULL)
        return f"the command fails: exit code {done.returncode}" if done.returncode else ""

    return fails


# -- results


def _write(model: onnx.ModelProto, feeds: Feeds, output: Path, reason: str) -> None:
    files.write(output, model.SerializeToString())
    loads = []
    for name, value in feeds.items():
        safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
        np.save(path := output.with_name(f"{output.stem}.{safe}.npy"), np.asarray(value), allow_pickle=False)
        loads.append(f"{name}:{path}")
    nodes = [f"{node.op_type} {node.name!r}" for node in model.graph.node]
    print(f"{len(nodes)} of them fail still: {', '.join(nodes[:12])}{', …' if len(nodes) > 12 else ''}: {reason}")
    print(f"written to {output}; see it with: ingot compare {output} --load-inputs {shlex.quote(','.join(loads))}")
