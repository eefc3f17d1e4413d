"""ModelStreamInfer: many requests and answers in one call, in the order in which the answers are ready."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from google.protobuf.message import DecodeError

from ingot.server import grpc_codec
from ingot.server.conversations import TOO_SLOW, Parts
from ingot.server.grpc_calls import Call, Message, reported
from ingot.server.request import Outcome, Request, Response, ServerError
from ingot.server.schema import message
from ingot.server.service import Service

_DEPTH = 256  # requests of one stream that are accepted before their answers are fetched
StreamResponse = message("inference.ModelStreamInferResponse")


class StreamInfer:
    """One such call; an error is an answer of its own. A decoupled model's parts go out at the client's pace."""

    def __init__(self, call: Call, service: Service, decoded: Callable[[Call, Message], Request]) -> None:
        self._call, self._service, self._decoded = call, service, decoded
        self._open, self._number, self._reading = 0, 0, True
        self._cancels: dict[int, Callable[[], Any]] = {}
        self._parts: deque[Parts] = deque()  # of which one is not yet on its way
        call.room = _DEPTH
        call.on_message, call.on_closed = self._message, self._closed
        call.on_flowing, call.cancel = self._flowing, self._gone

    def _message(self, raw: Message) -> None:
        self._open += 1
        self._number = number = self._number + 1
        try:
            request = self._decoded(self._call, raw)
            parts = Parts(partial(self._part, request))
            self._cancels[number] = parts.leave
            cancel = self._service.infer(replace(request, part=parts), partial(self._done, request, parts, number))
            if number in self._cancels:  # a quick model has answered by now
                self._cancels[number] = partial(_leave, parts, cancel)
        except Exception as error:  # noqa: BLE001 - becomes an answer of the stream
            self._cancels.pop(number, None)
            self._answered(_error(error, *_names(raw)))

    def _part(self, request: Request, parts: Parts, outcome: Outcome, final: bool) -> None:
        """One response of a decoupled model."""
        self._call.post(partial(self._send_part, self._answer(request, outcome, final), parts))

    def _send_part(self, answer: bytes, parts: Parts) -> None:
        self._call.send(answer)
        if self._call.flows:
            parts.taken()
        else:
            self._parts.append(parts)

    def _done(self, request: Request, parts: Parts, number: int, outcome: Outcome) -> None:
        self._call.post(partial(self._settle, request, parts, number, outcome))

    def _settle(self, request: Request, parts: Parts, number: int, outcome: Outcome) -> None:
        self._cancels.pop(number, None)
        self._answered(self._last(request, parts, outcome))

    def _last(self, request: Request, parts: Parts, outcome: Outcome) -> bytes | None:
        """A request's answer; a decoupled model's end is one only where the client asks for it."""
        if parts.too_slow:
            outcome = TOO_SLOW
        elif isinstance(outcome, Response) and outcome.ports.decoupled:
            wanted = request.parameters.get("triton_enable_empty_final_response") is True
            if parts.ended or not wanted:
                return None
        return self._answer(request, outcome, True)

    def _answer(self, request: Request, outcome: Outcome, final: bool) -> bytes:
        if isinstance(outcome, ServerError):
            return _error(outcome, request.id, request.model)
        try:
            answer = grpc_codec.as_message(request, outcome, self._service.regions)
        except Exception as error:  # noqa: BLE001 - becomes an answer of the stream
            return _error(error, request.id, request.model)
        grpc_codec.set_parameter(answer.parameters["triton_final_response"], final)
        return bytes(StreamResponse(infer_response=answer).SerializeToString())

    def _answered(self, answer: bytes | None) -> None:
        self._open -= 1
        if answer is not None:
            self._call.send(answer)
        self._go_on()

    def _flowing(self) -> None:
        """Everything sent is on its way."""
        while self._parts:
            self._parts.popleft().taken()
        self._go_on()

    def _go_on(self) -> None:
        self._call.room = _DEPTH - self._open - self._call.unread
        self._call.resume()
        self._perhaps_over()

    def _closed(self) -> None:
        self._reading = False
        self._perhaps_over()

    def _perhaps_over(self) -> None:
        if not self._reading and not self._open:
            self._call.end()

    def _gone(self) -> None:
        self._parts.clear()
        for cancel in tuple(self._cancels.values()):
            cancel()


def _leave(parts: Parts, cancel: Callable[[], Any]) -> None:
    parts.leave()
    cancel()


def _error(error: Exception, identity: str, model: str) -> bytes:
    answer = StreamResponse(error_message=str(reported(error)))
    answer.infer_response.id, answer.infer_response.model_name = identity, model
    return bytes(answer.SerializeToString())


def _names(raw: Message) -> tuple[str, str]:
    """The id and the model of a request that has failed; empty if it is none."""
    try:
        asked = grpc_codec.InferRequest.FromString(raw)
    except DecodeError:
        return "", ""
    return asked.id, asked.model_name
