"""NVIDIA's client, unmodified, against this server: every call that applies, over HTTP and gRPC."""

import ast
from pathlib import Path

import pytest

from tests.server.conftest import Client

SOURCE = ast.parse(Path(__file__).with_name("client_checks.py").read_text())
NAMES = [
    node.name
    for node in SOURCE.body
    if isinstance(node, ast.FunctionDef) and [ast.unparse(d) for d in node.decorator_list] == ["check"]
]
ONLY = {"infer_json": "http", "infer_stream": "grpc", "infer_decoupled": "grpc"}
CASES = [(name, protocol) for name in NAMES for protocol in ("http", "grpc") if ONLY.get(name, protocol) == protocol]


@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_tritonclient(client: Client, name: str, protocol: str) -> None:
    client.check(name, protocol)
