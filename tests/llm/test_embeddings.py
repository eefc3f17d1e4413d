"""Embeddings: the hidden states' mean or last one, whatever runs beside them; OpenAI's route and its refusals."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ingot
from ingot.errors import InputError
from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.engine import Engine
from ingot.llm.models import decoder_of
from ingot.llm.openai import Model
from ingot.llm.reference import states_of
from ingot.llm.request import Event, Request, Sampling
from ingot.llm.runner import EngineRunner
from ingot.llm.serve import LlmServer, ServeOptions, serving
from ingot.llm.weights import open_checkpoint
from tests.llm import interpreted
from tests.llm.checkpoints import TOKENS, Array, write_family
from tests.llm.fakes import FakeRunner, Writer
from tests.llm.test_openai import TEXT, ask, client_of

WIDE = 6


def expected(runner: FakeRunner, tokens: Sequence[int], pooling: str) -> Array:
    places = range(1, len(tokens) + 1) if pooling == "mean" else [len(tokens)]
    mean = np.mean([runner.state_of(tokens[:place]).astype(np.float64) for place in places], axis=0)
    return np.asarray(mean / np.linalg.norm(mean))


@pytest.mark.parametrize("blocks", [5, 64])
def test_vectors_beside_answers(blocks: int) -> None:
    """Chunks, prefixes that are known, blocks that run out: the same vectors, and nobody's answer changes."""
    runner = FakeRunner(hidden=WIDE, blocks=blocks, token_budget=3)
    engine, told = Engine(runner), dict[int, list[Event]]()
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8][:length] for length in (5, 12, 12, 1, 9, 12)]
    kinds: list[Any] = [None, "mean", "last", "mean", None, "last"]
    for number, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
        request = Request(prompt, Sampling(temperature=0.0, max_tokens=9), pooling=kind)
        engine.submit(request, told.setdefault(number, []).append)
    while engine.step():
        engine.scheduler.check_integrity()
    for number, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
        events = told[number]
        if kind is None:
            assert [token for event in events for token in event.tokens] == runner.greedy(prompt, 9)
        else:
            assert [event.finish for event in events] == ["stop"]
            assert np.allclose(events[0].vector or (), expected(runner, prompt, kind))
    engine.scheduler.cache.check_integrity([])
    assert (engine.scheduler.preemptions > 0) == (blocks < 64) and engine.scheduler.cache.found


def test_what_cannot_be_embedded() -> None:
    engine, events = Engine(FakeRunner(hidden=WIDE, poisoned=frozenset({7}), broken=frozenset({8}))), list[Event]()
    for token in (7, 8, 9):
        engine.submit(Request([1, 2, token], pooling="last"), events.append)
    while engine.step():
        pass
    found = {event.error: event.vector for event in events}
    assert len(found) == 3 and [error for error, vector in found.items() if vector] == [""]
    assert any("no numbers" in error for error in found) and any("the device is lost" in error for error in found)
    engine.submit(Request([1] * 128, pooling="last"), events.append)
    with pytest.raises(InputError, match="the text has 129 tokens; the window holds 128"):
        engine.submit(Request([1] * 129, pooling="last"), events.append)
    with pytest.raises(InputError, match="gives no hidden states"):
        Engine(FakeRunner()).submit(Request([1], pooling="last"), events.append)


@pytest.mark.parametrize(("family", "target"), [("llama", "cpu"), ("gpt2", "cpu"), ("llama", "cuda:sm_90")])
def test_an_engine_gives_the_states_of_the_reference(
    family: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if target != "cpu":
        interpreted.use(monkeypatch)
    folder = write_family(tmp_path, family)
    states = states_of(decoder_of(open_checkpoint(folder), 64), TOKENS)
    options = BuildOptions(target=target, context=64, token_budget=16, sequence_budget=2, level=0, verify=False)
    with ingot.LLM(EngineRunner(build_llm(folder, options), threads=1), text=TEXT) as llm:
        last, short = llm.embed([TOKENS.tolist(), TOKENS[:3].tolist()])
        (mean,) = llm.embed([TOKENS.tolist()], pooling="mean", dimensions=8)
    assert np.allclose(last, states[-1] / np.linalg.norm(states[-1]), atol=1e-4)
    assert np.allclose(short, states[2] / np.linalg.norm(states[2]), atol=1e-4)
    wanted = states.mean(0)[:8]
    assert np.allclose(mean, wanted / np.linalg.norm(wanted), atol=1e-4)


# -- the route --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def server() -> Iterator[LlmServer]:
    engine = Engine(Writer(hidden=WIDE, poisoned=frozenset({0})), TEXT)
    with serving(LlmServer(engine, Model("writer", TEXT), ServeOptions(port=0))) as running:
        yield running
    running.engine.scheduler.cache.check_integrity([])


def test_openais_client(server: LlmServer) -> None:
    """Which asks for base64 unless told otherwise."""
    texts, writer = ["one", "two words"], Writer(hidden=WIDE)
    with client_of(server) as client:
        answer = client.embeddings.create(model="writer", input=texts)
        plain = client.embeddings.create(model="writer", input=texts, encoding_format="float")
        tokens = client.embeddings.create(model="writer", input=[list(b"one"), list(b"two words")], dimensions=2)
        mean = client.embeddings.create(model="writer", input="one", extra_body={"pooling": "mean"})
    assert [each.index for each in answer.data] == [0, 1]
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (12, 12)
    for text, encoded, number, short in zip(texts, answer.data, plain.data, tokens.data, strict=True):
        wanted = expected(writer, list(text.encode()), "last")
        assert np.allclose(encoded.embedding, wanted) and np.allclose(number.embedding, wanted)
        assert np.allclose(short.embedding, wanted[:2] / np.linalg.norm(wanted[:2]))
    assert np.allclose(mean.data[0].embedding, expected(writer, list(b"one"), "mean"))


def test_bytes_are_of_float32(server: LlmServer) -> None:
    _, body = ask(server, "POST", "/v1/embeddings", {"input": "one", "encoding_format": "base64"})
    found = np.frombuffer(base64.b64decode(json.loads(body)["data"][0]["embedding"]), "<f4")
    assert np.allclose(found, expected(Writer(hidden=WIDE), list(b"one"), "last"))


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "'input' must be a string"),
        ({"input": []}, 400, "'input' must be a string"),
        ({"input": ""}, 400, "the prompt is empty"),
        ({"input": ["one", ""]}, 400, "the prompt is empty"),
        ({"input": ["x"] * 2049}, 400, "'input' must be at most 2048 texts"),
        ({"input": [[1, 9999]]}, 400, "token 9999"),
        ({"input": [1] * 600}, 400, "the text has 600 tokens; the window holds 512"),
        ({"input": "one", "dimensions": 7}, 400, "'dimensions' must be 1 to 6"),
        ({"input": "one", "dimensions": 0}, 400, "'dimensions' must be 1 to 6"),
        ({"input": "one", "encoding_format": "hex"}, 400, "'float' or 'base64'"),
        ({"input": "one", "pooling": "max"}, 400, "'last' or 'mean'"),
        ({"input": "one", "model": "other"}, 404, "there is no model 'other'"),
        ({"input": ["one", "a\0"]}, 500, "no numbers"),
    ],
)
def test_refusals(server: LlmServer, body: Any, status: int, words: str) -> None:
    found, answer = ask(server, "POST", "/v1/embeddings", body)
    assert found == status and words in json.loads(answer)["error"]["message"]
