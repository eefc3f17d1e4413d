"""Tokenizers, chat templates and stop strings, where users' files and texts are not what they should be."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingot.errors import EngineError
from ingot.llm import chat
from ingot.llm.chat import ChatTemplate
from ingot.llm.guided import Grammars
from ingot.llm.request import Guide, Refused
from ingot.llm.text import Growing, Stops, Text
from tests.llm.fakes import VOCABULARY, byte_tokenizer

TEXT = Text.from_files(byte_tokenizer(), VOCABULARY)
HELLO = [{"role": "user", "content": "Hello"}]


@given(st.text(max_size=40), st.integers(1, 5))
def test_growing_text_is_the_whole_text(text: str, step: int) -> None:
    tokens, growing = TEXT.encode(text), Growing(TEXT, TEXT.encode("prompt"))
    pieces = [growing.add(tokens[place : place + step]) for place in range(0, len(tokens), step)]
    assert "".join([*pieces, growing.end()]) == text


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 4))
def test_stops_are_found_however_the_text_comes(text: str, stops: list[str], step: int) -> None:
    finder, told = Stops(stops), ""
    for place in range(0, len(text), step):
        told += finder.add(text[place : place + step])
        if finder.found is not None:
            break
    told += finder.end()
    assert not any(stop in told for stop in stops)
    assert text.startswith(told) and (finder.found is not None or told == text)


def test_a_text_that_is_none() -> None:
    with pytest.raises(Refused, match="no UTF-8"):
        TEXT.encode("half a pair: \ud83d")


def test_tokenizers_that_do_not_fit() -> None:
    with pytest.raises(EngineError, match="another model's: it has token 256, the model has 100 tokens"):
        Text.from_files(byte_tokenizer(), 100)
    for name, content, words in (
        ("tokenizer.json", b'{"a":', "no tokenizer of Hugging Face's form"),
        ("tokenizer.json", b"\xff", "tokenizer.json is no UTF-8"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json is not an object"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is no UTF-8"),
    ):
        with pytest.raises(EngineError, match=words):
            Text.from_files({**byte_tokenizer(), name: content}, VOCABULARY)
    with pytest.raises(EngineError, match="holds no tokenizer"):
        Text.from_files({}, 100)


def test_tokens_beyond_the_vocabulary() -> None:
    """Gemma 3's tokenizer marks images by one; guided answers have masks as wide as the model's logits."""
    document = json.loads(byte_tokenizer()["tokenizer.json"])
    extra = {"id": 300, "content": "<image>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}  # fmt: skip
    document["added_tokens"].append(extra)
    text = Text.from_files({"tokenizer.json": json.dumps(document).encode()}, VOCABULARY)
    assert text.encode("a<image>")[-1] >= VOCABULARY
    matcher = Grammars(text.source, VOCABULARY, frozenset()).matcher(Guide("regex", "[ab]+"))
    assert np.unpackbits(matcher.mask().view(np.uint8), bitorder="little").nonzero()[0].tolist()[:2] == [97, 98]
    assert len(matcher.mask()) == -(-VOCABULARY // 32)


def template(source: str, **config: object) -> ChatTemplate:
    files = {**byte_tokenizer(), "tokenizer_config.json": json.dumps({"chat_template": source, **config}).encode()}
    made = Text.from_files(files, VOCABULARY).template
    assert made is not None
    return made


def test_a_template_of_the_command_line_is_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    for content, words in ((b"{% for", "no jinja2: line 1"), (b"\xff", "no UTF-8")):
        path.write_bytes(content)
        with pytest.raises(EngineError, match=words):
            ChatTemplate.from_file(path, {})
    path.write_text("{{ bos_token }}{{ messages[0].content }}")
    assert ChatTemplate.from_file(path, {"bos_token": "<"}).render(HELLO) == "<Hello"


def test_chat_templates() -> None:
    source = (
        "{{ bos_token }}{% for one in messages %}\n<|{{ one.role }}|>{{ one['content'] | trim }}{% endfor %}"
        "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    made = template(source, bos_token={"content": "<s>"})
    assert made.render(HELLO) == "<s><|user|>Hello<|assistant|>"
    assert made.render(HELLO, tools=[{"naïve": 1}], add_generation_prompt=False) == '<s><|user|>Hello[{"naïve": 1}]'
    named = ChatTemplate.from_config([{"name": "other", "template": "x"}, {"name": "default", "template": "y"}], {})
    assert named.render([]) == "y"


@pytest.mark.parametrize("written", [5, [5], ["x"], [{}], [{"name": "default"}], {"default": "x"}])
def test_templates_that_are_none(written: Any) -> None:
    with pytest.raises(EngineError, match="chat_template is neither a text nor a list"):
        ChatTemplate.from_config(written, {})


def test_a_template_that_fails_refuses_the_messages() -> None:
    for source in ("{{ 1 // 0 }}", "{{ messages[5] + 1 }}", "{{ ''.format(messages) ~ 'a'.nothing() }}"):
        with pytest.raises(Refused, match="the chat template refuses these messages"):
            ChatTemplate(source).render([{"role": "user", "content": "x"}])


def test_bytes_of_tokens() -> None:
    """Of byte-level tokenizers and of SentencePiece's; characters that are whole are themselves."""
    pieces = {0: "<0xE2>", 1: "Ġð", 2: "?"}
    words = {0: "\N{REPLACEMENT CHARACTER}", 1: " \N{REPLACEMENT CHARACTER}", 2: "é"}
    text = Text(SimpleNamespace(decode=lambda tokens, **_: words[tokens[0]], id_to_token=pieces.get), "")
    assert [text.bytes_of(token) for token in range(3)] == [b"\xe2", b" \xf0", "é".encode()]



@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}", "not end"),
        ("{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}", "writes more than"),
        ("{% for i in range(10000000) %}{% endfor %}", "Range too big"),
    ],
)
def test_templates_that_refuse_or_never_end(source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MOST_LINES", 20_000)
    tracing = sys.gettrace()
    with pytest.raises(Refused, match=message):
        template(source).render(HELLO)
    assert sys.gettrace() is tracing


def test_a_template_that_is_none() -> None:
    with pytest.raises(EngineError, match="no jinja2: line 1"):
        template("{% for %}").render(HELLO)
    with pytest.raises(Refused, match="no chat template; name one with --chat-template"):
        TEXT.chat(HELLO)
