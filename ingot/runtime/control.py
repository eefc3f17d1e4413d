"""If, Loop, Scan and SequenceMap over nested plans. Source: ONNX operator specification, versions 25 and 17."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ingot.errors import InputError
from ingot.plan.plan import ControlSegment

Body = Callable[..., list[Any]]


def run(segment: ControlSegment, arguments: Sequence[Any], bodies: Sequence[Body]) -> list[Any]:
    """Outputs of the control step; bodies take their own inputs only (captures are bound)."""
    return _TABLE[segment.step.op](segment, arguments, bodies)


def _unreachable(segment: ControlSegment, arguments: Sequence[Any], bodies: Sequence[Body]) -> list[Any]:
    """A branch that the build found impossible for the allowed shapes."""
    raise InputError(str(segment.attributes["reason"]))


def _if(segment: ControlSegment, arguments: Sequence[Any], bodies: Sequence[Body]) -> list[Any]:
    """arguments: (condition); bodies: (then, else)."""
    return bodies[0]() if bool(np.asarray(arguments[0]).reshape(-1)[0]) else bodies[1]()


def _loop(segment: ControlSegment, arguments: Sequence[Any], bodies: Sequence[Body]) -> list[Any]:
    """arguments: (trip count or None, condition or None, *carried)."""
    limit = None if arguments[0] is None else int(np.asarray(arguments[0]).reshape(-1)[0])
    going = arguments[1] is None or bool(np.asarray(arguments[1]).reshape(-1)[0])
    carried, count = list(arguments[2:]), len(arguments) - 2
    scans: list[list[Any]] = [[] for _ in range(len(segment.step.outputs) - count)]
    iteration = 0
    while going and (limit is None or iteration < limit):
        condition, *results = bodies[0](np.array(iteration, np.int64), np.array(True), *carried)
        carried = results[:count]
        for scan, y in zip(scans, results[count:], strict=True):
            scan.append(np.array(y, copy=True))
        going = bool(np.asarray(condition).reshape(-1)[0])
        iteration += 1
    return [*carried, *(_stacked(scan, 0, segment, i) for i, scan in enumerate(scans))]


def _scan(segment: ControlSegment, arguments: Sequence[Any], bodies: Sequence[Body]) -> list[Any]:
    """arguments: (*states, *sequences); before opset 9 (lengths or None, *states, *sequences) with a batch axis."""
    if not segment.attributes.get("batched"):
        return _scan_one(segment, arguments, bodies)
    lengths, *batched = arguments
    count = int(segment.attributes["num_scan_inputs"])
    results = []
    for index in range(len(batched[0])):
        mine = [x[index] for x in batched]
        if lengths is not None:
            mine[-count:] = [x[: int(lengths[index])] for x in mine[-count:]]
        results.append(_scan_one(segment, mine, bodies))
    longest = max(len(x[0]) for x in batched[-count:])
    scans = len(batched) - count
    return [np.stack([y if i < scans else _lengthened(y, longest) for y in group])
            for i, group in enumerate(zip(*results, strict=True))]  # fmt: skip


def _lengthened(y: Any, length: int) -> Any:
    """Zeros after the last step."""
    return np.concatenate([y, np.zeros((length - len(y), *y.shape[1:]), y.dtype)])


def _scan_one(segment: ControlSegment, arguments: Sequence[Any], bodies: Sequence[Body]) -> list[Any]:
    settings = segment.attributes
    sequences = int(settings["num_scan_inputs"])
    states, inputs = list(arguments[: len(arguments) - sequences]), list(arguments[len(arguments) - sequences :])
    in_axes = settings.get("scan_input_axes") or [0] * sequences
    backward = settings.get("scan_input_directions") or settings.get("directions") or [0] * sequences
    moved = [
        np.moveaxis(x, axis, 0)[:: -1 if back else 1] for x, axis, back in zip(inputs, in_axes, backward, strict=True)
    ]
    scans: list[list[Any]] = [[] for _ in range(len(segment.step.outputs) - len(states))]
    for t in range(len(moved[0])):
        results = bodies[0](*states, *(np.ascontiguousarray(x[t]) for x in moved))
        states = results[: len(states)]
        for scan, y in zip(scans, results[len(states) :], strict=True):
            scan.append(np.array(y, copy=True))
    out_axes = settings.get("scan_output_axes") or [0] * len(scans)
    flipped = settings.get("scan_output_directions") or [0] * len(scans)
    ordered = [scan[::-1] if back else scan for scan, back in zip(scans, flipped, strict=True)]
    return [*states, *(_stacked(scan, out_axes[i], segment, i) for i, scan in enumerate(ordered))]


def _sequence_map(segment: ControlSegment, arguments: Sequence[Any], bodies: Sequence[Body]) -> list[Any]:
    """arguments: (sequence, *others): other sequences are walked alongside, tensors are the same for every element."""
    sequence, *others = arguments
    short = next((other for other in others if isinstance(other, list) and len(other) < len(sequence)), None)
    if short is not None:
        raise InputError(
            f"{segment.step.name!r} (SequenceMap) walks sequences of {len(sequence)} and {len(short)} elements; "
            "give every sequence as many elements as the first"
        )
    mapped: list[list[Any]] = [[] for _ in segment.step.outputs]
    for index, element in enumerate(sequence):
        results = bodies[0](element, *(other[index] if isinstance(other, list) else other for other in others))
        for held, y in zip(mapped, results, strict=True):
            held.append(np.array(y, copy=True))
    return mapped


def _stacked(items: list[Any], axis: int, segment: ControlSegment, output: int) -> Any:
    if items:
        return np.stack(items, axis)
    shapes, dtypes = segment.attributes["scan_shapes"], segment.attributes["scan_dtypes"]
    from ingot.dtypes import numpy_dtype

    return np.empty((0, *shapes[output]), numpy_dtype(dtypes[output]))


_TABLE: dict[str, Callable[[ControlSegment, Sequence[Any], Sequence[Body]], list[Any]]] = {
    "If": _if,
    "Loop": _loop,
    "Scan": _scan,
    "SequenceMap": _sequence_map,
    "Unreachable": _unreachable,
}
