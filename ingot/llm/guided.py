"""Answers that match a schema, a regular expression or a grammar: llguidance says which tokens may come next.

A grammar is compiled in the thread that asks; the mask of the next token is computed beside the step that computes it.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np

from ingot.llm.batch import Array
from ingot.llm.request import Guide, Refused

_KEPT = 64  # compiled grammars
_LONGEST = 1 << 20


def _schema(text: str) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_json_schema(text, {"whitespace_flexible": False}))


def _regex(text: str) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_regex(text))


def _lark(text: str) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_lark(text))


def _choice(text: str) -> str:
    choices = json.loads(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("it must be an array of texts, of one at least")
    return _lark("start: " + " | ".join(map(json.dumps, choices)))


_GRAMMARS: Mapping[str, Callable[[str], str]] = {
    "json_schema": _schema,
    "json_object": lambda _: _schema('{"type": "object"}'),
    "regex": _regex,
    "grammar": _lark,
    "choice": _choice,
}


class Grammars:
    """Compiles guides for one tokenizer; thread-safe."""

    def __init__(self, tokenizer: str, vocabulary: int, eos: frozenset[int]) -> None:
        self._tokenizer_json, self._vocabulary, self._eos = tokenizer, vocabulary, sorted(eos)
        self._tokenizer: Any = None
        self._compiled: OrderedDict[Guide, Any] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, guide: Guide) -> Matcher:
        """A matcher at its beginning; Refused with the compiler's words where nothing can match."""
        with self._lock:
            if guide not in self._compiled:
                self._compiled[guide] = self._compile(guide)
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(guide)
            return Matcher(self._compiled[guide].deep_copy(), -(-self._vocabulary // 32))

    def _compile(self, guide: Guide) -> Any:
        from llguidance import LLMatcher, LLTokenizer

        if len(guide.text) > _LONGEST:
            raise Refused(f"the {guide.kind} has {len(guide.text)} characters; at most {_LONGEST}")
        if guide.kind not in _GRAMMARS:
            raise Refused(f"answers cannot be guided by {guide.kind!r}, but by {', '.join(_GRAMMARS)}")
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(self._tokenizer_json, n_vocab=self._size(), eos_token=self._eos or None)
        try:
            made = LLMatcher(self._tokenizer, _GRAMMARS[guide.kind](guide.text))
        except (ValueError, TypeError, RecursionError) as error:
            raise Refused(f"the {guide.kind} cannot be used: {error}") from error
        fault = _fault(made) or _fault(_begun(made))
        if fault:
            raise Refused(f"the {guide.kind} cannot be used: {fault}")
        return made

    def _size(self) -> int:
        """Tokens of the model, and what a tokenizer has beyond them (Gemma 3's mark of an image)."""
        import tokenizers

        known = tokenizers.Tokenizer.from_str(self._tokenizer_json).get_vocab(with_added_tokens=True)
        return max(self._vocabulary, 1 + max(known.values(), default=-1))


def _begun(made: Any) -> Any:
    """A copy that was asked for the first token: where nothing can ever match, it is at a fault."""
    copy = made.deep_copy()
    copy.compute_bitmask()
    return copy


def _fault(matcher: Any) -> str:
    """Why it cannot go on, without the compiler's inner state; empty if it can."""
    if not matcher.is_error():
        return ""
    said = str(matcher.get_error()).partition("\n<state>")[0]
    return {"NoExtensionBias": "nothing can match it", "NoExtension": "nothing can match it"}.get(said, said)


class Matcher:
    """Where one answer is in its grammar. A mask has `words` words of 32 tokens."""

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher, self._words = matcher, words
        self._mask: Future[Array] | None = None

    def prepare(self, pool: Executor) -> None:
        """Compute the next mask in another thread."""
        self._mask = pool.submit(self._compute)

    def mask(self) -> Array:
        """Bits of the tokens that may come next, int32; none where the grammar is at a fault."""
        if self._mask is None:
            return self._compute()
        return self._mask.result()

    def _compute(self) -> Array:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: self._words]
        return np.zeros_like(mask) if self._matcher.is_error() else mask

    def accept(self, token: int) -> None:
        """The answer goes on with this token, which the mask allowed."""
        self._mask = None
        self._matcher.consume_token(token)

    def allowed(self, draft: list[int]) -> list[int]:
        """The beginning of a draft that the grammar allows."""
        if self._mask is not None:
            self._mask.result()  # one thread at a time
        return draft[: self._matcher.validate_tokens(draft)] if draft else draft

    @property
    def ended(self) -> bool:
        """Whether the answer is whole and nothing may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def fault(self) -> str:
        """Why the grammar cannot go on; empty if it can."""
        return _fault(self._matcher)
