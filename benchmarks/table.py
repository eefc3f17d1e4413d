"""README's benchmark table, written from benchmarks/results/*.json, so that no figure there is typed by hand.

python -m benchmarks.table          rewrites the part of README.md between its markers
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.timing import RESULTS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
TITLES = {
    "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNetV2",
    "bert_base": "BERT-base, 128 tokens",
    "minilm": "MiniLM-L6, 128 tokens",
    "mnist": "MNIST",
}


def describe_machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['processor']}, {machine['threads']} threads available, Python {machine['python']}; {versions}."


def latency_rows(rows: list[dict[str, Any]]) -> Iterator[str]:
    peers = ("onnxruntime", "openvino")
    titles = (
        "fp32, batch 1",
        "threads",
        "Ingot ms",
        "onnxruntime ms",
        "OpenVINO ms",
        "against onnxruntime",
        "against OpenVINO",
    )
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    for row in rows:
        times = " | ".join(f"{row['milliseconds'].get(name, float('nan')):.3g}" for name in ("ingot", *peers))
        ratios = " | ".join(f"{row['ratios'][peer]:.2f}x" if peer in row["ratios"] else "–" for peer in peers)
        yield f"| {TITLES.get(row['model'], row['model'])} | {row['threads']} | {times} | {ratios} |"


def latency_table(results: Path) -> Iterator[str]:
    """The comparison with other CPU runtimes; a line saying so where nothing has been measured."""
    path = results / "cpu_peers.json"
    if not path.exists():
        yield "Nothing measured yet: `./scripts/bench cpu_peers --json benchmarks/results/cpu_peers.json`."
        return
    measured = json.loads(path.read_text())
    yield from latency_rows(measured["rows"])
    yield ""
    yield f"Measured by `./scripts/bench cpu_peers` on {describe_machine(measured['machine'])}"
    yield from reservations(measured["machine"])


def reservations(machine: dict[str, Any]) -> Iterator[str]:
    """What a reader has to know before comparing the figures."""
    yield f"Medians of paired runs, so that all runtimes meet the same load (at the start: {machine['load']})."
    if "amx_bf16" in machine["instruction_sets"]:
        yield (
            "This processor has AMX: Ingot makes float32 products of two bfloat16 parts there (2⁻¹⁵ of the magnitudes "
            "multiplied, verified against the reference); the other runtimes compute them in full. `--exact` forbids "
            "it."
        )


def rewritten(readme: str, results: Path = RESULTS) -> str:
    """`readme` with the table between its markers as the results say."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return "\n".join([f"{before}{BEGIN}", *latency_table(results), f"{END}{after}"])


def main() -> None:
    README.write_text(rewritten(README.read_text()))


if __name__ == "__main__":
    main()
