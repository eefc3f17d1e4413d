"""cuDNN through its Python frontend: the plans it has for what is wanted, one of them as bytes, and running that."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ingot.errors import LibraryUnusable
from ingot.runtime import cuda
from ingot.runtime.cudnn_graphs import RESULT, Wanted, draw, wanted_of

_NO_STREAM = 0
_LOCK = threading.Lock()  # a handle has one stream at a time


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


def _planned(context: cuda.Context, wanted: Wanted) -> Any:
    """The graph with its plans listed, none built. LibraryUnusable when cuDNN has no plan for it."""
    context.activate()
    cudnn, handle = _open(context.device.ordinal)
    try:
        graph = draw(cudnn, wanted, handle)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError) as error:
        raise LibraryUnusable(f"cuDNN has no plan for it ({' '.join(str(error).split())[-200:]})") from None
    return graph


def plans(context: cuda.Context, wanted: Wanted) -> int:
    """How many cuDNN has, best first by its own heuristics; 0 where it has none."""
    try:
        return int(_planned(context, wanted).get_execution_plan_count())
    except LibraryUnusable:
        return 0


def build(context: cuda.Context, wanted: Wanted, index: int) -> Built:
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


def prepare(
    context: cuda.Context, recipe: Mapping[str, Any], symbols: Mapping[str, int], code: bytes
) -> Callable[..., None]:
    """What puts what the recipe describes on a stream: (addresses, stream) -> None. LibraryUnusable when it cannot."""
    here = version(context)
    if here != recipe["version"]:
        raise LibraryUnusable(f"they were chosen with cuDNN {recipe['version']}, here is {here}")
    cudnn, handle = _open(context.device.ordinal)
    graph = cudnn.pygraph(handle=handle)
    try:
        graph.deserialize(handle, code)
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError) as error:
        raise LibraryUnusable(f"cuDNN refuses a plan ({' '.join(str(error).split())[-200:]})") from None
    wanted = wanted_of(recipe)
    names = wanted.tensors

    def run(addresses: Sequence[int], stream: Any) -> None:
        *read, workspace, y = addresses
        if wanted.compiled:  # between kernels it may begin when the one before says so, and ours say so early
            context.separate(stream, workspace)
        with _LOCK:
            cudnn.set_stream(handle, int(stream))
            graph.execute({**dict(zip(names, read, strict=True)), RESULT: y}, workspace, handle)
            cudnn.set_stream(handle, _NO_STREAM)  # ours may be destroyed before the handle is used again

    return run
