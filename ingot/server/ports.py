"""A model's inputs and outputs as its configuration states them: checks requests, gathers batches, splits results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ingot.server.config import enum_name
from ingot.server.request import BY_CONFIG, Array, Request, Response, ServerError, Tensor, invalid

Dims = tuple[int, ...]  # -1: any extent
Feeds = dict[str, Any]
_CHECKS_KEPT = 4096


class PartlyRefused(Exception):
    """Of a batch that ran, some requests are refused: `parts` are outputs or errors, in order."""

    def __init__(self, parts: Sequence[Sequence[Tensor] | ServerError]) -> None:
        super().__init__("some requests of the batch are refused")
        self.parts = parts


@dataclass(frozen=True)
class Port:
    """One input or output without the batch axis. `inner`: the model's own dims where the configuration reshapes."""

    name: str
    datatype: str
    dims: Dims
    inner: Dims | None = None
    optional: bool = False
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ports:
    """All of a model; `max_rows` 0: the model does not batch, dims are whole shapes.

    `decoupled`: it answers a request any number of times.
    """

    model: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    max_rows: int
    decoupled: bool = False

    @cached_property
    def input_of(self) -> Mapping[str, Port]:
        """Inputs by name."""
        return {port.name: port for port in self.inputs}

    @cached_property
    def output_of(self) -> Mapping[str, Port]:
        """Outputs by name."""
        return {port.name: port for port in self.outputs}

    def shape_of(self, port: Port) -> Dims:
        """Dims with the batch axis, as metadata shows them."""
        return (-1, *port.dims) if self.max_rows else port.dims

    @cached_property
    def _checked(self) -> dict[Any, tuple[int, tuple[Dims, ...]]]:
        return {}

    def check(self, request: Request) -> tuple[int, tuple[Dims, ...]]:
        """(rows, key of shapes that may share a batch) of a request; ServerError names what does not fit."""
        key = request.kind or (
            *[(x.name, x.datatype, x.data.shape) for x in request.inputs], *[x.name for x in request.outputs]
        )  # fmt: skip
        found = self._checked.get(key)
        if found is None:
            found = self._check(request)
            if len(self._checked) < _CHECKS_KEPT:
                self._checked[key] = found
        return found

    def _check(self, request: Request) -> tuple[int, tuple[Dims, ...]]:
        self._check_names(request)
        for tensor in request.inputs:
            self._check_tensor(self.input_of[tensor.name], tensor)
        for output in request.outputs:
            if output.name not in self.output_of:
                raise invalid(f"unexpected inference output '{output.name}' for model '{self.model}'")
        if not self.max_rows:
            return 1, tuple(tensor.shape for tensor in request.inputs)
        return self._rows(request.inputs), tuple(
            tensor.shape[1:] for tensor in sorted(request.inputs, key=lambda tensor: tensor.name)
        )

    def _check_names(self, request: Request) -> None:
        given = {tensor.name for tensor in request.inputs}
        for name in given - self.input_of.keys():
            raise invalid(f"unexpected inference input '{name}' for model '{self.model}'")
        missing = [port.name for port in self.inputs if port.name not in given and not port.optional]
        if missing or len(given) != len(request.inputs):
            raise invalid(
                f"expected {len(self.inputs)} inputs but got {len(request.inputs)} inputs for model '{self.model}'."
                + (f" Got input(s) {sorted(given)}, but missing required input(s) {missing}." if missing else "")
            )

    def _check_tensor(self, port: Port, tensor: Tensor) -> None:
        if tensor.datatype != port.datatype:
            raise invalid(
                f"inference input '{port.name}' data-type is '{tensor.datatype}', "
                f"but model '{self.model}' expects '{port.datatype}'"
            )
        expected = self.shape_of(port)
        if len(expected) != len(tensor.shape) or any(
            wanted not in (-1, found) for wanted, found in zip(expected, tensor.shape, strict=True)
        ):
            raise invalid(
                f"unexpected shape for input '{port.name}' for model '{self.model}'. "
                f"Expected {list(expected)}, got {list(tensor.shape)}"
            )

    def _rows(self, inputs: Sequence[Tensor]) -> int:
        rows = {tensor.shape[0] for tensor in inputs}
        if len(rows) != 1:
            raise invalid(f"inputs of a request for model '{self.model}' have different batch sizes: {sorted(rows)}")
        (count,) = rows
        if not 1 <= count <= self.max_rows:
            raise invalid(f"inference request batch-size must be <= {self.max_rows} for '{self.model}', it is {count}")
        return count

    def gather(self, requests: Sequence[Request]) -> Feeds:
        """Feeds of one execution: the request's own arrays, or one concatenation of several requests'."""
        if len(requests) == 1:
            return {tensor.name: self._inner(tensor.name, tensor.data) for tensor in requests[0].inputs}
        parts: dict[str, list[Array]] = {tensor.name: [] for tensor in requests[0].inputs}
        for request in requests:
            for tensor in request.inputs:
                parts[tensor.name].append(tensor.data)
        return {name: self._inner(name, np.concatenate(arrays)) for name, arrays in parts.items()}

    def _inner(self, name: str, data: Array) -> Array:
        port = self.input_of[name]
        return data if port.inner is None else data.reshape(_bound(port, data.shape, bool(self.max_rows)))

    def split(
        self, results: Mapping[str, Array], requests: Sequence[Request], rows: Sequence[int]
    ) -> list[list[Tensor]]:
        """Each request's outputs, in the order it asks for them: views of the results."""
        outer = {port.name: self._outer(port, results) for port in self.outputs}
        if len(requests) == 1:
            names = [output.name for output in requests[0].outputs] or outer
            return [[Tensor(name, self.output_of[name].datatype, outer[name]) for name in names]]
        parts, at = [], 0
        for request, count in zip(requests, rows, strict=True):
            names = [output.name for output in request.outputs] or list(outer)
            pick = slice(at, at + count) if self.max_rows else slice(None)
            parts.append([
                Tensor(name, self.output_of[name].datatype, outer[name][pick] if self.max_rows else outer[name])
                for name in names
            ])  # fmt: skip
            at += count
        return parts

    def _outer(self, port: Port, results: Mapping[str, Array]) -> Array:
        data = results.get(port.name)
        if data is None:
            raise RuntimeError(f"the model did not return output '{port.name}'")
        return data if port.inner is None else data.reshape((len(data), *port.dims) if self.max_rows else port.dims)


def _bound(port: Port, shape: Dims, batched: bool) -> Dims:
    """The inner dims with each -1 replaced by the extents the request gave for the outer -1s, in order."""
    given = shape[1:] if batched else shape
    variable = iter([found for wanted, found in zip(port.dims, given, strict=True) if wanted == -1])
    inner = tuple(next(variable) if extent == -1 else extent for extent in port.inner or ())
    return (shape[0], *inner) if batched else inner


def answer(request: Request, version: int, outputs: Sequence[Tensor], ports: Ports) -> Response:
    """A response in the request's name."""
    return Response(request.model, version, tuple(outputs), request.id, ports)


def ports_of(config: Any, folder: Path) -> Ports:
    """The ports of a complete configuration; label files lie beside config.pbtxt."""
    inputs = tuple(_port(item, config, optional=item.optional) for item in config.input)
    outputs = tuple(_port(item, config, labels=_labels(folder, item.label_filename)) for item in config.output)
    return Ports(config.name, inputs, outputs, config.max_batch_size)


def _port(item: Any, config: Any, optional: bool = False, labels: tuple[str, ...] = ()) -> Port:
    kind = enum_name(item, "data_type")
    if kind not in BY_CONFIG:
        raise invalid(f"model '{config.name}': '{item.name}' needs a data_type in config.pbtxt, it says {kind}")
    inner = tuple(item.reshape.shape) if item.HasField("reshape") else None
    return Port(item.name, BY_CONFIG[kind].name, tuple(item.dims), inner, optional, labels)


def _labels(folder: Path, name: str) -> tuple[str, ...]:
    if not name:
        return ()
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise invalid(f"label_filename '{name}' leads out of the model's folder")
    try:
        return tuple(file.read_text().splitlines())
    except OSError as error:
        raise invalid(f"label_filename '{name}' cannot be read: {error.strerror}") from error


def classified(tensor: Tensor, count: int, labels: Sequence[str], batched: bool) -> Tensor:
    """The classification extension: per row the best `count` as "value:index[:label]"."""
    if tensor.datatype == "BYTES":
        raise ServerError(invalid("").code, f"output '{tensor.name}' is BYTES, it cannot be classified")
    rows = tensor.data.reshape(len(tensor.data), -1) if batched else tensor.data.reshape(1, -1)
    best = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :count]
    texts = [
        [_class_text(row[index], int(index), labels) for index in order] for row, order in zip(rows, best, strict=True)
    ]
    classes = np.empty(best.shape, object)
    classes[:] = texts
    return Tensor(tensor.name, "BYTES", classes if batched else classes[0])


def _class_text(value: Any, index: int, labels: Sequence[str]) -> bytes:
    number = f"{float(value):f}" if isinstance(value, np.floating) else str(int(value))
    return ":".join([number, str(index), *labels[index : index + 1]]).encode()
