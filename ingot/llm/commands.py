"""`ingot llm <command>`: language models."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

# command -> (module with add_arguments and run, summary, example)
COMMANDS = {
    "build": ("ingot.llm.commands_build", "make an engine of a checkpoint", "ingot llm build FOLDER -o model.engine"),
    "generate": ("ingot.llm.commands_generate", "continue a text", 'ingot llm generate model.engine "Once"'),
    "serve": ("ingot.llm.commands_serve", "answer OpenAI's clients", "ingot llm serve model.engine --port 8000"),
}


def main(words: Sequence[str]) -> int:
    """Run one command."""
    parser = argparse.ArgumentParser("ingot llm", description="language models: build, run, serve",
                                     epilog=f"example: {COMMANDS['build'][2]}")  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary, example) in COMMANDS.items():
        own = commands.add_parser(name, help=summary, description=summary, epilog=f"example: {example}")
        if words and words[0] == name:
            importlib.import_module(module).add_arguments(own)
    chosen = parser.parse_args(words)
    return int(importlib.import_module(COMMANDS[chosen.command][0]).run(chosen))
