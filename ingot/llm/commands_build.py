"""`ingot llm build FOLDER -o model.engine`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ingot.dtypes import size_of
from ingot.engine import Engine
from ingot.errors import ConfigError
from ingot.ir.ops_paged import line_of
from ingot.llm.build import BuildOptions, build_ranks
from ingot.llm.formats import CACHES, FORMATS
from ingot.llm.parallel import rank_path
from ingot.report import last_log
from ingot.tools.progress import build_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("folder", help="config.json, safetensors and tokenizer files, as Hugging Face lays them out")
    parser.add_argument("-o", "--output", help="engine file to write (default: FOLDER.engine)")
    parser.add_argument("--precision", default="fp32", choices=sorted(FORMATS),
                        help="how weights are kept (fp8, fp8_cache: for GPUs alone)")  # fmt: skip
    parser.add_argument("--kv", choices=sorted(CACHES), help="how keys and values are kept (default: as the precision)")
    parser.add_argument("--calibration", metavar="FILE", help="a text that rounding to four bits goes by; drawn: one "
                        "that the model writes; none (default: drawn where that is quick)")
    parser.add_argument("--target", default="cpu", help='"cpu", "cuda" (the GPU that is here) or "cuda:sm_90"')
    parser.add_argument("--context", type=int, help="tokens of prompt and answer together (default: the model's)")
    parser.add_argument("--token-budget", type=int, default=512, help="most tokens in one step")
    parser.add_argument("--sequence-budget", type=int, default=64, help="most sequences in one step")
    parser.add_argument("--typical", type=int, default=1, metavar="TOKENS", help="of a usual step, which kernels are "
                        "chosen for: as many as are answered at once (default: 1)")
    parser.add_argument("--tensor-parallel", "--tp", type=int, default=1, metavar="RANKS",
                        help="ranks that share the model, each in an engine: model.engine, model.rank1.engine, …")
    parser.add_argument("--level", type=int, default=1, help="0 (nothing timed) to 5 (everything timed)")
    parser.add_argument("--variants", default="", help="instruction sets to hold; default: this machine's best")
    parser.add_argument(
        "--text", help="a text, or token ids in .npy: how much likelier the checkpoint finds it is recorded"
    )
    parser.add_argument("--max-rise", type=float, default=0.05, help="of the mean negative log-likelihood of --text")
    parser.add_argument("--no-verify", action="store_true", help="skip the comparison with the reference")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    """Build, save, report."""
    folder = Path(arguments.folder)
    named = folder if folder.name not in ("", "..") else folder.resolve()  # "." and ".." have names too
    output = Path(arguments.output or f"{named}.engine")
    if output.resolve().parent == folder.resolve() and output.exists() and output.suffix != ".engine":
        raise ConfigError(f"{output} is a file of the checkpoint; give the engine another name with -o")
    if not os.access(output.parent, os.W_OK | os.X_OK):  # before minutes go by
        raise ConfigError(f"cannot write {output}: {output.parent} is no folder that one may write to")
    options = BuildOptions(
        arguments.precision, arguments.target, arguments.context, arguments.token_budget, arguments.sequence_budget,
        arguments.typical, level=arguments.level, variants=tuple(filter(None, arguments.variants.split(","))),
        verify=not arguments.no_verify, text=arguments.text, max_rise=arguments.max_rise, kv=arguments.kv,
        calibration=arguments.calibration, ranks=arguments.tensor_parallel,
    )  # fmt: skip
    with build_progress(arguments.quiet) as progress:
        engines = build_ranks(folder, options, progress)
        for rank, engine in enumerate(engines):
            engine.save(rank_path(output, rank))
    print(as_text(engines[0], output))
    for rank in range(1, len(engines)):
        print(f"{rank_path(output, rank)}: rank {rank} of {len(engines)}, which is begun with {output}")
    return 0


def as_text(engine: Engine, path: Path) -> str:
    """The build report for people."""
    facts, log = engine.details["llm"], last_log()
    plan = engine.variants[0].plan
    planned = max((m.bytes for m in plan.memory), default=0)
    cache = facts["format"]["cache"]
    token = 2 * facts["groups"] * line_of(1, facts["depth"], cache) * size_of(cache) / 2**10  # of a layer, KiB
    within = "".join(f", of them {token * facts['kinds'].count(kind):.1f} within windows of {window}"
                     for kind, window in enumerate(facts["windows"]) if kind)  # fmt: skip
    return "\n".join([
        f"{path}: {path.stat().st_size / 2**20:.1f} MiB, {facts['family']}, {facts['layers']} layers, "
        f"{facts['vocabulary']} tokens, context {facts['context']}",
        f"memory: weights {len(engine.variants[0].weights) / 2**20:.1f} MiB, activations at {facts['token_budget']} "
        f"tokens {planned / 2**20:.1f} MiB, keys and values {token * facts['layers']:.1f} KiB a token{within}",
        "time: " + ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in log.seconds.items()),
        *(_evidence(entry) for entry in engine.details["evidence"]),
    ])  # fmt: skip


def _evidence(entry: Mapping[str, Any]) -> str:
    if entry["output"] == "nll":
        return (f"verified on {entry['tokens']} tokens of the text: mean negative log-likelihood {entry['before']:.4f} "
                f"of the checkpoint, {entry['after']:.4f} of the engine")  # fmt: skip
    return f"verified logits of {entry['tokens']} tokens: {entry['distance']:.1e} of their spread from the reference"
