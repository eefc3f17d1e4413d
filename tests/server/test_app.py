"""Flags, the command line, starts that fail and ends in good order."""

import argparse
import asyncio
import contextlib
import gc
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from ingot.errors import ConfigError
from ingot.server import logs
from ingot.server.app import BackgroundServer, Server, add_arguments, options_from
from ingot.server.request import Request, ServerError
from ingot.server.wire import Exchange
from tests.server.conftest import options
from tests.server.models import add_version, scale

INFER = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return parser.parse_args(words)


def test_tritonservers_flags(tmp_path: Path) -> None:
    words = (
        f"--model-repository={tmp_path} --model-control-mode=explicit --load-model=a --load-model=b --http-port=9000 "
        "--allow-grpc=false --strict-readiness 0 --exit-timeout-secs=5 --cache-config=local,size=1048576 "
        "--repository-poll-secs=3 --grpc-keepalive-time=5000"
    )
    found = options_from(parsed(*words.split()))
    assert found.repositories == (tmp_path,) and found.mode == "explicit" and found.load_models == ("a", "b")
    assert (found.http_port, found.grpc_port, found.metrics_port) == (9000, None, 8002)
    assert found.limits.ask_after == 5 and found.limits.answer_within == 20
    assert not found.strict_readiness and found.exit_timeout == 5 and found.cache_bytes == 1 << 20 and found.processes


def test_flags_that_say_nothing_here_are_accepted_and_named(tmp_path: Path) -> None:
    words = f"--pinned-memory-pool-byte-size=1 --disable-auto-complete-config {tmp_path} --backend-config python,a=b"
    found = parsed(*words.split(), "--log-info=false", "--grpc-address=::1", "--response-cache-byte-size=7")
    assert found.unused == ["--pinned-memory-pool-byte-size", "--disable-auto-complete-config", "--backend-config"]
    options = options_from(found)
    assert options.repositories == (tmp_path,) and options.grpc_address == "::1" and options.cache_bytes == 7


def test_the_form_of_the_log_may_change(server: Server) -> None:
    before = logs.chosen()[0]
    try:
        assert server.service.log_settings_updated({"log_format": "json"})["log_format"] == "json"
        assert logs.chosen()[0] == "json"
        for wrong in ({"log_format": "xml"}, {"log_file": "/etc/passwd"}):
            with pytest.raises(ServerError, match="log_f"):
                server.service.log_settings_updated(wrong)
    finally:
        server.service.log_settings_updated({"log_format": before})


@pytest.mark.parametrize("words", [(), ("/no/such/folder",), (".", "--cache-config=redis,host=x")])
def test_wrong_flags(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        options_from(parsed(*words))


def test_a_model_that_fails_ends_the_start_or_not_as_asked(tmp_path: Path, engine_cache: Path) -> None:
    add_version(tmp_path, "good", 1, scale(2.0))
    add_version(tmp_path, "bad", 1, scale(2.0), "max_batch_size: oops")
    with pytest.raises(ServerError, match="bad"), BackgroundServer(options(tmp_path, engine_cache)):
        pass
    with BackgroundServer(options(tmp_path, engine_cache, exit_on_error=False)) as server:
        assert get(server, "/v2/models/good/ready") == 200 and get(server, "/v2/models/bad/ready") == 400
        assert get(server, "/v2/health/live") == 200 and get(server, "/v2/health/ready") == 400
    with BackgroundServer(options(tmp_path, engine_cache, exit_on_error=False, strict_readiness=False)) as server:
        assert get(server, "/v2/health/ready") == 200


def ask_once(connection: http.client.HTTPConnection) -> object:
    """The answer's data, or its status."""
    connection.request("POST", "/v2/models/scale/infer", json.dumps(INFER))
    response = connection.getresponse()
    body = json.loads(response.read())
    return body["outputs"][0]["data"] if response.status == 200 else response.status


def get(server: Server, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["http"], timeout=60)
    connection.request("GET", path)
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.parametrize("name", ["http", "grpc", "metrics"])
def test_a_port_that_is_taken_is_named(server: Server, tmp_path: Path, engine_cache: Path, name: str) -> None:
    taken: Any = {f"{name}_port": server.ports[name]}
    second = BackgroundServer(options(tmp_path, engine_cache, **taken))
    with pytest.raises(ConfigError, match=f"port {server.ports[name]} cannot be listened on.*--{name}-port"), second:
        pass


def test_ending_while_requests_arrive(tmp_path: Path, engine_cache: Path) -> None:
    """Each request is answered rightly, refused with 503, or finds the door closed; none hangs, none is wrong."""
    add_version(tmp_path, "scale", 1, scale(2.0))
    background = BackgroundServer(options(tmp_path, engine_cache, lame_duck=3.0))
    seen: list[object] = []
    busy = threading.Barrier(9)

    def ask(port: int) -> None:
        answered = 0
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            try:
                while True:
                    seen.append(ask_once(connection))
                    answered += 1
                    if answered == 5:
                        busy.wait(60)
            except (http.client.HTTPException, ConnectionError) as error:
                seen.append(type(error))

    with background as server:
        threads = [threading.Thread(target=ask, args=(server.ports["http"],)) for _ in range(8)]
        for thread in threads:
            thread.start()
        busy.wait(60)
        stopping = asyncio.run_coroutine_threadsafe(server.stop(), background.loop)
        while get(server, "/v2/health/ready") != 400:  # readiness falls while requests are still taken
            pass
        stopping.result(60)
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    good = [item for item in seen if item == [2, 4, 6, 8]]
    rest = [item for item in seen if item != [2, 4, 6, 8]]
    assert len(good) >= 40 and all(item == 503 or isinstance(item, type) for item in rest), rest
    assert server.service.inflight == 0


def test_answered_requests_leave_nothing_to_the_collector(server: Server) -> None:
    """A request that refers to itself in a circle is freed by collections only, which hold all others up."""
    body = json.dumps(INFER)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.ports["http"], timeout=60)) as connection:
        gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                connection.request("POST", "/v2/models/scale/infer", body)
                assert connection.getresponse().read()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            circles = [type(item).__name__ for item in gc.garbage if isinstance(item, (Exchange, Request))]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert not circles


def test_the_command(tmp_path: Path, engine_cache: Path) -> None:
    add_version(tmp_path, "scale", 1, scale(2.0))
    flags = [
        "--http-port=0",
        "--grpc-port=0",
        "--metrics-port=0",
        "--http-address=127.0.0.1",
        f"--engine-cache={engine_cache}",
    ]
    command = [sys.executable, "-m", "ingot", "serve", str(tmp_path), *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if "listening" in line:
            break
    assert "listening" in lines[-1], "".join(lines)
    port = int(lines[-1].partition("http ")[2].split(",")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v2/models/scale/infer", json.dumps(INFER))
    assert json.loads(connection.getresponse().read())["outputs"][0]["data"] == [2, 4, 6, 8]
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=30)
    connection.close()
    assert process.returncode == 0, rest
