"""What a step's logits become: for each answer a token, or several where drafts were right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ingot.llm.answers import Answer, Voice
from ingot.llm.flight import Landed
from ingot.llm.request import Finish, TokenLogprob
from ingot.llm.sampling import Drawn, draw, drawn_of, logprobs_of
from ingot.llm.scheduler import Share


@dataclass(eq=False)
class Turn:
    """A voice whose next tokens are drawn, from row `row` of the logits on; `end` and why, once it has one."""

    share: Share
    voice: Voice
    row: int
    drawn: list[Drawn] = field(default_factory=list)
    fault: str = ""
    end: tuple[Finish, int | None] | None = None
    answer: Answer | None = None

    @property
    def tokens(self) -> list[int]:
        """What was drawn."""
        return [drawn.token for drawn in self.drawn if drawn.token is not None]

    def accept(self, drawn: Drawn) -> None:
        """The next one is drawn."""
        self.drawn.append(drawn)
        voice, token = self.voice, drawn.token
        if token is None:
            self.fault = _fault(voice)
            return
        voice.drawing.accept(token)
        if voice.matcher is not None:
            voice.matcher.accept(token)
        if token in voice.drawing.ends:
            self.end = ("stop", token)
        elif voice.matcher is not None and voice.matcher.ended:
            self.end = ("stop", None)
        elif voice.drawing.count >= voice.ticket.limit:
            self.end = ("length", None)

    @property
    def goes_on(self) -> bool:
        """Whether the last token was the draft that the next row's logits follow."""
        place = len(self.drawn) - 1
        if self.fault or self.end or place >= self.share.drafts:
            return False
        return self.drawn[-1].token == self.share.sequence.draft[place]


def _fault(voice: Voice) -> str:
    if voice.matcher is None:
        return "the model's logits are no numbers"
    return voice.matcher.fault or "no token that the grammar allows has a number for its logit"


def draw_all(turns: Sequence[Turn], landed: Landed) -> None:
    """Draw for every turn, and again for those whose drafts turn out right; from logits, or what the runner drew."""
    going = list(turns)
    while going:
        rows = [turn.row + len(turn.drawn) for turn in going]
        for turn, drawn in zip(going, _drawn(going, rows, landed), strict=True):
            turn.accept(drawn)
        going = [turn for turn in going if turn.goes_on]


def _drawn(turns: Sequence[Turn], rows: Sequence[int], landed: Landed) -> list[Drawn]:
    """The next token of every turn, from its row."""
    picked: Any = landed.rows if rows == list(range(len(landed.rows))) else landed.rows[rows]
    if landed.rows.ndim == 1:
        return drawn_of(picked, _logprobs(turns, rows, landed) if landed.likely else {})
    masks = [turn.voice.matcher.mask() if turn.voice.matcher is not None else None for turn in turns]
    return draw(picked, list(zip([turn.voice.drawing for turn in turns], masks, strict=True)))


def _logprobs(turns: Sequence[Turn], rows: Sequence[int], landed: Landed) -> dict[int, TokenLogprob]:
    """Of those turns, by their place, that ask for any."""
    told = [place for place, row in enumerate(rows) if row in landed.likely]
    if not told:
        return {}
    words = np.stack([landed.likely[rows[place]] for place in told])
    tokens = [int(landed.rows[rows[place]]) for place in told]
    tops = [turns[place].voice.drawing.sampling.logprobs or 0 for place in told]
    return dict(zip(told, logprobs_of(words, tokens, tops), strict=True))
