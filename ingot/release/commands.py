"""`ingot release <verb>`: see VERBS. Every verb of people goes to a server (--server) or straight to the
store (--store)."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingot.release import show
from ingot.release.access import Access, reached
from ingot.release.spec import ReleaseError, read, schema_text

STORE = "sqlite:///ingot-release.db"
Arguments = argparse.Namespace


@dataclass(frozen=True)
class Verb:
    """One verb: what it does, its arguments, its function."""

    summary: str
    run: Callable[[Arguments], int]
    arguments: Callable[[argparse.ArgumentParser], Any] = lambda parser: None
    reaches: bool = True


def main(words: Sequence[str]) -> int:
    """Run a verb; wrong usage exits 2."""
    parser = argparse.ArgumentParser(
        "ingot release", description="roll versions out, and back", allow_abbrev=False,
        epilog="example: ingot release apply rollout.yaml   (docs/release.md)",
    )  # fmt: skip
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        one = verbs.add_parser(name, help=verb.summary, description=verb.summary, allow_abbrev=False)
        verb.arguments(one)
        if verb.reaches:
            _reaching(one)
    arguments = parser.parse_args(list(words))
    return VERBS[arguments.verb].run(arguments)


def _reaching(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--server", metavar="URL", help="a release server's API")
    parser.add_argument("--key-file", type=Path, help="holds the API key for --server")
    parser.add_argument("--store", default=STORE, metavar="URL", help=f"sqlite:///… or postgresql://… ({STORE})")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _access(arguments: Arguments) -> Access:
    return reached(arguments.server, arguments.store, arguments.key_file)


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")


def _file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path)


# -- reading ----------------------------------------------------------------------------------------------------------
def _list(arguments: Arguments) -> int:
    found = _access(arguments).rollouts()
    print(json.dumps(found) if arguments.json else show.listed(found))
    return 0


def _get(arguments: Arguments) -> int:
    """-w: again whenever something changed, until the rollout has ended."""
    access, last = _access(arguments), None
    while True:
        found = access.get(arguments.model)
        text = show.rollout(found)
        if found["sequence"] != last or arguments.json:
            print(json.dumps(found) if arguments.json else text, flush=True)
        last = found["sequence"]
        if not arguments.watch or found["phase"] in ("Healthy", "Degraded"):
            return 0
        time.sleep(0.5)


def _status(arguments: Arguments) -> int:
    """0 Healthy, 1 Degraded, 3 still going on."""
    access, end = _access(arguments), time.monotonic() + arguments.timeout
    while True:
        found = access.get(arguments.model)
        if found["phase"] in ("Healthy", "Degraded") or time.monotonic() >= end:
            break
        time.sleep(0.2)
    print(json.dumps(found) if arguments.json else show.status(found))
    return {"Healthy": 0, "Degraded": 1}.get(found["phase"], 3)


def _history(arguments: Arguments) -> int:
    access = _access(arguments)
    found = access.history(arguments.model)
    print(json.dumps(found) if arguments.json else show.history(found, arguments.figures))
    fault = access.verify(arguments.model) if arguments.verify else None
    if arguments.verify:
        print(fault or "every entry follows from those before it", file=sys.stderr)
    return 1 if fault else 0


def _lint(arguments: Arguments) -> int:
    spec = read(arguments.file)
    print(f"{arguments.file}: a rollout of {spec.model}: {spec.stable} -> {', '.join(spec.candidates)}, "
          f"{len(spec.steps)} steps")  # fmt: skip
    return 0


def _schema(arguments: Arguments) -> int:
    print(schema_text(), end="")
    return 0


# -- commands ---------------------------------------------------------------------------------------------------------
def _apply(arguments: Arguments) -> int:
    text = arguments.file.read_text()
    found = _access(arguments).apply(text, str(arguments.file))
    print(json.dumps(found) if arguments.json else show.listed([found]))
    return 0


def _commanded(arguments: Arguments, settings: dict[str, Any]) -> int:
    found = _access(arguments).command(arguments.model, arguments.verb, settings)
    print(json.dumps(found) if arguments.json else show.listed([found]))
    return 0


def _plain_command(arguments: Arguments) -> int:
    return _commanded(arguments, {})


def _promote(arguments: Arguments) -> int:
    return _commanded(arguments, {"full": arguments.full, "version": arguments.version})


def _set_weight(arguments: Arguments) -> int:
    access = _access(arguments)
    weights: dict[str, float] = {}
    for word in arguments.weight:
        version, found, text = word.rpartition("=")
        name = version if found else access.get(arguments.model)["candidates"][0]
        try:
            weights[name] = float(text)
        except ValueError as error:
            raise ReleaseError(f"{word!r} is no weight: write 20 or v2=20, in percent") from error
    return _commanded(arguments, {"weights": weights})


def _keys(arguments: Arguments) -> int:
    from ingot.release.store import Store

    store = Store(arguments.store)
    store.migrate()
    if arguments.action == "add":
        key = secrets.token_urlsafe(32)
        store.add_key(key, arguments.name, arguments.role)
        print(key)  # the only time it is seen
        return 0
    if not store.remove_key(arguments.name):
        raise ReleaseError(f"there is no key {arguments.name!r}")
    return 0


# -- processes --------------------------------------------------------------------------------------------------------
def _serve(arguments: Arguments) -> int:
    from ingot.release import app

    return app.serve(arguments)


def _gateway(arguments: Arguments) -> int:
    from ingot.release import app

    return app.gateway(arguments)


def _publish(arguments: Arguments) -> int:
    from ingot.release import publish

    return publish.run(arguments)


def _publish_arguments(parser: argparse.ArgumentParser) -> None:
    from ingot.release import publish

    publish.add_arguments(parser)


def _get_arguments(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("-w", "--watch", action="store_true", help="go on until the rollout has ended")


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--timeout", type=float, default=0.0, metavar="SECONDS", help="wait so long for the end")


def _history_arguments(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--figures", action="store_true", help="with the evidence of each verdict")
    parser.add_argument("--verify", action="store_true", help="replay it and check every digest")


def _promote_arguments(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--full", action="store_true", help="pass over what is left of the steps")
    parser.add_argument("--version", help="which, if there are several candidates")


def _weight_arguments(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("weight", nargs="+", help="percent, or VERSION=PERCENT")


def _keys_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["add", "remove"])
    parser.add_argument("name")
    parser.add_argument("--role", choices=["viewer", "operator"], default="viewer")
    parser.add_argument("--store", default=STORE)


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", default=STORE)
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8010)
    parser.add_argument("--no-controller", action="store_true", help="API and console alone")


def _gateway_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", default=STORE)
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--metrics-port", type=int, default=8081)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--remember", type=Path, help="keeps the last routes, for a start without the store")


VERBS = {
    "apply": Verb("begin the rollout a file describes", _apply, _file),
    "list": Verb("every model's rollout in a line", _list),
    "get": Verb("one rollout: steps, weights, figures, verdicts", _get, _get_arguments),
    "status": Verb("the phase; exit code 0 Healthy, 1 Degraded, 3 under way", _status, _status_arguments),
    "promote": Verb("on to the next step, or --full to the end", _promote, _promote_arguments),
    "pause": Verb("hold; guards and analyses go on", _plain_command, _model),
    "resume": Verb("go on", _plain_command, _model),
    "abort": Verb("all traffic back to stable", _plain_command, _model),
    "retry": Verb("an aborted rollout again from its first step", _plain_command, _model),
    "undo": Verb("back to the version that was stable before", _plain_command, _model),
    "set-weight": Verb("weights by hand; the rollout is held", _set_weight, _weight_arguments),
    "history": Verb("who, when, what, why, with the figures", _history, _history_arguments),
    "lint": Verb("check a rollout.yaml", _lint, _file, reaches=False),
    "schema": Verb("the JSON schema of rollout.yaml", _schema, reaches=False),
    "keys": Verb("API keys with a role", _keys, _keys_arguments, reaches=False),
    "serve": Verb("the API, the console and the controller", _serve, _serve_arguments, reaches=False),
    "gateway": Verb("the gateway that users talk to", _gateway, _gateway_arguments, reaches=False),
    "publish": Verb("build, verify, gate, benchmark, register, start", _publish, _publish_arguments),
}
