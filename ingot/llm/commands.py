"""`ingot llm <command>`: language models."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# command -> (module with add_arguments and run, summary, example)
COMMANDS = {
    "build": ("ingot.llm.commands_build", "make an engine of a checkpoint", "ingot llm build FOLDER -o model.engine"),
    "generate": ("ingot.llm.commands_generate", "continue a text", 'ingot llm generate model.engine "Once"'),
    "serve": ("ingot.llm.commands_serve", "answer OpenAI's clients", "ingot llm serve model.engine --port 8000"),
}


def main(words: Sequence[str]) -> int:
    """Run one command; options may stand between its arguments."""
    if not words or words[0] not in COMMANDS:
        return _overview(words)
    name, summary, example = COMMANDS[words[0]]
    module = importlib.import_module(name)
    parser = argparse.ArgumentParser(
        f"ingot llm {words[0]}", description=summary, epilog=f"example: {example}", allow_abbrev=False
    )
    module.add_arguments(parser)
    return int(module.run(parser.parse_intermixed_args(words[1:])))


def _overview(words: Sequence[str]) -> int:
    """The commands; 2 unless that was asked for."""
    known = not words or words[0] in ("-h", "--help", "help")
    stream = sys.stdout if known else sys.stderr
    if not known:
        print(f"ingot llm: there is no command {words[0]!r}", file=stream)
    print("usage: ingot llm <command> …   (ingot llm <command> --help tells more)\n", file=stream)
    for name, (_, summary, example) in COMMANDS.items():
        print(f"  {name:10} {summary}\n  {'':10}   example: {example}", file=stream)
    return 0 if known else 2
