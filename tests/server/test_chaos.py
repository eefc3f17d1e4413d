"""A small share of benchmarks/server_chaos.py: chaos, mutated requests, a full queue."""

import pytest

from benchmarks import server_chaos, server_fuzz
from benchmarks.server_chaos import small_models, workers_of


def test_nothing_is_lost_wrong_or_hung() -> None:
    with small_models() as (root, host):
        tally, ended = server_chaos.chaos(host, root, threads=8, requests=150, seed=1)
    assert not tally.faults and tally.requests == 8 * 150 and tally.counts["answered"] > 300, tally.counts
    assert ended


def test_mutated_requests_and_a_full_queue() -> None:
    with small_models() as (_, host):
        server = server_fuzz.Server(host.ports, lambda: [host.process.pid, *workers_of(host)])
        outcomes, _ = server_fuzz.fuzz(server, 1000, seed=2)
        refused = [words for status, words in server_chaos.queue_outcomes(host) if status != 200]
    assert not outcomes.faults, outcomes.faults
    assert outcomes.counts["accepted"] > 200 and outcomes.counts["refused"] > 200
    assert refused == ["Exceeds maximum queue size"] * 2


@pytest.mark.parametrize(
    ("body", "right"),
    [
        (b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2.5, 3, 4]}]}', True),
        (b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3]}]}', False),
        (b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, true]}]}', False),
        (b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, NaN]}]}', False),
        (b'{"inputs": [{"name": "x", "shape": [99, 4], "datatype": "FP32", "data": []}]}', False),
    ],
)
def test_the_strict_decoder(body: bytes, right: bool) -> None:
    assert server_fuzz.strict_http(server_fuzz.Body(body, None)) is right
