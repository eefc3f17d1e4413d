"""Between text and tokens: a tokenizer, text that grows token by token, stop strings."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingot.errors import ConfigError, EngineError
from ingot.llm.chat import ChatTemplate
from ingot.llm.request import Refused

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_LEFT = 6  # tokens of the prompt before an answer: whether its first one begins with a space depends on them
_REPLACED = "\N{REPLACEMENT CHARACTER}"
_SPLIT = 3  # replacement characters at the end that later tokens may still make one character
_PENDING = 64  # tokens after which even those are given out


@dataclass(frozen=True)
class Text:
    """A model's tokenizer and, if it has one, its chat template."""

    tokenizer: Any
    source: str
    template: ChatTemplate | None = None

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], vocabulary: int) -> Text:
        """From what lies beside a checkpoint: tokenizer.json, tokenizer_config.json, chat_template.jinja. Tokens that
        were added may lie beyond the vocabulary: where a text has one, it is refused."""
        if "tokenizer.json" not in files:
            raise EngineError("this engine holds no tokenizer.json; build it again from a folder that has one")
        source = _words(files, "tokenizer.json")
        tokenizer = _tokenizer(source)
        largest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
        if largest >= vocabulary:
            raise EngineError(
                f"the tokenizer is another model's: it has token {largest}, the model has {vocabulary} tokens"
            )
        config = _settings(files)
        beside = "chat_template.jinja"
        written = _words(files, beside) if beside in files else config.get("chat_template")
        return cls(tokenizer, source, ChatTemplate.from_config(written, config) if written else None)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text; `special`: with what the tokenizer puts before and after it."""
        try:
            return list(self.tokenizer.encode(text, add_special_tokens=special).ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise Refused("the text holds half a surrogate pair: it is no UTF-8") from error

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """Text of tokens; `special` ones only where asked for."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=not special))

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for, which need not be whole characters."""
        word = self.decode([token], special=True)
        if _REPLACED not in word:
            return word.encode()
        piece = str(self.tokenizer.id_to_token(token) or "")
        if _BYTE.fullmatch(piece):  # as SentencePiece writes one
            return bytes([int(piece[3:5], 16)])
        known = _byte_letters()
        return bytes(known[letter] for letter in piece) if all(letter in known for letter in piece) else word.encode()

    def chat(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> list[int]:
        """Tokens of a conversation as the model was taught it; Refused if it has no template."""
        if self.template is None:
            raise Refused("this model has no chat template; name one with --chat-template FILE, or ask for completions")
        return self.encode(self.template.render(messages, **more), special=False)


@functools.cache
def _byte_letters() -> Mapping[str, int]:
    """The letters by which byte-level tokenizers write bytes: those that can be seen stand for themselves, the others,
    in their order, for letters from U+0100 on (GPT-2's encoder.py)."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in seen)
    return {**{chr(byte): byte for byte in seen}, **{chr(256 + place): byte for place, byte in enumerate(others)}}


def _tokenizer(source: str) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(source)
    except Exception as error:  # what the library raises is nothing more special
        raise EngineError(f"tokenizer.json is no tokenizer of Hugging Face's form: {error}") from error


def words_of(path: Path, remedy: str) -> str:
    """A file that somebody named as text; ConfigError where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8: {error}; {remedy}") from error


def _words(files: Mapping[str, bytes], name: str) -> str:
    try:
        return files[name].decode()
    except UnicodeDecodeError as error:
        raise EngineError(f"{name} is no UTF-8: {error}") from error


def _settings(files: Mapping[str, bytes]) -> Mapping[str, Any]:
    """tokenizer_config.json, or nothing."""
    name = "tokenizer_config.json"
    try:
        found = json.loads(_words(files, name)) if name in files else {}
    except json.JSONDecodeError as error:
        raise EngineError(f"{name} is not JSON ({error})") from error
    if not isinstance(found, Mapping):
        raise EngineError(f"{name} is not an object of JSON")
    return found


@dataclass
class Growing:
    """The text of tokens that come one by one: only what later tokens cannot change is given out."""

    text: Text
    context: Sequence[int] = ()
    _tokens: list[int] = field(default_factory=list)
    _start: int = 0
    _read: int = 0
    _given: int = 0

    def __post_init__(self) -> None:
        self._tokens = list(self.context[-_LEFT:])
        self._read = len(self._tokens)

    def add(self, tokens: Sequence[int]) -> str:
        """What these tokens make certain."""
        self._tokens += tokens
        return self._grown(len(self._tokens) - self._read > _PENDING)

    def end(self) -> str:
        """What was held back."""
        return self._grown(True)

    def _grown(self, certain: bool) -> str:
        before = self.text.decode(self._tokens[self._start : self._read])
        after = self.text.decode(self._tokens[self._start :])
        held = 0 if certain else min(len(after) - len(after.rstrip(_REPLACED)), _SPLIT)
        grown = after[len(before) + self._given : len(after) - held]
        if held:
            self._given += len(grown)
        else:
            self._start, self._read, self._given = self._read, len(self._tokens), 0
        return grown


@dataclass
class Stops:
    """Stop strings in a growing text: text that may be the beginning of one is held back."""

    stops: Sequence[str]
    include: bool = False
    found: str | None = None
    _held: str = ""

    def add(self, text: str) -> str:
        """What may be given out; once a stop string is found, everything before it, and `found` is set."""
        if not self.stops:
            return text
        held = self._held + text
        places = [(place, stop) for stop in self.stops if (place := held.find(stop)) >= 0]
        if places:
            place, self.found = min(places, key=lambda pair: (pair[0], -len(pair[1])))
            self._held = ""
            return held[: place + len(self.found)] if self.include else held[:place]
        kept = max(_overlap(held, stop) for stop in self.stops)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def end(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    start = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(stop[0], start + 1)
    return 0
