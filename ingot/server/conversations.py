"""What a model.py says while it runs: responses before the last one, and calls of other models. The front's side.

Said to a thread that waits for the model anyway; each sentence is answered before the model goes on.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

from ingot.server.request import (
    BY_NUMPY,
    Array,
    Code,
    Done,
    Outcome,
    Request,
    RequestedOutput,
    Response,
    SequencePlace,
    ServerError,
    Tensor,
    invalid,
)
from ingot.server.scheduler import Cancel, clock

Submit = Callable[[Request, Done], Cancel]
Facts = Mapping[str, Any]
Respond = Callable[[Request, Facts, Mapping[str, Array]], Outcome]
TOO_SLOW = ServerError(Code.CANCELLED, "the client reads its responses too slowly", "CANCELED")
_DEPTH, _PATIENCE = 16, 30.0  # responses of one request that wait for its client, and seconds the model waits for it


class Parts:
    """A request's responses before the last, on their way to a client that reads at its own pace.

    Called on the model's thread; returns whether anybody still listens. `deliver` must not block, and what it gave away
    is `taken` once it is on its way.
    """

    def __init__(
        self, deliver: Callable[[Parts, Outcome, bool], None], depth: int = _DEPTH, patience: float = _PATIENCE
    ) -> None:
        self._deliver, self._patience = deliver, patience
        self._room = threading.Semaphore(depth)
        self._gone = False
        self.too_slow = self.ended = False

    def __call__(self, outcome: Outcome, final: bool) -> bool:
        """One response; `final`: the model has said that it is the last."""
        if not self._gone and not self._room.acquire(timeout=self._patience):
            self._gone = self.too_slow = True
        if not self._gone:
            self.ended = final
            self._deliver(self, outcome, final)
        return not self._gone

    def taken(self) -> None:
        """One that was delivered is on its way."""
        self._room.release()

    def leave(self) -> None:
        """Nobody listens any longer."""
        self._gone = True
        self._room.release()


class Conversation:
    """Answers what is said during one execution of a batch. `heard`: a response has gone out, it cannot be repeated."""

    def __init__(self, requests: Sequence[Request], submit: Submit, respond: Respond) -> None:
        self._requests, self._submit, self._respond = requests, submit, respond
        self.heard = False

    def __call__(self, facts: Facts, tensors: Mapping[str, Array]) -> tuple[Facts, Mapping[str, Array]]:
        """The answer to one sentence; an error is one too."""
        try:
            return self._called(facts["call"], tensors) if "call" in facts else self._part(facts, tensors)
        except ServerError as error:
            return {"error": str(error), "code": error.code.name}, {}

    def _part(self, facts: Facts, tensors: Mapping[str, Array]) -> tuple[Facts, Mapping[str, Array]]:
        request = self._requests[facts["part"]]
        outcome = self._respond(request, facts, tensors)
        self.heard = True
        return {"cancelled": request.part is None or not request.part(outcome, facts["final"])}, {}

    def _called(self, asked: Facts, tensors: Mapping[str, Array]) -> tuple[Facts, Mapping[str, Array]]:
        """Ask another model and wait."""
        outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self._submit(self._request(asked, tensors), outcomes.put)
        outcome = outcomes.get()
        if not isinstance(outcome, Response):
            raise outcome
        return {}, {tensor.name: tensor.data for tensor in outcome.outputs}

    def _request(self, asked: Facts, tensors: Mapping[str, Array]) -> Request:
        place = SequencePlace(asked["sequence"], bool(asked["flags"] & 1), bool(asked["flags"] & 2))
        return Request(
            asked["model"], tuple(_tensor(name, data) for name, data in tensors.items()), asked["version"], asked["id"],
            tuple(RequestedOutput(name, binary=True) for name in asked["outputs"]), place if place.identity else None,
            0, asked["timeout"], asked["parameters"], clock(), caller=self._requests[0].model,
        )  # fmt: skip


class Waits:
    """Which models wait for which, so that none comes to wait for itself: its instance would never be free again."""

    def __init__(self) -> None:
        self._lock, self._edges = threading.Lock(), Counter[tuple[str, str]]()

    def enter(self, caller: str, model: str) -> Callable[[], None]:
        """One waits for the other until what is returned is called; INVALID_ARG if that closed a circle."""
        with self._lock:
            if caller in self._reached(model):
                problem = f"model '{caller}' cannot call '{model}' now, which is, or waits for, '{caller}' itself"
                raise invalid(f"{problem}: neither would ever go on")
            self._edges[caller, model] += 1
        return partial(self._leave, (caller, model))

    def _reached(self, model: str) -> set[str]:
        found, new = {model}, [model]
        while new:
            here = new.pop()
            fresh = {to for (of, to), count in self._edges.items() if of == here and count} - found
            found |= fresh
            new += fresh
        return found

    def _leave(self, edge: tuple[str, str]) -> None:
        with self._lock:
            self._edges[edge] -= 1
            if not self._edges[edge]:
                del self._edges[edge]


def _tensor(name: str, data: Array) -> Tensor:
    if data.dtype == object:
        return Tensor(name, "BYTES", data)
    if data.dtype.name not in BY_NUMPY:
        raise ServerError(Code.INVALID_ARG, f"input '{name}': the protocol has no datatype for {data.dtype}")
    return Tensor(name, BY_NUMPY[data.dtype.name].name, data)
