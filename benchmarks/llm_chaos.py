"""A language model's server while everything goes wrong: nothing is lost, leaked or wrong.

    python -m benchmarks.llm_chaos [--requests 1000] [--threads 32] [--blocks 40] [--seed 0] [--json results.json]

The tiny model of examples/tiny_llm behind the OpenAI API, with few blocks so that requests wait and give way to others.
A fifth of the requests vanish in the middle of their stream, one in fifty is malformed. Every other answer must be,
token for token, what the same request got alone before; afterwards no block may have an owner.
"""

import argparse
import http.client
import json
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.timing import RESULTS, write_json
from examples.tiny_llm import FOLDER
from examples.tiny_llm.corpus import conversation
from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.engine import Engine
from ingot.llm.openai import Model
from ingot.llm.options import EngineOptions
from ingot.llm.runner import open_runner
from ingot.llm.serve import LlmServer, ServeOptions, serving
from ingot.llm.text import Text

PATIENCE = 120.0  # seconds after which a request counts as lost
DISTINCT = 60  # requests that there are; each is asked many times
MALFORMED: Sequence[Any] = (
    b"{", b"[]", b"\xff\xfe", {"messages": []}, {"messages": [{"role": "user", "content": 7}]},
    {"messages": [{"role": "user", "content": "x"}], "temperature": "hot"},
    {"messages": [{"role": "user", "content": "x"}], "stop": ["x"] * 1000},
    {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema", "json_schema": {}}},
    {"messages": [{"role": "user", "content": "x" * 5000}]}, {"messages": [{"role": "user", "content": "x"}], "n": 0},
)  # fmt: skip


@dataclass
class Tally:
    """What became of the requests."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, outcome: str, example: str = "") -> None:
        self.counts[outcome] += 1
        if example and len(self.examples) < 5:
            self.examples.append(f"{outcome}: {example}")


def distinct(seed: int) -> list[dict[str, Any]]:
    """Requests of every kind: greedy and drawn, long and short, several answers, guided, with stop strings."""
    draw, made = random.Random(seed), []
    for number in range(DISTINCT):
        messages = conversation(draw)[:-1]
        body: dict[str, Any] = {"messages": messages, "max_tokens": draw.choice([1, 8, 40, 100]), "seed": number}
        body |= draw.choice([{"temperature": 0}, {"top_p": 0.95}, {"temperature": 0.7, "top_k": 20}])
        body |= draw.choice([{}, {}, {"n": 3}, {"stop": ["."]}, {"presence_penalty": 0.5}, {"min_tokens": 5}])
        if number % 10 == 0:
            body["structured_outputs"] = {"regex": "[a-z]{3,12}( [a-z]{2,8}){1,3}"}
        made.append(body)
    return made


def post(port: int, body: Any) -> tuple[int, Any]:
    """(status, document)"""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", "/v1/chat/completions", data, {"content-type": "application/json"})
    answer = connection.getresponse()
    document = json.loads(answer.read())
    connection.close()
    return answer.status, document


def answers_of(document: Any) -> list[tuple[str, str]]:
    """The texts and why they ended."""
    return [(choice["message"]["content"], choice["finish_reason"]) for choice in document["choices"]]


def vanish(port: int, body: dict[str, Any], after: int) -> None:
    """Ask for a stream and leave after so many bytes of it."""
    data = json.dumps({**body, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        connection.sendall(head % len(data) + data)
        while after > 0 and (piece := connection.recv(min(after, 4096))):
            after -= len(piece)


def one(port: int, kind: str, body: Any, expected: Any, after: int) -> tuple[str, str]:
    """(outcome, what was wrong)"""
    try:
        if kind == "cancelled":
            vanish(port, body, after)
            return "cancelled", ""
        status, document = post(port, body)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return "lost", f"{type(error).__name__}: {error}"
    if kind == "malformed":
        return ("refused", "") if status == 400 and document["error"]["message"] else ("wrong", str(document))
    if status != 200:
        return "wrong", f"{status}: {document}"
    found = answers_of(document)
    return ("right", "") if found == expected else ("wrong", f"{body}: {found}, alone {expected}")


def chaos(server: LlmServer, requests: int, threads: int, seed: int) -> tuple[Tally, float]:
    """The requests from so many threads at once; the tally, and seconds."""
    bodies, draw, tally, lock = distinct(seed), random.Random(seed), Tally(), threading.Lock()
    expected = [answers_of(post(server.port, body)[1]) for body in bodies]
    kinds = ["cancelled"] * (requests // 5) + ["malformed"] * (requests // 50)
    kinds += ["asked"] * (requests - len(kinds))
    draw.shuffle(kinds)

    def run(kind: str, which: int, after: int) -> None:
        body = MALFORMED[which % len(MALFORMED)] if kind == "malformed" else bodies[which]
        outcome = one(server.port, kind, body, expected[which], after)
        with lock:
            tally.add(*outcome)

    began = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        for kind in kinds:
            pool.submit(run, kind, draw.randrange(DISTINCT), draw.choice([0, 1, 300, 2000]))
    return tally, time.monotonic() - began


def leaked(server: LlmServer) -> int:
    """Blocks that have an owner though nothing runs."""
    until = time.monotonic() + PATIENCE
    while server.engine.open and time.monotonic() < until:
        time.sleep(0.01)
    server.engine.scheduler.check_integrity()
    return sum(pool.blocks - pool.free for pool in server.engine.scheduler.cache.pools)


def measured(requests: int, threads: int, blocks: int, seed: int) -> dict[str, Any]:
    """Build, serve, ask."""
    with tempfile.TemporaryDirectory() as folder:
        engine = Path(folder) / "tiny.engine"
        build_llm(FOLDER, BuildOptions(token_budget=128, sequence_budget=16)).save(engine)
        runner = open_runner(engine, blocks=blocks)
        text = Text.from_files(runner.files, runner.vocabulary)
        options = EngineOptions(drafts=3)
        with serving(LlmServer(Engine(runner, text, options), Model("tiny", text), ServeOptions(port=0))) as server:
            tally, seconds = chaos(server, requests, threads, seed)
            owned, scheduler, counters = leaked(server), server.engine.scheduler, server.engine.counters
    for example in tally.examples:
        print(example, file=sys.stderr)
    counts = tally.counts
    return {
        "requests": requests, "seconds": round(seconds, 1), "lost": counts["lost"], "leaked_blocks": owned,
        "wrong": counts["wrong"], "right": counts["right"], "cancelled": counts["cancelled"],
        "refused": counts["refused"], "preemptions": scheduler.preemptions, "steps": counters.steps,
        "prefix_tokens_found": scheduler.cache.found, "drafts_right": counters.accepted,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=40, help="of 16 tokens: few, so that requests give way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS / "llm_chaos.json")
    arguments = parser.parse_args()
    result = measured(arguments.requests, arguments.threads, arguments.blocks, arguments.seed)
    write_json(arguments.json, "lost 0, leaked blocks 0, wrong 0", [result])
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result.items()))
    return int(any(result[name] for name in ("lost", "leaked_blocks", "wrong")))


if __name__ == "__main__":
    sys.exit(main())
