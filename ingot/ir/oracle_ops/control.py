"""Control flow and optional values: a subgraph attribute arrives as a `Subgraph`, a callable over its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from ingot.ir.oracle_ops.table import Value, meaning


class Subgraph(Protocol):
    """A graph attribute with its outer scope bound."""

    def __call__(self, *inputs: Value) -> list[Any]: ...

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the results."""
        ...

    def empty(self, index: int) -> np.ndarray:
        """An array of output `index`'s declared type, symbolic extents taken as 0."""
        ...


@meaning("If")
def if_(condition: np.ndarray, *, then_branch: Subgraph, else_branch: Subgraph) -> tuple[Value, ...]:
    return tuple(then_branch() if condition.item() else else_branch())


@meaning("Loop")
def loop(trip_count: np.ndarray | None, condition: np.ndarray | None, *carried: Value, body: Subgraph,
         outputs: tuple[bool, ...]) -> tuple[Value, ...]:  # fmt: skip
    """State variables after the last iteration, then each scan output stacked on a new first axis."""
    state: list[Any] = list(carried)
    scanned: list[list[np.ndarray]] = [[] for _ in outputs[len(carried) :]]
    going = condition is None or bool(condition.item())
    for iteration in _iterations(trip_count):
        if not going:
            break
        again, *results = body(np.array(iteration, np.int64), np.array(True), *state)
        state = results[: len(state)]
        for collected, element in zip(scanned, results[len(state) :], strict=True):
            collected.append(element)
        going = bool(again.item())
    stacked = [_stack(elements, body, 1 + len(state) + i) for i, elements in enumerate(scanned)]
    return (*state, *stacked)


def _iterations(trip_count: np.ndarray | None) -> Iterator[int]:
    iteration = 0
    while trip_count is None or iteration < trip_count.item():
        yield iteration
        iteration += 1


def _stack(elements: list[np.ndarray], body: Subgraph, index: int, axis: int = 0) -> np.ndarray:
    if elements:
        return np.stack(elements, axis)
    element = body.empty(index)
    return np.zeros((*element.shape[:axis], 0, *element.shape[axis:]), element.dtype)


@meaning("Scan", since=8)
def scan_8(sequence_lengths: np.ndarray | None, *values: np.ndarray, body: Subgraph, num_scan_inputs: int,
           directions: list[int] | None = None) -> tuple[Value, ...]:  # fmt: skip
    """Opset 8: everything carries a batch axis, the scanned axis is 1."""
    states = len(values) - num_scan_inputs
    batches = []
    for batch in range(values[0].shape[0]):
        slices = [value[batch] for value in values]
        length = slices[-1].shape[0] if sequence_lengths is None else int(sequence_lengths[batch])
        scans = [s[:length] for s in slices[states:]]
        batches.append(_scan(slices[:states], scans, body, directions or [0] * num_scan_inputs, [], []))
    return tuple(_padded_stack(column) for column in zip(*batches, strict=True))


def _padded_stack(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    longest = max((a.shape[0] if a.ndim else 0) for a in arrays)
    if all(a.shape == arrays[0].shape for a in arrays):
        return np.stack(arrays)
    return np.stack([np.pad(a, [(0, longest - a.shape[0]), *[(0, 0)] * (a.ndim - 1)]) for a in arrays])


@meaning("Scan", since=9)
def scan(*values: np.ndarray, body: Subgraph, num_scan_inputs: int, scan_input_axes: list[int] | None = None,
         scan_input_directions: list[int] | None = None, scan_output_axes: list[int] | None = None,
         scan_output_directions: list[int] | None = None) -> tuple[Value, ...]:  # fmt: skip
    """State variables after the last element, then each scan output stacked along its axis."""
    states = len(values) - num_scan_inputs
    axes = scan_input_axes or [0] * num_scan_inputs
    scans = [np.moveaxis(v, axis, 0) for v, axis in zip(values[states:], axes, strict=True)]
    directions = scan_input_directions or [0] * num_scan_inputs
    return _scan(list(values[:states]), scans, body, directions, scan_output_axes or [], scan_output_directions or [])


def _scan(state: list[Any], scans: list[np.ndarray], body: Subgraph, directions: list[int],
          output_axes: list[int], output_directions: list[int]) -> tuple[Value, ...]:  # fmt: skip
    ordered = [np.flip(s, 0) if reverse else s for s, reverse in zip(scans, directions, strict=True)]
    rows = []
    states = len(state)
    for elements in zip(*ordered, strict=True):
        results = body(*state, *(np.asarray(e) for e in elements))
        state, row = results[:states], results[states:]
        rows.append(row)
    stacked = []
    for i in range(len(body.outputs) - states):
        axis = output_axes[i] if i < len(output_axes) else 0
        reverse = bool(output_directions[i]) if i < len(output_directions) else False
        column = [row[i] for row in rows]
        rank = (column[0] if column else body.empty(states + i)).ndim + 1
        stacked.append(_stack(column[::-1] if reverse else column, body, states + i, axis % rank))
    return (*state, *stacked)


@meaning("SequenceMap")
def sequence_map(sequence: list[Any], *others: Value, body: Subgraph, outputs: tuple[bool, ...]) -> tuple[Value, ...]:
    """body applied to each element; sequences among the other inputs are walked alongside, tensors are repeated."""
    rows = [body(element, *(o[i] if isinstance(o, list) else o for o in others)) for i, element in enumerate(sequence)]
    return tuple(list(column) for column in zip(*rows, strict=True)) if rows else tuple([] for _ in outputs)


@meaning("Optional")
def optional(value: Value = None, *, type: object = None) -> Value:
    return value


@meaning("OptionalHasElement")
def optional_has_element(value: Value = None) -> np.ndarray:
    return np.array(value is not None)


@meaning("OptionalGetElement")
def optional_get_element(value: Value) -> Value:
    if value is None:
        raise ValueError("OptionalGetElement of an optional without a value")
    return value
