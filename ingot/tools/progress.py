"""A progress bar on stderr for builds, when somebody is looking."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def build_progress(quiet: bool = False) -> Iterator[Callable[[str, float], None] | None]:
    """A `progress(stage, share)` function for `ingot.build`: a bar on a terminal, a line a stage elsewhere, None if
    quiet."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        yield from _bar()
    else:
        yield _lines()


def _bar() -> Iterator[Callable[[str, float], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda stage, share: bar.update(task, description=stage, completed=share)


def _lines() -> Callable[[str, float], None]:
    seen: set[str] = set()

    def tell(stage: str, share: float) -> None:
        if stage not in seen:
            seen.add(stage)
            print(f"[ingot] {stage} …", file=sys.stderr, flush=True)

    return tell
