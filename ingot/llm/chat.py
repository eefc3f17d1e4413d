"""Chat templates: jinja2 in its sandbox, with bounds on what a template may do."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ingot.errors import EngineError
from ingot.llm.request import Refused

MOST_LINES, MOST_CHARACTERS = 2_000_000, 16_000_000
_OF_TEMPLATES = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)  # raised within


class _Endless(Exception):
    """A template did more than a template needs."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens that it may name."""

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_config(cls, written: Any, config: Mapping[str, Any]) -> ChatTemplate:
        """From tokenizer_config.json: one template, or a list of named ones of which `default` is taken."""
        if isinstance(written, list):
            named = {each.get("name"): each.get("template") for each in written if isinstance(each, Mapping)}
            written = named.get("default", next(iter(named.values()), None))
        if not isinstance(written, str):
            raise EngineError("tokenizer_config.json: chat_template is neither a text nor a list of {name, template}")
        tokens = {
            name: value.get("content", "") if isinstance(value, dict) else value
            for name, value in config.items()
            if name.endswith("_token") and isinstance(value, str | dict)
        }
        return cls(written, tokens)

    @classmethod
    def from_file(cls, path: Path, tokens: Mapping[str, str]) -> ChatTemplate:
        """From a file that somebody named: EngineError at once where it is no template."""
        try:
            made = cls(path.read_text(encoding="utf-8"), tokens)
        except UnicodeDecodeError as error:
            raise EngineError(f"{path} is no UTF-8: {error}") from error
        made.compiled()
        return made

    def compiled(self) -> Any:
        """What jinja2 makes of it; EngineError with the line where it is no template."""
        import jinja2

        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise EngineError(f"the chat template is no jinja2: line {error.lineno}: {error.message}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True, **more: Any,
    ) -> str:  # fmt: skip
        """The conversation as text; Refused where the template refuses it."""
        import jinja2

        values = {**self.tokens, **more, "tools": tools, "documents": None}
        template = self.compiled()
        try:
            return _bounded(template, {"messages": messages, "add_generation_prompt": add_generation_prompt, **values})
        except (jinja2.TemplateError, _Endless, *_OF_TEMPLATES) as error:
            raise Refused(f"the chat template refuses these messages: {error}") from error


def _environment() -> Any:
    """As transformers' one: what templates in the wild expect."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: time.strftime(form)
    environment.filters["tojson"] = _as_json
    return environment


def _refuse(message: Any) -> None:
    import jinja2

    raise jinja2.TemplateError(str(message))


def _as_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _bounded(template: Any, values: Mapping[str, Any]) -> str:
    """The rendered text; _Endless once it runs too many lines or writes too much. Only this thread is traced."""
    lines = 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        if lines > MOST_LINES:
            raise _Endless(f"it did not end within {MOST_LINES} lines")
        return count

    pieces, size, before = [], 0, sys.gettrace()
    sys.settrace(count)
    try:
        for piece in template.generate(**values):
            pieces.append(piece)
            size += len(piece)
            if size > MOST_CHARACTERS:
                raise _Endless(f"it writes more than {MOST_CHARACTERS} characters")
    finally:
        sys.settrace(before)
    return "".join(pieces)
