"""Runs on a GPU that follow each other without the host between them: each waits there for the one before, and takes
from where they lie those elements of its inputs that the one before computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ingot.dtypes import size_of
from ingot.runtime.buffers import Array
from ingot.runtime.executor import Carried

if TYPE_CHECKING:
    from ingot.runtime.cuda_executor import CudaFrame


def follow(frame: CudaFrame, before: CudaFrame, carried: Sequence[Carried]) -> None:
    """What is put on the frame's stream from now on begins when the last run of `before` has ended; carried elements
    are copied first. The host's inputs are on their way by then, and need not wait."""
    context, plan = frame.context, frame.plan
    if before.ended is None and not len(carried):
        return  # forgotten, as its run has been waited for
    context.call("cuStreamWaitEvent", frame.stream, before.ended, 0)
    for position, output, pairs_C2 in carried:
        target, source = plan.values[plan.inputs[position]], plan.values[plan.outputs[output]]
        size = size_of(target.dtype)
        begin, there = int(frame.pointers[target.storage]), int(before.pointers[source.storage])
        for place, row, count in stretches(pairs_C2):
            places = begin + place * size, there + row * size
            context.call("cuMemcpyDtoDAsync", *places, count * size, frame.stream)


def stretches(pairs_C2: Array) -> Iterator[tuple[int, int, int]]:
    """(first, first, how many) of pairs that follow each other on both sides."""
    if not len(pairs_C2):
        return
    breaks = np.flatnonzero((np.diff(pairs_C2, axis=0) != 1).any(axis=1)) + 1
    starts = [0, *breaks.tolist()]
    for start, end in zip(starts, [*starts[1:], len(pairs_C2)], strict=True):
        yield int(pairs_C2[start, 0]), int(pairs_C2[start, 1]), end - start
