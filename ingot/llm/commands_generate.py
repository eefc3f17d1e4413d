"""`ingot llm generate model.engine "Once upon a time"`: text to the terminal as it comes."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ingot.errors import ConfigError
from ingot.llm.api import LLM
from ingot.llm.request import Guide
from ingot.llm.text import words_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("engine", help="engine file of `ingot llm build`")
    parser.add_argument("prompt", nargs="*", help="texts to continue; - reads one from standard input")
    parser.add_argument("--chat", action="store_true", help="prompts are messages of a user: use the chat template")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token (default)")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", default=[], help="end before this text; repeatable")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the model's end")
    parser.add_argument("--json-schema", metavar="FILE", help="a schema, or a file of one, that the answer must match")
    parser.add_argument("--regex", help="the answer must match")
    parser.add_argument("--choice", action="append", help="the answer must be one of these; repeatable")
    parser.add_argument("--json", action="store_true", help="answers as JSON lines, each whole")
    add_running(parser)


def add_running(parser: argparse.ArgumentParser) -> None:
    """What generate and serve have in common."""
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--blocks", type=int, help="of keys and values; default: what a quarter of free memory holds")
    parser.add_argument("--drafts", type=int, default=0, help="tokens that are guessed at once (0: none)")
    parser.add_argument("--draft-engine", help="a smaller model that guesses; default: from what was said before")


def run(arguments: argparse.Namespace) -> int:
    """Answer every prompt."""
    logging.getLogger("ingot.llm").addHandler(logging.NullHandler())  # what ends an answer is this command's error
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in arguments.prompt or ["-"]]
    with LLM(
        arguments.engine, threads=arguments.threads, blocks=arguments.blocks,
        drafts=arguments.drafts, draft=arguments.draft_engine,
    ) as llm:  # fmt: skip
        asked = _asked(arguments)
        tokens = [_prompt(llm, arguments, prompt) for prompt in prompts]
        if arguments.json or len(prompts) > 1:
            _all(llm, tokens, asked, arguments.json)
        else:
            _stream(llm, tokens[0], asked)
    return 0


def _prompt(llm: LLM, arguments: argparse.Namespace, prompt: str) -> Sequence[int]:
    if arguments.chat:
        return llm.text.chat([{"role": "user", "content": prompt}])
    return llm.text.encode(prompt)


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    plain = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "ignore_eos")
    return {name: getattr(arguments, name) for name in plain} | {
        "stop": tuple(arguments.stop), "guide": _guide(arguments),
    }  # fmt: skip


def _guide(arguments: argparse.Namespace) -> Guide | None:
    found = []
    if arguments.json_schema is not None:
        given: str = arguments.json_schema
        if given.lstrip()[:1] != "{":
            given = words_of(Path(given), "--json-schema takes a schema or its file")
        found.append(Guide("json_schema", given))
    if arguments.regex is not None:
        found.append(Guide("regex", arguments.regex))
    if arguments.choice:
        found.append(Guide("choice", json.dumps(arguments.choice)))
    if len(found) > 1:
        raise ConfigError("give one of --json-schema, --regex and --choice")
    return found[0] if found else None


def _stream(llm: LLM, tokens: Sequence[int], asked: Mapping[str, Any]) -> None:
    began, first = time.perf_counter(), 0.0
    for piece in llm.stream(tokens, **asked):
        first = first or time.perf_counter()
        print(piece, end="", flush=True)
    ended, count = time.perf_counter(), llm.engine.counters.answer_tokens
    print()
    if count > 1:
        rate = (count - 1) / max(ended - first, 1e-9)
        print(f"{count} tokens, first after {(first - began) * 1e3:.0f} ms, then {rate:.0f} a second", file=sys.stderr)


def _all(llm: LLM, prompts: Sequence[Sequence[int]], asked: Mapping[str, Any], as_json: bool) -> None:
    for answer in llm.generate(prompts, **asked):
        if as_json:
            print(json.dumps({"text": answer.text, "tokens": list(answer.tokens), "finish": answer.finish}))
        else:
            print(answer.text)
