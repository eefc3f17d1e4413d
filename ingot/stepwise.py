"""Models that round to integers on the way, step by step: each chosen kernel alone, on the unrewritten model's numbers.

From end to end two correct engines of a deep quantized model differ as much as its roundings do: where a number lies
near the middle between two integers, the order of a sum decides, and a few steps later everything has been rounded
anew. A small fault could hide there. Given the same operands, a step has to give a nearest integer of the number that
the model rounds; floats have to agree as everywhere else. That holds rewriting and kernels to account, constants and
epilogues included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir

from ingot.compiler import Compiled
from ingot.ir import expression as expressions
from ingot.ir.graph import constant_of
from ingot.ir.ops import meaning
from ingot.ir.oracle import compile_model
from ingot.kernels.cpu import standalone
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.node import Node
from ingot.plan.extent import symbols_of
from ingot.plan.lower import Module, Tensor, Work
from ingot.tune.binding import bind

Array = np.ndarray[Any, Any]
Tolerance = Callable[[Any], float]  # of a dtype: relative to the largest magnitude
_BYTES = ("int8", "uint8")
_BEYOND = 0.02  # of a step: how far from the middle the order of float32 sums may still decide
_FEW = 2e-3  # of wider integers, and of truth values, that may differ: places of equal numbers
_DERIVED = 5e-2  # relative, of what reads integers that the unrewritten model has no name for


@dataclass(frozen=True)
class Fault:
    """A step that is wrong; `kernel` is None where its kernel does what the rewritten graph says."""

    kernel: str | None
    nodes: str
    reason: str


@dataclass(frozen=True)
class Finding:
    """How many steps were compared, and what is wrong."""

    compared: int
    faults: tuple[Fault, ...]


def compare_steps(
    made: Compiled, source: onnx_ir.Model, feeds: Mapping[str, Array], tolerance: Tolerance
) -> Finding | None:
    """Every native step of a variant for this processor; None for other variants."""
    if made.module is None or not isinstance(made.target, Isa):
        return None
    steps = _Steps(made, made.target, Truth(source, feeds), _symbols(made.module, feeds), tolerance)
    found = [steps.fault(work) for work in made.module.works if work.kind == "native"]
    return Finding(steps.compared, tuple(fault for fault in found if fault is not None))


class Truth:
    """What the unrewritten model computes: every tensor of its main graph, by name."""

    def __init__(self, source: onnx_ir.Model, feeds: Mapping[str, Array]) -> None:
        observed = source.clone()
        outputs = observed.graph.outputs
        outputs.extend(v for node in observed.graph for v in node.outputs
                       if v.name and v.dtype is not None and not v.is_graph_output())  # fmt: skip
        self._values: dict[str, Any] = {**feeds, **compile_model(observed)(feeds)}
        self._quantizers = {node.outputs[0].name: node for node in source.graph if node.op_type == "QuantizeLinear"}

    def get(self, name: str, dtype: str, shape: Sequence[int]) -> Array | None:
        """A tensor in a shape of as many elements; None where the model has none of this name and type."""
        known = self._values.get(name)
        fits = isinstance(known, np.ndarray) and known.dtype.name == dtype and known.size == np.prod(shape, dtype=int)
        return known.reshape(shape) if fits and isinstance(known, np.ndarray) else None

    def before_rounding(self, name: str, shape: Sequence[int]) -> Array | None:
        """The numbers, in steps, whose nearest integers a QuantizeLinear with one scale puts under this name."""
        node = self._quantizers.get(name)
        if node is None or len(node.inputs) < 3:
            return None
        x, scale, zero = (self._of(value) for value in node.inputs[:3])
        if x is None or scale is None or zero is None or scale.size != 1 or zero.dtype.name not in _BYTES:
            return None
        limits = np.iinfo(zero.dtype)
        ratio = x.astype(np.float64) / float(scale.reshape(-1)[0]) + float(zero.reshape(-1)[0])
        return np.clip(ratio, limits.min, limits.max).reshape(shape)

    def _of(self, value: onnx_ir.Value | None) -> Array | None:
        if value is None:
            return None
        known = self._values.get(str(value.name))
        return known if isinstance(known, np.ndarray) else constant_of(value)


def _symbols(module: Module, feeds: Mapping[str, Array]) -> dict[str, int]:
    """Sizes of the inputs' symbols."""
    found: dict[str, int] = {}
    for tensor in module.inputs:
        sizes = zip(tensor.shape or (), np.shape(feeds[tensor.name]), strict=False)
        found |= {extent: size for extent, size in sizes if isinstance(extent, str) and extent.isidentifier()}
    return found


@dataclass(eq=False)
class _Steps:
    made: Compiled
    isa: Isa
    truth: Truth
    symbols: Mapping[str, int]
    tolerance: Tolerance
    compared: int = 0
    derived: dict[str, Array] = field(default_factory=dict)  # what the model has no name for
    _codes: dict[str, standalone.Compiled] = field(default_factory=dict)

    def fault(self, work: Work) -> Fault | None:
        """What is wrong with a step, on the model's own numbers."""
        if work.node is None or not self._is_known(work):
            return None
        node = bind(work.node, self.symbols)
        operands = [self._operand(tensor, port.shape) if port is not None and tensor is not None else None
                    for tensor, port in zip(work.inputs, node.inputs, strict=True)]  # fmt: skip
        if any(x is None and port is not None for x, port in zip(operands, node.inputs, strict=True)):
            return None
        meant = _Meaning(node, operands)
        mine = self._run(work, node, operands)
        self.compared += 1
        for index, (tensor, y) in enumerate(zip(work.outputs, mine, strict=True)):
            if self.truth.get(tensor.name, y.dtype.name, y.shape) is None:
                self.derived[tensor.name] = meant.outputs[index]
            reason = self._wrong(work, tensor, y, lambda i=index: meant.outputs[i])  # type: ignore[misc]
            if reason:
                own = _difference(y, meant.outputs[index], None, self.tolerance(y.dtype))
                kernel = self.made.choices[work].label if own else None
                return Fault(kernel, ", ".join(work.origins) or work.name, reason)
        return None

    def _is_known(self, work: Work) -> bool:
        tensors = (*work.inputs, *work.outputs)
        extents = [d for tensor in tensors if tensor is not None for d in tensor.shape or ()]
        return work in self.made.choices and all(symbols_of(d) <= self.symbols.keys() for d in extents)

    def _operand(self, tensor: Tensor, shape: Sequence[Any]) -> Array | None:
        if tensor.constant is not None:
            return tensor.constant.reshape(shape)
        found = self.truth.get(tensor.name, tensor.dtype, shape)
        if found is None and tensor.name in self.derived:
            found = self.derived[tensor.name].reshape(shape)
        return found if found is not None or tensor.alias is None else self._operand(tensor.alias, shape)

    def _run(self, work: Work, node: Node, operands: Sequence[Array | None]) -> list[Array]:
        """By the kernel that was chosen, its code compiled once."""
        candidate = self.made.choices[work]
        build = standalone.generate(node, candidate, self.isa)
        text = build.text()
        if text not in self._codes:
            self._codes[text] = standalone.compiled(build)
        return standalone.Standalone(node, candidate, self.isa, ready=self._codes[text])(*operands)

    def _wrong(self, work: Work, tensor: Tensor, y: Array, meant: Callable[[], Array]) -> str:
        wanted = self.truth.get(tensor.name, y.dtype.name, y.shape)
        if wanted is None:
            return _difference(y, meant(), None, self.tolerance(y.dtype))
        unnamed = any(t is not None and t.root.name in self.derived for t in work.inputs)
        tolerance = max(self.tolerance(y.dtype), _DERIVED if unnamed else 0.0)
        numbers = None if unnamed else self.truth.before_rounding(tensor.name, y.shape)
        return _difference(y, wanted, numbers, tolerance)


@dataclass(eq=False)
class _Meaning:
    """A node's own outputs, computed when somebody asks."""

    node: Node
    operands: Sequence[Array | None]
    _outputs: tuple[Array, ...] = ()

    @property
    def outputs(self) -> tuple[Array, ...]:
        """By the operator's numpy meaning."""
        if not self._outputs:
            node = self.node
            key = "expression" if node.op == "Pointwise" else "epilogue"
            stated = {**node.attributes, **({key: expressions.format(node.epilogue)} if node.epilogue else {})}
            self._outputs = meaning(node.op)(*self.operands, **stated)
        return self._outputs


def _difference(mine: Array, wanted: Array, numbers: Array | None, tolerance: float) -> str:
    """In words; empty where there is none that counts. `numbers`: what was rounded, in steps."""
    if not mine.size:
        return ""
    if mine.dtype.name in _BYTES and numbers is not None:
        beyond = float(np.abs(mine - numbers).max()) - 0.5
        return f"is {beyond:.3g} steps further than the nearest integer" if not beyond <= _BEYOND else ""
    if mine.dtype.kind in "iub":
        gap = np.abs(mine.astype(np.int64) - wanted.reshape(mine.shape).astype(np.int64))
        if mine.dtype.name in _BYTES:
            return f"differs by {gap.max()} steps" if gap.max() > 1 else ""
        share = float((gap > 0).mean())
        return f"differs in {share:.2%} of its elements" if share > _FEW else ""
    a, b = mine.astype(np.float64), wanted.reshape(mine.shape).astype(np.float64)
    with np.errstate(all="ignore"):
        gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        scale = float(np.abs(b[np.isfinite(b)]).max(initial=0.0)) or 1.0
    relative = float(gap.max()) / scale
    return f"differs by {relative:.2e} of its largest magnitude" if not relative <= tolerance else ""


def without_rounding(model: onnx_ir.Model) -> onnx_ir.Model:
    """DQ(Q(x)) => x, in a copy: what the model computes without its integers."""
    copy = model.clone()
    for node in copy.graph.all_nodes():
        quantize = node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] else None
        if quantize is None or quantize.op_type != "QuantizeLinear" or node.outputs[0].is_graph_output():
            continue
        x, scale = quantize.inputs[0], node.inputs[1]
        if x is not None and scale is not None and x.dtype in (None, scale.dtype):
            node.outputs[0].replace_all_uses_with(x)
    return copy
