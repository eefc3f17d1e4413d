"""`ingot.LLM`: a model in this process, for scripts: texts in, texts out."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

from ingot.llm.answers import Ticket, shortened
from ingot.llm.batch import Floats, Runner
from ingot.llm.engine import Engine
from ingot.llm.options import EngineOptions
from ingot.llm.request import Event, Finish, Pooling, Refused, Request, Sampling, TokenLogprob
from ingot.llm.text import Text

Prompt = str | Sequence[int]
_NO_SAMPLING = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Answer:
    """One answer: its text and tokens, and why it ended ("stop", "length"). prompt_logprobs: of the prompt's tokens
    from the second on, where they were asked for."""

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class LLM:
    """A model that answers; thread-safe, and a context manager.

        with ingot.LLM("model.engine") as llm:
            print(llm("Once upon a time", max_tokens=64))

    Parameters of answers are those of `ingot.llm.request.Sampling`; without any the likeliest token is taken.
    drafts: how many tokens are guessed at once, by `draft`, an engine of a smaller model, or from what was said before.
    """

    def __init__(
        self, engine: str | Path | Runner, *, threads: int | None = None, blocks: int | None = None,
        drafts: int = 0, draft: str | Path | Runner | None = None, text: Text | None = None,
    ) -> None:  # fmt: skip
        options = EngineOptions(drafts=drafts or (4 if draft is not None else 0))
        with ExitStack() as opened:  # what was opened is closed where something else is wrong
            runner = opened.enter_context(closing(_opened(engine, threads, blocks)))
            small = None
            if draft is not None:
                small = opened.enter_context(closing(_opened(draft, threads, runner.kinds[0].blocks, alike=True)))
            self.text = text or Text.from_files(getattr(runner, "files", {}), runner.vocabulary)
            self.engine = Engine(runner, self.text, options, small)
            self.engine.start()
            opened.pop_all()

    def __call__(self, prompt: Prompt, **sampling: Any) -> str:
        """The text of one answer."""
        return self.generate([prompt], **sampling)[0].text

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | None = None, **asked: Any) -> list[Answer]:
        """One answer a prompt (or `n` after each other), computed together. Refused; IngotError where one fails."""
        chosen = _sampling(sampling, asked)
        _check_several(prompts)
        told = self._told([Request(self._tokens(prompt), chosen) for prompt in prompts])
        return [_joined(ticket, events) for ticket, answers in told for events in answers]

    def chat(self, messages: Sequence[Mapping[str, Any]], **asked: Any) -> Answer:
        """The answer to a conversation."""
        return self.generate([self.text.chat(messages)], **asked)[0]

    def embed(self, texts: Sequence[Prompt], *, pooling: Pooling = "last", dimensions: int | None = None) -> Floats:
        """A vector of length 1 for each text, [texts, hidden]: the hidden states' mean, or that of the last token."""
        _check_several(texts)
        hidden = self.engine.runner.hidden
        if pooling not in ("last", "mean"):
            raise Refused(f"pooling must be 'last' or 'mean', it is {pooling!r}")
        if dimensions is not None and not 1 <= dimensions <= hidden:
            raise Refused(f"dimensions must be 1 to {hidden}, it is {dimensions}")
        told = self._told([Request(self._tokens(text), _NO_SAMPLING, pooling=pooling) for text in texts])
        found = [shortened(events[-1].vector or (), dimensions) for _, (events,) in told]
        return np.stack(found) if found else np.zeros((0, dimensions or hidden), np.float32)

    def stream(self, prompt: Prompt, **asked: Any) -> Iterator[str]:
        """One answer's text, piece by piece; leaving the loop early cancels the rest."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        sampling = _sampling(None, asked)
        if sampling.n > 1:
            raise Refused(f"a stream tells one answer, n is {sampling.n}; generate([prompt]) gives several")
        ticket = self.engine.submit(Request(self._tokens(prompt), sampling), events.put)
        try:
            while True:
                event = _checked(events.get())
                if event.text:
                    yield event.text
                if event.finish:
                    return
        finally:
            self.engine.cancel(ticket)

    def _tokens(self, prompt: Prompt) -> Sequence[int]:
        return self.text.encode(prompt) if isinstance(prompt, str) else _whole(prompt)

    def _told(self, requests: Sequence[Request]) -> list[tuple[Ticket, list[list[Event]]]]:
        """What each request's answers were told, once all have ended; where one fails, none goes on."""
        waiting = list[tuple[Ticket, queue.SimpleQueue[Event]]]()
        try:
            for request in requests:
                events: queue.SimpleQueue[Event] = queue.SimpleQueue()
                waiting.append((self.engine.submit(request, events.put), events))
            return [(ticket, _answers(ticket, events)) for ticket, events in waiting]
        except BaseException:  # Ctrl-C too
            for ticket, _ in waiting:
                self.engine.cancel(ticket)
            raise

    def close(self) -> None:
        """Cancel what runs, give memory and threads back; idempotent."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _opened(engine: str | Path | Runner, threads: int | None, blocks: int | None, alike: bool = False) -> Runner:
    if not isinstance(engine, str | Path):
        return engine
    from ingot.llm.runner import open_runner

    return open_runner(engine, threads=threads, blocks=blocks, alike=alike)


def _sampling(sampling: Sampling | None, asked: Mapping[str, Any]) -> Sampling:
    if sampling is not None and asked:
        raise Refused("give either a Sampling or its fields")
    known = [each.name for each in fields(Sampling)]
    wrong = ", ".join(name for name in asked if name not in known)
    if wrong:
        raise Refused(f"there is no parameter {wrong}; there are {', '.join(known)}")
    return sampling or (Sampling(**{"temperature": 0.0, **asked}) if asked else _NO_SAMPLING)


def _check_several(prompts: object) -> None:
    """Letters of a text are prompts too, but nobody means that."""
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise Refused("give a list of prompts; for one call the model itself, llm(prompt), or give [prompt]")


def _whole(prompt: Sequence[int]) -> list[int]:
    """Token ids, as integers of Python's."""
    try:
        if isinstance(prompt, bytes | bytearray):
            raise TypeError
        return [index(token) for token in prompt]
    except TypeError:
        raise Refused(f"a prompt is a text or whole numbers, ids of tokens; this is {str(prompt)[:60]!r}") from None


def _answers(ticket: Ticket, events: queue.SimpleQueue[Event]) -> list[list[Event]]:
    """What a request's answers are told, once all have ended."""
    told: list[list[Event]] = [[] for _ in range(ticket.request.sampling.n)]
    left = len(told)
    while left:
        event = _checked(events.get())
        told[event.answer].append(event)
        left -= event.finish is not None
    return told


def _checked(event: Event) -> Event:
    if event.finish in ("error", "cancelled"):
        raise Refused(event.error or "the answer was cancelled: the model is being closed")
    return event


def _joined(ticket: Ticket, events: Sequence[Event]) -> Answer:
    finish = events[-1].finish
    assert finish is not None
    return Answer(
        "".join(event.text for event in events), tuple(token for event in events for token in event.tokens), finish,
        tuple(found for event in events for found in event.logprobs), len(ticket.request.tokens), events[-1].cached,
        tuple(ticket.scored),
    )  # fmt: skip
