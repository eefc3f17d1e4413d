"""The stages `build` names: import, optimise, compile a variant per instruction set, package."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import onnx_ir

from ingot import passes
from ingot.config import SPLIT_ERROR, BuildConfig
from ingot.engine import Engine, Variant, plan_bytes
from ingot.errors import BuildError, ConfigError
from ingot.importers import ends
from ingot.importers import onnx as onnx_importer
from ingot.ir import shapes
from ingot.ir.graph import dtype_of
from ingot.ir.provenance import origins
from ingot.kernels import Candidate
from ingot.kernels.cpu import workers
from ingot.kernels.cpu.backend import open_backend as open_cpu
from ingot.kernels.cpu.isa import BY_NAME, Isa
from ingot.kernels.cpu.standalone import native_isa
from ingot.kernels.cuda.architecture import Architecture, architecture
from ingot.kernels.cuda.backend import open_backend as open_cuda
from ingot.kernels.target import Backend, Target
from ingot.passes.narrow import quantize_inside
from ingot.passes.norms import normalise_linears
from ingot.passes.packed import pack_heads
from ingot.passes.parallel import divide_convolutions, gate_linears, join_linears
from ingot.passes.sequences import see_as_sequences
from ingot.plan.assemble import Code, assemble
from ingot.plan.lower import REJECTED, Module, Work, lower
from ingot.plan.memory import plan_memory
from ingot.plan.plan import Plan, TensorSpec
from ingot.precision import half, maps
from ingot.report import BuildLog
from ingot.runtime import cuda, library
from ingot.runtime.cpu import usable_threads
from ingot.runtime.session import features
from ingot.tune import beginnings, choose, tuner

Symbols = Mapping[str, int]
_OUTLINE_LIMIT = 3000
_FLOAT8_CAPABILITY = 89
_TOOLCHAIN = ("ingot", "onnx", "onnx_ir", "onnx-shape-inference", "llvmlite", "numpy")
_CUDA_TOOLCHAIN = ("triton", "cuda-bindings")


def import_model(model: Any, config: BuildConfig, log: BuildLog) -> onnx_ir.Model:
    """The user's model as a checked graph with shapes inferred. Meanwhile the compiling children start."""
    if config.target != "host":
        workers.prepare(usable_threads())
    with log.stage("import"):
        if isinstance(model, tuple):
            from ingot.importers import torch as torch_importer

            source = torch_importer.load(*model)
        else:
            source = onnx_importer.load(model)
        ends.retype(source, config.input_types, config.output_types)
        shapes.infer(source)
        check_profiles(source, config)
        return source


def optimise(source: onnx_ir.Model, config: BuildConfig, log: BuildLog) -> onnx_ir.Model | None:
    """A rewritten copy of the model for native targets."""
    if config.target == "host":
        return None
    with log.stage("optimise"):
        fixed = fixed_symbols(source, config)
        model = shapes.specialize(source, fixed) if fixed else source.clone()
        result = passes.run(model, quantized_weights=config.target == "cpu", float8=_multiplies_float8(config))
        for refused in result.rejections:
            log.note("not fused", refused.node, refused.reason)
        reasons = {r.node: f"{r.reason}; {r.remedy}" if r.remedy else r.reason for r in result.remaining}
        for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
            if node.name in reasons and node.domain != "ingot":
                node.metadata_props[REJECTED] = reasons[node.name]
        log.figures["rewrites"] = dict(result.counts)
        if config.precision in half.DTYPES:
            _narrow(model, config, log)
        if config.target.startswith("cuda"):
            log.figures["joined"] = join_linears(model) + divide_convolutions(model)
            log.figures["quantized inside"] = quantize_inside(model)
            log.figures["gated"] = gate_linears(model)
            log.figures["heads packed"] = pack_heads(model)
            log.figures["normalised inside"] = normalise_linears(model)
            log.figures["seen as sequences"] = see_as_sequences(model)
        return model


def hosts_two(config: BuildConfig) -> bool:
    """Whether every variant's GPU has room for blocks of a launch beside those of the one ahead of it."""
    return all(a.hosts_two for a in _architectures(config))


def _multiplies_float8(config: BuildConfig) -> bool:
    """Whether every variant's processor does."""
    return config.target.startswith("cuda") and all(a.capability >= _FLOAT8_CAPABILITY for a in _architectures(config))


def _narrow(model: onnx_ir.Model, config: BuildConfig, log: BuildLog) -> None:
    """16-bit tensors: all of them on a GPU; on a CPU feature maps where every variant has tiles for them."""
    scope = half.Scope(_fits(config, log)) if config.overflows else None
    if config.target == "cpu":
        tiles = all(isa.has("amx_bf16") for isa in _isas(config))
        scope = maps.scope_of(model.graph) if tiles else None
        if scope is None:
            return
        log.note("bf16", "feature maps", "kept in bfloat16 between the convolutions; --bf16 asked for it")
    log.figures["kept in float32"] = half.convert(model, half.DTYPES[config.precision], scope)


def _fits(config: BuildConfig, log: BuildLog) -> Callable[[onnx_ir.Node], bool]:
    """Whether a node reads and writes nothing that was observed beyond the narrow type."""
    told: set[str] = set()

    def fits(node: onnx_ir.Node) -> bool:
        beyond = [v.name for v in (*node.inputs, *node.outputs) if v is not None and v.name in config.overflows]
        for name in beyond:
            if name is not None and name not in told:
                low, high = config.overflows[name]
                log.note("kept in float32", ", ".join(origins(node)), f"{name} ranges from {low:.4g} to {high:.4g}")
                told.add(name)
        return not beyond and half.Scope().takes(node)

    return fits


@dataclass(frozen=True, eq=False)
class Compiled:
    """A variant with what it was made from, for finding a wrong kernel."""

    variant: Variant
    target: Target | None = None
    module: Module | None = None
    choices: Mapping[Work, Candidate] = field(default_factory=dict)


def compile_variants(
    source: onnx_ir.Model,
    optimised: onnx_ir.Model | None,
    config: BuildConfig,
    log: BuildLog,
    banned: frozenset[str] = frozenset(),
) -> list[Compiled]:
    """A variant per instruction set asked for, best first; `banned` candidates (by label) are not used."""
    if optimised is None:
        return [Compiled(_host_variant(source, config))]
    return [_native_variant(optimised, target, config, log, banned) for target in _targets(config)]


def _targets(config: BuildConfig) -> Sequence[Target]:
    return _isas(config) if config.target == "cpu" else _architectures(config)


def _architectures(config: BuildConfig) -> list[Architecture]:
    """Of the target's name ("cuda:sm_90"), of --variants, or of the GPU that is here."""
    named = config.target.partition(":")[2]
    names = named.split(",") if named else list(config.variants) or [cuda.first_architecture()]
    found = [architecture(name, config.precision, _libraries(name, config)) for name in names]
    return sorted(found, key=lambda a: a.capability, reverse=True)


def _libraries(name: str, config: BuildConfig) -> tuple[str, ...]:
    """Whose tactics are timed: of those that are here, where such a GPU is."""
    here = library.installed(config.libraries) if config.level else ()
    return here if here and name in features("cuda") else ()


def _isas(config: BuildConfig) -> list[Isa]:
    unknown = [name for name in config.variants if name not in BY_NAME]
    if unknown:
        raise ConfigError(f"there is no variant {unknown[0]!r}; choose from {', '.join(BY_NAME)}")
    if config.variants:
        return [isa for isa in BY_NAME.values() if isa.name in config.variants]
    native = native_isa()
    if native is None:
        raise ConfigError(
            "this machine has no AVX2, name the variants to build for with --variants, or use target='host'"
        )
    return [native]


def _host_variant(source: onnx_ir.Model, config: BuildConfig) -> Variant:
    code = Code(None)
    plan = plan_memory(assemble(lower(source, None), {}, code), profile_bounds(source, config))
    return Variant("host", "", (), plan_bytes(plan), weights=code.weight_bytes().data)


_BACKENDS: Mapping[str, Callable[..., AbstractContextManager[Backend]]] = {"cpu": open_cpu, "cuda": open_cuda}


def _native_variant(
    model: onnx_ir.Model, target: Target, config: BuildConfig, log: BuildLog, banned: frozenset[str]
) -> Compiled:
    with log.stage(f"lower {target.name}"):
        module = lower(model, target, target.target, banned=banned, tolerance=config.tolerance)
        _note_host_works(module, log)
    with log.stage(f"tune {target.name}"):
        symbols = typical_symbols(model, config)
        price = tuner.prices(module, target, symbols, config, log)
        choice = choose.choose(module, price, symbols, target.pace)
    with log.stage(f"compile {target.name}"), _BACKENDS[target.target](target, log) as backend:
        code = Code(backend)
        plan = plan_memory(assemble(module, choice.candidates, code), profile_bounds(model, config))
        _check_memory(plan, config)
        _note_approximations(choice.candidates, config, log)
        weights = code.weight_bytes().data  # while the last kernels compile
        image, exported = backend.image()
    requires = tuple(sorted(target.machine))
    variant = Variant(target.target, target.name, requires, plan_bytes(plan), image, exported, weights)
    if target.target == "cuda":
        with log.stage(f"settle {target.name}"):
            variant = beginnings.settled(variant, target, symbols, config)
    return Compiled(variant, target, module, choice.candidates)


def host_works(source: onnx_ir.Model) -> tuple[int, list[Work]]:
    """The capability report, before a build: how many steps would be native, and the works that would not."""
    shapes.infer(source)
    config, log = BuildConfig(level=0), BuildLog()
    model = optimise(source, config, log)
    assert model is not None
    works = list(lower(model, native_isa() or BY_NAME["avx2"]).all_works())
    return sum(w.kind == "native" for w in works), [w for w in works if w.kind == "host"]


def _note_approximations(choices: Mapping[Work, Candidate], config: BuildConfig, log: BuildLog) -> None:
    errors: dict[str, list[float]] = {}
    for work, candidate in choices.items():
        if candidate.kernel.tolerance and work.node is not None:
            errors.setdefault(candidate.kernel.name, []).append(candidate.kernel.error(work.node))
    for name, found in errors.items():
        remedy = f"--{config.precision} asked for it" if max(found) > SPLIT_ERROR else "--exact forbids it"
        said = f"within {max(found):.0e} of the magnitudes multiplied, in {len(found)} steps; {remedy}"
        log.note("approximation", name, said)
    rounded = any(max(found) > SPLIT_ERROR for found in errors.values()) or "kept in float32" in log.figures
    if config.precision == "bf16" and not rounded:
        log.note("bf16", "no step", "float32 was faster, or the instruction set has no products of bfloat16")


def _note_host_works(module: Module, log: BuildLog) -> None:
    hosts = [w for w in module.all_works() if w.kind == "host"]
    log.figures["host steps"] = len(hosts)
    log.figures["native steps"] = sum(w.kind == "native" for w in module.all_works())
    for work in hosts:
        log.note("host step", ", ".join(work.origins) or work.name, f"{work.op}: {work.reason}")


def _check_memory(plan: Plan, config: BuildConfig) -> None:
    planned = max((m.bytes for m in plan.memory), default=0)
    if config.memory_limit is not None and planned > config.memory_limit:
        raise BuildError(
            f"a run needs {planned / 2**20:.1f} MiB of activations, the limit is "
            f"{config.memory_limit / 2**20:.1f} MiB: lower the profile's largest shapes or raise the limit"
        )


# -- profiles
# -----------------------------------------------------------------------------------------------------------


def check_profiles(model: onnx_ir.Model, config: BuildConfig) -> None:
    """Every profile names existing inputs with fitting shapes."""
    inputs = {v.name: shapes.shape_of(v) for v in model.graph.inputs}
    for profile in config.profiles:
        for name, triple in profile.shapes.items():
            if name not in inputs:
                raise ConfigError(f"the profile names input {name!r}; the model has {', '.join(map(str, inputs))}")
            shape = inputs[name] or ()
            for given in triple:
                if len(given) != len(shape) or any(
                    isinstance(d, int) and d != n for d, n in zip(shape, given, strict=True)
                ):
                    raise ConfigError(f"the profile gives {given} for input {name!r}, the model has {list(shape)}")


def _bound_symbols(model: onnx_ir.Model, config: BuildConfig, point: int) -> list[dict[str, int]]:
    """Per profile: the symbols at min (0), opt (1) or max (2)."""
    inputs = {v.name: shapes.shape_of(v) or () for v in model.graph.inputs}
    bound = []
    for profile in config.profiles:
        pairs = [
            (d, n) for name, triple in profile.shapes.items() for d, n in zip(inputs[name], triple[point], strict=True)
        ]
        bound.append({d: n for d, n in pairs if isinstance(d, str) and d.isidentifier()})
    return bound


def fixed_symbols(model: onnx_ir.Model, config: BuildConfig) -> dict[str, int]:
    """Symbols that every profile gives one and the same extent: the engine is built for it as a constant."""
    corners = [bound for point in range(3) for bound in _bound_symbols(model, config, point)]
    names = set.intersection(*(set(c) for c in corners)) if corners else set()
    return {n: corners[0][n] for n in sorted(names) if len({c[n] for c in corners}) == 1}


def profile_bounds(model: onnx_ir.Model, config: BuildConfig) -> list[dict[str, int]]:
    """Largest extents per profile; one empty set for a static model."""
    return _bound_symbols(model, config, 2) or [{}]


def typical_symbols(model: onnx_ir.Model, config: BuildConfig) -> dict[str, int]:
    """Extents to tune for: the first profile's opt."""
    return next(iter(_bound_symbols(model, config, 1)), {})


# -- packaging
# ----------------------------------------------------------------------------------------------------------


def package(source: onnx_ir.Model, compiled: Sequence[Compiled], config: BuildConfig, log: BuildLog) -> Engine:
    """The engine around its variants."""
    with log.stage("package"):
        inputs = input_specs(source, config)
        outputs = tuple(_spec(v, config) for v in source.graph.outputs)
        details = {
            "config": config.described(),
            "model": {"name": source.graph.name or "", "digest": digest(source), "opsets": dict(source.opset_imports)},
            "graph": _graph_outline(source),
            "toolchain": toolchain(_CUDA_TOOLCHAIN if config.target.startswith("cuda") else ()),
            "notices": [str(n) for n in log.notices if n.kind != "not fused"],
        }
        return Engine(inputs, outputs, tuple(c.variant for c in compiled), details)


def input_specs(model: onnx_ir.Model, config: BuildConfig) -> tuple[TensorSpec, ...]:
    """The model's inputs with the extents that the profiles give."""
    return tuple(_spec(v, config) for v in model.graph.inputs)


def _graph_outline(model: onnx_ir.Model) -> list[tuple[str, str, list[int]]]:
    """(name, operator, positions of the nodes it reads from) per node of the main graph: what the report draws."""
    nodes = list(model.graph)
    place = {value: i for i, node in enumerate(nodes) for value in node.outputs}
    return [
        (n.name or "", n.op_type, sorted({place[v] for v in n.inputs if v in place})) for n in nodes[:_OUTLINE_LIMIT]
    ]  # fmt: skip


def _spec(value: onnx_ir.Value, config: BuildConfig) -> TensorSpec:
    shape, name = shapes.shape_of(value) or (), value.name or ""
    triples = [p.shapes[name] for p in config.profiles if name in p.shapes]
    dtype = dtype_of(value) if isinstance(value.type, onnx_ir.TensorType) and value.dtype is not None else "object"
    if not triples:
        return TensorSpec(name, dtype, shape)
    low = tuple(min(extents) for extents in zip(*(t[0] for t in triples), strict=True))
    high = tuple(max(extents) for extents in zip(*(t[2] for t in triples), strict=True))
    return TensorSpec(name, dtype, shape, low, triples[0][1], high)


def toolchain(further: Sequence[str] = ()) -> dict[str, str]:
    """Versions of what took part in the build."""
    found = {"python": platform.python_version()}
    for name in (*_TOOLCHAIN, *further):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source"
    return found


def digest(model: onnx_ir.Model) -> str:
    """SHA-256 over the graph's structure and weights."""
    sha = hashlib.sha256()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        sha.update(f"{value.name}:{tensor.dtype if tensor else ''}:{tensor.shape if tensor else ''};".encode())
        if tensor is not None and tensor.dtype != onnx_ir.DataType.STRING:
            sha.update(tensor.numpy().reshape(-1).view(np.uint8).data if tensor.size else b"")
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        sha.update(onnx_ir.to_proto(node).SerializeToString(deterministic=True))
    for value in (*model.graph.inputs, *model.graph.outputs):
        sha.update(f"{value.name}:{value.dtype}:{value.shape};".encode())
    return sha.hexdigest()
