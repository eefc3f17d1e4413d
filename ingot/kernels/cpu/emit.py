"""Texts of kernels and segments → one linked image, compiled on all cores when there is enough to compile."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor

from ingot.kernels.cpu.compile import compile_object
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.link import link
from ingot.kernels.cpu.support import support_text
from ingot.report import BuildLog
from ingot.runtime.cpu import usable_threads

_WORTH_A_PROCESS = 400_000  # characters of IR


def compile_image(texts: Mapping[str, str], isa: Isa, log: BuildLog) -> tuple[bytes, dict[str, int]]:
    """The code section and the entry points a runtime needs."""
    jobs = [*(texts[name] for name in sorted(texts)), support_text(isa.attributes)]
    objects = compile_objects(jobs, isa, log)
    image, exported = link(objects)
    return image, {n: a for n, a in exported.items() if n.startswith(("ingot_", "segment"))}


def compile_objects(texts: list[str], isa: Isa, log: BuildLog) -> list[bytes]:
    """One object per text, in order."""
    if sum(map(len, texts)) < _WORTH_A_PROCESS or usable_threads() == 1:
        return [compile_object(text, isa) for text in texts]
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(usable_threads(), mp_context=context) as pool:
        jobs = [pool.submit(compile_object, text, isa) for text in texts]
        objects = []
        for done, job in enumerate(jobs):
            objects.append(job.result())
            log.advance("compile", (done + 1) / len(jobs))
        return objects
