"""`ingot debug …`: reduce a failing model; find the layers that break accuracy."""

from __future__ import annotations

import argparse
import importlib

_KINDS = {
    "precision": ("ingot.tools.debug_precision", "the layers that break accuracy in a narrow precision"),
    "reduce": ("ingot.tools.debug_reduce", "the smallest part of a model that still fails"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A parser for each kind."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="|".join(_KINDS))
    for name, (module, summary) in _KINDS.items():
        importlib.import_module(module).add_arguments(kinds.add_parser(name, help=summary, description=summary))


def run(arguments: argparse.Namespace) -> int:
    """Hand over to the kind that was asked for."""
    return int(importlib.import_module(_KINDS[arguments.kind][0]).run(arguments))
