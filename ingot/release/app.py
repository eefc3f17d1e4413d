"""The two processes: `serve` (API, console, controller) and `gateway`."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Coroutine
from typing import Any

from ingot.release.api import Api
from ingot.release.controller import Controller
from ingot.release.gateway import Gateway, Options
from ingot.release.store import Store
from ingot.server.wire import Front

log = logging.getLogger("ingot.release")


def serve(arguments: Namespace) -> int:
    """Until SIGINT or SIGTERM."""
    store = Store(arguments.store)
    store.migrate()
    ended = threading.Event()
    controller = None if arguments.no_controller else threading.Thread(target=Controller(store).run, args=(ended,))

    async def started() -> Callable[[], Coroutine[Any, Any, None]]:
        front = Front(Api(store))
        port = await front.start(arguments.address, arguments.port)
        if controller is not None:
            controller.start()
        print(f"ingot release: console on http://{arguments.address}:{port}/", file=sys.stderr, flush=True)
        return front.stop

    try:
        _run(started)
    finally:
        ended.set()
        if controller is not None and controller.ident is not None:
            controller.join()
        store.close()
    return 0


def gateway(arguments: Namespace) -> int:
    """Until SIGINT or SIGTERM; what is under way is answered."""

    async def started() -> Callable[[], Coroutine[Any, Any, None]]:
        options = Options(
            arguments.store, arguments.address, arguments.port, arguments.metrics_port, arguments.workers,
            arguments.remember,
        )  # fmt: skip
        running = Gateway(options)
        await running.start()
        print(f"ingot release: gateway on http://{arguments.address}:{running.port}/", file=sys.stderr, flush=True)
        return running.stop

    _run(started)
    return 0


def _run(started: Callable[[], Coroutine[Any, Any, Callable[[], Coroutine[Any, Any, None]]]]) -> None:
    """Start, wait for a signal, stop."""
    import uvloop

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)

    async def whole() -> None:
        ended = asyncio.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, ended.set)
        stop = await started()
        await ended.wait()
        await stop()

    uvloop.run(whole())
