"""A tiny language model becomes an engine, talks, answers OpenAI's own client, and writes JSON that matches a schema.

    ./scripts/demo-llm

The model is examples/tiny_llm's: 1.3 million parameters, trained by the script beside it.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import openai

import ingot
from examples.tiny_llm import FOLDER
from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.engine import Engine
from ingot.llm.openai import Model
from ingot.llm.runner import open_runner
from ingot.llm.serve import LlmServer, ServeOptions, serving
from ingot.llm.text import Text

ENGINE = Path(__file__).parent.parent / "build" / "demo-llm" / "tiny.engine"
QUESTIONS = ("Who are you?", "What is the capital of Norway?", "What is 3 + 4?")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"},
        "animal": {"enum": ["owl", "bear"]},
        "color": {"enum": ["red", "white", "brown"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 10},
    },
    "required": ["name", "animal", "color", "legs"],
    "additionalProperties": False,
}


def build() -> None:
    """A checkpoint's folder becomes one file."""
    ENGINE.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    build_llm(FOLDER, BuildOptions(token_budget=256, sequence_budget=16)).save(ENGINE)
    print(f"built {ENGINE.name}, {ENGINE.stat().st_size / 2**20:.1f} MiB, in {time.perf_counter() - began:.1f} s\n")


def tell_a_story() -> None:
    """In this process: five lines."""
    with ingot.LLM(ENGINE) as llm:
        prompt = llm.text.chat([{"role": "user", "content": "Tell me a story about a fox."}])
        began = time.perf_counter()
        for piece in llm.stream(prompt, temperature=0.7, seed=7, max_tokens=200):
            print(piece, end="", flush=True)
        count, seconds = llm.engine.counters.answer_tokens, time.perf_counter() - began
    print(f"\n({count} tokens in {seconds:.2f} s)\n")


def serve() -> LlmServer:
    """The same engine behind OpenAI's API."""
    runner = open_runner(ENGINE)
    text = Text.from_files(runner.files, runner.vocabulary)
    return LlmServer(Engine(runner, text), Model("tiny", text), ServeOptions(port=0))


def ask(client: openai.OpenAI) -> None:
    """Questions through OpenAI's client, answers as they come."""
    for question in QUESTIONS:
        print(f"> {question}\n  ", end="")
        messages: Any = [{"role": "user", "content": question}]
        for piece in client.chat.completions.create(model="tiny", messages=messages, temperature=0, stream=True):
            print(piece.choices[0].delta.content or "", end="", flush=True)
        print()


def describe(client: openai.OpenAI) -> bool:
    """JSON that must match a schema; whether it does."""
    print("> Describe a owl as JSON. (a schema allows an owl or a bear, three colours, and no other key)")
    answer = client.chat.completions.create(
        model="tiny", temperature=1.0, seed=5, max_tokens=100,
        messages=[{"role": "user", "content": "Describe a owl as JSON."}],
        response_format={"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}},
    )  # fmt: skip
    content = answer.choices[0].message.content or ""
    print(f"  {content}")
    made = json.loads(content)
    allowed = SCHEMA["properties"]
    return list(made) == SCHEMA["required"] and all(made[key] in allowed[key]["enum"] for key in ("animal", "color"))


def main() -> int:
    """0 if everything is as it should be."""
    build()
    tell_a_story()
    with serving(serve()) as server:
        print(f"http://127.0.0.1:{server.port}/v1 answers OpenAI's client:")
        with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as client:
            ask(client)
            matches = describe(client)
    print("  it matches the schema" if matches else "  it does NOT match the schema")
    return 0 if matches else 1


if __name__ == "__main__":
    sys.exit(main())
