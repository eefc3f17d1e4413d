"""Tables of the documents, written from benchmarks/results/*.json, so that no figure there is typed by hand.

python -m benchmarks.table          rewrites README.md and the documents in TABLES between their markers
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cuda_table import cuda_table
from benchmarks.server_table import server_table
from benchmarks.timing import RESULTS

ROOT = Path(__file__).parent.parent
README, CPU, PRECISION = ROOT / "README.md", ROOT / "docs" / "cpu.md", ROOT / "docs" / "precision.md"
CALIBRATION, SERVER = ROOT / "docs" / "calibration.md", ROOT / "docs" / "server.md"
LLM_CPU, LLM_BUILD, CUDA = ROOT / "docs" / "llm_cpu.md", ROOT / "docs" / "llm_build.md", ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
TITLES = {
    "resnet50": "ResNet-50",
    "resnet50 b8": "ResNet-50, 8 images",
    "mobilenet_v2": "MobileNetV2",
    "bert_base": "BERT-base, 128 tokens",
    "minilm": "MiniLM-L6, 128 tokens",
    "mnist": "MNIST",
    "silero_vad": "Silero VAD, 32 ms",
    "superres": "super-resolution, 224x224",
}
PEERS = ("onnxruntime", "openvino")


def describe_machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['processor']}, {machine['threads']} threads available, Python {machine['python']}; {versions}."


def header(titles: Sequence[str]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"


def milliseconds(row: dict[str, Any], runtime: str) -> str:
    return f"{row['milliseconds'][runtime]:.3g}" if runtime in row["milliseconds"] else "–"


def latency_rows(rows: list[dict[str, Any]]) -> Iterator[str]:
    titles = ("batch 1", "precision", "threads", "Ingot ms", "onnxruntime ms", "OpenVINO ms", "against the fastest")
    yield from header(titles)
    for row in rows:
        times = " | ".join(milliseconds(row, runtime) for runtime in ("ingot", *PEERS))
        name = TITLES.get(row["model"], row["model"])
        best = "–" if row["best"] is None else f"{row['best']:.2f}x"
        yield f"| {name} | {row['precision']} | {row['threads']} | {times} | {best} |"


def latency_lines(measured: dict[str, Any]) -> Iterator[str]:
    """The comparison with other CPU runtimes."""
    yield from latency_rows(measured["rows"])
    yield ""
    yield from (f"{line}." for line in measured["summary"])
    yield f"Measured by `./scripts/bench cpu_peers` on {describe_machine(measured['machine'])}"
    yield from reservations(measured["machine"])


def reservations(machine: dict[str, Any]) -> Iterator[str]:
    """What a reader has to know before comparing the figures."""
    yield f"Medians of paired runs, so that all runtimes meet the same load (at the start: {machine['load']})."
    if "amx_bf16" in machine["instruction_sets"]:
        yield (
            "This processor has AMX: in the fp32 rows Ingot makes products of two bfloat16 parts there (2⁻¹⁵ of the "
            "magnitudes multiplied, verified against the reference; `--exact` forbids it). The other runtimes compute "
            "them in full: OpenVINO is told to, unasked it takes one bfloat16 part, which is what its bf16 rows show."
        )


PRECISIONS = {"": "fp32", "_exact": "fp32, `--exact`", "_bf16": "`--bf16`", "_int8": "int8 (QDQ)"}


def roofline_rows(name: str, measured: dict[str, Any]) -> Iterator[str]:
    titles = ("layer", "kernel", "µs", "GFLOP/s", "GB/s", "limit", "share of it")
    yield f"### {name}"
    yield ""
    yield from header(titles)
    for row in measured["rows"]:
        time, layer = row["microseconds"], row["nodes"].split(", ")[-1]
        speeds = f"{row['operations'] / time / 1e3:.0f} | {row['bytes'] / time / 1e3:.1f}"
        yield f"| {layer} | {row['kernel']} | {time:.0f} | {speeds} | {row['bound']} | {row['share']:.0%} |"
    yield ""
    yield f"{measured['line']}."
    yield ""


def roofline_table(results: Path) -> Iterator[str]:
    """Every step of ResNet-50 beside its limit, per precision."""
    found = {name: results / f"cpu_roofline{suffix}.json" for suffix, name in PRECISIONS.items()}
    measured = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    if not measured:
        yield "Nothing measured yet: `./scripts/bench cpu_roofline resnet50 --json …/cpu_roofline.json`."
        return
    first = next(iter(measured.values()))
    peaks = ", ".join(f"{name} {rate / 1e3:,.1f}" for name, rate in first["peaks"]["operations"].items())
    reading = f"{first['peaks']['bytes'] / 1e3:.0f} GB/s"
    yield f"One core, thousands of GFLOP/s from registers alone: {peaks}; reading memory {reading}."
    yield f"Measured on {describe_machine(first['machine'])}"
    yield ""
    for name, figures in measured.items():
        yield from roofline_rows(name, figures)


def budget_lines(measured: dict[str, Any]) -> Iterator[str]:
    """What each budget bought."""
    titles = ("ResNet-56, budget", "layers in int8", "points lost, held out", "ms, 32 images", "of float32's speed")
    yield from header(titles)
    for row in measured["rows"]:
        layers, lost = f"{row['narrow']} of {row['layers']}", f"{row['points_lost']:+.2f}"
        yield f"| {row['budget']} | {layers} | {lost} | {row['milliseconds']:.2f} | {row['speedup']:.2f}x |"
    yield ""
    yield f"`python -m benchmarks.precision_budget`, on {describe_machine(measured['machine'])}"
    load = measured["machine"]["load"]
    yield f"{measured['rows'][0]['images']:,} images of CIFAR-10 proved it; paired runs (load {load})."


def formats_lines(measured: dict[str, Any]) -> Iterator[str]:
    """Narrow formats of whole models beside float32."""
    titles = ("model", "format", "against float32", "float32 ms", "narrow ms", "speed-up")
    yield from header(titles)
    for row in measured["rows"]:
        times = " | ".join(f"{value:.3g}" for value in row["milliseconds"].values())
        yield f"| {row['model']} | {row['format']} | {row['outcome']} | {times} | {row['faster']:.2f}x |"
    yield ""
    yield f"`python -m benchmarks.precision`, on {describe_machine(measured['machine'])}"
    loads = [row["load"] for row in measured["rows"]]
    busy = f"load {min(loads)} to {max(loads)}"
    yield f"Samples that were calibrated on are not judged; medians of paired runs ({busy})."


def llm_cpu_lines(measured: dict[str, Any]) -> Iterator[str]:
    """Decoding and prefill beside llama.cpp."""
    titles = ("weights", "decode tokens/s", "llama.cpp", "times", "GB/s of weights", "of GB/s read", "prefill tokens/s",
              "llama.cpp", "times", "cosine of logits")  # fmt: skip
    yield from header(titles)
    for row in measured["rows"]:
        decode = f"{row['decode tokens/s']:.1f} | {row['llama.cpp decode']:.1f} | {row['decode times']:.2f}"
        memory = f"{row['GB/s read']} | {row['GB/s measured']} ({row['share of bandwidth']:.0%})"
        prefill = f"{row['prefill tokens/s']:.0f} | {row['llama.cpp prefill']:.0f} | {row['prefill times']:.2f}"
        name = f"{row['precision']} / {row['peer']}"
        yield f"| {name} | {decode} | {memory} | {prefill} | {row['cosine of logits']:.4f} |"
    yield ""
    yield f"{measured['prompt']} tokens of prompt, {measured['answer']} decoded after, {measured['threads']} threads;"
    yield f"llama-cpp-python {measured['peer']['llama-cpp-python']} built for this processor, AMX included."
    yield f"Measured on {describe_machine(measured['machine'])}"
    yield f"Medians of paired turns (load at the start: {measured['machine']['load']})."


def stories_lines(measured: dict[str, Any]) -> Iterator[str]:
    """Likelihoods by precision of a small model of language."""
    kinds = {"five": "five stories of TinyStories", "drawn": "five that it wrote itself", "written": "stories260K.md"}
    yield from header(["precision", *(f"{title} ({measured['tokens'][kind]} tokens)" for kind, title in kinds.items())])
    exact = measured["rows"][0]["mean nll"]
    for row in measured["rows"]:
        found = row["mean nll"]
        rises = [f"{found[kind]:.4f} ({found[kind] - exact[kind]:+.4f})" for kind in kinds]
        yield f"| {row['precision']} | {' | '.join(rises)} |"
    yield ""
    yield "Mean negative log-likelihood of a token, and by how much it is more than float32's:"
    yield "`python -m benchmarks.llm_stories FOLDER STORIES`, whose `--help` says where the model's files and the five"
    yield "stories are to be had."


Table = Callable[[Path], Iterator[str]]


def table_of(name: str, command: str, lines: Callable[[dict[str, Any]], Iterator[str]]) -> Table:
    """The table of one result file; a line saying how to make that where nothing has been measured."""

    def table(results: Path) -> Iterator[str]:
        path = results / name
        if path.exists():
            yield from lines(json.loads(path.read_text()))
        else:
            yield f"Nothing measured yet: `{command}`."

    return table


latency_table = table_of(
    "cpu_peers.json", "./scripts/bench cpu_peers --json benchmarks/results/cpu_peers.json", latency_lines
)
TABLES: Mapping[Path, Table] = {
    README: latency_table,
    CPU: roofline_table,
    PRECISION: table_of("precision_budget.json",
                        "./scripts/bench precision_budget FOLDER --json …/precision_budget.json", budget_lines),
    CALIBRATION: table_of("precision.json", "./scripts/bench precision FOLDER --json …/precision.json", formats_lines),
    SERVER: server_table,
    LLM_CPU: table_of("llm_cpu.json", "./scripts/bench llm_cpu", llm_cpu_lines),
    LLM_BUILD: table_of("llm_stories.json", "python -m benchmarks.llm_stories", stories_lines),
    CUDA: cuda_table,
}  # fmt: skip


def rewritten(page: str, results: Path = RESULTS, table: Table = latency_table) -> str:
    """`page` with the table between its markers as the results say."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return "\n".join([f"{before}{BEGIN}", *table(results), f"{END}{after}"])


def main() -> None:
    for page, table in TABLES.items():
        page.write_text(rewritten(page.read_text(), table=table))


if __name__ == "__main__":
    main()
