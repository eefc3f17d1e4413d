"""A network run by PyTorch: eager, eager in a CUDA graph, torch.compile (max-autotune, frozen), and that of the module
that people have of it, where it is another one than ours."""
# mypy: disable-error-code="no-untyped-call"

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.cuda_rows import Row, difference

CALLS, ROUNDS, ALONE = 30, 7, 50


def peer(row: Row, which: str) -> dict[str, Any]:
    """The row's module run by PyTorch one way."""
    import torch

    from benchmarks import torch_models

    torch.backends.cudnn.benchmark = True
    module = torch_models.module(row.model)
    if which == "library":
        module = of_transformers(module)
    module = module.half().cuda().to(memory_format=torch.channels_last)
    inputs = [_placed(x) for x in torch_models.inputs(row.model, row.batch)]
    start = time.perf_counter()
    with torch.no_grad():
        call = WAYS[which](module, inputs)
        result = call().clone()  # a graph's output is written over by its next run
        seconds = time.perf_counter() - start
        found = {"ms": _time(call), **_alone(call), "prepared s": seconds, "torch": torch.__version__}
    return {**found, "difference": difference(row, result.float().cpu().numpy())}


def of_transformers(bert: Any) -> Any:
    """transformers' BertModel with our Bert's weights, which are the same ones in the same order."""
    import torch
    from transformers import BertConfig, BertModel

    class LastState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = BertModel(BertConfig(), add_pooling_layer=False).eval()

        def forward(self, ids: Any, attention: Any, kinds: Any) -> Any:
            found = self.model(ids, attention_mask=attention, token_type_ids=kinds)
            return found.last_hidden_state

    made = LastState()
    names = made.model.state_dict().keys()
    made.model.load_state_dict(dict(zip(names, bert.state_dict().values(), strict=True)))
    return made


def _placed(x: Any) -> Any:
    import torch

    moved = x.half().cuda() if x.is_floating_point() else x.cuda()
    return moved.to(memory_format=torch.channels_last) if moved.dim() == 4 else moved


def _eager(module: Any, inputs: Sequence[Any]) -> Callable[[], Any]:
    return lambda: module(*inputs)


def _graphed(module: Any, inputs: Sequence[Any]) -> Callable[[], Any]:
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):
            module(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = module(*inputs)

    def call() -> Any:
        graph.replay()
        return held

    return call


def _compiled(module: Any, inputs: Sequence[Any]) -> Callable[[], Any]:
    import torch
    import torch._inductor.config as inductor

    inductor.freezing = True
    made = torch.compile(module, mode="max-autotune")
    for _ in range(3):  # compiles, warms up, captures its graphs
        made(*inputs)
    return lambda: made(*inputs)


WAYS = {"eager": _eager, "graph": _graphed, "compile": _compiled, "library": _compiled}


def _time(call: Callable[[], Any]) -> float:
    """Milliseconds of one call among many in a row."""
    import torch

    rows = []
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(5):
        call()
    for _ in range(ROUNDS):
        begin.record()
        for _ in range(CALLS):
            call()
        end.record()
        torch.cuda.synchronize()
        rows.append(begin.elapsed_time(end) / CALLS)
    return statistics.median(rows)


def _alone(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of one call on an idle GPU: between two events, and by the clock of who waits for it."""
    import torch

    begin, end, alone, calls = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True), [], []
    for _ in range(ALONE):
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        alone.append(begin.elapsed_time(end))
    for _ in range(ALONE):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        calls.append(time.perf_counter() - start)
    return {"alone ms": statistics.median(alone), "call ms": statistics.median(calls) * 1e3}
