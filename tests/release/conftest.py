"""A real PostgreSQL for the whole run, where Debian's is installed."""

import glob
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.server_load import free_port
from tests.release.bench import Bench, Server


def postgres_tools() -> Path | None:
    """The folder that holds initdb and postgres."""
    folders = [
        *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True),
        os.path.dirname(shutil.which("initdb") or ""),
    ]
    return next((Path(folder) for folder in folders if folder and (Path(folder) / "initdb").exists()), None)


def postgres_user() -> str | None:
    """PostgreSQL refuses to run as root: then Debian's own user, if there is one."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    if "postgres" not in names:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres: apt install postgresql")
    return "postgres"


class PostgresServer:
    """Started and stopped at will: a database that goes away is one of the tests."""

    def __init__(self, folder: Path) -> None:
        tools = postgres_tools()
        if tools is None:
            pytest.skip("no PostgreSQL here: apt install postgresql (.ci/run does so)")
        self.folder, self.tools, self.user, self.port = folder, tools, postgres_user(), free_port()
        if self.user is not None:
            shutil.chown(folder, self.user)
        self._run("initdb", "-A", "trust", "-U", "postgres", "--no-sync", str(folder / "data"))
        self.start()

    def _run(self, tool: str, *arguments: str) -> None:
        command = [str(self.tools / tool), *arguments]
        subprocess.run(command, check=True, capture_output=True, user=self.user, cwd=self.folder)

    def start(self) -> None:
        settings = f"-p {self.port} -k {self.folder} -h 127.0.0.1 -F"
        self._run(
            "pg_ctl", "-D", str(self.folder / "data"), "-l", str(self.folder / "log"), "-w", "-o", settings, "start"
        )

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")

    def database(self) -> str:
        """The URL of a new one."""
        import psycopg

        name = f"db{uuid.uuid4().hex[:12]}"
        with psycopg.connect(f"postgresql://postgres@127.0.0.1:{self.port}/postgres", autocommit=True) as connection:
            connection.execute(f"create database {name}")
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    folder = Path(tempfile.mkdtemp(prefix="ingot-pg-", dir="/tmp"))
    folder.chmod(0o755)
    server = PostgresServer(folder)
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh store of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/release.db"
    url: str = request.getfixturevalue("postgres").database()
    return url


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def bench(tmp_path: Path, server: Server) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(extra: str, versions: str = "") -> Bench:
        made.append(Bench(tmp_path, server, extra, versions))
        return made[-1]

    yield make
    for one in made:
        one.close()
