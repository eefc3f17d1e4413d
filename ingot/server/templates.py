"""Requests that were decoded before: one that differs in nothing but the numbers in its tensors is not parsed again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ingot.server.request import Request, Tensor

Span = tuple[str, str, tuple[int, ...], np.dtype[Any], int]


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """A request without its tensors, and where those lie in what was sent: name, datatype, shape, dtype, first byte."""

    spans: tuple[Span, ...]
    end: int
    rest: Request

    def filled(self, sent: bytes | bytearray, model: str, version: int, arrived: int) -> Request:
        """The request that this makes of other bytes; its tensors are views of them."""
        rest = self.rest
        inputs = tuple([
            Tensor(name, datatype, np.ndarray(shape, dtype, sent, start))
            for name, datatype, shape, dtype, start in self.spans
        ])  # fmt: skip
        return Request(
            model, inputs, version, rest.id, rest.outputs, rest.sequence, rest.priority, rest.timeout_us,
            rest.parameters, arrived, kind=self,
        )  # fmt: skip


def template_of(request: Request, starts: list[int], end: int) -> Template | None:
    """A request's template, its tensors beginning at `starts`; None where not all that differs is in their bytes."""
    if not starts or request.id or any(tensor.datatype == "BYTES" for tensor in request.inputs):
        return None
    spans = tuple([
        (tensor.name, tensor.datatype, tensor.shape, tensor.data.dtype, start)
        for tensor, start in zip(request.inputs, starts, strict=True)
    ])  # fmt: skip
    return Template(spans, end, replace(request, inputs=()))
