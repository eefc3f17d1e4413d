"""What a step's rows are asked for: how the runner draws their tokens, or that the host has to, from logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ingot.llm.answers import Answer
from ingot.llm.batch import MOST_EDITS, Array, Integers
from ingot.llm.sampling import Drawing, asked_of
from ingot.llm.scheduler import Share, Tokens


def asked(shares: Sequence[Share], answers: Mapping[Tokens, Answer], runner_draws: bool) -> dict[str, Integers] | None:
    """`draws`, `edits`, `masks` and `told` of a batch of these shares; None where logits must come to the host."""
    drawing = [share for share in shares if share.rows]
    if not all(drawable(share, answers[share.sequence], runner_draws) for share in drawing):
        return None
    found = asked_of([row for share in drawing for row in _rows(share, answers[share.sequence])])
    return found if len(found["edits"]) <= MOST_EDITS else None


def drawable(share: Share, answer: Answer, runner_draws: bool) -> bool:
    """Whether tokens (and log-probabilities of what is drawn) are all that is wanted of it, and what they depend on is
    known beforehand. runner_draws: the runner draws itself; masks for what is drawn here are computed beside the step,
    log-probabilities from logits."""
    if share.sequence.silent or (share.sequence.whole and share.start < share.sequence.prompt):
        return False
    voice, later = answer.voice, answer.ticket.later
    if not runner_draws and (voice.drawing.sampling.logprobs is not None or voice.matcher is not None):
        return False
    follows = voice.matcher is not None or voice.drawing.penalised
    several = voice.matcher is not None or voice.drawing.random
    return not (follows and share.drafts) and not (several and later)


def leads(share: Share, answer: Answer | None) -> bool:
    """Whether the next token can be drawn by who has not seen this one, and the sequence stays one."""
    if answer is None or not share.draws:
        return True
    return not answer.ticket.later and answer.voice.matcher is None and not answer.voice.drawing.penalised


def _rows(share: Share, answer: Answer) -> Iterator[tuple[Drawing, int, Array | None]]:
    """(how, the token's place in the answer, its mask) of every row."""
    voice, end = answer.voice, share.start + share.count + 1 - share.sequence.prompt
    mask = voice.matcher.mask() if voice.matcher is not None else None
    for place in range(end - share.rows, end):
        yield voice.drawing, place, mask
