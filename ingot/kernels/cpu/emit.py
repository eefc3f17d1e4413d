"""Texts of kernels and segments → one linked image, compiled on all cores when there is enough to compile."""

from __future__ import annotations

from collections.abc import Mapping

from ingot.kernels.cpu.compile import compile_object
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.link import link
from ingot.kernels.cpu.support import support_text
from ingot.kernels.cpu.workers import WorkerDied, WorkerPool
from ingot.report import BuildLog
from ingot.runtime.cpu import usable_threads

_WORTH_A_PROCESS = 1_000_000  # characters of IR


def compile_image(texts: Mapping[str, str], isa: Isa, log: BuildLog) -> tuple[bytes, dict[str, int]]:
    """The code section and the entry points a runtime needs."""
    jobs = [*(texts[name] for name in sorted(texts)), support_text(isa.attributes)]
    image, exported = link(compile_objects(jobs, isa, log))
    return image, {n: a for n, a in exported.items() if n.startswith(("ingot_", "segment"))}


def compile_objects(texts: list[str], isa: Isa, log: BuildLog) -> list[bytes]:
    """One object per text, in order."""
    objects: list[bytes] = []
    if sum(map(len, texts)) < _WORTH_A_PROCESS or usable_threads() == 1:
        for text in texts:
            objects.append(compile_object(text, isa))
            log.advance("compile", len(objects) / len(texts))
        return objects
    with WorkerPool(usable_threads()) as pool:
        for result in pool.map("ingot.kernels.cpu.compile:compile_object", [(text, isa) for text in texts]):
            if isinstance(result, WorkerDied):
                raise result
            objects.append(result)
            log.advance("compile", len(objects) / len(texts))
    return objects
