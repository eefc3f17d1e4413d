"""The server's log: lines for people, or a JSON object a line; what a record carries in `facts` becomes fields."""

from __future__ import annotations

import datetime
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

FORMATS = ("default", "ISO8601", "json")
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the record's facts, and an exception's traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as text."""
        content: dict[str, Any] = {
            "time": _time(record), "level": record.levelname, "logger": record.name, "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }  # fmt: skip
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(content, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


class TextFormatter(logging.Formatter):
    """A line for people; facts follow the message as name=value. `iso`: times in ISO 8601."""

    def __init__(self, iso: bool) -> None:
        super().__init__(_TEXT)
        self._iso = iso

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """The time of a record."""
        return _time(record) if self._iso else super().formatTime(record, datefmt)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, without an exception."""
        facts: Mapping[str, Any] = getattr(record, "facts", {})
        return " ".join([super().formatMessage(record), *(f"{name}={value}" for name, value in facts.items())])


def _time(record: logging.LogRecord) -> str:
    return datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")


_chosen = ["default", "0"]


def configure(form: str, verbose: bool, file: Path | None = None) -> None:
    """Log in this form (default, ISO8601 or json) from now on, to a file or to standard error."""
    _chosen[:] = [form, str(int(verbose))]
    handler = logging.StreamHandler(sys.stderr) if file is None else logging.FileHandler(file)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter(form == "ISO8601"))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)


def change_form(form: str) -> None:
    """Write what follows in another form."""
    _chosen[0] = form
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, JsonFormatter | TextFormatter):
            handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter(form == "ISO8601"))


def chosen() -> list[str]:
    """What `configure` was told, as words for a process that is to log alike."""
    return list(_chosen)
