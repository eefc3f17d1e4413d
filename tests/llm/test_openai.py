"""The OpenAI API over fakes: openai's own client unmodified, and what clients do wrong."""

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from ingot.llm.chat import ChatTemplate
from ingot.llm.engine import Engine
from ingot.llm.openai import Model
from ingot.llm.serve import LlmServer, ServeOptions, serving
from ingot.llm.text import Text
from ingot.server.access import Access
from tests.llm.fakes import VOCABULARY, Writer, byte_tokenizer

SONG = "la la la, and so on."
TEMPLATE = (
    "{% for one in messages %}<{{ one.role }}>{{ one.content }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
)
PLAIN = Text.from_files(byte_tokenizer(), VOCABULARY)
TEXT = Text(PLAIN.tokenizer, PLAIN.source, ChatTemplate(TEMPLATE))
HELLO: list[Any] = [{"role": "user", "content": "Sing"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"], "additionalProperties": False,
        },
    },
}  # fmt: skip


def server_of(runner: Writer, **options: Any) -> LlmServer:
    return LlmServer(Engine(runner, TEXT), Model("writer", TEXT), ServeOptions(port=0, **options))


@pytest.fixture(scope="module")
def server() -> Iterator[LlmServer]:
    with serving(server_of(Writer(poisoned=frozenset({0})))) as running:
        yield running
    assert not running.engine.open
    running.engine.scheduler.pool.check_integrity([])


def client_of(server: LlmServer, **more: Any) -> openai.OpenAI:
    more = {"api_key": "none", "max_retries": 0, "timeout": 60, **more}
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", **more)


@pytest.fixture(scope="module")
def client(server: LlmServer) -> Iterator[openai.OpenAI]:
    with client_of(server) as made:
        yield made


# -- openai's client --------------------------------------------------------------------------------------------------
def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="writer", messages=HELLO, temperature=0, seed=1)
    assert answer.choices[0].message.content == SONG and answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion" and answer.model == "writer" and answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len("<user>Sing\n"), len(SONG) + 1)


def test_chat_in_pieces(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="writer", messages=HELLO, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    pieces = list(stream)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == SONG
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [piece.choices[0].finish_reason for piece in pieces if piece.choices][-1] == "stop"
    assert pieces[-1].usage and pieces[-1].usage.completion_tokens == len(SONG) + 1 and not pieces[-1].choices
    assert len({piece.id for piece in pieces}) == 1


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="writer", prompt=["One\n", "Two\n"], temperature=0, max_tokens=5, n=2)
    assert [choice.text for choice in answer.choices] == [SONG[:5]] * 4
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3] and answer.choices[0].finish_reason == "length"
    assert answer.usage and answer.usage.completion_tokens == 20
    tokens = list(b"Sing\n")
    stream = client.completions.create(model="writer", prompt=tokens, temperature=0, max_tokens=64, stream=True)
    assert "".join(piece.choices[0].text for piece in stream) == SONG
    echoed = client.completions.create(model="writer", prompt="Sing\n", temperature=0, max_tokens=3, echo=True)
    assert echoed.choices[0].text == "Sing\n" + SONG[:3]


def test_logprobs(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="writer", messages=HELLO, temperature=0, max_tokens=2, logprobs=True, top_logprobs=2
    )
    found = chat.choices[0].logprobs
    assert found and found.content and [each.token for each in found.content] == ["l", "a"]
    assert found.content[0].bytes == [ord("l")] and len(found.content[0].top_logprobs) == 2
    assert found.content[0].top_logprobs[0].logprob == found.content[0].logprob > -0.01
    plain = client.completions.create(
        model="writer", prompt="S\n", temperature=0, max_tokens=2, logprobs=1, echo=True
    ).choices[0]  # fmt: skip
    assert plain.logprobs and plain.logprobs.tokens == ["S", "\n", "l", "a"]
    assert plain.logprobs.token_logprobs and plain.logprobs.token_logprobs[0] is None
    assert plain.logprobs.text_offset == [0, 1, 2, 3]


def test_stop_and_extras(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="writer", messages=HELLO, temperature=0, stop=[", and"])
    assert answer.choices[0].message.content == "la la la" and answer.choices[0].finish_reason == "stop"
    longer = client.chat.completions.create(
        model="writer", messages=HELLO, temperature=0, max_completion_tokens=30,
        extra_body={"ignore_eos": True, "min_tokens": 30, "top_k": -1, "min_p": 0.0},
    )  # fmt: skip
    assert longer.usage and longer.usage.completion_tokens == 30 and longer.choices[0].finish_reason == "length"


def test_parse(client: openai.OpenAI) -> None:
    class Animal(pydantic.BaseModel):
        name: str
        legs: int

    answer = client.chat.completions.parse(
        model="writer", messages=HELLO, response_format=Animal, seed=3, max_tokens=400, logit_bias={str(ord('"')): 9}
    )
    parsed = answer.choices[0].message.parsed
    assert parsed is not None and isinstance(parsed.legs, int)


def test_json_object_and_choice(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model="writer", messages=HELLO, response_format={"type": "json_object"}, max_tokens=3, seed=1
    )
    assert (made.choices[0].message.content or "").startswith("{")
    chosen = client.chat.completions.create(
        model="writer", messages=HELLO, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert chosen.choices[0].message.content in ("yes", "no")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    asked: Any = {"model": "writer", "messages": HELLO, "tools": [WEATHER], "tool_choice": choice, "seed": 1}
    if stream:
        deltas = [piece.choices[0] for piece in client.chat.completions.create(**asked, stream=True)]
        assert not any(delta.delta.content for delta in deltas)
        call, finish = next(delta.delta.tool_calls for delta in deltas if delta.delta.tool_calls)[0], deltas[-1]
        name, arguments = call.function.name, call.function.arguments
    else:
        finish = client.chat.completions.create(**asked).choices[0]
        name, arguments = finish.message.tool_calls[0].function.name, finish.message.tool_calls[0].function.arguments
    assert finish.finish_reason == "tool_calls" and name == "weather"
    assert json.loads(arguments)["city"] in ("Oslo", "Rome")


@pytest.mark.parametrize("stream", [False, True])
def test_calls_that_the_model_chooses(stream: bool) -> None:
    song = b'I look. <tool_call> {"name": "weather", "arguments": {"city": "Rome"}} </tool_call>'
    asked: Any = {"model": "writer", "messages": HELLO, "tools": [WEATHER], "temperature": 0, "stream": stream}
    with serving(server_of(Writer(song=song))) as server, client_of(server) as client:
        answer = client.chat.completions.create(**asked)
        if stream:
            pieces = [piece.choices[0] for piece in answer]
            content = "".join(piece.delta.content or "" for piece in pieces)
            calls, finish = next(p.delta.tool_calls for p in pieces if p.delta.tool_calls), pieces[-1].finish_reason
        else:
            message, finish = answer.choices[0].message, answer.choices[0].finish_reason
            content, calls = message.content, message.tool_calls
    assert content.strip() == "I look." and finish == "tool_calls"
    assert calls[0].function.name == "weather" and json.loads(calls[0].function.arguments) == {"city": "Rome"}


def test_a_conversation_with_calls(client: openai.OpenAI) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages: Any = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]  # fmt: skip
    answer = client.chat.completions.create(model="writer", messages=messages, tools=[WEATHER], temperature=0)
    assert answer.choices[0].message.content == SONG


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["writer"]
    assert client.models.retrieve("writer").owned_by == "ingot"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


# -- plain HTTP -------------------------------------------------------------------------------------------------------
def ask(server: LlmServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, data, headers)
    answer = connection.getresponse()
    try:
        return answer.status, answer.read()
    finally:
        connection.close()


CHAT = {"model": "writer", "messages": HELLO}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("chat/completions", b"{", 400, "no JSON"),
        ("chat/completions", [], 400, "must be a JSON object"),
        ("chat/completions", {**CHAT, "model": "gpt"}, 404, "there is no model 'gpt' here"),
        ("chat/completions", {**CHAT, "messages": []}, 400, "'messages' must be"),
        ("chat/completions", {**CHAT, "messages": [{"role": 1}]}, 400, "'messages[0].role' must be a string"),
        ("chat/completions", {**CHAT, "temperature": "hot"}, 400, "'temperature' must be a number"),
        ("chat/completions", {**CHAT, "temperature": -1}, 400, "temperature must be 0 to 100"),
        ("chat/completions", {**CHAT, "n": True}, 400, "'n' must be an integer"),
        ("chat/completions", {**CHAT, "n": 0}, 400, "n must be 1 to 128"),
        ("chat/completions", {**CHAT, "stop": ["x"] * 1000}, 400, "at most 64 stop strings, there are 1000"),
        ("chat/completions", {**CHAT, "functions": [{}]}, 400, "use 'tools'"),
        ("chat/completions", {**CHAT, "logit_bias": {"9999": 1}}, 400, "token 9999 is none of this model"),
        ("chat/completions", {**CHAT, "tools": [{}]}, 400, "a function with a name"),
        ("chat/completions", {**CHAT, "tools": [WEATHER], "tool_choice": "always"}, 400, "'tool_choice' must be"),
        ("chat/completions", {**CHAT, "stream_options": {}}, 400, "left out where 'stream' is not true"),
        ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": 5}]}, 400, "a string or an array"),
        ("chat/completions", b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', 400, ""),
        ("chat/completions", {**CHAT, "response_format": {"type": "xml"}}, 400, "'text', 'json_object' or"),
        (
            "chat/completions", {**CHAT, "structured_outputs": {"json": {"type": "unheard"}}}, 400,
            "the json_schema cannot be used",
        ),
        ("completions", {"prompt": "a", "guided_choice": []}, 400, "an array of texts, of one at least"),
        ("completions", {"prompt": []}, 400, "'prompt' must be"),
        ("completions", {"prompt": ""}, 400, "the prompt is empty"),
        ("completions", {"prompt": [1, 9999]}, 400, "token 9999"),
        ("completions", {"prompt": [1] * 600}, 400, "the prompt has 600 tokens; the window holds 512"),
        ("completions", {"prompt": [0]}, 500, "the model's logits are no numbers"),
        ("embeddings", {"input": "x"}, 501, "no embeddings"),
        ("nothing", {}, 404, "there is no /v1/nothing here"),
    ],
)  # fmt: skip
def test_refusals(server: LlmServer, path: str, body: Any, status: int, words: str) -> None:
    found, answer = ask(server, "POST", f"/v1/{path}", body)
    assert found == status and words in json.loads(answer)["error"]["message"]


def test_an_error_in_a_stream_before_it_begins(server: LlmServer) -> None:
    status, answer = ask(server, "POST", "/v1/completions", {"prompt": [0], "stream": True})
    assert status == 500 and "no numbers" in json.loads(answer)["error"]["message"]


def test_other_routes(server: LlmServer) -> None:
    assert ask(server, "GET", "/health") == (200, b"") and ask(server, "GET", "/v1/chat/completions")[0] == 405
    status, page = ask(server, "GET", "/metrics")
    assert status == 200 and b'vllm:generation_tokens_total{model_name="writer"}' in page
    assert b'vllm:time_to_first_token_seconds_bucket{model_name="writer",le="+Inf"}' in page
    assert json.loads(ask(server, "POST", "/tokenize", {"prompt": "abc"})[1])["tokens"] == list(b"abc")
    assert json.loads(ask(server, "POST", "/detokenize", {"tokens": list(b"abc")})[1]) == {"prompt": "abc"}
    asked = {"text_input": "Sing\n", "max_tokens": 40, "temperature": 0}
    assert json.loads(ask(server, "POST", "/v2/models/writer/generate", asked)[1])["text_output"] == SONG
    events = ask(server, "POST", "/v2/models/writer/generate_stream", asked)[1].decode().split("\n\n")
    assert "".join(json.loads(event[6:])["text_output"] for event in events if event) == SONG


def test_a_client_that_vanishes_frees_its_place(server: LlmServer) -> None:
    body = json.dumps({"prompt": "Sing\n", "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    until = time.monotonic() + 60
    while server.engine.open and time.monotonic() < until:
        time.sleep(0.01)
    assert not server.engine.open


def test_keys() -> None:
    import hashlib

    access = Access({"inference": frozenset({hashlib.sha256(b"secret").digest()})})
    with serving(server_of(Writer(), access=access)) as server:
        with client_of(server) as stranger, pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(model="writer", messages=HELLO)
        with client_of(server, api_key="secret") as known:
            assert known.chat.completions.create(model="writer", messages=HELLO, temperature=0).choices
        assert ask(server, "GET", "/health")[0] == 200


def test_an_ending_server_answers_what_it_took() -> None:
    with contextlib.ExitStack() as open_until_read:
        with serving(server_of(Writer())) as server:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            open_until_read.enter_context(contextlib.closing(connection))
            body = json.dumps({"prompt": "Sing\n", "max_tokens": 64, "temperature": 0})
            connection.request("POST", "/v1/completions", body)
            while not server.engine.counters.steps:
                time.sleep(0.001)
        assert json.loads(connection.getresponse().read())["choices"][0]["text"] == SONG
