"""Where instances run, by what a configuration says, what an engine holds and what is here."""

import os
from pathlib import Path

import pytest

from ingot.errors import ConfigError
from ingot.server import placement
from ingot.server.app import BackgroundServer
from ingot.server.config import read_config
from ingot.server.placement import Place, available_cores, places_of, read_policies, threads_of, wants_gpu
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
    assert threads_of(cpu, [cpu]) is threads_of(cpu, [gpu, gpu, cpu]) is None
    assert [threads_of(cpu, [cpu] * count) for count in (2, 3, 8, 20)] == [4, 2, 1, 1]
    few = Place("cpu", cores=(0, 1, 2, 5))
    assert threads_of(few, [cpu, few, few]) == 2 and threads_of(few, [few, cpu]) is None


def test_host_policies(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(placement, "available_cores", lambda: set(range(8)))
    policies = read_policies(["near,cpu-cores=0-2,5", "far,cpu-cores=7"])
    assert policies == {"near": (0, 1, 2, 5), "far": (7,)}
    asked = config('instance_group { count: 2 host_policy: "near" } instance_group { host_policy: "gone" }')
    near = Place("cpu", cores=(0, 1, 2, 5))
    assert places_of(asked, CPU, policies) == [near, near, Place("cpu")]
    assert "no host policy 'gone'" in caplog.text and near.apart and not Place("cpu").apart


@pytest.mark.parametrize(
    ("flag", "words"),
    [("near", "takes NAME"), ("near,cores=1", "takes NAME"), (",cpu-cores=1", "takes NAME"),
     ("a,cpu-cores=", "is no core"), ("a,cpu-cores=2-1", "is no core"), ("a,cpu-cores=0,x", "is no core"),
     ("a,cpu-cores=0-4095", "is none of this process's"), ("a,numa-node=4096", "no NUMA node"),
     ("a,numa-node=../x", "no NUMA node")],
)  # fmt: skip
def test_host_policies_that_are_refused(flag: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_policies([flag])


def test_instances_keep_to_their_cores(tmp_path: Path, engine_cache: Path) -> None:
    """Each group has a process on the cores of its policy, and keeps them when it is started again."""
    first = min(available_cores())
    text = 'name: "scale" max_batch_size: 4 instance_group { host_policy: "one" } instance_group {}'
    add_version(tmp_path, "scale", 1, scale(2.0), config=text)
    policies = {"one": (first,)}
    with BackgroundServer(options(tmp_path, engine_cache, processes=True, host_policies=policies)) as server:
        workers = server.repository.find("scale").workers
        assert {len(os.sched_getaffinity(worker.pid)) for worker in workers} == {1, len(available_cores())}
        (kept,) = [worker for worker in workers if os.sched_getaffinity(worker.pid) == {first}][:1]
        kept.line(dead=kept.generation).close()
        assert kept.generation == 2 and os.sched_getaffinity(kept.pid) == {first}
    with (
        pytest.raises(ServerError, match="needs a process of its own"),
        BackgroundServer(options(tmp_path, engine_cache, processes=False, host_policies=policies)),
    ):
        pass


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
        worker.spawned(["nothing"], Place("cuda", visible))[1].close()
    assert seen[0]["CUDA_VISIBLE_DEVICES"] == "MIG-x" and "PATH" in seen[0] and seen[1] is None
