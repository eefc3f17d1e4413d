"""How the command line reaches rollouts: through a server's API with a key, or a store on its own."""

from __future__ import annotations

import getpass
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ingot.release import api, events, view
from ingot.release.client import CallFailed, call
from ingot.release.spec import ReleaseError, parse
from ingot.release.store import Store


class Access(Protocol):
    """What both ways offer; answers are the API's."""

    def rollouts(self) -> list[dict[str, Any]]:
        """Every rollout's summary."""

    def get(self, model: str) -> dict[str, Any]:
        """Everything about one."""

    def history(self, model: str) -> list[dict[str, Any]]:
        """Its log."""

    def verify(self, model: str) -> str | None:
        """What is wrong with its log."""

    def apply(self, text: str, place: str) -> dict[str, Any]:
        """Begin a rollout."""

    def command(self, model: str, verb: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """One of the verbs."""


@dataclass(frozen=True)
class Direct:
    """The store itself, for who may read and write its file or database."""

    store: Store

    def rollouts(self) -> list[dict[str, Any]]:
        """Every rollout's summary."""
        return [view.summary(self._loaded(model)[0]) for model in self.store.models()]

    def _loaded(self, model: str) -> Any:
        state, sequence = self.store.load(model)
        if state is None:
            raise ReleaseError(f"there is no rollout of {model!r}: ingot release apply rollout.yaml")
        return state, sequence

    def get(self, model: str) -> dict[str, Any]:
        """Everything about one."""
        state, sequence = self._loaded(model)
        observations, _ = self.store.observations(model, most=400)
        return view.full(state, sequence, observations, max([time.time(), *(o.time for o in observations[-1:])]))

    def history(self, model: str) -> list[dict[str, Any]]:
        """Its log."""
        self._loaded(model)
        return [view.entry(one) for one in self.store.history(model, most=100_000)]

    def verify(self, model: str) -> str | None:
        """What is wrong with its log."""
        return self.store.verify(model)

    def apply(self, text: str, place: str) -> dict[str, Any]:
        """Begin a rollout."""
        spec = parse(text, place)
        return view.summary(self.store.submit(spec.model, events.Applied(spec), getpass.getuser()))

    def command(self, model: str, verb: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """One of the verbs."""
        self._loaded(model)
        return view.summary(self.store.submit(model, api.command(verb, settings), getpass.getuser()))


@dataclass(frozen=True)
class Remote:
    """A server's API."""

    url: str
    key: str = ""

    def _ask(self, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> Any:
        headers = {"content-type": kind}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        try:
            status, text = call(method, self.url.rstrip("/") + path, body, headers, timeout=15.0)
        except CallFailed as error:
            raise ReleaseError(f"the release server does not answer: {error}") from error
        try:
            answer = json.loads(text)
        except ValueError as error:
            raise ReleaseError(f"{self.url} is no release server: it answers {status}") from error
        if status != 200:
            raise ReleaseError(answer.get("error", f"{self.url} answers {status}"))
        return answer

    def rollouts(self) -> list[dict[str, Any]]:
        """Every rollout's summary."""
        return list(self._ask("GET", "/api/rollouts")["rollouts"])

    def get(self, model: str) -> dict[str, Any]:
        """Everything about one."""
        return dict(self._ask("GET", f"/api/rollouts/{model}"))

    def history(self, model: str) -> list[dict[str, Any]]:
        """Its log."""
        found: list[dict[str, Any]] = []
        while more := self._ask("GET", f"/api/rollouts/{model}/history?after={len(found)}")["history"]:
            found += more
        return found

    def verify(self, model: str) -> str | None:
        """What is wrong with its log."""
        fault = self._ask("GET", f"/api/rollouts/{model}/verify")["fault"]
        return None if fault is None else str(fault)

    def apply(self, text: str, place: str) -> dict[str, Any]:
        """Begin a rollout; mistakes in the file are told before it is sent."""
        parse(text, place)
        return dict(self._ask("POST", "/api/rollouts", text.encode(), "application/yaml"))

    def command(self, model: str, verb: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """One of the verbs."""
        return dict(self._ask("POST", f"/api/rollouts/{model}/{verb}", json.dumps(settings).encode()))


def reached(server: str | None, store: str, key_file: Path | None) -> Access:
    """By flags: a server if one is named, else the store."""
    if server is not None:
        return Remote(server, key_file.read_text().strip() if key_file is not None else "")
    opened = Store(store)
    opened.migrate()
    return Direct(opened)
