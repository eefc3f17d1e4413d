"""Engines of large random models whose weights nobody has: plans and kernels are made anywhere, the weights on the GPU.

    python -m benchmarks.llm_cuda_engine --folder build/llm_cuda [--shapes llama_8b] [--precisions bf16 fp8] [--ranks 2]

A file holds the engine without its weights, and where which of them would be: what is small as it is, matrices as
random numbers that `fill` draws on the device.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from ingot import compiler
from ingot.dtypes import numpy_dtype
from ingot.engine import Engine, Variant
from ingot.kernels.cuda import mixture, projection, projection_quantized
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.build import NAME, Unit
from ingot.kernels.cuda.compile import compile_unit
from ingot.kernels.cuda.projection_ring import COLUMNS
from ingot.llm import build as llm_build
from ingot.llm import projections
from ingot.llm.batch import FORMS
from ingot.llm.build import BuildOptions
from ingot.llm.decoder import Array, Decoder, Experts, Layer, Matrix, Scale
from ingot.llm.formats import FORMATS, Format, Role, Weights
from ingot.llm.graph import BLOCK
from ingot.llm.rope import tables
from ingot.llm.shards import shard
from ingot.plan.assemble import Code
from ingot.plan.packing import align
from ingot.plan.plan import TensorSpec
from ingot.report import BuildLog
from ingot.runtime import cuda, cuda_executor
from ingot.runtime.cubins import Code as Cubin

SPREAD = 0.02  # of the weights
_WHOLE = 74  # of integers of eight bits


@dataclass(frozen=True)
class Shape:
    """A Llama of these sizes, whose networks are experts of which each token passes `chosen`, where there are any."""

    layers: int
    hidden: int
    inner: int
    heads: int
    groups: int
    vocabulary: int
    depth: int = 128
    experts: int = 0
    chosen: int = 0

    @property
    def matrices(self) -> int:
        """Weights that a decoded token reads, but routers'."""
        return self._with(max(self.chosen, 1))

    @property
    def every(self) -> int:
        """Weights there are, but routers'."""
        return self._with(max(self.experts, 1))

    @property
    def routers(self) -> int:
        """Weights of routers."""
        return self.layers * self.hidden * self.experts

    def read(self, kept: Format) -> float:
        """Bytes of weights and their scales that a decoded token reads, without routers."""

        def of(bits: int, narrow: bool = False) -> float:
            return bits / 8 + (2 / kept.group if kept.group and not narrow else 0)

        keys, head = 2 * self.layers * self.hidden * self.groups * self.depth, self.hidden * self.vocabulary
        key_bits, head_bits = (max(bits, kept.bits) for bits in (kept.key_bits, kept.head_bits))
        rest = (self.matrices - keys - head) * of(kept.bits, kept.narrow_rows)
        return rest + keys * of(key_bits, kept.narrow_rows) + head * of(head_bits)

    def _with(self, networks: int) -> int:
        each = self.hidden * (2 * self.heads + 2 * self.groups) * self.depth + 3 * self.hidden * self.inner * networks
        return self.layers * each + self.hidden * self.vocabulary


SHAPES = {
    "llama_8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "llama_70b": Shape(80, 8192, 28672, 64, 8, 128256),
    "qwen3_30b": Shape(48, 2048, 768, 32, 4, 151936, experts=128, chosen=8),
    "llama_tiny": Shape(2, 256, 512, 4, 2, 1024, 64),
    "moe_tiny": Shape(2, 256, 128, 4, 2, 1024, 64, 8, 2),
}


@dataclass(frozen=True)
class Unmade(Format):
    """Matrices of zeros that take no memory; the same ones for every layer."""

    _known: dict[tuple[int, int, int], Weights] = field(default_factory=dict)

    def linear(self, matrix: Matrix, role: Role = "plain") -> tuple[str, Weights, dict[str, Any]]:
        """As a format gives them."""
        outputs, depth = matrix.outputs, matrix.weights[0].shape[1]
        key = (outputs, depth, self.bits_of(role))
        if key not in self._known:
            self._known[key] = self._zeros(outputs, depth, matrix, role)
        whole = self.bits_of(role) < 16 and not self.name.startswith("fp8") and not self.narrows(matrix, role)
        stated = {"bits": self.bits_of(role), "group": self.group} if whole else {}
        return "QuantizedLinear" if whole else "Linear", self._known[key], stated

    def bits_of(self, role: Role) -> int:
        """Of a weight."""
        return 16 if role == "router" else {"head": self.head_bits, "keys": self.key_bits}.get(role, 0) or self.bits

    def _zeros(self, outputs: int, depth: int, matrix: Matrix, role: Role) -> Weights:
        dtype = self._dtype if role != "router" else "bfloat16"
        held: dict[str, Any] = {"weight": np.zeros((outputs, depth), numpy_dtype(dtype)).T}
        if dtype == "float8_e4m3fn" or (dtype == "int8" and self.narrows(matrix, role)):
            size = SPREAD / (_WHOLE if dtype == "int8" else 1)
            held["columns"] = np.full(outputs, size, numpy_dtype("bfloat16")).astype(np.float32)
        elif dtype == "int8":
            held |= {"scale": np.zeros((-(-depth // self.group), outputs), np.float16), "zero": None}
        return held

    @property
    def _dtype(self) -> str:
        return "float8_e4m3fn" if self.name.startswith("fp8") else "bfloat16" if self.bits > 8 else "int8"

    def stack(self, weights: Sequence[Array]) -> tuple[Array, Array | None]:
        """As a format gives them."""
        outputs, depth = weights[0].shape
        key = (outputs, depth, -len(weights))
        if key not in self._known:
            scale = None
            if self._dtype != "bfloat16":
                scale = np.full((len(weights), outputs), SPREAD, numpy_dtype("bfloat16")).astype(np.float32)
            whole = np.zeros((len(weights), depth, outputs), numpy_dtype(self._dtype))
            self._known[key] = {"weight": whole, "columns": scale}
        weight, scale = self._known[key]["weight"], self._known[key]["columns"]
        assert weight is not None
        return weight, scale


@dataclass(eq=False)
class Described(Code):
    """Places of weights: matrices as (offset, bytes, dtype), the rest as it is."""

    matrices: list[tuple[int, int, str]] = field(default_factory=list)
    small: dict[int, bytes] = field(default_factory=dict)
    _places: dict[bytes, int] = field(default_factory=dict)

    def add_weight(self, array: Array) -> int:
        """Every matrix has a place of its own."""
        matrix = array.dtype.name in FILLS and array.nbytes >= 1 << 16
        data = b"" if matrix else np.ascontiguousarray(array).tobytes()
        if data in self._places:
            return self._places[data]
        offset = self.size
        self.size = align(offset + array.nbytes + 64)
        if matrix:
            self.matrices.append((offset, array.nbytes, array.dtype.name))
        else:
            self.small[offset], self._places[data] = data, offset
        return offset

    def weight_bytes(self) -> Array:
        """Nothing: they are made on the device."""
        return np.zeros(0, np.uint8)


def decoder_of(shape: Shape, context: int, ranks: int = 1) -> Decoder:
    """The description, of one of some ranks; all layers refer to the same matrices, whose numbers do not matter."""

    def matrix(outputs: int, depth: int) -> Matrix:
        return Matrix((np.zeros((outputs, depth), numpy_dtype("bfloat16")),))

    scale = Scale(np.ones(shape.hidden, np.float32))
    projection = matrix((shape.heads + 2 * shape.groups) * shape.depth, shape.hidden)
    output, down = matrix(shape.hidden, shape.heads * shape.depth), matrix(shape.hidden, shape.inner)
    gate, up = (matrix(shape.inner, shape.hidden) for _ in range(2))
    layer = Layer(scale, projection, output, scale, up, gate, down)
    if shape.experts:
        gates, ups, downs = ((part.weights[0],) * shape.experts for part in (gate, up, down))
        router = matrix(shape.experts, shape.hidden).weights[0]
        layer = replace(layer, up=None, gate=None, down=None,
                        experts=Experts(router, gates, ups, downs, shape.chosen, normalised=True))  # fmt: skip
    embedding = np.zeros((shape.vocabulary, shape.hidden), numpy_dtype("bfloat16"))
    angles = tables({"rope_type": "default", "rope_theta": 500000.0}, shape.depth, context)
    whole = Decoder(
        shape.hidden, shape.heads, shape.groups, shape.depth, context, embedding, [layer], scale,
        matrix(shape.vocabulary, shape.hidden), shape.depth**-0.5, rope={"default": angles},
    )  # fmt: skip
    part = shard(whole, 0, ranks)
    return replace(part, layers=[*part.layers] * shape.layers)


def made(shape: Shape, precision: str, options: BuildOptions) -> dict[str, Any]:
    """An engine without weights, as a file holds it."""
    assert options.context is not None
    kept = FORMATS[precision]
    unmade = Unmade(**{part.name: getattr(kept, part.name) for part in fields(kept)})
    decoder = decoder_of(shape, options.context, options.ranks)
    with mock.patch.object(projections._Joined, "__call__", lambda joined, *both: _beside(*both)):
        model = llm_build.graph_for(decoder, unmade, "llama", options)
    config, codes = llm_build._config(decoder, options), list[Described]()

    def described(backend: Any) -> Described:
        codes.append(Described(backend))
        return codes[-1]

    with (
        mock.patch.object(compiler, "Code", described), mock.patch.object(projection, "stored", _unstored),
        mock.patch.object(projection, "bricks", _unbricked), mock.patch.object(mixture, "stored", _unstored),
        mock.patch.object(projection_quantized, "packed_words", _unpacked),
    ):  # fmt: skip
        (compiled,) = compiler.compile_variants(model, model, config, BuildLog())
    variant, code = compiled.variant, codes[-1]
    facts = {
        "form": FORMS[0], "family": "llama", "vocabulary": shape.vocabulary, "layers": shape.layers,
        "ranks": options.ranks, "rank": 0, "identity": hashlib.sha256(repr((shape, options)).encode()).hexdigest(),
        "groups": decoder.groups, "depth": shape.depth, "block_size": BLOCK, "context": options.context,
        "token_budget": options.token_budget, "sequence_budget": options.sequence_budget,
        "format": {"cache": unmade.cache}, "bos": None, "eos": [], "files": {},
    }  # fmt: skip
    return {
        "inputs": [asdict(spec) for spec in compiler.input_specs(model, config)],
        "outputs": [asdict(compiler._spec(value, config)) for value in model.graph.outputs],
        "target": variant.target, "isa": variant.isa, "requires": variant.requires,
        "plan": _text(variant.plan_json), "code": _text(variant.code), "facts": facts, "matrices": code.matrices,
        "small": {str(offset): _text(data) for offset, data in code.small.items()}, "size": code.size, "fill": filler(),
    }  # fmt: skip


def _unstored(weight: Array) -> Array:
    """Zeros that take no memory, in the place of weights as they are kept."""
    return np.zeros(weight.swapaxes(-1, -2).shape, weight.dtype)


def _unbricked(weight: Array, parts: int) -> Array:
    """The same of weights in bricks of so many parts."""
    columns = -(-weight.shape[1] // parts // COLUMNS) * COLUMNS
    return np.zeros((parts * columns, weight.shape[0]), weight.dtype)


def _unpacked(weight: Array, bits: int) -> Array:
    """The same of words of integers."""
    return np.zeros((weight.shape[1], len(weight) * bits // 32), np.int32)


def _beside(first: Array, second: Array) -> Array:
    """The same of two matrices side by side."""
    return np.zeros((first.shape[1] + second.shape[1], len(first)), first.dtype).T


FILL = """
import triton
import triton.language as tl


@triton.jit
def KERNEL(words, count, seed, kept, set):
    at = tl.program_id(0).to(tl.int64) * 4096 + tl.arange(0, 4096)
    x = (at + seed.to(tl.int64) * 2654435761).to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    tl.store(words + at, (x.to(tl.int32, bitcast=True) & kept) | set, at < count)
"""
# Bits of two or four numbers that are drawn, and that are set: sign and fraction at random, exponents within a factor
# of four, about SPREAD in bfloat16, about one in float8; integers anyhow; scales in float16 about SPREAD / 5.
FILLS = {
    "bfloat16": (0x80FF80FF, 0x3C003C00), "float8_e4m3fn": (0x8F8F8F8F, 0x30303030), "int32": (0xFFFFFFFF, 0),
    "float16": (0x00FF00FF, 0x1C001C00),
}  # fmt: skip


def _text(data: Any) -> str:
    return base64.b64encode(bytes(data)).decode()


def filler() -> tuple[str, int, int]:
    """The kernel that draws matrices: code, shared memory, threads."""
    signature = (("words", "*i32"), ("count", "i64"), ("seed", "i32"), ("kept", "i32"), ("set", "i32"))
    cubin = compile_unit(Unit(FILL.lstrip(), signature, (), 8, 1), architecture("sm_90").name)
    return _text(cubin.code), cubin.shared, cubin.threads


def opened(path: Path, device: cuda.Device, rank: int = 0) -> Engine:
    """The engine with its weights on the device, drawn there: another part of the model for each rank."""
    held = json.loads(path.read_text())
    plan, code = (base64.b64decode(held[part]) for part in ("plan", "code"))
    variant = Variant(held["target"], held["isa"], tuple(held["requires"]), plan, code)
    context = cuda.context_of(device)
    memory = context.allocate(held["size"], "random weights")
    stream = context.stream()
    context.clear(memory, stream)
    _draw(context, memory, held, stream, rank * len(held["matrices"]))
    for offset, data in held["small"].items():
        context.upload(memory.address + int(offset), np.frombuffer(base64.b64decode(data), np.uint8), stream)
        context.wait(stream, "an upload")
    cuda_executor.adopt(variant, device, memory)
    return Engine(_specs(held["inputs"]), _specs(held["outputs"]), (variant,), {"llm": {**held["facts"], "rank": rank}})


def _draw(context: cuda.Context, memory: cuda.Allocation, held: dict[str, Any], stream: Any, first: int) -> None:
    code, shared, threads = held["fill"]
    kernels = cuda.Kernels(context, {"fill": Cubin(base64.b64decode(code), NAME, threads, shared, False)})
    kinds = (ctypes.c_void_p, ctypes.c_longlong, *[ctypes.c_int] * 3, ctypes.c_void_p, ctypes.c_void_p)
    for seed, (offset, size, dtype) in enumerate(held["matrices"], first):
        values = (memory.address + offset, size // 4, seed, *(ctypes.c_int(bits).value for bits in FILLS[dtype]), 0, 0)
        kernels.launch("fill", (-(-size // 4 // 4096), 1, 1), (values, kinds), stream)


def name_of(shape: str, precision: str, ranks: int = 1) -> str:
    """A file of the folder."""
    return f"{shape}_{precision}{f'_x{ranks}' if ranks > 1 else ''}.json"


def _specs(held: Sequence[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    def entry(spec: dict[str, Any]) -> TensorSpec:
        given: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in spec.items()}
        return TensorSpec(**given)

    return tuple(map(entry, held))


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/llm_cuda"))
    parser.add_argument("--shapes", nargs="+", default=["llama_8b"], choices=sorted(SHAPES))
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--context", type=int, default=8704)
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--sequence-budget", type=int, default=1024)
    parser.add_argument("--typical", type=int, default=1, help="tokens of the step to choose kernels for")
    parser.add_argument("--target", default="cuda:sm_90")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs that share the model")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """A file for each shape and precision."""
    asked = parsed(words)
    asked.folder.mkdir(parents=True, exist_ok=True)
    for shape in asked.shapes:
        for precision in asked.precisions:
            options = BuildOptions(precision, asked.target, asked.context, asked.token_budget, asked.sequence_budget,
                                   asked.typical, level=0, verify=False, ranks=asked.ranks)  # fmt: skip
            path = asked.folder / name_of(shape, precision, asked.ranks)
            path.write_text(json.dumps(made(SHAPES[shape], precision, options)))
            print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
