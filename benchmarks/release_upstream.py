"""A server in a process of its own that answers after a while, sometimes with an error: a version for benchmarks."""

import asyncio
import contextlib
import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

ANSWER = (
    b'{"model_name": "m", "outputs": [{"name": "scores", "datatype": "FP32", "shape": [1, 2], "data": [0.1, 0.9]}]}'
)


@dataclass(frozen=True)
class Upstream:
    """Seconds until the answer (normal, with this deviation), share of errors."""

    seconds: float
    deviation: float = 0.0
    errors: float = 0.0


@contextlib.contextmanager
def upstream(behaviour: Upstream, port: int = 0) -> Iterator[int]:
    """Its port."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(behaviour, port, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def _serve(behaviour: Upstream, port: int, told: Any) -> None:
    import uvloop

    from ingot.server.wire import Exchange, Front

    drawn = random.Random(0)

    def handle(exchange: Exchange) -> None:
        status = 500 if drawn.random() < behaviour.errors else 200
        wait = max(0.0, drawn.gauss(behaviour.seconds, behaviour.deviation))
        headers = {b"content-type": b"application/json"}
        asyncio.get_running_loop().call_later(wait, exchange.respond, status, [ANSWER], headers)

    async def forever() -> None:
        told.send(await Front(handle).start("127.0.0.1", port))
        await asyncio.Event().wait()

    uvloop.run(forever())
