"""Requests on their way: a ticket for each, an answer for each sequence that it draws, and who speaks to the client."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ingot.llm.batch import Floats
from ingot.llm.guided import Matcher
from ingot.llm.request import Event, Finish, Refused, Request, TokenLogprob
from ingot.llm.sampling import Drawing
from ingot.llm.scheduler import Tokens
from ingot.llm.text import Growing, Stops

log = logging.getLogger("ingot.llm")
Sink = Callable[[Event], None]


@dataclass(eq=False, slots=True)
class Ticket:
    """A request that was taken; `sink` is told of it in one thread.

    voices: one for each answer. later: those that begin when the first one's prompt is computed. left: answers that the
    loop has not ended; untold: those that the speaker has not.
    """

    request: Request
    sink: Sink
    arrived: float
    limit: int
    voices: list[Voice] = field(default_factory=list)
    later: list[Voice] = field(default_factory=list)
    left: int = 1
    untold: int = 1
    cached: int = 0
    entered: float | None = None
    first: float | None = None
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)

    @property
    def scored(self) -> list[TokenLogprob]:
        """The log-probabilities of the prompt's tokens, from the second on."""
        return [self.prompt_logprobs[place] for place in sorted(self.prompt_logprobs)]


@dataclass(eq=False, slots=True)
class Pooled:
    """The hidden states of a text, as far as they are computed."""

    total: Any = 0.0
    count: int = 0

    def take(self, start: int, states: Floats) -> None:
        """Those of the tokens from `start` on; a text that begins again is computed anew."""
        if start == 0:
            self.total, self.count = 0.0, 0
        self.total, self.count = self.total + states.astype(np.float64).sum(0), self.count + len(states)

    def vector(self) -> tuple[float, ...]:
        """Their mean, of length 1. Refused where it has none."""
        mean = self.total / self.count
        length = float(np.sqrt(np.sum(mean * mean)))
        if not (length > 0 and np.isfinite(length)):
            raise Refused("the hidden states of this text are no numbers, or all zero")
        return tuple((mean / length).tolist())


@dataclass(eq=False, slots=True)
class Answer:
    """A voice and the sequence that feeds it, as the loop sees them."""

    voice: Voice
    sequence: Tokens
    last: float = 0.0
    pooled: Pooled | None = None

    @property
    def ticket(self) -> Ticket:
        """The request."""
        return self.voice.ticket

    @property
    def left(self) -> int:
        """Tokens that it may still have."""
        return self.ticket.limit - self.voice.drawing.count


@dataclass(frozen=True, slots=True)
class Spoken:
    """Tokens on their way from the loop to the client."""

    voice: Voice
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    stop: int | None = None
    error: str = ""
    vector: tuple[float, ...] | None = None


@dataclass(eq=False)
class Voice:
    """One answer: how the loop draws it, and how the speaker's thread puts it into words."""

    ticket: Ticket
    index: int
    drawing: Drawing
    matcher: Matcher | None
    growing: Growing | None
    stops: Stops
    stopped: Callable[[Voice], None]
    closed: bool = False
    likelihood: float = 0.0
    kept: list[Event] = field(default_factory=list)

    def event(self, said: Spoken) -> Event:
        """What the client is told; a stop string ends the answer before its sequence does."""
        silent = said.tokens[:-1] if said.stop is not None else said.tokens
        text = self.stops.add(self.growing.add(silent)) if self.growing is not None else ""
        finish: Finish | None = said.finish
        if finish is not None and self.stops.found is None and self.growing is not None:
            text += self.stops.add(self.growing.end())
            text += self.stops.end() if self.stops.found is None else ""
        if self.stops.found is not None:
            finish = "stop"
            self.stopped(self)
        stop = self.stops.found if self.stops.found is not None else said.stop
        return Event(self.index, text, said.tokens, said.logprobs, finish, stop, said.error, self.ticket.cached,
                     said.vector)  # fmt: skip


def shortened(vector: Sequence[float], dimensions: int | None) -> Floats:
    """The first numbers of a vector, again of length 1, as models with nested embeddings want it."""
    first = np.asarray(vector[:dimensions], np.float64)
    return np.asarray(first / max(float(np.sqrt(np.sum(first * first))), 1e-30), np.float32)


class Speaker:
    """Turns tokens into text and tells clients, in a thread of its own once started, in the caller's before."""

    def __init__(self) -> None:
        self._said: queue.SimpleQueue[list[Spoken] | None] = queue.SimpleQueue()
        self._held: list[Spoken] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """From now on in a thread."""
        self._thread = threading.Thread(target=self._run, name="ingot-llm-speaker", daemon=True)
        self._thread.start()

    def say(self, said: Spoken) -> None:
        """Pass it on; what the thread is to say waits for `release`."""
        if self._thread is None:
            self._speak(said)
        else:
            with self._lock:
                self._held.append(said)

    def release(self) -> None:
        """What was said goes to the thread: when the loop is about to wait, so that neither hinders the other."""
        with self._lock:
            held, self._held = self._held, []
        if held:
            self._said.put(held)

    def close(self) -> None:
        """Everything said is told; idempotent."""
        if self._thread is not None:
            self.release()
            self._said.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (some := self._said.get()) is not None:
            for said in some:
                self._speak(said)

    def _speak(self, said: Spoken) -> None:
        voice = said.voice
        if voice.closed:
            return  # what was drawn after a stop string
        event = self._event(said)
        voice.closed = event.finish is not None
        voice.likelihood += sum(each.logprob for each in event.logprobs)
        if voice.ticket.request.sampling.answers > voice.ticket.request.sampling.n:
            self._keep(voice, event)
        else:
            self._tell(voice.ticket, event)
        if voice.closed:
            voice.ticket.untold -= 1

    def _event(self, said: Spoken) -> Event:
        try:
            return said.voice.event(said)
        except Exception as error:  # becomes the request's end; the others go on
            log.exception("an answer could not be put into words")
            said.voice.stopped(said.voice)
            return Event(said.voice.index, finish="error", error=f"{type(error).__name__}: {error}")

    def _keep(self, voice: Voice, event: Event) -> None:
        """Best of several: nothing is told before all have ended."""
        voice.kept.append(event)
        ticket = voice.ticket
        if not voice.closed or ticket.untold > 1:
            return
        voices = sorted(ticket.voices, key=lambda each: (-each.likelihood, each.index))
        for place, best in enumerate(voices[: ticket.request.sampling.n]):
            for each in best.kept:
                self._tell(ticket, replace(each, answer=place))

    def _tell(self, ticket: Ticket, event: Event) -> None:
        if ticket.request.sampling.logprobs is None and event.logprobs:
            event = replace(event, logprobs=())
        try:
            ticket.sink(event)
        except Exception:
            log.exception("a client could not be told; its request is cancelled")
            for voice in ticket.voices:
                voice.closed = True
                voice.stopped(voice)
