"""Nodes, candidates and modules made by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ingot import kernels
from ingot.kernels import Candidate, Kernel, Ports
from ingot.kernels.cpu.build import KernelBuilder
from ingot.kernels.node import Node, Port
from ingot.plan.lower import Module, Tensor, Work


def nothing(build: KernelBuilder, node: Node) -> None:
    """A generator that is never called."""


def entry(name: str, cost: Callable[..., float] | None = None) -> Kernel:
    """A kernel that only has a name."""
    return Kernel("Pointwise", "cpu", name, nothing, lambda n, i: True, {}, lambda *a, **k: False, cost,
                  lambda n, i: (), lambda n: ())  # fmt: skip


def candidate(name: str, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> Candidate:
    """A candidate by name, with these port layouts."""
    return Candidate(entry(name), {}, Ports(tuple(inputs), tuple(outputs)))


def tensor(name: str, shape: tuple[int | str, ...] = (1, 16, 8, 8), alias: Tensor | None = None) -> Tensor:
    """A float32 tensor."""
    return Tensor(name, "float32", shape, alias=alias)


def work(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], choices: Sequence[Candidate]) -> Work:
    """A native work; without choices, a host step."""
    node = Node("Pointwise", tuple(t.port() for t in inputs), tuple(t.port() for t in outputs), {}, name=name)
    kind = "native" if choices else "host"
    return Work(kind, name, "Pointwise", (name,), tuple(inputs), tuple(outputs), node, tuple(choices))  # type: ignore[arg-type]


def module(inputs: Sequence[Tensor], outputs: Sequence[Tensor], works: Sequence[Work]) -> Module:
    """A module of these works."""
    return Module(tuple(inputs), tuple(outputs), list(works), {"": 21})


def node(op: str, *shapes: tuple[int | str, ...], weight: np.ndarray[Any, Any] | None = None, **given: Any) -> Node:
    """A float32 node: the last shape is the output's; `weight` is the second input's constant."""
    ports = [Port("float32", shape) for shape in shapes]
    if weight is not None:
        ports[1] = Port("float32", ports[1].shape, weight)
    return Node(op, tuple(ports[:-1]), (ports[-1],), given)


def abs_model(shape: Sequence[int | str] = (64, 1024)) -> onnx.ModelProto:
    """y = |x|."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, list(shape)) for n in "xy")
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"], "users_abs")], "abs", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def saved(engine: Any, path: Path) -> bytes:
    """The engine's bytes."""
    engine.save(path)
    return path.read_bytes()


def planted(monkeypatch: Any, module_name: str) -> Iterator[Mapping[tuple[str, str], list[Kernel]]]:
    """The kernels a module registers, for the length of a test."""
    import importlib

    kernels._load("cpu")
    table = {key: list(entries) for key, entries in kernels._TABLE.items()}
    monkeypatch.setattr(kernels, "_TABLE", table)
    importlib.reload(importlib.import_module(module_name))
    yield table
