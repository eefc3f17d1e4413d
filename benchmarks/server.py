"""The model server's claims, each measured beside what it is held against, in turns on the same machine.

    python -m benchmarks.server [--quick] [--only mnist,grpc,minilm,goodput] [--json benchmarks/results/server.json]

The client is this process, the servers are others. MNIST runs on one thread, with its batch fixed at 1 as in the model
zoo and with a free one. MiniLM-L6 runs on all cores, for goodput on one, so that the load does not take cores from the
model. Figures are medians over rounds in which all servers took turns. A claim without its peer is not measured and
does not hold. The file keeps what it holds of sections that were not run. Last line: `server: N of M claims hold`.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import server_hosts as hosts
from benchmarks.models import example_inputs
from benchmarks.server_fronts import processor_seconds
from benchmarks.server_grpc import bare_engine, grpc_calls
from benchmarks.server_grpc_fronts import OURS, front
from benchmarks.server_load import Load, Offered, closed_loop, open_loop
from benchmarks.server_repository import Models, made_models
from benchmarks.timing import machine

CLIENTS = 16
DEADLINE, MARGIN = 0.050, 0.004  # seconds a client waits; what it leaves of them for the way there and back
OVERLOAD = 1.5


# -- what is measured -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pace:
    """How long a turn takes and how many rounds there are."""

    seconds: float
    rounds: int


@dataclass(frozen=True)
class Row:
    """One server under one load; one entry of `runs` a round, `cpu` the server's microseconds for each request."""

    section: str
    server: str
    clients: int
    runs: list[Load] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def middle(self, name: str) -> float:
        return statistics.median(getattr(run, name) for run in self.runs)


@dataclass(frozen=True)
class Claim:
    """A measured figure and its threshold; None where its peer is absent."""

    text: str
    measured: float | None
    least: float | None = None
    most: float | None = None

    @property
    def holds(self) -> bool:
        if self.measured is None:
            return False
        return (self.least is None or self.measured >= self.least) and (self.most is None or self.measured <= self.most)


@dataclass
class Findings:
    """What all sections found."""

    rows: list[Row] = field(default_factory=list)
    offered: dict[str, list[Offered]] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)

    def claim(self, text: str, measured: float | None, **threshold: float) -> None:
        self.claims.append(Claim(text, measured, **threshold))


@dataclass(frozen=True)
class Turn:
    """A server, what it is asked, by how many clients."""

    label: str
    host: hosts.Host
    request: bytes
    clients: int


def take_turns(section: str, turns: Sequence[Turn], pace: Pace, findings: Findings) -> dict[str, Row]:
    """Every server in turn, another first each round."""
    rows = {turn.label: Row(section, turn.label, turn.clients) for turn in turns}
    for index in range(pace.rounds):
        first = index % len(turns)
        for turn in [*turns[first:], *turns[:first]]:
            measure(turn, pace.seconds, rows[turn.label])
    findings.rows.extend(rows.values())
    for row in rows.values():
        print(describe(row), flush=True)
    return rows


def measure(turn: Turn, seconds: float, row: Row) -> None:
    with turn.host.awake():
        closed_loop(turn.host.port, turn.request, turn.clients, min(0.3, seconds / 3))
        before = processor_seconds(turn.host.process.pid)
        load = closed_loop(turn.host.port, turn.request, turn.clients, seconds)
        row.runs.append(load)
        row.cpu.append((processor_seconds(turn.host.process.pid) - before) / max(load.requests, 1) * 1e6)


def ratio(rows: Mapping[str, Row], ours: str, theirs: str, name: str = "rate") -> float | None:
    """The median over the rounds of ours / theirs; None if either is absent."""
    if ours not in rows or theirs not in rows:
        return None
    pairs = zip(rows[ours].runs, rows[theirs].runs, strict=True)
    return statistics.median(getattr(own, name) / getattr(other, name) for own, other in pairs)


def difference(rows: Mapping[str, Row], ours: str, theirs: str) -> float:
    """The median over the rounds of ours - theirs, of the latencies' medians."""
    return statistics.median(a.p50 - b.p50 for a, b in zip(rows[ours].runs, rows[theirs].runs, strict=True))


# -- sections ---------------------------------------------------------------------------------------------------------
def mnist(models: Models, pace: Pace, findings: Findings) -> None:
    """Requests a second and latency beside the raw application, MLServer and LitServe."""
    inputs = example_inputs("mnist")
    binary, text = hosts.binary_request(inputs), hosts.json_request(inputs)
    with contextlib.ExitStack() as stack:
        start = stack.enter_context
        raw = start(hosts.raw_application(models.engine("mnist")))
        inside = start(hosts.ingot_server("inside", models.repository("mnist")))
        apart = start(hosts.ingot_server("apart", models.repository("mnist"), processes=True))
        free_raw = start(hosts.raw_application(models.engine("mnist_free")))
        free = start(hosts.ingot_server("free", models.repository("mnist_free")))
        one = [("raw ASGI", raw), ("Ingot", inside), ("processes", apart)]
        rows = take_turns("MNIST, binary", [Turn(label, host, binary, 1) for label, host in one], pace, findings)
        findings.claim("MNIST, 1 client: p50 above raw ASGI's, µs", difference(rows, "Ingot", "raw ASGI"), most=80)
        many = [
            Turn("raw ASGI", raw, binary, CLIENTS), Turn("Ingot", inside, binary, CLIENTS),
            Turn("processes", apart, binary, CLIENTS), Turn("raw ASGI, free batch", free_raw, binary, CLIENTS),
            Turn("Ingot, free batch", free, binary, CLIENTS),
        ]  # fmt: skip
        beside_raw(take_turns("MNIST, binary", many, pace, findings), findings)
        texts = [Turn("Ingot, JSON", inside, text, CLIENTS)]
        texts += [Turn(host.name, host, request, CLIENTS) for host, request in peers(stack, models, inputs)]
        beside_peers(take_turns("MNIST, JSON", texts, pace, findings), findings)


def peers(
    stack: contextlib.ExitStack, models: Models, inputs: Mapping[str, "np.ndarray[Any, Any]"]
) -> list[tuple[hosts.Host, bytes]]:
    """The other servers with their requests; none where they cannot be installed."""
    python = hosts.peers_python()
    if python is None:
        return []
    model, text = models.onnx("mnist"), hosts.json_request(inputs)
    folders = [models.folder / f"mlserver{workers}" for workers in (0, 1)]
    inside, default = (
        stack.enter_context(hosts.mlserver(python, model, folder, workers)) for workers, folder in enumerate(folders)
    )
    litserve = stack.enter_context(hosts.litserve(python, model))
    return [(inside, text), (default, text), (litserve, hosts.litserve_request(inputs))]


def beside_raw(rows: Mapping[str, Row], findings: Findings) -> None:
    at = f"MNIST, {CLIENTS} clients: requests/s of raw ASGI's"
    findings.claim(f"{at}, in process", ratio(rows, "Ingot", "raw ASGI"), least=0.75)
    free = ratio(rows, "Ingot, free batch", "raw ASGI, free batch")
    findings.claim(f"{at}, in process, free batch", free, least=0.75)
    findings.claim(f"{at}, a process per model", ratio(rows, "processes", "raw ASGI"), least=0.50)


def beside_peers(rows: Mapping[str, Row], findings: Findings) -> None:
    """Held against MLServer's faster way to run."""
    against = [ratio(rows, "Ingot, JSON", name) for name in ("MLServer, in process", "MLServer, default")]
    known = [value for value in against if value is not None]
    findings.claim("MNIST JSON, 16 clients: times MLServer's requests/s", min(known, default=None), least=2.5)
    litserve = ratio(rows, "Ingot, JSON", "LitServe")
    findings.claim("MNIST JSON, 16 clients: times LitServe's requests/s", litserve, least=7.0)


def grpc(models: Models, pace: Pace, findings: Findings) -> None:
    """The median of one gRPC call after the other, less the engine alone; beside an echo on the same front."""
    inputs, labels = example_inputs("mnist"), ("engine alone", "gRPC", "gRPC, an echo")
    with hosts.ingot_server("inside", models.repository("mnist")) as host, front(OURS, None) as echo:
        rows = {label: Row("MNIST, one caller", label, 1) for label in labels}
        for _ in range(pace.rounds):
            rows["engine alone"].runs.append(bare_engine(models.engine("mnist"), inputs, pace.seconds / 4))
            with host.awake():
                rows["gRPC"].runs.append(grpc_calls(host.ports["grpc"], inputs, pace.seconds))
            rows["gRPC, an echo"].runs.append(grpc_calls(echo, inputs, pace.seconds))
    findings.rows.extend(rows.values())
    for row in rows.values():
        print(describe(row), flush=True)
    findings.claim("MNIST, gRPC: p50 above the engine's, µs", difference(rows, "gRPC", "engine alone"), most=350)


def minilm(models: Models, pace: Pace, findings: Findings) -> None:
    """Batched as the server chooses beside one request an execution."""
    with (
        hosts.ingot_server("batched", models.repository("minilm"), threads=models.threads) as batched,
        hosts.ingot_server("single", models.repository("minilm_single"), threads=models.threads) as single,
    ):
        for length in (8, 16, 32, 128):
            request = hosts.binary_request(tokens(length))
            turns = [Turn("one at a time", single, request, CLIENTS), Turn("batched", batched, request, CLIENTS)]
            rows = take_turns(f"MiniLM, {length} tokens", turns, Pace(pace.seconds * 2, pace.rounds), findings)
            at, least = f"MiniLM, {length} tokens, {CLIENTS} clients:", 1.4 if length <= 32 else 1.0
            findings.claim(f"{at} times the requests/s", ratio(rows, "batched", "one at a time"), least=least)
            findings.claim(f"{at} P99 of unbatched", ratio(rows, "batched", "one at a time", "p99"), most=1.0)


def tokens(length: int) -> dict[str, "np.ndarray[Any, Any]"]:
    """A full sentence of so many tokens."""
    ids = np.random.default_rng(length).integers(1000, 30000, (1, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def goodput(models: Models, pace: Pace, findings: Findings) -> None:
    """Answers within 50 ms at 1.5 times what the server can do: where it is told the deadline, and first come.

    A run is held against the capacity before and after it: a shared machine changes from one second to the next.
    """
    length, seconds = 32, pace.seconds * 4
    plain = hosts.binary_request(tokens(length))
    urgent = hosts.binary_request(tokens(length), timeout_us=int((DEADLINE - MARGIN) * 1e6))
    found: dict[str, list[float]] = {"deadline": [], "first come": []}
    with hosts.ingot_server("batched", models.repository("minilm")) as host, host.awake():
        closed_loop(host.port, plain, 2 * CLIENTS, 2.0)
        before = closed_loop(host.port, plain, 2 * CLIENTS, pace.seconds * 2).rate
        for seed in range(pace.rounds):
            for label, request in (("deadline", urgent), ("first come", plain)):
                rate = OVERLOAD * before
                offered = open_loop(host.port, request, rate, seconds, DEADLINE, connections=256, seed=seed)
                after = closed_loop(host.port, plain, 2 * CLIENTS, pace.seconds * 2).rate
                findings.offered.setdefault(label, []).append(offered)
                found[label].append(offered.goodput / statistics.mean((before, after)))
                print(f"goodput, {label:12} of {before:.0f}, {after:.0f}/s: {describe_offered(offered)}", flush=True)
                before = after
    at = f"MiniLM, {length} tokens, {OVERLOAD}x overload: goodput within 50 ms of capacity"
    findings.claim(at, statistics.median(found["deadline"]), least=0.9)
    findings.claim(f"{at}, first-come queue", statistics.median(found["first come"]), most=0.1)


SECTIONS: dict[str, Callable[[Models, Pace, Findings], None]] = {
    "mnist": mnist, "grpc": grpc, "minilm": minilm, "goodput": goodput,
}  # fmt: skip


# -- report -----------------------------------------------------------------------------------------------------------
def describe(row: Row) -> str:
    cpu = f"{statistics.median(row.cpu):8.0f}" if row.cpu else f"{'–':>8}"
    figures = f"{row.middle('rate'):9.0f} {row.middle('p50'):9.0f} {row.middle('p99'):9.0f} {cpu}"
    return f"{row.section:20} {row.server:22} {row.clients:7} {figures}"


def describe_offered(offered: Offered) -> str:
    figures = f"in time {offered.goodput:.0f}/s, late {offered.late}, refused {offered.refused}"
    return f"offered {offered.offered:.0f}/s, {figures}"


def describe_claim(claim: Claim) -> str:
    threshold = f">= {claim.least:g}" if claim.least is not None else f"<= {claim.most:g}"
    measured = "not measured" if claim.measured is None else f"{claim.measured:.2f}"
    return f"{claim.text:74} {threshold:>8} {measured:>12}  {'passed' if claim.holds else 'FAILED'}"


def as_json(findings: Findings) -> dict[str, Any]:
    """A section's figures, with what they depend on."""
    claims = [{**asdict(claim), "holds": claim.holds} for claim in findings.claims]
    offered = {label: [asdict(run) for run in runs] for label, runs in findings.offered.items()}
    return {"machine": machine(), "claims": claims, "rows": [asdict(row) for row in findings.rows], "offered": offered}


def write(path: Path, found: Mapping[str, Findings]) -> None:
    """Put the sections into the file, beside those it has."""
    sections = json.loads(path.read_text())["sections"] if path.exists() else {}
    sections |= {name: as_json(findings) for name, findings in found.items()}
    claims = [claim for section in sections.values() for claim in section["claims"]]
    line = f"server: {sum(claim['holds'] for claim in claims)} of {len(claims)} claims hold"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"claim": line, "sections": sections}, indent=1) + "\n")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short rounds instead of five")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections, of {','.join(SECTIONS)}")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def main() -> int:
    chosen = options()
    names = chosen.only.split(",")
    pace, found = Pace(0.6, 2) if chosen.quick else Pace(1.5, 5), dict[str, Findings]()
    print(f"{'':20} {'server':22} {'clients':>7} {'requests/s':>9} {'p50 µs':>8} {'p99 µs':>9} {'CPU µs':>8}")
    with tempfile.TemporaryDirectory() as folder:
        models = made_models(Path(folder))
        for name in names:
            found[name] = Findings()
            SECTIONS[name](models, pace, found[name])
    if chosen.json:
        write(chosen.json, found)
    claims = [claim for findings in found.values() for claim in findings.claims]
    for claim in claims:
        print(describe_claim(claim))
    hold = sum(claim.holds for claim in claims)
    print(f"server: {hold} of {len(claims)} claims hold")
    return 0 if hold == len(claims) else 1


if __name__ == "__main__":
    sys.exit(main())
