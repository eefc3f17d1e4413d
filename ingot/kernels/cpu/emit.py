"""Texts of kernels and segments → one linked image, compiled on all cores when there is enough to compile."""

from __future__ import annotations

from concurrent.futures import Future
from types import TracebackType
from typing import Self

from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.link import link
from ingot.kernels.cpu.support import support_text
from ingot.kernels.cpu.workers import WorkerPool
from ingot.report import BuildLog
from ingot.runtime.cpu import usable_threads


class Compilation:
    """Objects of one image, compiled in children while further texts are being generated. A context manager."""

    def __init__(self, isa: Isa, log: BuildLog) -> None:
        self.isa, self._log = isa, log
        self._pool = WorkerPool(usable_threads())
        self._objects: dict[str, Future[bytes]] = {}

    def add(self, name: str, text: str) -> None:
        """Compile a module under a name, unless that name is known."""
        if name not in self._objects:
            self._objects[name] = self._pool.submit("ingot.kernels.cpu.compile:compile_object", text, self.isa)

    def image(self) -> tuple[bytes, dict[str, int]]:
        """The code section, linked in order of names, and the entry points a runtime needs."""
        self.add("ingot", support_text(self.isa.attributes))
        objects = []
        for name in sorted(self._objects):
            objects.append(self._objects[name].result())
            self._log.advance("compile", len(objects) / len(self._objects))
        image, exported = link(objects)
        return image, {n: a for n, a in exported.items() if n.startswith(("ingot_", "segment"))}

    def __enter__(self) -> Self:
        self._pool.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.__exit__(kind, error, trace)
