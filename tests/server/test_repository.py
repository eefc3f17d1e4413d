"""Folders, versions, policies, reloads that fail, polling, drains: with models that are no engines."""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ingot.server.config import ModelConfig, read_config
from ingot.server.repository import Repository, in_dependency_order
from ingot.server.request import Code, ServerError
from ingot.server.scheduler import Closed
from ingot.server.service import Service
from ingot.server.statistics import Statistics
from tests.server.fakes import PORTS, Answers, opened, request, scheduler, value_of


@dataclass
class FakeModel:
    """A servable whose answers are twice what they were asked."""

    config: Any
    version: int
    scheduler: Any = field(default_factory=lambda: scheduler(opened()))
    statistics: Statistics = field(default_factory=Statistics)
    ports: Any = PORTS
    pending: int = 0
    closed: bool = False

    def submit(self, asked: Any, done: Any) -> Any:
        return self.scheduler.submit(asked, done)

    def close(self) -> None:
        self.closed = True
        self.scheduler.close()


def load(config: Any, version: int, folder: Path) -> FakeModel:
    """Fails where the version holds a file named broken."""
    if (folder / str(version) / "broken").exists():
        raise ServerError(Code.INVALID_ARG, "it is broken")
    return FakeModel(config, version)


def write(root: Path, name: str, *versions: str, config: str = "") -> None:
    for version in versions:
        (root / name / version).mkdir(parents=True, exist_ok=True)
    if config:
        (root / name / "config.pbtxt").write_text(config)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository((tmp_path,), "explicit", load)


VERSIONS = ("1", "3", "12", "007", "0", "-1", "1a", "tmp")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("", [12]),
        ("version_policy { latest { num_versions: 2 } }", [3, 12]),
        ("version_policy { all {} }", [1, 3, 12]),
        ("version_policy { specific { versions: [ 3, 99 ] } }", [3]),
    ],
)
def test_version_policies(repository: Repository, tmp_path: Path, policy: str, expected: list[int]) -> None:
    write(tmp_path, "m", *VERSIONS, config=policy)
    repository.load("m")
    assert repository.versions("m") == expected
    assert repository.find("m").version == expected[-1]
    repository.close()


def test_a_failed_reload_leaves_the_old_one_serving(repository: Repository, tmp_path: Path) -> None:
    write(tmp_path, "m", "1")
    repository.load("m")
    old = repository.find("m")
    write(tmp_path, "m", "2")
    (tmp_path / "m" / "2" / "broken").touch()
    with pytest.raises(ServerError, match="load failed for model 'm': it is broken"):
        repository.load("m")
    assert repository.find("m") is old and not old.closed  # type: ignore[attr-defined]
    (tmp_path / "m" / "config.pbtxt").write_text("max_batch_size: oops")
    with pytest.raises(ServerError, match=r"config\.pbtxt: 1:17"):
        repository.load("m")
    assert repository.find("m") is old
    states = {(state.version, state.state): state.reason for state in repository.index()}
    assert states == {("1", "READY"): "", ("2", "UNAVAILABLE"): "it is broken"}
    repository.close()


def test_a_reload_replaces_all_at_once_and_closes_the_old(repository: Repository, tmp_path: Path) -> None:
    write(tmp_path, "m", "1")
    repository.load("m")
    old = repository.find("m")
    write(tmp_path, "m", "2")
    repository.load("m")
    assert repository.versions("m") == [2] and old.closed  # type: ignore[attr-defined]
    repository.unload("m")
    with pytest.raises(ServerError, match="has no available versions") as caught:
        repository.find("m")
    assert caught.value.code is Code.NOT_FOUND
    repository.close()


@pytest.mark.parametrize("name", ["", "..", ".", "../m", "a/b", "/etc", ".hidden", "a\0b", "a\\b", "unheard_of"])
def test_names_that_lead_nowhere(repository: Repository, tmp_path: Path, name: str) -> None:
    with pytest.raises(ServerError, match="failed to load"):
        repository.load(name)


def test_a_broken_model_among_good_ones(tmp_path: Path) -> None:
    repository = Repository((tmp_path,), "none", load)
    write(tmp_path, "a", "1", config="this is no configuration")
    write(tmp_path, "b", "1", config='name: "other"')
    write(tmp_path, "c", "1")
    write(tmp_path, "d")
    (tmp_path / "d").mkdir()
    failures = repository.poll()
    assert [servable.config.name for servable in repository.serving()] == ["c"]
    assert len(failures) == 3 and not repository.ready()
    assert "they must be equal" in str(failures[1]) and "no version" in str(failures[2])
    repository.close()


def test_polling_follows_the_folders(tmp_path: Path) -> None:
    repository = Repository((tmp_path,), "poll", load)
    write(tmp_path, "m", "1")
    write(tmp_path, "gone", "1")
    assert not repository.poll() and len(repository.serving()) == 2
    kept = repository.find("m")
    assert not repository.poll() and repository.find("m") is kept
    write(tmp_path, "m", "2")
    os.rmdir(tmp_path / "gone" / "1")
    os.rmdir(tmp_path / "gone")
    assert not repository.poll()
    assert [(s.config.name, s.version) for s in repository.serving()] == [("m", 2)]
    repository.close()


def test_ensembles_load_behind_their_models() -> None:
    def folder(*uses: str) -> Any:
        steps = " ".join(f'step {{ model_name: "{name}" }}' for name in uses)
        return type("Found", (), {"name": "x", "config_text": f"ensemble_scheduling {{ {steps} }}" if uses else ""})

    folders = {"a": folder("c", "b"), "b": folder("c"), "c": folder(), "loop": folder("loop2"), "loop2": folder("loop")}
    assert in_dependency_order(folders) == ["c", "b", "a", "loop", "loop2"]


def test_requests_meet_loads_and_unloads_from_many_threads(repository: Repository, tmp_path: Path) -> None:
    """Whatever is loaded, unloaded or replaced meanwhile, each request gets its own answer or a clear refusal."""
    write(tmp_path, "m", "1")
    repository.load("m")
    service = Service(repository)
    refusals: list[Code] = []
    wrong: list[float] = []
    stop = threading.Event()

    def ask(first: int) -> None:
        for number in range(first, first + 60):
            answers = Answers()
            try:
                service.infer(request(number), answers)
            except ServerError as error:
                refusals.append(error.code)
                continue
            (outcome,) = answers.wait(1)
            wrong.extend([] if value_of(outcome) == number * 2 else [number])

    def change() -> None:
        while not stop.is_set():
            repository.load("m")
            repository.unload("m")

    run_all([lambda first=first: ask(first) for first in range(0, 1600, 100)], [change, change], stop)
    assert not wrong and set(refusals) <= {Code.NOT_FOUND, Code.UNAVAILABLE} and service.inflight == 0
    repository.close()


def run_all(workers: list[Callable[[], None]], changers: list[Callable[[], None]], stop: threading.Event) -> None:
    threads = [threading.Thread(target=worker) for worker in workers]
    changing = [threading.Thread(target=changer) for changer in changers]
    for thread in (*threads, *changing):
        thread.start()
    for thread in threads:
        thread.join(60)
    stop.set()
    for thread in changing:
        thread.join(60)
    assert not any(thread.is_alive() for thread in (*threads, *changing))


def test_nothing_is_taken_after_the_end(repository: Repository, tmp_path: Path) -> None:
    write(tmp_path, "m", "1")
    repository.load("m")
    service = Service(repository)
    service.exiting = service.exiting_soon = True
    with pytest.raises(ServerError, match="shutting down") as caught:
        service.infer(request(1), Answers())
    assert caught.value.code is Code.UNAVAILABLE and not service.ready() and service.inflight == 0
    old = repository.find("m")
    repository.close()
    with pytest.raises(Closed):
        old.submit(request(1), Answers())


def test_a_configuration_is_read_through_its_schema() -> None:
    config = read_config('name: "m" dynamic_batching { preferred_batch_size: [ 4, 8 ] }', "config.pbtxt")
    assert isinstance(config, ModelConfig) and list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    for text in ("nam: 1", "max_batch_size: -99999999999", "input {", 'name: "\\xff"', "\0"):
        with pytest.raises(ServerError) as caught:
            read_config(text, "m/config.pbtxt")
        assert str(caught.value).startswith("m/config.pbtxt: ")
