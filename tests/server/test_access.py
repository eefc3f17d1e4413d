"""API keys, TLS, limits: who may ask, how, and how much at once."""

import hashlib
import hmac
import http.client
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from ingot.errors import ConfigError
from ingot.server.access import Access, Tls, read_keys
from ingot.server.app import BackgroundServer, Server
from ingot.server.options import options_from
from ingot.server.request import ServerError
from ingot.server.schema import message
from ingot.server.wire import Limits
from tests.server.conftest import options
from tests.server.models import add_version, scale
from tests.server.test_app import INFER, parsed

USER, OWNER, SCRAPER = "user-key-0123456789", "owner-key-0123456789", "scraper-key-0123456789"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    add_version(folder, "scale", 1, scale(2.0))
    return folder


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name, key in (("inference", USER), ("management", OWNER), ("metrics", SCRAPER)):
        (folder / name).write_text(f"# of {name}\n{key}\n")
        (folder / name).chmod(0o600)
    return folder


@pytest.fixture(scope="module")
def guarded(root: Path, keys: Path, engine_cache: Path) -> Iterator[Server]:
    access = Access({name: read_keys(keys / name) for name in ("inference", "management", "metrics")})
    with BackgroundServer(options(root, engine_cache, access=access)) as running:
        yield running


def ask(
    server: Server, method: str, path: str, key: str = "", port: str = "http", header: str = "x-api-key", body: str = ""
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.ports[port], timeout=60)
    connection.request(method, path, body, {header: key} if key else {})
    response = connection.getresponse()
    answer = response.status, response.read()
    connection.close()
    return answer


ROUTES = [
    ("POST", "/v2/models/scale/infer", USER), ("GET", "/v2/models/scale", USER), ("GET", "/v2", USER),
    ("POST", "/v2/repository/index", OWNER), ("POST", "/v2/repository/models/scale/load", OWNER),
    ("GET", "/v2/logging", OWNER), ("GET", "/v2/trace/setting", OWNER),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "key"), ROUTES)
def test_routes_take_their_groups_keys(guarded: Server, method: str, path: str, key: str) -> None:
    body = json.dumps(INFER) if path.endswith("infer") else ""
    assert ask(guarded, method, path, key, body=body)[0] == 200
    assert ask(guarded, method, path, f"Bearer {key}", header="authorization", body=body)[0] == 200
    for wrong in ("", key[:-1], key + "x", USER if key == OWNER else OWNER, "ä"):
        status, answer = ask(guarded, method, path, wrong, body=body)
        assert status == 401 and b"API key" in answer


def test_health_needs_no_key_and_metrics_their_own(guarded: Server) -> None:
    assert ask(guarded, "GET", "/v2/health/live")[0] == ask(guarded, "GET", "/v2/health/ready")[0] == 200
    assert ask(guarded, "GET", "/metrics", port="metrics")[0] == 401
    assert ask(guarded, "GET", "/metrics", USER, port="metrics")[0] == 401
    assert ask(guarded, "GET", "/metrics", SCRAPER, port="metrics")[0] == 200


def call(channel: grpc.Channel, verb: str, answer: str, metadata: Any = (), **fields: Any) -> Any:
    asked = message(f"inference.{verb}Request")(**fields)
    method = channel.unary_unary(
        f"/inference.GRPCInferenceService/{verb}",
        lambda sent: sent.SerializeToString(), message(f"inference.{answer}").FromString,
    )  # fmt: skip
    return method(asked, metadata=metadata, timeout=60)


def test_grpc_takes_the_same_keys(guarded: Server) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{guarded.ports['grpc']}") as channel:
        assert call(channel, "ServerReady", "ServerReadyResponse").ready
        assert call(channel, "ModelReady", "ModelReadyResponse", [("x-api-key", USER)], name="scale").ready
        index = call(channel, "RepositoryIndex", "RepositoryIndexResponse", [("authorization", f"Bearer {OWNER}")])
        assert index.models[0].name == "scale"
        for name, metadata in (("ModelInfer", ()), ("RepositoryIndex", [("x-api-key", USER)]), ("ModelMetadata", ())):
            with pytest.raises(grpc.RpcError) as refusal:
                call(channel, name, f"{name}Response", metadata)
            assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        with pytest.raises(grpc.RpcError) as refusal:
            next(stream(iter([b""]), timeout=60))
        assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("key", [USER, "wrong"])
def test_a_call_ends_with_its_id(guarded: Server, key: str) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{guarded.ports['grpc']}") as channel:
        asked = message("inference.ModelReadyRequest")(name="scale").SerializeToString()
        ready = channel.unary_unary("/inference.GRPCInferenceService/ModelReady").future(
            asked, metadata=[("x-api-key", key), ("x-request-id", "seven")], timeout=20
        )
        assert (ready.exception(20) is None) == (key == USER)
        assert ("x-request-id", "seven") in ready.trailing_metadata()


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many comparisons for the first key as for the last and for none."""
    counted: list[bool] = []
    compare = hmac.compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: counted.append(compare(a, b)) or counted[-1])
    keys = [f"key-number-{number:08}" for number in range(5)]
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]
    access = Access({"inference": frozenset(digests)})
    for key in keys:
        access.check("inference", None, key)
    with pytest.raises(ServerError):
        access.check("inference", None, "none of these")
    assert len(counted) == 30 and sum(counted) == 5


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [
        ("", 0o600, "no key"), ("# only this\n", 0o600, "no key"), ("short\n", 0o600, "fewer than 16"),
        (USER, 0o644, "everybody"),
    ],
)  # fmt: skip
def test_key_files_that_are_refused(tmp_path: Path, text: str, mode: int, reason: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=reason):
        read_keys(file)
    with pytest.raises(ConfigError, match="cannot read"):
        read_keys(tmp_path / "missing")


def test_a_key_file_may_hold_digests(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"sha256:{hashlib.sha256(USER.encode()).hexdigest()}\n")
    file.chmod(0o600)
    Access({"inference": read_keys(file)}).check("inference", f"Bearer {USER}", None)


# -- TLS --------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    folder = tmp_path_factory.mktemp("tls")
    made_certificate(folder)
    return Tls(folder / "cert.pem", folder / "key.pem")


def made_certificate(folder: Path) -> None:
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost".split()
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")


def secure(server: Server, port: str, tls: Tls, own: Tls | None = None) -> http.client.HTTPSConnection:
    context = ssl.create_default_context(cafile=str(tls.certificate))
    if own:
        context.load_cert_chain(own.certificate, own.key)
    return http.client.HTTPSConnection("127.0.0.1", server.ports[port], timeout=60, context=context)


def test_tls(root: Path, engine_cache: Path, certificate: Tls, tmp_path: Path) -> None:
    with BackgroundServer(options(root, engine_cache, tls=certificate, grpc_tls=certificate)) as server:
        connection = secure(server, "http", certificate)
        for _ in range(3):
            connection.request("POST", "/v2/models/scale/infer", json.dumps(INFER))
            assert json.loads(connection.getresponse().read())["outputs"][0]["data"] == [2, 4, 6, 8]
        connection.close()
        metrics = secure(server, "metrics", certificate)
        metrics.request("GET", "/metrics")
        assert metrics.getresponse().status == 200
        metrics.close()
        trusted = grpc.ssl_channel_credentials(certificate.certificate.read_bytes())
        with grpc.secure_channel(f"localhost:{server.ports['grpc']}", trusted) as channel:
            assert call(channel, "ServerReady", "ServerReadyResponse").ready
        with socket.create_connection(("127.0.0.1", server.ports["http"]), timeout=60) as plain:
            plain.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200" not in plain.recv(100)
        made_certificate(tmp_path)
        for name in ("cert.pem", "key.pem"):  # renewed: new connections get the new one
            (certificate.certificate.parent / name).write_bytes((tmp_path / name).read_bytes())
        server.renew()
        renewed = secure(server, "http", Tls(tmp_path / "cert.pem", tmp_path / "key.pem"))
        renewed.request("GET", "/v2/health/live")
        assert renewed.getresponse().status == 200
        renewed.close()


def test_clients_with_certificates(root: Path, engine_cache: Path, certificate: Tls) -> None:
    mutual = Tls(certificate.certificate, certificate.key, certificate.certificate)
    with BackgroundServer(options(root, engine_cache, tls=mutual, grpc_port=None)) as server:
        connection = secure(server, "http", certificate, own=certificate)
        connection.request("GET", "/v2/health/live")
        assert connection.getresponse().status == 200
        connection.close()
        stranger = secure(server, "http", certificate)
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
            stranger.request("GET", "/v2/health/live")
            stranger.getresponse()
        stranger.close()


def test_tls_files_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"cert\.pem"):
        Tls(tmp_path / "cert.pem", tmp_path / "cert.pem").context()


@pytest.mark.parametrize(
    "words",
    [
        ["--tls-cert=x"], ["--grpc-use-ssl=true"], ["--api-key-file=all=x"], ["--api-key-file=inference=/no/such"],
        ["--trace-config=colour=blue"],
        ["--grpc-use-ssl-mutual=true", "--grpc-server-cert=a", "--grpc-server-key=b"],
    ],
)  # fmt: skip
def test_flags_that_are_refused(tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(ConfigError):
        options_from(parsed(str(tmp_path), *words))


# -- limits -----------------------------------------------------------------------------------------------------------
def test_requests_in_flight_are_limited(root: Path, engine_cache: Path) -> None:
    with BackgroundServer(options(root, engine_cache, inflight=2)) as server:
        server.service.inflight += 2
        status, answer = ask(server, "POST", "/v2/models/scale/infer", body=json.dumps(INFER))
        assert status == 503 and b"2 requests are being answered" in answer
        server.service.inflight -= 2
        assert ask(server, "POST", "/v2/models/scale/infer", body=json.dumps(INFER))[0] == 200


def test_connections_are_limited(root: Path, engine_cache: Path) -> None:
    with BackgroundServer(options(root, engine_cache, limits=Limits(connections=3))) as server:
        address = ("127.0.0.1", server.ports["http"])
        held = [socket.create_connection(address, timeout=60) for _ in range(3)]
        for client in held:
            client.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200" in client.recv(1000)
        with socket.create_connection(address, timeout=60) as one_too_many, pytest.raises(ConnectionError):
            one_too_many.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            if not one_too_many.recv(1000):
                raise ConnectionError
        for client in held:
            client.close()
        assert ask(server, "GET", "/v2/health/live")[0] == 200


def test_queue_limit_for_models_that_state_none(root: Path, engine_cache: Path) -> None:
    with BackgroundServer(options(root, engine_cache, queue_size=7)) as server:
        policy = server.service.config("scale").dynamic_batching.default_queue_policy
        assert policy.max_queue_size == 7 and policy.allow_timeout_override


def test_a_large_body_is_refused_before_it_is_sent(root: Path, engine_cache: Path) -> None:
    with BackgroundServer(options(root, engine_cache, limits=Limits(body=1000))) as server:
        with socket.create_connection(("127.0.0.1", server.ports["http"]), timeout=60) as client:
            client.sendall(b"POST /v2/models/scale/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n")
            assert b" 413 " in client.recv(1000)
        seen = []

        def chunked() -> None:
            with socket.create_connection(("127.0.0.1", server.ports["http"]), timeout=60) as client:
                client.sendall(b"POST /v2/models/scale/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
                client.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
                seen.append(client.recv(1000))

        thread = threading.Thread(target=chunked)
        thread.start()
        thread.join(60)
        assert b" 413 " in seen[0]
