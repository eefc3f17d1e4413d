"""Answers as OpenAI's clients read them: whole, or piece by piece."""

from __future__ import annotations

import base64
import codecs
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ingot.llm.answers import Ticket, shortened
from ingot.llm.openai import Asked, Model
from ingot.llm.request import Event, TokenLogprob
from ingot.llm.tools import Call


class _Characters:
    """Where tokens lie in a text, in characters; a character of several tokens ends with its last one."""

    def __init__(self) -> None:
        self._decoder, self.count = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def place(self, data: bytes) -> int:
        """Where this token begins, behind those before it."""
        before, self.count = self.count, self.count + len(self._decoder.decode(data))
        return before


@dataclass
class Choice:
    """One answer so far; `told` characters of its text went out as content. places: of the tokens in a stream."""

    index: int
    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    stop: str | int | None = None
    told: int = 0
    vector: tuple[float, ...] | None = None
    places: _Characters = field(default_factory=_Characters)


@dataclass
class Reply:
    """The reply to one HTTP request, of all its prompts' answers."""

    model: Model
    asked: Asked
    tickets: list[Ticket] = field(default_factory=list)
    choices: dict[int, Choice] = field(default_factory=dict)
    error: str = ""
    cached: dict[int, int] = field(default_factory=dict)
    identity: str = field(default_factory=lambda: secrets.token_hex(16))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def count(self) -> int:
        """Choices that there will be."""
        return sum(request.sampling.n for request in self.asked.requests)

    @property
    def whole(self) -> bool:
        """Whether every answer has ended."""
        return len(self.choices) == self.count and all(choice.finish for choice in self.choices.values())

    def take(self, prompt: int, event: Event) -> Choice:
        """News of an answer to the prompt of this number."""
        index = prompt * self.asked.requests[0].sampling.n + event.answer
        choice = self.choices.setdefault(index, Choice(index))
        choice.text += event.text
        choice.tokens += len(event.tokens)
        choice.logprobs += event.logprobs
        choice.finish, choice.stop, choice.vector = event.finish, event.stop, event.vector
        self.error = self.error or event.error
        self.cached[prompt] = event.cached
        return choice

    # -- whole --------------------------------------------------------------------------------------------------------
    def body(self) -> dict[str, Any]:
        """The reply at its end."""
        choices = [self._chosen(self.choices[index]) for index in sorted(self.choices)]
        return {**self._head(), "choices": choices, "usage": self.usage()}

    def vectors(self) -> dict[str, Any]:
        """The reply to a request for embeddings."""
        data = [{"object": "embedding", "index": index, "embedding": self._vector(self.choices[index].vector or ())}
                for index in sorted(self.choices)]  # fmt: skip
        usage = self.usage()
        return {"object": "list", "data": data, "model": self.model.name,
                "usage": {name: usage[name] for name in ("prompt_tokens", "total_tokens")}}  # fmt: skip

    def _vector(self, vector: Sequence[float]) -> list[float] | str:
        assert self.asked.vectors is not None
        found = shortened(vector, self.asked.vectors.dimensions)
        if self.asked.vectors.encoded:
            return base64.b64encode(found.astype("<f4").tobytes()).decode()
        return [float(number) for number in found]

    def _head(self, piece: bool = False) -> dict[str, Any]:
        kind = "chat.completion" + ".chunk" * piece if self.asked.chat else "text_completion"
        prefix = "chatcmpl" if self.asked.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.identity}", "object": kind, "created": self.created, "model": self.model.name,
            "system_fingerprint": None,
        }  # fmt: skip

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompts and of the answers."""
        prompts = sum(len(request.tokens) for request in self.asked.requests)
        answers = sum(choice.tokens for choice in self.choices.values())
        return {
            "prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }  # fmt: skip

    def _chosen(self, choice: Choice) -> dict[str, Any]:
        common: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish, "stop_reason": choice.stop}
        if self.asked.prompt_logprobs:
            common["prompt_logprobs"] = self._prompt_logprobs(self._prompt(choice))
        if not self.asked.chat:
            return {**common, "text": self._echo(choice) + choice.text, "logprobs": self._completion_logprobs(choice)}
        content, calls = self._calls(choice)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["tool_calls"] = [call.as_json() for call in calls]
            message["content"] = content or None
            common["finish_reason"] = "tool_calls"
        return {**common, "message": message, "logprobs": self._chat_logprobs(choice.logprobs)}

    def _calls(self, choice: Choice) -> tuple[str, list[Call]]:
        return self.asked.tools.calls(choice.text) if self.asked.tools is not None else (choice.text, [])

    # -- in pieces ----------------------------------------------------------------------------------------------------
    def pieces(self, choice: Choice, event: Event) -> Iterator[dict[str, Any]]:
        """What a stream says of this news."""
        if self.asked.chat:
            yield from self._chat_pieces(choice, event)
            return
        first = choice.text == event.text and choice.tokens == len(event.tokens)
        logprobs = self._streamed_logprobs(choice, event, first)
        yield self._piece(choice, event, {"text": self._echo(choice) * first + event.text, "logprobs": logprobs})

    def _prompt(self, choice: Choice) -> int:
        return choice.index // self.asked.requests[0].sampling.n

    def _echo(self, choice: Choice) -> str:
        return self.asked.echo[self._prompt(choice)] if self.asked.echo else ""

    def _chat_pieces(self, choice: Choice, event: Event) -> Iterator[dict[str, Any]]:
        if choice.tokens == len(event.tokens):
            yield self._piece(choice, None, {"delta": {"role": "assistant", "content": ""}, "logprobs": None})
        end = len(choice.text) if self.asked.tools is None else self.asked.tools.held(choice.text)
        calls: list[Call] = []
        if event.finish:
            content, calls = self._calls(choice)
            end = max(len(content), choice.told) if calls else len(choice.text)
        delta: dict[str, Any] = {"content": choice.text[choice.told : end]} if end > choice.told else {}
        choice.told = max(end, choice.told)
        if calls:
            delta["tool_calls"] = [call.as_json(index) for index, call in enumerate(calls)]
        if delta or event.finish or event.logprobs:
            logprobs = self._chat_logprobs(list(event.logprobs)) if event.logprobs else None
            piece = self._piece(choice, event, {"delta": delta, "logprobs": logprobs})
            if calls:
                piece["choices"][0]["finish_reason"] = "tool_calls"
            yield piece

    def _piece(self, choice: Choice, event: Event | None, body: dict[str, Any]) -> dict[str, Any]:
        finish = event.finish if event is not None else None
        stop = choice.stop if finish else None
        one = {"index": choice.index, **body, "finish_reason": finish, "stop_reason": stop}
        usage = {"usage": None} if self.asked.usage else {}
        return {**self._head(piece=True), "choices": [one], **usage}

    def last_piece(self) -> dict[str, Any]:
        """The usage, where it was asked for."""
        return {**self._head(piece=True), "choices": [], "usage": self.usage()}

    # -- log-probabilities --------------------------------------------------------------------------------------------
    def _word(self, token: int) -> str:
        return self.model.text.decode([token], special=True)

    def _chat_logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self.asked.top_logprobs is None:
            return None
        return {"content": [self._chat_logprob(each) for each in found], "refusal": None}

    def _chat_logprob(self, found: TokenLogprob) -> dict[str, Any]:
        top = [self._token_logprob(token, logprob) for token, logprob in found.top]
        return {**self._token_logprob(found.token, found.logprob), "top_logprobs": top}

    def _token_logprob(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._word(token), "logprob": logprob, "bytes": list(self.model.text.bytes_of(token))}

    def _streamed_logprobs(self, choice: Choice, event: Event, first: bool) -> dict[str, Any] | None:
        if self.asked.top_logprobs is None:
            return None
        return self._listed([*(self._echoed(choice) if first else ()), *event.logprobs], choice.places)

    def _completion_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if self.asked.top_logprobs is None:
            return None
        return self._listed([*self._echoed(choice), *choice.logprobs], _Characters())

    def _echoed(self, choice: Choice) -> list[TokenLogprob]:
        """The prompt's, where it is told again: of its first token nothing is known."""
        if not self.asked.echo:
            return []
        top, known = self.asked.top_logprobs, self.tickets[self._prompt(choice)].scored
        first = TokenLogprob(self.asked.requests[self._prompt(choice)].tokens[0], float("nan"))
        return [first, *(replace(each, top=each.top[:top]) for each in known)]

    def _prompt_logprobs(self, prompt: int) -> list[dict[str, Any] | None]:
        """As vLLM tells them: of each token of the prompt its own and the likeliest, by their ids."""
        return [None, *(
            {str(token): {"logprob": logprob, "decoded_token": self._word(token)}
             for token, logprob in (*each.top, (each.token, each.logprob))} for each in self.tickets[prompt].scored
        )]  # fmt: skip

    def _listed(self, found: Sequence[TokenLogprob], places: _Characters) -> dict[str, Any]:
        return {
            "tokens": [self._name(each.token) for each in found],
            "text_offset": [places.place(self.model.text.bytes_of(each.token)) for each in found],
            "token_logprobs": [each.logprob if each.logprob == each.logprob else None for each in found],
            "top_logprobs": [{self._name(token): value for token, value in each.top} or None for each in found],
        }  # fmt: skip

    def _name(self, token: int) -> str:
        """Its text, or its bytes where these are no text: names of a place's likeliest tokens must differ."""
        word = self._word(token)
        if "\N{REPLACEMENT CHARACTER}" not in word:
            return word
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.model.text.bytes_of(token))
