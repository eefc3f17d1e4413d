"""A JSON object of a request, field by field: a wrong type is refused by its name, what is null counts as missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ingot.llm.request import Refused


class WrongField(Refused):
    """A field that is not what it should be; `param` names it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class UnknownModel(WrongField):
    """A model that is not served here."""


@dataclass(frozen=True)
class Fields:
    """Typed access to an object; `place` is where it lies in the request, for messages."""

    document: Mapping[str, Any]
    place: str = ""

    @classmethod
    def of(cls, document: Any, place: str = "") -> Fields:
        """WrongField unless it is an object."""
        if not isinstance(document, dict):
            raise WrongField(place, f"{place or 'the request'} must be a JSON object")
        return cls(document, place)

    def _name(self, name: str) -> str:
        return f"{self.place}.{name}" if self.place and name else name or self.place

    def wrong(self, name: str, wanted: str) -> WrongField:
        """What to raise where a field is not what is wanted."""
        return WrongField(self._name(name), f"'{self._name(name)}' must be {wanted}")

    def has(self, name: str) -> bool:
        """Whether it is there and not null."""
        return self.document.get(name) is not None

    def any(self, name: str) -> Any:
        """As it is; None where it is missing."""
        return self.document.get(name)

    def integer(self, name: str, default: int | None = None) -> int | None:
        """A whole number."""
        value = self.document.get(name)
        if value is None:
            return default
        if type(value) is not int:
            raise self.wrong(name, "an integer")
        return value

    def number(self, name: str, default: float) -> float:
        """Any number."""
        value = self.document.get(name)
        if value is None:
            return default
        if type(value) not in (int, float):
            raise self.wrong(name, "a number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.document.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: str = "") -> str:
        """A string."""
        value = self.document.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A string, or several."""
        value = self.document.get(name)
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, "a string or an array of strings")
        return tuple(value)

    def integers(self, name: str) -> tuple[int, ...]:
        """An array of whole numbers."""
        value = self.document.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.wrong(name, "an array of integers")
        return tuple(value)

    def object(self, name: str) -> Fields | None:
        """An object within."""
        value = self.document.get(name)
        return None if value is None else Fields.of(value, self._name(name))

    def objects(self, name: str) -> Sequence[Fields]:
        """An array of objects."""
        value = self.document.get(name)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self.wrong(name, "an array")
        return [Fields.of(item, f"{self._name(name)}[{place}]") for place, item in enumerate(value)]
