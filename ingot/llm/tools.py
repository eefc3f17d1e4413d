"""Tool calls: what a model may call, and what it called, in the forms that models are taught to write it in."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ingot.llm.fields import Fields
from ingot.llm.request import Guide

# what begins a call: Hermes and Qwen, Mistral, Llama 3 (a call is the whole answer)
_TAGGED = re.compile(r"<tool_call>\s*(\{.*?\})\s*(?:</tool_call>|$)", re.DOTALL)
_LISTED = re.compile(r"\[TOOL_CALLS\]\s*(\[.*\])\s*$", re.DOTALL)
_BEGINNINGS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")


@dataclass(frozen=True)
class Call:
    """One call; arguments are JSON text."""

    name: str
    arguments: str
    identity: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def as_json(self, index: int | None = None) -> dict[str, Any]:
        """As a message, or with its index as a piece of one, carries it."""
        body = {"id": self.identity, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return body if index is None else {"index": index, **body}


@dataclass(frozen=True)
class Tools:
    """The functions of a request by name, with the schemas of their arguments; `forced`: an answer must be a call."""

    functions: Mapping[str, Any]
    listed: Sequence[Any]
    forced: bool = False

    @classmethod
    def of(cls, fields: Fields) -> Tools | None:
        """From `tools` and `tool_choice`; None where nothing may be called."""
        functions = {}
        for tool in fields.objects("tools"):
            function = tool.object("function")
            if tool.text("type") != "function" or function is None or not function.text("name"):
                raise tool.wrong("function", "a function with a name (type 'function')")
            functions[function.text("name")] = function.any("parameters") or {"type": "object"}
        choice = fields.any("tool_choice")
        if choice not in (None, "none", "auto", "required") and not isinstance(choice, dict):
            raise fields.wrong("tool_choice", "'none', 'auto', 'required' or a function")
        if choice == "none" or not functions:
            if choice not in (None, "none", "auto"):
                raise fields.wrong("tools", "given where 'tool_choice' asks for a call")
            return None
        if isinstance(choice, dict):
            name = Fields.of(choice.get("function"), "tool_choice.function").text("name")
            if name not in functions:
                raise fields.wrong("tool_choice", f"one of {', '.join(functions)}")
            functions = {name: functions[name]}
        listed = fields.any("tools")
        return cls(functions, listed, choice is not None and choice != "auto")

    @property
    def guide(self) -> Guide | None:
        """What an answer must match, where it must be a call."""
        if not self.forced:
            return None
        calls = [
            {
                "type": "object", "required": ["name", "arguments"], "additionalProperties": False,
                "properties": {"name": {"const": name}, "arguments": schema},
            }
            for name, schema in self.functions.items()
        ]  # fmt: skip
        return Guide("json_schema", json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls}))

    def calls(self, text: str) -> tuple[str, list[Call]]:
        """(content, calls) of a whole answer; what is no call of a known function stays content."""
        stripped = text.strip().removeprefix("<|python_tag|>").strip()
        if (match := _LISTED.search(stripped)) is not None:
            found = self._listed(match[1])
            return (text[: text.index("[TOOL_CALLS]")].strip(), found) if found else (text, [])
        tagged = [call for match in _TAGGED.finditer(stripped) if (call := self._call(_parsed(match[1])))]
        if tagged:
            return _TAGGED.sub("", stripped).strip(), tagged
        call = self._call(_parsed(stripped)) if stripped.startswith("{") else None
        return ("", [call]) if call is not None else (text, [])

    def _listed(self, text: str) -> list[Call]:
        items = _parsed(text)
        return [call for item in items if (call := self._call(item))] if isinstance(items, list) else []

    def _call(self, item: Any) -> Call | None:
        if not isinstance(item, dict) or item.get("name") not in self.functions:
            return None
        arguments = item.get("arguments", item.get("parameters", {}))
        return Call(item["name"], arguments if isinstance(arguments, str) else json.dumps(arguments))

    def held(self, text: str) -> int:
        """From where on a growing text may be a call, and is not to be given out as content."""
        if self.forced or text.lstrip()[:1] == "{":
            return 0
        places = [place for beginning in _BEGINNINGS if (place := text.find(beginning)) >= 0]
        ends = [len(text) - size for one in _BEGINNINGS for size in range(1, len(one)) if text.endswith(one[:size])]
        return min([*places, *ends], default=len(text))


def _parsed(text: str) -> Any:
    """JSON, or None: a model's text is none of a client's faults."""
    try:
        return json.loads(text)
    except ValueError:
        return None
