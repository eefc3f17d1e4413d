"""Webhooks: every entry of the log is told at least once, in order; one that fails holds up only itself."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ingot.release import events
from ingot.release.client import CallFailed, call
from ingot.release.rollout import State, phase
from ingot.release.spec import Webhook, plain
from ingot.release.store import Entry, Store

log = logging.getLogger("ingot.release")
Post = Callable[[str, bytes, dict[str, str]], int]


def post(url: str, body: bytes, headers: dict[str, str]) -> int:
    """The status of a POST."""
    return call("POST", url, body, headers, timeout=5.0)[0]


def deliver(store: Store, model: str, state: State, send: Post = post) -> None:
    """Tell every webhook of a model what it has not been told; the cursor moves after a 2xx."""
    for hook in state.spec.notifications:
        name = f"hook:{model}:{hashlib.sha256(hook.url.encode()).hexdigest()[:16]}"
        for entry in store.history(model, store.cursor(name), most=20):
            if _wanted(hook, entry.event) and not _sent(hook, entry, state, send):
                break
            store.move_cursor(name, entry.sequence)


def _wanted(hook: Webhook, event: events.Event) -> bool:
    return not hook.on or type(event).__name__ in hook.on


def _sent(hook: Webhook, entry: Entry, state: State, send: Post) -> bool:
    body = json.dumps(content(entry, state)).encode()
    headers = {"content-type": "application/json"}
    if hook.secret_file is not None:
        secret = Path(hook.secret_file).read_bytes().strip()
        headers["x-ingot-signature"] = "sha256=" + hmac.new(secret, body, hashlib.sha256).hexdigest()
    try:
        status = send(hook.url, body, headers)
    except CallFailed as error:
        log.warning("webhook %s: %s", hook.url, error)
        return False
    return 200 <= status < 300


def content(entry: Entry, state: State) -> dict[str, Any]:
    """What a webhook is told: the entry, and where the rollout stands by now."""
    return {
        "model": entry.model, "sequence": entry.sequence, "time": entry.time, "actor": entry.actor,
        "event": plain(entry.event), "phase": phase(state), "stable": state.stable, "message": state.message,
    }  # fmt: skip
