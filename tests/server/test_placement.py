"""Where instances run, by what a configuration says, what an engine holds and what is here."""

from pathlib import Path

import pytest

from ingot.server import placement
from ingot.server.app import BackgroundServer
from ingot.server.config import read_config
from ingot.server.placement import Place, places_of, threads_each, wants_gpu
from ingot.server.request import ServerError
from tests.server.conftest import options
from tests.server.models import add_version, scale

CPU, GPU = ["cpu", "host"], ["cuda"]


def config(text: str) -> object:
    return read_config(f'name: "m" {text}', "config.pbtxt")


@pytest.mark.parametrize(
    ("text", "targets", "wanted"),
    [
        ("", CPU, ["cpu"]),
        ("instance_group { count: 3 }", CPU, ["cpu"] * 3),
        ("instance_group { kind: KIND_CPU count: 2 } instance_group { count: 1 }", CPU, ["cpu"] * 3),
        ("instance_group { kind: KIND_GPU }", GPU, ["cuda"]),
        ("instance_group { kind: KIND_GPU count: 2 gpus: [ 0, 3 ] }", GPU, ["cuda:0", "cuda:0", "cuda:3", "cuda:3"]),
        ("instance_group { gpus: [ 1 ] }", [*CPU, *GPU], ["cuda:1"]),
        ("instance_group { kind: KIND_GPU } instance_group { kind: KIND_CPU }", [*CPU, *GPU], ["cuda", "cpu"]),
        ("instance_group { kind: KIND_AUTO }", GPU, ["cuda"]),
        ("instance_group { kind: KIND_MODEL }", CPU, ["cpu"]),
    ],
)
def test_groups(text: str, targets: list[str], wanted: list[str]) -> None:
    assert [place.device for place in places_of(config(text), targets)] == wanted


@pytest.mark.parametrize("here", [True, False])
def test_an_engine_for_both_runs_where_it_can(here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "features", lambda _: frozenset({"sm_90"} if here else ()))
    found = places_of(config("instance_group { kind: KIND_AUTO }"), [*CPU, *GPU])
    assert [place.device for place in found] == (["cuda"] if here else ["cpu"])


def named(devices: str, more: str = "instance_group {}") -> object:
    return config(f'parameters {{ key: "device" value {{ string_value: "{devices}" }} }} {more}')


def test_devices_by_name() -> None:
    """A MIG instance is seen by a process that starts with its name, and by that alone."""
    asked = named("cuda:GPU-3f2a, cuda:MIG-aa,cuda:MIG-bb", "instance_group { count: 2 }")
    first, second, third = Place("cuda:GPU-3f2a"), Place("cuda", "MIG-aa"), Place("cuda", "MIG-bb")
    assert places_of(asked, GPU) == [first, first, second, second, third, third]
    assert wants_gpu(asked) and not wants_gpu(named("cpu")) and not wants_gpu(config(""))
    assert wants_gpu(config("instance_group { kind: KIND_GPU }"))


@pytest.mark.parametrize(
    ("asked", "targets", "words"),
    [
        (config("instance_group { kind: KIND_GPU }"), CPU, "its engine runs on the CPU"),
        (config("instance_group { kind: KIND_CPU }"), GPU, "its engine is for a GPU"),
        (named("tpu"), CPU, "the parameter 'device' takes"), (named("cpu:1"), CPU, "the parameter 'device' takes"),
        (named("cuda"), CPU, "its engine runs on the CPU"),
    ],
)  # fmt: skip
def test_what_cannot_be(asked: object, targets: list[str], words: str) -> None:
    with pytest.raises(ServerError, match=words):
        places_of(asked, targets)


def test_instances_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "usable_threads", lambda: 8)
    cpu, gpu = Place("cpu"), Place("cuda")
    assert threads_each([cpu]) is threads_each([gpu, gpu, cpu]) is None
    assert [threads_each([cpu] * count) for count in (2, 3, 8, 20)] == [4, 2, 1, 1]


@pytest.mark.parametrize("processes", [True, False])
def test_a_server_refuses_what_cannot_be(tmp_path: Path, engine_cache: Path, processes: bool) -> None:
    add_version(tmp_path, "scale", 1, scale(2.0))
    text = (
        'instance_group { count: 2 kind: KIND_CPU } parameters { key: "device" value { string_value: "cuda:MIG-x" } }'
    )
    (tmp_path / "scale" / "config.pbtxt").write_text(text)
    server = BackgroundServer(options(tmp_path, engine_cache, processes=processes))
    with pytest.raises(ServerError, match="scale"), server:
        pass


def test_a_worker_sees_its_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from ingot.server import worker

    seen = []
    monkeypatch.setattr(worker.subprocess, "Popen", lambda *_, **more: seen.append(more["env"]))
    for visible in ("MIG-x", ""):
        worker.spawned(["nothing"], visible)[1].close()
    assert seen[0]["CUDA_VISIBLE_DEVICES"] == "MIG-x" and "PATH" in seen[0] and seen[1] is None
