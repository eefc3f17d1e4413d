"""`ingot <verb>`: each verb is a module with `add_arguments(parser)` and `run(arguments) -> exit code`."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ingot.tools import failures


@dataclass(frozen=True)
class Verb:
    """One subcommand: where it lives, what it does in a line, an example."""

    module: str
    summary: str
    example: str


VERBS = {
    "build": Verb(
        "ingot.tools.build_engine", "compile a model into a verified engine",
        "ingot build model.onnx -o model.engine",
    ),
    "trtexec": Verb(
        "ingot.tools.trtexec", "build and time with trtexec's flags and report",
        "ingot trtexec --onnx=model.onnx --shapes=x:1x3x224x224",
    ),
    "compare": Verb(
        "ingot.tools.compare", "engine, reference and onnxruntime side by side",
        "ingot compare model.onnx --runners engine,reference",
    ),
    "gate": Verb(
        "ingot.tools.gate", "may a new engine take an old one's place: scores and changed samples",
        "ingot gate old.engine new.engine --data samples.npz --max-drop 0.5%",
    ),
    "debug": Verb(
        "ingot.tools.debug", "reduce a failing model; find the layers that break accuracy",
        "ingot debug reduce model.onnx -o reduced.onnx",
    ),
    "inspect": Verb(
        "ingot.tools.inspect", "what a model or an engine holds, what runs natively",
        "ingot inspect engine model.engine",
    ),
    "report": Verb("ingot.tools.html_report", "one page about an engine", "ingot report model.engine -o report.html"),
    "explain": Verb(
        "ingot.tools.explain", "which fusions fired where, and why others did not",
        "ingot explain model.onnx",
    ),
    "infer": Verb(
        "ingot.server.infer", "ask a server or an engine, once or as a load",
        "ingot infer model.engine --save outputs.npz",
    ),
    "advise": Verb(
        "ingot.server.advise", "measure batch sizes and instances, recommend a configuration",
        "ingot advise model.engine --seconds 0.05",
    ),
    "doctor": Verb("ingot.server.doctor", "what would stop a server here", "ingot doctor models/"),
    "serve": Verb("ingot.server.app", "serve a model repository to Triton's clients", "ingot serve models/"),
    "llm": Verb("ingot.llm.commands", "language models: build, run, serve", "ingot llm build FOLDER -o model.engine"),
    "release": Verb("ingot.release.commands", "roll versions out, and back", "ingot release apply rollout.yaml"),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 on success, 1 for an error of the user's model or files, 2 for wrong usage, 130 on Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb = VERBS.get(words[0]) if words else None
    if verb is None:
        return _overview(words)
    module = importlib.import_module(verb.module)
    if hasattr(module, "main"):  # a verb with a syntax of its own
        return _guarded(lambda: module.main(words[1:]))
    parser = argparse.ArgumentParser(
        f"ingot {words[0]}", description=verb.summary, epilog=f"example: {verb.example}", allow_abbrev=False
    )
    module.add_arguments(parser)
    chosen = parser.parse_args(words[1:])
    return _guarded(lambda: module.run(chosen))


def _guarded(action: Callable[[], Any]) -> int:
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _tell_warning
            return int(action())
    except failures.EXPECTED as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 0
        print(f"ingot: error: {failures.sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ingot: interrupted; no file was left half-written", file=sys.stderr)
        return 130


def _nobody_reads() -> bool:
    """Whether who read our output has had enough (`ingot … | head`); then nothing is to be flushed at exit either."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _tell_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"ingot: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _overview(words: Sequence[str]) -> int:
    known = not words or words[0] in ("-h", "--help", "help")
    stream = sys.stdout if known else sys.stderr
    if words and words[0] in ("-V", "--version"):
        from ingot import __version__

        print(f"ingot {__version__}")
        return 0
    if not known:
        print(f"ingot: there is no verb {words[0]!r}", file=stream)
    print("usage: ingot <verb> …   (ingot <verb> --help tells more)\n", file=stream)
    for name, verb in VERBS.items():
        print(f"  {name:10} {verb.summary}\n  {'':10}   {verb.example}", file=stream)
    return 0 if known else 2


if __name__ == "__main__":
    sys.exit(main())
