"""cuDNN's fused convolutions through its Python frontend: a graph, the plans cuDNN has for it, one of them as bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

from ingot.errors import LibraryUnusable
from ingot.runtime import cuda

_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BFLOAT16", "int8": "INT8"}  # of cudnn.data_type
_X, _WEIGHT, _SCALE, _BIAS, _Y = range(1, 6)  # names of the graph's tensors
_NO_STREAM = 0
_LOCK = threading.Lock()  # a handle has one stream at a time


@dataclass(frozen=True)
class Convolution:
    """y[N, *, O] = activation(scale[O] · conv(x[N, H, W, C], weight[O, *, C / group]) + bias[O]), channels last.

    `shape` is N, C, H, W of x, `filter` O, C / group and the kernel's sizes. Scale and bias are there where `scaled`
    and `bias` say so, of the type `vectors`. Addresses are taken in this order, then the workspace and y.
    """

    factors: str
    vectors: str
    results: str
    shape: tuple[int, ...]
    filter: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    scaled: bool
    bias: bool
    relu: bool

    @property
    def tensors(self) -> tuple[int, ...]:
        """Names of what it reads."""
        return (_X, _WEIGHT, *[_SCALE] * self.scaled, *[_BIAS] * self.bias)


@dataclass(frozen=True)
class Built:
    """One plan: its bytes, and the bytes of workspace it wants."""

    code: bytes
    workspace: int


def _library() -> Any:
    """The frontend; tests put their own in its place."""
    import cudnn

    return cudnn


@cache
def _open(ordinal: int) -> tuple[Any, Any]:
    """The frontend and a handle for the device, whose context is the thread's; for the life of the process."""
    try:
        cudnn = _library()
        return cudnn, cudnn.create_handle()
    except (ImportError, OSError, RuntimeError) as error:  # the latter: the frontend without the library itself
        words = " ".join(str(error).split())
        raise LibraryUnusable(f"cuDNN is not here ({words}): pip install 'ingot[cuda-libraries]'") from None


def version(context: cuda.Context) -> int:
    """Of cuDNN itself."""
    context.activate()
    return int(_open(context.device.ordinal)[0].backend_version())


def _planned(context: cuda.Context, wanted: Convolution) -> Any:
    """The graph with its plans listed, none built. LibraryUnusable when cuDNN has no plan for it."""
    context.activate()
    cudnn, handle = _open(context.device.ordinal)
    kinds = {name: getattr(cudnn.data_type, kind) for name, kind in _TYPES.items()}
    graph = cudnn.pygraph(io_data_type=kinds[wanted.factors], intermediate_data_type=cudnn.data_type.FLOAT,
                          compute_data_type=cudnn.data_type.FLOAT, handle=handle)  # fmt: skip
    try:
        _draw(cudnn, graph, wanted, kinds)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
        raise LibraryUnusable(f"cuDNN has no plan for it ({' '.join(str(error).split())[-200:]})") from None
    return graph


def _draw(cudnn: Any, graph: Any, wanted: Convolution, kinds: Mapping[str, Any]) -> None:
    def tensor(uid: int, shape: Sequence[int], dtype: str) -> Any:
        _, channels, height, width = shape
        strides = [channels * height * width, 1, width * channels, channels]
        return graph.tensor(dim=list(shape), stride=strides, data_type=kinds[dtype], uid=uid, name=f"tensor{uid}")

    x, weight = tensor(_X, wanted.shape, wanted.factors), tensor(_WEIGHT, wanted.filter, wanted.factors)
    exact = cudnn.data_type.INT32 if wanted.factors == "int8" else cudnn.data_type.FLOAT
    half = len(wanted.pads) // 2
    y = graph.conv_fprop(x, weight, pre_padding=list(wanted.pads[:half]), post_padding=list(wanted.pads[half:]),
                         stride=list(wanted.strides), dilation=list(wanted.dilations),
                         compute_data_type=exact)  # fmt: skip
    if wanted.factors == "int8":
        y.set_data_type(exact)
    vector = (1, wanted.filter[0], 1, 1)
    if wanted.scaled:
        y = graph.mul(y, tensor(_SCALE, vector, wanted.vectors))
    if wanted.bias:
        y = graph.add(y, tensor(_BIAS, vector, wanted.vectors))
    if wanted.relu:
        y = graph.relu(y)
    y.set_output(True).set_data_type(kinds[wanted.results]).set_uid(_Y)


def plans(context: cuda.Context, wanted: Convolution) -> int:
    """How many cuDNN has, best first by its own heuristics; 0 where it has none."""
    try:
        return int(_planned(context, wanted).get_execution_plan_count())
    except LibraryUnusable:
        return 0


def build(context: cuda.Context, wanted: Convolution, index: int) -> Built:
    """A plan by its number. LibraryUnusable when it does not build."""
    graph = _planned(context, wanted)
    cudnn, _ = _open(context.device.ordinal)
    try:
        graph.build_plan_at_index(index)
        workspace = int(graph.get_workspace_size_plan_at_index(index))
        return Built(bytes(graph.serialize()), workspace)
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
        words = " ".join(str(error).split())[-200:]
        raise LibraryUnusable(f"cuDNN cannot build plan {index} of {wanted} ({words})") from None


def recipe_of(wanted: Convolution, version: int) -> dict[str, Any]:
    """What an engine keeps beside the plan's bytes: what it computes, and which cuDNN takes it."""
    return {**asdict(wanted), "version": version}


def prepare(
    context: cuda.Context, recipe: Mapping[str, Any], symbols: Mapping[str, int], code: bytes
) -> Callable[..., None]:
    """What puts the recipe's convolution on a stream: (addresses, stream) -> None. LibraryUnusable when it cannot."""
    here = version(context)
    if here != recipe["version"]:
        raise LibraryUnusable(f"they were chosen with cuDNN {recipe['version']}, here is {here}")
    cudnn, handle = _open(context.device.ordinal)
    graph = cudnn.pygraph(handle=handle)
    try:
        graph.deserialize(handle, code)
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError) as error:
        raise LibraryUnusable(f"cuDNN refuses a plan ({' '.join(str(error).split())[-200:]})") from None
    names = Convolution(**{f.name: recipe[f.name] for f in fields(Convolution)}).tensors

    def run(addresses: Sequence[int], stream: Any) -> None:
        *read, workspace, y = addresses
        with _LOCK:
            cudnn.set_stream(handle, int(stream))
            graph.execute({**dict(zip(names, read, strict=True)), _Y: y}, workspace, handle)
            cudnn.set_stream(handle, _NO_STREAM)  # ours may be destroyed before the handle is used again

    return run
