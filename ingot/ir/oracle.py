"""The numpy meaning of every ONNX operator: the yardstick engines are verified against, and the host steps they run.

A meaning is taken from our own table (`oracle_ops`), then from onnx.reference, then from the function that
the operator's schema defines. Values are arrays, lists (sequences) and None (absent optionals).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np
import onnx
import onnx_ir
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import RuntimeContextError, SparseTensor

from ingot.errors import InputError, UnsupportedOperator
from ingot.ir.oracle_ops import Value, find
from ingot.ir.oracle_ops.table import Meaning

Runner = Callable[[Sequence[Value]], list[Value]]
Functions = Mapping[tuple[str, str], onnx.FunctionProto]
Binds = tuple[tuple[int, int, str], ...]
_SYMBOLS = "\0symbols"  # no ONNX name contains a NUL
_Kind = onnx.AttributeProto
_REFUSALS = (
    ArithmeticError, AttributeError, LookupError, MemoryError, NotImplementedError, TypeError, ValueError, RuntimeError,
)  # what numpy and onnx.reference raise for inputs that an operator does not take


def evaluate_model(model: onnx.ModelProto | onnx_ir.Model, feeds: Mapping[str, Value]) -> dict[str, Value]:
    """Outputs by name of a whole model, control flow and functions included."""
    return compile_model(model)(feeds)


def compile_model(model: onnx.ModelProto | onnx_ir.Model) -> Callable[[Mapping[str, Value]], dict[str, Value]]:
    """The model as a function from named inputs to named outputs; weights are read once."""
    program = _program_of(model)

    def run(feeds: Mapping[str, Value]) -> dict[str, Value]:
        with np.errstate(all="ignore"):  # an infinity or a NaN is a result like any other
            return dict(zip(program.outputs, program.run(feeds, {}), strict=True))

    return run


def trace_model(model: onnx.ModelProto | onnx_ir.Model, feeds: Mapping[str, Value]) -> dict[str, Value]:
    """Every value of the main graph by name, intermediate ones included."""
    program = _program_of(model)
    kept = replace(program, steps=tuple(replace(step, drops=()) for step in program.steps))
    with np.errstate(all="ignore"):
        return {name: value for name, value in kept.values(feeds, {}).items() if name not in ("", _SYMBOLS)}


def _program_of(model: onnx.ModelProto | onnx_ir.Model) -> Program:
    return _program_of_ir(model) if isinstance(model, onnx_ir.Model) else _program_of_proto(model)


def is_known(domain: str, op_type: str, version: int) -> bool:
    """Whether the operator has a meaning at that opset."""
    if domain == "ingot" or find(domain, op_type, version) is not None:
        return True
    if _reference_class(domain, op_type, version) is not None:
        return True
    try:
        schema: Any = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)


def evaluate_node(node: onnx.NodeProto, inputs: Sequence[Value], opset: Mapping[str, int],
                  functions: Functions | None = None) -> list[Value]:  # fmt: skip
    """Outputs of one node; the values of `captures(node)` follow its inputs."""
    with np.errstate(all="ignore"):
        return _compile(node, opset, functions or {})(inputs)


@lru_cache(maxsize=4096)
def _compile_serialized(node_bytes: bytes, opset: tuple[tuple[str, int], ...]) -> Runner:
    runner = _compile(onnx.NodeProto.FromString(node_bytes), dict(opset), {})

    def run(inputs: Sequence[Value]) -> list[Value]:
        with np.errstate(all="ignore"):
            return runner(inputs)

    return run


def compile_node(node_bytes: bytes, opset: Mapping[str, int]) -> Runner:
    """A serialized node as a callable over its inputs, then its captures; parsed once per process."""
    return _compile_serialized(node_bytes, tuple(sorted(opset.items())))


def captures(node: onnx.NodeProto) -> tuple[str, ...]:
    """Names of the enclosing scope that the node's subgraphs read, in order of first use."""
    names: dict[str, None] = {}
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs] if attribute.type in (_Kind.GRAPH, _Kind.GRAPHS) else ():
            names.update(dict.fromkeys(_free_names(graph)))
    return tuple(names)


def _free_names(graph: onnx.GraphProto) -> list[str]:
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    known |= {tensor.values.name for tensor in graph.sparse_initializer} | {""}
    free: dict[str, None] = {}
    for node in graph.node:
        free.update({name: None for name in (*node.input, *captures(node)) if name not in known})
        known.update(node.output)
    free.update({value.name: None for value in graph.output if value.name not in known})
    return list(free)


@dataclass(frozen=True)
class Step:
    """One node: `reads` are its inputs, captures and the symbols; `drops` the names nobody reads afterwards; `binds`
    the (output, axis, symbol) that its results define."""

    run: Runner
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    drops: tuple[str, ...]
    label: str
    binds: Binds = ()


@dataclass(frozen=True)
class Program:
    """A graph ready to run."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    output_types: tuple[onnx.TypeProto, ...]
    constants: Mapping[str, Value]
    steps: tuple[Step, ...]
    binds: Binds = ()

    def run(self, feeds: Mapping[str, Value], outer: Mapping[str, Any]) -> list[Value]:
        """Output values in order; `outer` holds the enclosing scope's values."""
        values = self.values(feeds, outer)
        return [values[name] for name in self.outputs]

    def values(self, feeds: Mapping[str, Value], outer: Mapping[str, Any]) -> dict[str, Value]:
        """All values that are left at the end, by name."""
        symbols: dict[str, int] = dict(outer.get(_SYMBOLS, {}))
        values: dict[str, Any] = {"": None, **outer, **self.constants, **feeds, _SYMBOLS: symbols}
        _bind(symbols, self.binds, [values[name] for name in self.inputs])
        for step in self.steps:
            try:
                results = step.run([values[name] for name in step.reads])
            except _REFUSALS as error:
                raise InputError(f"{step.label} cannot be computed: {type(error).__name__}: {error}") from error
            values.update(zip(step.writes, results, strict=False))
            _bind(symbols, step.binds, results)
            for name in step.drops:
                del values[name]
        return values


def _bind(symbols: dict[str, int], binds: Binds, values: Sequence[Value]) -> None:
    for index, axis, symbol in binds:
        value = values[index]
        if isinstance(value, np.ndarray):
            symbols.setdefault(symbol, value.shape[axis])


def _program_of_proto(model: onnx.ModelProto) -> Program:
    opset = {entry.domain: entry.version for entry in model.opset_import}
    functions = {(function.domain, function.name): function for function in model.functions}
    return _graph_program(model.graph, opset, functions)


def _program_of_ir(model: onnx_ir.Model) -> Program:
    """Without copying the initializers through protobuf."""
    graph = model.graph
    functions = {key[:2]: onnx_ir.to_proto(function) for key, function in model.functions.items()}
    program = _program(
        [onnx_ir.to_proto(node) for node in graph],
        tuple(str(value.name) for value in graph.inputs),
        [onnx_ir.to_proto(value) for value in graph.outputs],
        {name: _constant(v.const_value) for name, v in graph.initializers.items() if v.const_value is not None},
        dict(model.opset_imports),
        functions,
    )
    steps = [replace(step, binds=_binds(node.outputs)) for step, node in zip(program.steps, graph, strict=True)]
    return replace(program, steps=tuple(steps), binds=_binds(graph.inputs))


def _constant(tensor: onnx_ir.TensorProtocol) -> np.ndarray:
    if tensor.dtype == onnx_ir.DataType.STRING:
        return np.vectorize(bytes.decode, otypes=[object])(tensor.numpy())
    return tensor.numpy()


def _binds(values: Sequence[onnx_ir.Value]) -> Binds:
    """Where a value's shape names a bare symbol, running the model tells the symbol's size."""
    dims = [(index, axis, dim) for index, value in enumerate(values) if value.shape is not None
            for axis, dim in enumerate(value.shape.dims)]  # fmt: skip
    return tuple((index, axis, dim.value) for index, axis, dim in dims
                 if not isinstance(dim, int) and dim.value is not None and dim.value.isidentifier())  # fmt: skip


def _graph_program(graph: onnx.GraphProto, opset: Mapping[str, int], functions: Functions) -> Program:
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    constants |= {tensor.values.name: _dense(tensor) for tensor in graph.sparse_initializer}
    inputs = tuple(value.name for value in graph.input)
    return _program(graph.node, inputs, graph.output, constants, opset, functions)


def _program(nodes: Sequence[onnx.NodeProto], inputs: tuple[str, ...], outputs: Sequence[onnx.ValueInfoProto],
             constants: Mapping[str, Value], opset: Mapping[str, int], functions: Functions) -> Program:  # fmt: skip
    names = tuple(value.name for value in outputs)
    reads = [(*node.input, *captures(node), _SYMBOLS) for node in nodes]
    drops = _drops(nodes, reads, {*names, *constants, *inputs, "", _SYMBOLS})
    steps = [
        Step(_compile(node, opset, functions), read, tuple(node.output), drop, f"node {node.name!r} ({node.op_type})")
        for node, read, drop in zip(nodes, reads, drops, strict=True)
    ]
    return Program(inputs, names, tuple(value.type for value in outputs), constants, tuple(steps))


def _drops(nodes: Sequence[onnx.NodeProto], reads: Sequence[tuple[str, ...]], kept: set[str]) -> list[tuple[str, ...]]:
    """For every node the values of this graph that it is the last to read."""
    made: set[str] = set().union(*(node.output for node in nodes)) - kept
    drops: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for node, read in zip(reversed(nodes), reversed(reads), strict=True):
        last = {name for name in (*read, *node.output) if name in made and name not in seen}
        drops.append(tuple(sorted(last)))
        seen |= last
    return drops[::-1]


@dataclass(frozen=True)
class BoundGraph:
    """A subgraph attribute during a run: a function of its formal inputs, the enclosing scope's values bound."""

    program: Program
    outer: Mapping[str, Any]

    def __call__(self, *inputs: Value) -> list[Value]:
        return self.program.run(dict(zip(self.program.inputs, inputs, strict=False)), self.outer)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the results."""
        return self.program.outputs

    def empty(self, index: int) -> np.ndarray:
        """An array of output `index`'s declared type, unknown extents taken as 0."""
        tensor = self.program.output_types[index].tensor_type
        shape = [dim.dim_value for dim in tensor.shape.dim]
        return np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))


def _compile(node: onnx.NodeProto, opset: Mapping[str, int], functions: Functions) -> Runner:
    domain = "" if node.domain == "ai.onnx" else node.domain
    version = opset.get(domain, opset.get(node.domain, 1))
    if (function := functions.get((node.domain, node.op_type))) is not None:
        return _function_runner(function, node, functions)
    if domain == "ingot":
        return _fused_runner(node)
    if (known := find(domain, node.op_type, version)) is not None:
        return _table_runner(known, node, version, opset, functions)
    return _reference_runner(node, domain, version, opset, functions)


def _fused_runner(node: onnx.NodeProto) -> Runner:
    run, count = _fused(node), len(node.input)
    return lambda inputs: run(inputs[:count], _symbols(inputs, count))


def _symbols(inputs: Sequence[Any], count: int) -> dict[str, int]:
    """The sizes of symbols, which a program hands to every node behind its inputs and captures."""
    return inputs[count] if len(inputs) > count else {}


def compile_fused(node_bytes: bytes) -> Callable[[Sequence[Value], Mapping[str, int]], list[Value]]:
    """A serialized `ingot` node as a callable over its inputs and the sizes of the symbols its attributes name."""
    return _fused(onnx.NodeProto.FromString(node_bytes))


def _fused(node: onnx.NodeProto) -> Callable[[Sequence[Value], Mapping[str, int]], list[Value]]:
    """Our fused ops have their meaning in ir/ops.py, which may import this module."""
    from ingot.ir import ops

    function = ops.meaning(node.op_type)
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    decoded = {name: _decoded_strings(value) for name, value in attributes.items()}
    return lambda inputs, symbols: _as_list(function(*inputs, symbols=symbols, **decoded))


def _decoded_strings(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return [_decoded_strings(item) for item in value] if isinstance(value, list) else value


def _table_runner(known: Meaning, node: onnx.NodeProto, version: int, opset: Mapping[str, int],
                  functions: Functions) -> Runner:  # fmt: skip
    attributes = {a.name: _attribute(a, opset, functions) for a in node.attribute}
    graphs = [name for name, value in attributes.items() if isinstance(value, Program)]
    context = {"outputs": tuple(bool(name) for name in node.output), "opset": version}
    attributes |= {name: context[name] for name in known.wants}
    count, outer_names = len(node.input), captures(node)
    if not graphs:
        return lambda inputs: _as_list(known.function(*inputs[:count], **attributes))

    def run(inputs: Sequence[Any]) -> list[Value]:
        outer: dict[str, Any] = dict(zip(outer_names, inputs[count:], strict=False))
        outer[_SYMBOLS] = _symbols(inputs, count + len(outer_names))
        bound = {name: BoundGraph(attributes[name], outer) for name in graphs}
        return _as_list(known.function(*inputs[:count], **{**attributes, **bound}))

    return run


def _attribute(attribute: onnx.AttributeProto, opset: Mapping[str, int], functions: Functions) -> Any:
    match attribute.type:
        case _Kind.GRAPH:
            return _graph_program(attribute.g, opset, functions)
        case _Kind.TENSOR:
            return numpy_helper.to_array(attribute.t)
        case _Kind.SPARSE_TENSOR:
            return _dense(attribute.sparse_tensor)
        case _:
            return _decoded_strings(onnx.helper.get_attribute_value(attribute))


def _dense(tensor: onnx.SparseTensorProto) -> np.ndarray:
    values, indices = numpy_helper.to_array(tensor.values), numpy_helper.to_array(tensor.indices)
    dense = np.zeros(tuple(tensor.dims), values.dtype)
    flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), dense.shape)
    dense.reshape(-1)[flat] = values
    return dense


def _as_list(result: Any) -> list[Value]:
    return [_as_value(item) for item in result] if isinstance(result, tuple) else [_as_value(result)]


def _as_value(item: Any) -> Any:
    return item if item is None or isinstance(item, (np.ndarray, list, dict, SparseTensor)) else np.asarray(item)


def _reference_runner(node: onnx.NodeProto, domain: str, version: int, opset: Mapping[str, int],
                      functions: Functions) -> Runner:  # fmt: skip
    implementation = _reference_class(domain, node.op_type, version)
    if implementation is None:
        return _schema_runner(node, domain, version)
    parameters = {"log": lambda *_: None, "opsets": {**opset, domain: version}, "verbose": 0, "new_ops": {},
                  "existing_functions": {}, "evaluator_cls": ReferenceEvaluator}  # fmt: skip
    operator = implementation(node, parameters)
    count = len(node.input)
    return lambda inputs: _as_list(tuple(operator.run(*inputs[:count])))


@cache
def _reference_class(domain: str, op_type: str, version: int) -> type | None:
    """onnx.reference's class, or None where it would only expand the schema's function."""
    evaluator = ReferenceEvaluator.__new__(ReferenceEvaluator)
    evaluator.opsets_, evaluator.new_ops_, evaluator.functions_ = {domain: version}, {}, {}
    try:
        found = evaluator._load_impl(onnx.NodeProto(op_type=op_type, domain=domain))
    except (RuntimeContextError, NotImplementedError, RuntimeError, ValueError):
        return None
    return found if isinstance(found, type) else None


def _schema_runner(node: onnx.NodeProto, domain: str, version: int) -> Runner:
    """Through the function body of the operator's schema, which may depend on the input types."""
    schema: Any
    try:
        schema = onnx.defs.get_schema(node.op_type, version, domain)
    except onnx.defs.SchemaError:
        raise _unsupported(node, domain, version) from None
    defaults = {name: a.default_value for name, a in schema.attributes.items() if a.default_value.name}
    if schema.has_function:
        chosen = max(v for v in schema.function_opset_versions if v <= version)
        body = onnx.FunctionProto.FromString(schema.get_function_with_opset_version(chosen))
        return _function_runner(body, node, {}, defaults)
    if not schema.has_context_dependent_function:
        raise _unsupported(node, domain, version)
    chosen = max(v for v in schema.context_dependent_function_opset_versions if v <= version)
    serialized = node.SerializeToString()

    @lru_cache(maxsize=64)
    def specialised(types: tuple[bytes, ...]) -> Runner:
        body = schema.get_context_dependent_function_with_opset_version(chosen, serialized, list(types))
        return _function_runner(onnx.FunctionProto.FromString(body), node, {}, defaults)

    count = len(node.input)
    return lambda inputs: specialised(tuple(_type_bytes(value) for value in inputs[:count]))(inputs[:count])


def _unsupported(node: onnx.NodeProto, domain: str, version: int) -> UnsupportedOperator:
    name = f"{domain}::{node.op_type}" if domain else node.op_type
    return UnsupportedOperator(
        f"node {node.name!r}: there is no reference meaning for {name} at opset {version}; "
        f'register one with @ingot.plugin("{name}")'
    )


def _type_bytes(value: Value) -> bytes:
    if value is None:
        return onnx.TypeProto().SerializeToString()
    if isinstance(value, list):
        element = onnx.TypeProto.FromString(_type_bytes(value[0])) if value else onnx.TypeProto()
        return onnx.helper.make_sequence_type_proto(element).SerializeToString()
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return onnx.helper.make_tensor_type_proto(kind, value.shape).SerializeToString()


def _function_runner(function: onnx.FunctionProto, node: onnx.NodeProto, functions: Functions,
                     defaults: Mapping[str, onnx.AttributeProto] | None = None) -> Runner:  # fmt: skip
    given = {**(defaults or {}), **{attribute.name: attribute for attribute in function.attribute_proto}}
    given |= {attribute.name: attribute for attribute in node.attribute}
    opset = {entry.domain: entry.version for entry in function.opset_import}
    nodes = [_with_attributes(inner, given) for inner in function.node]
    outputs = [onnx.ValueInfoProto(name=name) for name in function.output]
    program = _program(nodes, tuple(function.input), outputs, {}, opset, functions)

    def run(inputs: Sequence[Value]) -> list[Value]:
        given = inputs[: len(node.input)]
        absent = dict.fromkeys(program.inputs[len(given) :])
        return program.run({**dict(zip(program.inputs, given, strict=False)), **absent}, {})

    return run


def _with_attributes(node: onnx.NodeProto, given: Mapping[str, onnx.AttributeProto]) -> onnx.NodeProto:
    """The node with attribute references replaced by the call's attributes; unset ones disappear."""
    bound = onnx.NodeProto()
    bound.CopyFrom(node)
    del bound.attribute[:]
    for attribute in node.attribute:
        copy = bound.attribute.add()
        copy.CopyFrom(given.get(attribute.ref_attr_name, attribute) if attribute.ref_attr_name else attribute)
        copy.name = attribute.name
        if copy.ref_attr_name:
            bound.attribute.pop()
        elif copy.type == _Kind.GRAPH:
            inner = [_with_attributes(n, given) for n in copy.g.node]
            del copy.g.node[:]
            copy.g.node.extend(inner)
    return bound
