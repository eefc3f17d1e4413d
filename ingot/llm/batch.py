"""One step of a model: which tokens it computes, where their keys and values go, and what runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from ingot.ir.ops_sample import DRAW, EDIT

Array = np.ndarray[Any, Any]
Integers = np.ndarray[Any, np.dtype[np.int32]]
Floats = np.ndarray[Any, np.dtype[np.float32]]
FORMS = (1, 2)  # of details["llm"]: all layers share blocks, or kinds of layers have their own
MOST_EDITS = 1 << 20  # of a step: more are made by the host
Copy = tuple[int, int, int]  # a kind of layers, a block of theirs, and the one that becomes like it
Wanted = Literal["logits", "chosen", "likely", "hidden"]


@dataclass(frozen=True)
class Kind:
    """Layers that see equally far: `window` positions at most, a token's own included, 0 for all. `blocks` hold their
    keys and values; those of other kinds have blocks of their own."""

    blocks: int
    window: int = 0


def input_of(name: str, kind: int) -> str:
    """What an engine calls its `slots` or `tables` for a kind of layers."""
    return f"{name}.{kind}" if kind else name


@dataclass(frozen=True)
class Batch:
    """T tokens of S sequences, in any mixture of prompts and answers; tokens of a sequence follow each other.

    slots [K, T]: block * block_size + offset, where a token's key and value are written, for each kind of layers; [T],
    or K = 1: the same for all. starts [S+1]: the tokens starts[s]..starts[s+1] belong to sequence s. lengths [S]:
    context of s, these tokens included. tables [K, S, any]: its blocks in order; [S, any], or K = 1: the same for all.
    rows [R]: the tokens whose logits are wanted; states [E]: those whose hidden states are, behind the last norm.
    carried [C, 2]: in the place of token_ids[c, 0] the step takes what the step that was begun just before it chose
    after its row c, 1, which nobody has seen yet. draws [R, DRAW]: how the rows' tokens are drawn, with edits [E, EDIT]
    and masks [M, any], as the operator Sample has them; no draws: the likeliest of each. told [L]: the rows whose
    tokens' log-probabilities are wanted, each once. All int32.
    """

    token_ids: Integers
    positions: Integers
    slots: Integers
    starts: Integers
    lengths: Integers
    tables: Integers
    rows: Integers
    states: Integers = field(default_factory=lambda: np.zeros(0, np.int32))
    carried: Integers = field(default_factory=lambda: np.zeros((0, 2), np.int32))
    draws: Integers = field(default_factory=lambda: np.zeros((0, DRAW), np.int32))
    edits: Integers = field(default_factory=lambda: np.zeros((0, EDIT), np.int32))
    masks: Integers = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    told: Integers = field(default_factory=lambda: np.zeros(0, np.int32))


class Begun(Protocol):
    """A step that was begun."""

    def result(self) -> Mapping[str, Any]:
        """What was wanted of it, when it is there: "logits" [R, vocabulary] of the batch's rows, float32; "chosen" [R],
        the token drawn after each of them, int32, -1 where there is none; "likely" [L, LIKELY] of its `told`, what the
        operator Likely says of them, int32; "hidden" [E, hidden] of its `states`, float32. Raises what went wrong. To
        be called once, in the order in which steps were begun."""
        ...


class Runner(Protocol):
    """What computes batches. Blocks of `block_size` tokens hold keys and values; a batch has at most `token_budget`
    tokens of `sequence_budget` sequences, each at most `context` long; `eos` are the tokens that end an answer."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of its layers, those that see farthest first: they have the most blocks."""
        ...
    @property
    def token_budget(self) -> int: ...
    @property
    def sequence_budget(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def eos(self) -> frozenset[int]: ...
    @property
    def hidden(self) -> int:
        """Extent of a hidden state; 0: "hidden" is not there."""
        ...

    @property
    def ahead(self) -> bool:
        """Whether one step may be begun while the one before is under way; the device computes them in their order."""
        ...

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn where the logits are, which need not come here then."""
        ...

    def begin(self, batch: Batch, *wanted: Wanted) -> Begun:
        """Begin a step. A runner that computes here may do so when its result is asked for."""
        ...

    def copy_blocks(self, copies: Sequence[Copy]) -> None:
        """Copy the keys and values of block a into block b of a kind, for every (kind, a, b), after all steps that were
        begun."""
        ...

    def close(self) -> None:
        """Give back memory and threads; idempotent."""
        ...
