"""A language model of 1.1 billion random weights on two threads beside llama.cpp: decoding and a prefill of 512 tokens.

    python -m benchmarks.llm_cpu [--precisions int8 int4] [--rounds 8] [--threads 2]
    python -m benchmarks.llm_cpu --prepare     # only writes what is measured: checkpoint, GGUF files, engines

llama.cpp is the one that llama-cpp-python builds from its source package, in an environment of its own (--peer):

    python -m venv build/llm-peers/venv
    CMAKE_ARGS="-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'" build/llm-peers/venv/bin/pip install \
        --no-binary llama-cpp-python llama-cpp-python gguf

Without the flags GCC 12 leaves out what configures AMX's tiles, and the first product ends the process;
--peer-libraries names a folder of libraries built otherwise. Both runtimes have the same weights: rounded to eight bits
(Q8_0; Ingot int8), or to four with the last product in eight (Q4_0; Ingot int4, which makes keys and values in eight
too). They take turns, and between turns the speed at which memory is read is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import ingot
from benchmarks import llm_cpu_checkpoint as checkpoint
from benchmarks.peaks import reading
from benchmarks.timing import PAUSE, RESULTS, available_threads, write_json
from ingot.kernels.cpu.standalone import native_isa
from ingot.llm.batch import Batch
from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.formats import FORMATS, Format
from ingot.llm.runner import EngineRunner, open_runner

FOLDER = Path("build/llm_cpu")
PEER = Path("build/llm-peers/venv/bin/python")
KINDS = {"int8": "Q8_0", "int4": "Q4_0"}
PROMPT, ANSWER = 512, 24  # tokens of a prefill, and of a decoding that continues it
READ_BYTES = 512 << 20  # of each thread
# What must hold: times llama.cpp's rate, and the share of the bandwidth.
WANTED = {"decode": 1.05, "prefill": 3.0, "bandwidth": 0.75}
Array = np.ndarray[Any, Any]


@dataclass
class Ours:
    """An engine's runner with one sequence."""

    runner: EngineRunner
    tokens: int = 0

    def prefill(self, tokens: Sequence[int]) -> Array:
        self.tokens = 0
        return self._step(tokens)

    def decode(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._step([token])

    def _step(self, tokens: Sequence[int]) -> Array:
        """The last token's logits."""
        places = np.arange(self.tokens, self.tokens + len(tokens), dtype=np.int32)
        self.tokens += len(tokens)
        blocks = np.arange(-(-self.tokens // self.runner.block_size), dtype=np.int32)
        logits = self.runner.step(Batch(
            np.array(tokens, np.int32), places, places, np.array([0, len(tokens)], np.int32),
            np.array([self.tokens], np.int32), blocks[None], np.array([len(tokens) - 1], np.int32),
        ))  # fmt: skip
        return np.asarray(logits[0])


@dataclass
class Peer:
    """llama.cpp in a process of its own; see llm_cpu_peer."""

    process: subprocess.Popen[str]
    about: Mapping[str, Any]

    def ask(self, work: str, tokens: Sequence[int]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({work: list(tokens)}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        return _answer(self.process)


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"llama.cpp ended with status {process.wait()}; see this program's first lines")
    return dict(json.loads(line))


def open_peer(options: argparse.Namespace, kind: str) -> Peer:
    script = Path(__file__).with_name("llm_cpu_peer.py")
    file, threads = str(FOLDER / f"{kind}.gguf"), str(options.threads)
    command = [str(options.peer), str(script), file, threads, *options.peer_options]
    environment = dict(os.environ)
    if options.peer_libraries:
        environment |= dict.fromkeys(("LLAMA_CPP_LIB_PATH", "LD_LIBRARY_PATH"), str(options.peer_libraries.resolve()))
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True, env=environment)  # fmt: skip
    return Peer(process, {**_answer(process), "options": options.peer_options})


def prepare(precisions: Sequence[str], python: Path, level: int) -> None:
    """Checkpoint, GGUF files and engines, where they are not there yet; an engine of other sources is built anew."""
    sources = _sources()
    if not (FOLDER / "model.safetensors").exists():
        checkpoint.write_checkpoint(FOLDER)
    for precision in precisions:
        kind, engine, made = KINDS[precision], FOLDER / f"{precision}.engine", FOLDER / f"{precision}.sources"
        if not (FOLDER / f"{kind}.gguf").exists():
            subprocess.run([str(python), str(Path(checkpoint.__file__)), str(FOLDER), kind], check=True)
        if not engine.exists() or not made.exists() or made.read_text() != sources:
            start = time.perf_counter()
            options = BuildOptions(precision, context=1024, token_budget=PROMPT, sequence_budget=1, level=level)
            build_llm(FOLDER, options).save(engine)
            made.write_text(sources)
            print(f"{engine}: built in {time.perf_counter() - start:.0f} s, {engine.stat().st_size / 1e6:.0f} MB")


def _sources() -> str:
    """Digest of everything that makes an engine."""
    sha = hashlib.sha256()
    for path in sorted(Path(ingot.__file__).parent.rglob("*.py")):
        sha.update(path.read_bytes())
    return sha.hexdigest()


@dataclass
class Measured:
    """Of every round: seconds by runtime and work, and bytes read a microsecond."""

    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    bandwidth: list[float] = field(default_factory=list)

    def add(self, who: str, work: str, seconds: float) -> None:
        self.seconds.setdefault((who, work), []).append(seconds)

    def rate(self, who: str, work: str) -> float:
        """Tokens a second, of the median round."""
        return {"prefill": PROMPT, "decode": ANSWER}[work] / statistics.median(self.seconds[who, work])

    def ratio(self, work: str) -> float:
        """How many times faster Ingot is: the median over the rounds."""
        pairs = zip(self.seconds["ingot", work], self.seconds["llama.cpp", work], strict=True)
        return statistics.median(theirs / mine for mine, theirs in pairs)


def measure(ours: Ours, peer: Peer, rounds: int, threads: int) -> tuple[Measured, float]:
    """What every round took; and how alike the logits of the prompt are (cosine)."""
    random, isa = np.random.default_rng(0), native_isa()
    assert isa is not None, "this processor has none of the instruction sets that Ingot generates code for"
    read, measured = reading(isa, threads, READ_BYTES), Measured()
    prompt, answer = (random.integers(3, 32000, size).tolist() for size in (PROMPT, ANSWER))
    mine, theirs = ours.prefill(prompt), np.array(peer.ask("prefill", prompt)["logits"])
    ours.decode(answer)
    peer.ask("decode", answer)
    for number in range(rounds):
        for work, tokens in (("prefill", prompt), ("decode", answer)):
            for who in ("ingot", "llama.cpp") if number % 2 else ("llama.cpp", "ingot"):
                time.sleep(PAUSE)
                is_ours = who == "ingot"
                seconds = _timed(ours, work, tokens) if is_ours else peer.ask(work, tokens)["seconds"]
                measured.add(who, work, seconds)
            time.sleep(PAUSE)
            measured.bandwidth.append(max(read() for _ in range(2)))
    return measured, float(mine @ theirs / np.linalg.norm(mine) / np.linalg.norm(theirs))


def _timed(ours: Ours, work: str, tokens: Sequence[int]) -> float:
    start = time.perf_counter()
    getattr(ours, work)(tokens)
    return time.perf_counter() - start


def row(precision: str, measured: Measured, alike: float, matrix_bytes: float) -> dict[str, Any]:
    """What the result file says of a precision; bytes: of the matrices that each token multiplies."""
    bandwidth, decode = statistics.median(measured.bandwidth) / 1e3, measured.rate("ingot", "decode")
    read = decode * matrix_bytes / 1e9
    return {
        "precision": precision, "peer": KINDS[precision], "matrix bytes": round(matrix_bytes),
        "decode tokens/s": round(decode, 2), "llama.cpp decode": round(measured.rate("llama.cpp", "decode"), 2),
        "decode times": round(measured.ratio("decode"), 3), "GB/s read": round(read, 1),
        "GB/s measured": round(bandwidth, 1), "share of bandwidth": round(read / bandwidth, 3),
        "prefill tokens/s": round(measured.rate("ingot", "prefill"), 1),
        "llama.cpp prefill": round(measured.rate("llama.cpp", "prefill"), 1),
        "prefill times": round(measured.ratio("prefill"), 2), "cosine of logits": round(alike, 6),
    }  # fmt: skip


def holds(found: Mapping[str, Any]) -> bool:
    keys = {"decode": "decode times", "prefill": "prefill times", "bandwidth": "share of bandwidth"}
    return all(found[key] >= WANTED[what] for what, key in keys.items())


def bytes_of_matrices(kept: Format) -> float:
    """As the engine keeps them: two bytes a group beside the weights."""
    total = 0.0
    for name, _, shape in checkpoint.shapes():
        if len(shape) == 2 and "embed" not in name:
            keys = name.endswith(("k_proj.weight", "v_proj.weight"))
            bits = kept.head_bits if "lm_head" in name else kept.key_bits if keys else kept.bits
            total += shape[0] * shape[1] * (bits / 8 + 2 / kept.group)
    return total


def run(precision: str, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the row of a precision, what the peer is)"""
    runner, peer = open_runner(FOLDER / f"{precision}.engine", options.threads), None
    try:
        peer = open_peer(options, KINDS[precision])
        measured, alike = measure(Ours(runner), peer, options.rounds, options.threads)
    finally:
        runner.close()
        if peer is not None:
            peer.process.kill()
            peer.process.wait()
    return row(precision, measured, alike, bytes_of_matrices(FORMATS[precision])), dict(peer.about)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--level", type=int, default=1)
    parser.add_argument("--peer", type=Path, default=PEER)
    parser.add_argument("--peer-libraries", type=Path)
    parser.add_argument("--peer-options", nargs="*", default=[], help="plain: see llm_cpu_peer")
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--json", type=Path, default=RESULTS / "llm_cpu.json")
    options = parser.parse_args()
    prepare(options.precisions, options.peer, options.level)
    if options.prepare:
        return 0
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    for precision in options.precisions:
        found, about = run(precision, options)
        rows.append(found)
        print("; ".join(f"{key} {value}" for key, value in found.items()), "PASS" if holds(found) else "FAIL")
    write_json(options.json, "decoding and prefill beside llama.cpp", rows, peer=about, wanted=WANTED,
               threads=options.threads, prompt=PROMPT, answer=ANSWER)  # fmt: skip
    return 0 if all(map(holds, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
