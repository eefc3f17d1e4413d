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

from ingot.errors import ConfigError
from ingot.llm.chat import ChatTemplate
from ingot.llm.engine import Engine
from ingot.llm.openai import Model
from ingot.llm.serve import LlmServer, ServeOptions, serving
from ingot.llm.text import Text
from ingot.server.access import Access
from ingot.server.wire import Limits
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
    running.engine.scheduler.cache.check_integrity([])


@pytest.mark.parametrize("wrong", [{"drain": float("nan")}, {"drain": -1.0}, {"limits": Limits(body=0)}])
def test_options_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least"):
        ServeOptions(**wrong)


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


def test_scores_of_prompts(client: openai.OpenAI) -> None:
    """As evaluation harnesses ask: echo, log-probabilities, and no new token; a prompt that fills the window too."""
    asked: Any = {"model": "writer", "temperature": 0, "max_tokens": 0, "logprobs": 1, "echo": True}
    scored = client.completions.create(prompt=["Sing\n", "One"], **asked)
    longer = client.completions.create(prompt="Sing\n", **{**asked, "max_tokens": 2})
    assert [choice.text for choice in scored.choices] == ["Sing\n", "One"]
    assert scored.usage and scored.usage.completion_tokens == 0 and scored.choices[0].finish_reason == "length"
    found, other = scored.choices[0].logprobs, longer.choices[0].logprobs
    assert found and other and found.tokens == list("Sing\n") and other.tokens == [*"Sing\n", "l", "a"]
    assert other.token_logprobs and found.token_logprobs == other.token_logprobs[:5]
    streamed = list(client.completions.create(prompt="Sing\n", stream=True, **asked))
    assert [piece.choices[0].text for piece in streamed] == ["Sing\n"]
    assert streamed[0].choices[0].logprobs == found
    full = client.completions.create(prompt=[65] * 512, **asked)
    assert full.usage and full.usage.total_tokens == 512
    assert client.completions.create(model="writer", prompt="Sing\n", max_tokens=0).choices[0].text == ""


def test_places_of_tokens_in_a_stream(client: openai.OpenAI) -> None:
    """They go on from piece to piece, behind the prompt where it is told again."""
    asked: Any = {"model": "writer", "prompt": "S\n", "temperature": 0, "max_tokens": 3, "logprobs": 0, "echo": True}
    pieces = [piece.choices[0].logprobs for piece in client.completions.create(stream=True, **asked)]
    whole = client.completions.create(**asked).choices[0].logprobs
    assert whole and whole.text_offset == [0, 1, 2, 3, 4]
    for name in ("tokens", "text_offset", "token_logprobs"):
        told = [each for piece in pieces if piece for each in getattr(piece, name)]
        assert told == getattr(whole, name)


def test_bytes_of_tokens_that_are_no_characters(client: openai.OpenAI) -> None:
    """Each byte of an owl is a token: their bytes say so, and their names differ."""
    asked: Any = {"model": "writer", "temperature": 0, "max_tokens": 0, "logprobs": 0, "echo": True}
    found = client.completions.create(prompt="é🦉!", **asked).choices[0].logprobs
    assert found and found.tokens
    assert found.tokens == [f"bytes:\\x{byte:02x}" for byte in "é🦉".encode()] + ["!"]
    assert found.text_offset == [0, 0, 1, 1, 1, 1, 2]
    chat = client.chat.completions.create(
        model="writer", messages=HELLO, logprobs=True, max_tokens=1, logit_bias={"169": 100, "108": -100}
    )
    assert chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert chat.choices[0].logprobs.content[0].bytes == [169]


def test_log_probabilities_of_a_prompt_as_vllm_tells_them(client: openai.OpenAI) -> None:
    more: Any = {"extra_body": {"prompt_logprobs": 1}, "max_tokens": 1, "temperature": 0}
    plain = client.completions.create(model="writer", prompt="AB", **more).choices[0].model_dump()["prompt_logprobs"]
    chat = client.chat.completions.create(model="writer", messages=HELLO, **more).choices[0].model_dump()
    assert plain[0] is None and plain[1][str(ord("B"))]["decoded_token"] == "B" and len(plain) == 2
    assert plain[1][str(ord("B"))]["logprob"] < 0 and len(chat["prompt_logprobs"]) == len("<user>Sing\n")


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


def deep(forced: str = "forced") -> bytes:
    """Schemas that nest as deep as JSON is read: a tool's, and an answer's."""
    schema = b'{"type": "array", "items": ' * 1015 + b"{}" + b"}" * 1015
    tools = b'"tools": [{"type": "function", "function": {"name": "f", "parameters": %b}}]' % schema
    return b'{"prompt": "a", "guided_json": %b, "messages": [{"role": "user"}], %b, "%b": "required"}' % (
        schema, tools, forced.encode()
    )  # fmt: skip


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
        ("chat/completions", {**CHAT, "top_logprobs": 2}, 400, "left out where 'logprobs' is not true"),
        *(
            ("chat/completions", {**CHAT, "chat_template_kwargs": {name: 1}}, 400, "they are fields beside it")
            for name in ("messages", "tools", "add_generation_prompt", "self")
        ),
        ("chat/completions", deep("tool_choice"), 400, "recursion"), ("chat/completions", deep(), 400, "recursion"),
        ("completions", deep(), 400, "Recursion limit reached"), ("completions", b"[" * 10_000, 400, "no JSON"),
        ("completions", {"prompt": "a", "guided_regex": 5}, 400, "'guided_regex' must be a string"),
        ("completions", {"prompt": "a", "logit_bias": {"²": 1}}, 400, "'logit_bias' must be an object from tokens"),
        ("completions", {"prompt": "a", "logit_bias": {"1" * 5000: 1}}, 400, "'logit_bias' must be an object"),
        ("completions", {"prompt": "a", "prompt_logprobs": 1, "stream": True}, 400, "left out where 'stream' is true"),
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


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "'prompt' must be a string"), ("/tokenize", {"prompt": 5}, "'prompt' must be a string"),
        ("/detokenize", {}, "'tokens' must be"), ("/detokenize", {"tokens": [-1]}, "tokens are 0 to"),
        ("/v2/models/writer/generate", {"prompt": "x"}, "'text_input' must be a string"),
        ("/v2/models/writer/generate", {"text_input": ["x", "y"]}, "'text_input' must be a string"),
        ("/v2/models/writer/generate_stream", {"text_input": "x", "n": 2}, "'n' must be 1: this route tells one"),
    ],
)  # fmt: skip
def test_refusals_of_other_routes(server: LlmServer, path: str, body: Any, words: str) -> None:
    status, answer = ask(server, "POST", path, body)
    assert status == 400 and words in json.loads(answer)["error"]["message"]
    status, answer = ask(server, "POST", "/v2/models/writer/infer", {})
    assert status == 404 and json.loads(answer)["error"]["message"] == "there is no /v2/models/writer/infer here"


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
