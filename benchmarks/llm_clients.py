"""NVIDIA's aiperf, unmodified, against `ingot llm serve` with the tiny model of examples/tiny_llm.

    python -m benchmarks.llm_clients [--requests 60] [--aiperf PATH] [--json results.json]

aiperf lives in an environment of its own (build/llm-peers, made on first use from llm-peers.txt). Chat and completions,
streaming and whole, four at once; every request must succeed with the number of tokens that was asked for.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.server_hosts import ROOT, environment
from benchmarks.timing import RESULTS, write_json
from examples.tiny_llm import FOLDER
from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.engine import Engine
from ingot.llm.openai import Model
from ingot.llm.runner import open_runner
from ingot.llm.serve import LlmServer, ServeOptions, serving
from ingot.llm.text import Text

TOKENS = 32
CASES = (("chat", True), ("chat", False), ("completions", True), ("completions", False))


def profile(aiperf: Path, port: int, kind: str, streaming: bool, requests: int, folder: Path) -> dict[str, Any]:
    """One run of aiperf."""
    command: list[str | Path] = [
        aiperf, "profile", "-m", "tiny", "--url", f"http://127.0.0.1:{port}", "--endpoint-type", kind,
        "--tokenizer", FOLDER, "--request-count", str(requests), "--concurrency", "4", "--isl", "60",
        "--osl", str(TOKENS), "--extra-inputs", "ignore_eos:true", "--use-server-token-count", "--ui", "none",
        "--artifact-dir", folder, *(["--streaming"] if streaming else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"aiperf failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    told = json.loads((folder / "profile_export_aiperf.json").read_text())
    figures = {"first_token_ms": "time_to_first_token", "between_tokens_ms": "inter_token_latency"}
    return {
        "aiperf": told["aiperf_version"], "endpoint": kind, "streaming": streaming,
        "requests": int(told["request_count"]["avg"]), "errors": len(told["error_summary"]),
        "tokens_an_answer": told["output_sequence_length"]["avg"],
        "request_ms": round(told["request_latency"]["p50"], 1),
        **{name: round(told[metric]["p50"], 2) for name, metric in figures.items() if told.get(metric)},
    }  # fmt: skip


def measured(aiperf: Path, requests: int) -> list[dict[str, Any]]:
    """All cases against one server."""
    with tempfile.TemporaryDirectory() as folder:
        engine = Path(folder) / "tiny.engine"
        build_llm(FOLDER, BuildOptions(sequence_budget=16)).save(engine)
        runner = open_runner(engine)
        text = Text.from_files(runner.files, runner.vocabulary)
        with serving(LlmServer(Engine(runner, text), Model("tiny", text), ServeOptions(port=0))) as server:
            return [
                profile(aiperf, server.port, kind, streaming, requests, Path(folder) / f"{kind}-{streaming}")
                for kind, streaming in CASES
            ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--aiperf", type=Path, help="the program, where it is installed already")
    parser.add_argument("--json", type=Path, default=RESULTS / "llm_clients.json")
    arguments = parser.parse_args()
    aiperf = arguments.aiperf or _installed()
    rows = measured(aiperf, arguments.requests)
    write_json(arguments.json, "aiperf runs unmodified, without an error", rows)
    for row in rows:
        print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in row.items()))
    return int(any(row["errors"] or row["requests"] != arguments.requests for row in rows))


def _installed() -> Path:
    python = environment(ROOT / "build" / "llm-peers", Path(__file__).parent / "llm-peers.txt")
    return Path(python).parent / "aiperf"


if __name__ == "__main__":
    sys.exit(main())
