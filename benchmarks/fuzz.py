"""Mutated files against the importer and the engine loader.

    python -m benchmarks.fuzz [--count 10000] [--seed 0] [--only importer|loader]

Loader: each mutant of an engine must be refused with one EngineError. A second series damages the header and then makes
its digest right again, as an attacker would: those may load, but only an EngineError may stop them.
Importer: benchmarks.fuzz_importer says what it checks. Exits 1 if anything is accepted, or fails otherwise.
"""

import argparse
import hashlib
import json
import multiprocessing
import random
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ingot
from benchmarks import fuzz_importer
from ingot.engine import MAGIC
from ingot.errors import EngineError

ROOT = Path(__file__).parent.parent
PREFIX = struct.Struct("<8sIIQ32s")  # magic, format, reserved, header length, header digest
Mutation = Callable[[random.Random, bytearray], None]


@dataclass(frozen=True)
class Tally:
    """What became of the mutants: how many were refused, how many loaded, and every failure of another kind."""

    refused: int
    accepted: int
    failures: tuple[str, ...]


def flip_bit(source: random.Random, data: bytearray) -> None:
    data[source.randrange(len(data))] ^= 1 << source.randrange(8)


def set_bytes(source: random.Random, data: bytearray) -> None:
    start = source.randrange(len(data))
    data[start : start + 8] = source.choice((b"\0" * 8, b"\xff" * 8, source.randbytes(8)))[: len(data) - start]


def truncate(source: random.Random, data: bytearray) -> None:
    del data[source.randrange(len(data)) :]


def extend(source: random.Random, data: bytearray) -> None:
    data += source.randbytes(source.randrange(1, 5000))


def delete(source: random.Random, data: bytearray) -> None:
    start = source.randrange(len(data))
    del data[start : start + source.randrange(1, 5000)]


def insert(source: random.Random, data: bytearray) -> None:
    start = source.randrange(len(data))
    data[start:start] = source.randbytes(source.randrange(1, 5000))


def copy_block(source: random.Random, data: bytearray) -> None:
    size = source.choice((16, 512, 4096))
    start, target = source.randrange(len(data)), source.randrange(len(data))
    block = data[start : start + size]
    data[target : target + len(block)] = block


def damage_prefix(source: random.Random, data: bytearray) -> None:
    data[source.randrange(PREFIX.size)] = source.randrange(256)


MUTATIONS: tuple[Mutation, ...] = (flip_bit, set_bytes, truncate, extend, delete, insert, copy_block, damage_prefix)
NUMBERS: tuple[Any, ...] = (0, 1, -1, 7, 2**31, 2**63, -(2**63), 10**30, 0.5, None, "", [], {})


def header_value(source: random.Random, header: object) -> None:
    """One value somewhere below `header` becomes another, or disappears."""
    node = header
    while isinstance(node, dict | list) and node:
        key = source.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or source.random() < 0.1:
            if source.random() < 0.2:
                del node[key]
            else:
                node[key] = source.choice(NUMBERS)
            return
        node = node[key]


def resealed(source: random.Random, data: bytes) -> bytes:
    """The engine with a damaged header whose length and digest are right."""
    _, version, reserved, length, _ = PREFIX.unpack_from(data)
    header = json.loads(data[PREFIX.size : PREFIX.size + length])
    header_value(source, header)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + PREFIX.size) % 4096)
    prefix = PREFIX.pack(MAGIC, version, reserved, len(text), hashlib.sha256(text).digest())
    return prefix + text + data[PREFIX.size + length :]


def mutated(source: random.Random, data: bytes) -> bytes:
    """A file that differs from `data` after one to three mutations."""
    while True:
        copy = bytearray(data)
        for mutation in source.choices(MUTATIONS, k=source.choice((1, 1, 1, 2, 3))):
            if copy:
                mutation(source, copy)
        if copy != data:
            return bytes(copy)


def attempt(path: Path, data: bytes) -> str:
    """ "refused", "accepted", or what went wrong otherwise."""
    path.unlink(missing_ok=True)  # a new file each time: the loader maps what it opened
    path.write_bytes(data)
    try:
        ingot.Engine.load(path).verified()
    except EngineError:
        return "refused"
    except Exception as error:  # noqa: BLE001  anything else is what is being looked for
        return f"{type(error).__name__}: {error}"
    return "accepted"


def tally(change: Callable[[random.Random, bytes], bytes], data: bytes, count: int, seed: int) -> Tally:
    """`count` mutants of `data`, one after the other."""
    source = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        results = [attempt(Path(folder) / "mutant.engine", change(source, data)) for _ in range(count)]
    failures = tuple(
        f"mutant {index}: {text}" for index, text in enumerate(results) if text not in ("refused", "accepted")
    )
    return Tally(results.count("refused"), results.count("accepted"), failures)


def example_engine() -> bytes:
    """A small engine with code, weights and a plan."""
    profile = ingot.Profile(image=((1, 1, 8, 8), (1, 1, 8, 8), (64, 1, 8, 8)))
    config = ingot.BuildConfig(target="cpu", profiles=[profile], level=0)
    return ingot.build(ROOT / "examples" / "digits" / "digits.onnx", config).to_bytes()


def in_child(change: Callable[[random.Random, bytes], bytes], data: bytes, count: int, seed: int) -> Tally:
    """`tally` in a process of its own, so that a crash is a failure and not the end."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply_async(tally, (change, data, count, seed)).get(timeout=count * 0.2 + 60)


def fuzz_loader(count: int, seed: int) -> bool:
    """Both series against the loader; prints what became of them."""
    data = example_engine()
    plain, sealed = (in_child(change, data, count, seed) for change in (mutated, resealed))
    for failure in (*plain.failures, *sealed.failures)[:20]:
        print(f"  {failure}")
    for series, found in (("loader", plain), ("loader, header resealed", sealed)):
        counts = f"{found.refused:,} refused, {found.accepted:,} accepted, {len(found.failures):,} failed otherwise"
        print(f"{series}: {count:,} mutants, {counts}")
    return plain.refused == count and not sealed.failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("importer", "loader"))
    options = parser.parse_args()
    good = [True]
    if options.only != "importer":
        good.append(fuzz_loader(options.count, options.seed))
    if options.only != "loader":
        good.append(fuzz_importer.fuzz(options.count, options.seed))
    print(f"fuzz: {'passed' if all(good) else 'FAILED'}")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
