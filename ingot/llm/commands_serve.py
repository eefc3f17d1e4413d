"""`ingot llm serve model.engine`: OpenAI's API until SIGINT or SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from dataclasses import replace
from pathlib import Path

from ingot.llm.batch import Runner
from ingot.llm.chat import ChatTemplate
from ingot.llm.commands_generate import add_running
from ingot.llm.engine import Engine
from ingot.llm.openai import Model
from ingot.llm.options import EngineOptions
from ingot.llm.runner import open_runner
from ingot.llm.serve import LlmServer, ServeOptions
from ingot.llm.text import Text
from ingot.server import logs
from ingot.server.access import Access, read_keys
from ingot.server.app import new_loop
from ingot.server.wire import Limits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("engine", type=Path, help="engine file of `ingot llm build`")
    parser.add_argument("--served-model-name", help="the model's name in requests (default: the file's)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: one that is free")
    parser.add_argument("--api-key-file", type=Path, help="a key, or sha256:DIGEST of one, a line; default: everybody")
    parser.add_argument("--chat-template", type=Path, help="jinja2 file, instead of the checkpoint's")
    parser.add_argument("--max-requests", type=int, default=EngineOptions.requests, help="at once; more get 503")
    parser.add_argument("--max-input-size", type=int, default=16 << 20, help="bytes of a request")
    parser.add_argument("--interval-ms", type=float, default=EngineOptions.interval * 1e3,
                        help="between tokens: prompts are computed in chunks that keep it")  # fmt: skip
    parser.add_argument("--step-timeout-secs", type=float, default=EngineOptions.patience,
                        help="a step that takes longer counts as hung")  # fmt: skip
    parser.add_argument("--drain-secs", type=float, default=ServeOptions.drain, help="for answers when told to end")
    add_running(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve."""
    logs.configure("default", False, None)
    loop = new_loop()
    try:
        loop.run_until_complete(_serve(server_of(arguments)))
    finally:
        loop.close()
    return 0


def server_of(arguments: argparse.Namespace) -> LlmServer:
    """The server that these arguments ask for, not yet started."""
    runner = open_runner(arguments.engine, threads=arguments.threads, blocks=arguments.blocks)
    text = Text.from_files(runner.files, runner.vocabulary)
    if arguments.chat_template is not None:
        tokens = text.template.tokens if text.template is not None else {}
        text = replace(text, template=ChatTemplate.from_file(arguments.chat_template, tokens))
    small = arguments.draft_engine
    draft = open_runner(small, arguments.threads, runner.blocks, alike=True) if small else None
    options = EngineOptions(
        drafts=arguments.drafts or (4 if draft is not None else 0), interval=arguments.interval_ms / 1e3,
        requests=arguments.max_requests, patience=arguments.step_timeout_secs,
    )  # fmt: skip
    keys = {"inference": read_keys(arguments.api_key_file)} if arguments.api_key_file else {}
    return LlmServer(
        Engine(runner, text, options, draft), Model(arguments.served_model_name or arguments.engine.stem, text),
        ServeOptions(
            arguments.host, arguments.port, Access(keys), Limits(body=arguments.max_input_size), arguments.drain_secs
        ),
    )  # fmt: skip


def _held_by(runner: Runner) -> str:
    """How much room there is for keys and values."""
    first, *others = runner.kinds
    windows = (f"; {kind.blocks} more those of layers that see {kind.window}" for kind in others)
    return f"{first.blocks} blocks hold {first.blocks * runner.block_size} tokens of keys and values" + "".join(windows)


async def _serve(server: LlmServer) -> None:
    ended = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, ended.set)
    await server.start()
    engine = server.engine
    print(
        f"{server.api.model.name} at http://{server.options.host}:{server.port}/v1: {_held_by(engine.runner)}, a "
        f"request at most {engine.longest}", file=sys.stderr, flush=True,
    )  # fmt: skip
    await ended.wait()
    print(f"ending: {engine.open} requests are being answered", file=sys.stderr, flush=True)
    await server.stop()
