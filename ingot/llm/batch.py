"""One step of a model: which tokens it computes, where their keys and values go, and what runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

Array = np.ndarray[Any, Any]
Integers = np.ndarray[Any, np.dtype[np.int32]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Batch:
    """T tokens of S sequences, in any mixture of prompts and answers; tokens of a sequence follow each other.

    slots: block * block_size + offset, where a token's key and value are written. starts [S+1]: the tokens
    starts[s]..starts[s+1] belong to sequence s. lengths [S]: context of s, these tokens included. tables
    [S, any]: its blocks in order. rows [R]: the tokens whose logits are wanted; states [E]: those whose hidden states
    are, behind the last norm. All int32.
    """

    token_ids: Integers
    positions: Integers
    slots: Integers
    starts: Integers
    lengths: Integers
    tables: Integers
    rows: Integers
    states: Integers = field(default_factory=lambda: np.zeros(0, np.int32))


@runtime_checkable
class Overlapping(Protocol):
    """A runner that has its caller do something else while a step is computed elsewhere: before it waits it calls
    `meanwhile`."""

    meanwhile: Callable[[], None]


class Runner(Protocol):
    """What computes batches. `blocks` of `block_size` tokens hold keys and values; a batch has at most `token_budget`
    tokens of `sequence_budget` sequences, each at most `context` long; `eos` are the tokens that end an answer."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def token_budget(self) -> int: ...
    @property
    def sequence_budget(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def eos(self) -> frozenset[int]: ...
    @property
    def window(self) -> int:
        """Positions that a token sees at most in any layer, its own included; 0: all."""
        ...
    @property
    def hidden(self) -> int:
        """Extent of a hidden state; 0: `step_states` is not there."""
        ...

    def step(self, batch: Batch) -> Floats:
        """Logits [R, vocabulary] of the batch's rows."""
        ...

    def step_states(self, batch: Batch) -> tuple[Floats, Floats]:
        """Logits of the batch's rows, and the hidden states [E, hidden] of its `states`."""
        ...

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the keys and values of block a into block b, for every (a, b)."""
        ...

    def close(self) -> None:
        """Give back memory and threads; idempotent."""
        ...
