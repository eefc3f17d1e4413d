"""Ranks on GPUs: their sums are launches of one graph; who cannot use NCCL, and who ends, is told of to all."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import ingot
from ingot import compiler
from ingot.config import BuildConfig, Profile
from ingot.errors import DeviceError, IngotError
from ingot.ir.graph import make_node, set_type
from ingot.ir.ops_table import TensorType
from ingot.plan.plan import CollectiveSegment, GraphSegment
from ingot.report import BuildLog
from ingot.runtime import nccl
from ingot.runtime.group import GroupLost, SharedGroup, shared_groups
from ingot.runtime.session import Session
from tests.runtime.fake_cuda import FakeDevice, FakeDriver
from tests.runtime.test_cuda import use

Array = np.ndarray[Any, Any]
TWO = (FakeDevice(), FakeDevice(uuid="22222222-3333-4444-5555-666677778888"))
KEY = bytes(range(128))
_TYPES = {number: np.dtype(name) for name, number in nccl._TYPES.items() if name != "bfloat16"}


@dataclass
class FakeNccl:
    """The functions of nccl4py's bindings that Ingot calls; a handle is a rank, data go through its group."""

    driver: FakeDriver
    groups: list[SharedGroup]
    NCCLError: type[Exception] = ValueError
    failing: str = ""
    refused: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))
    calls: Counter[str] = field(default_factory=Counter)

    def get_version(self) -> int:
        return 22809

    def get_unique_id(self) -> bytes:
        return KEY

    def comm_init_rank_scalable(self, ranks: int, rank: int, keys: int, key: bytearray, config: int) -> int:
        assert (ranks, keys, config) == (2, 1, 0) and bytes(key) == KEY
        if self.failing == "comm_init":
            raise ValueError("unhandled cuda error")
        return rank + 1

    def all_reduce(self, source: int, target: int, count: int, kind: int, how: int, handle: int, stream: int) -> None:
        assert how == 0
        self._put("all_reduce", source, target, count, kind, handle)

    def all_gather(self, source: int, target: int, count: int, kind: int, handle: int, stream: int) -> None:
        self._put("all_gather", source, target, count, kind, handle)

    def _put(self, name: str, source: int, target: int, count: int, kind: int, handle: int) -> None:
        self.calls[name] += 1
        if self.failing == name:
            self.refused.wait(30.0)  # a rank that has failed leaves, which the other would be told of instead
            raise ValueError("invalid usage")
        size = count * _TYPES[kind].itemsize

        def exchange() -> None:
            x = np.frombuffer(ctypes.string_at(source, size), _TYPES[kind])
            y: Array = getattr(self.groups[handle - 1], name)(x)
            ctypes.memmove(target, y.tobytes(), y.nbytes)

        assert self.driver.recording is not None, "collectives belong into graphs"
        self.driver.recording.append(exchange)

    def comm_destroy(self, handle: int) -> None:
        self.calls["comm_destroy"] += 1

    def comm_abort(self, handle: int) -> None:
        self.calls["comm_abort"] += 1


def engine() -> ingot.Engine:
    """gathered = all of: 2 · the sum of all (x + 1)"""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21, "ingot": 1}, name="ranks")
    x = ir.Value(name="x")
    set_type(x, TensorType("float32", ("N", 4)))
    graph.inputs.append(x)
    add, double = ({"expression": f"{word} -> float32"} for word in ("Add %0 1.0", "Mul %0 2.0"))
    ranks: dict[str, Any] = {"ranks": 2}
    for op, attributes in (("Pointwise", add), ("AllReduce", ranks), ("Pointwise", double), ("AllGather", ranks)):
        node = make_node(op, [x], attributes, name=f"{op}{len(graph)}")
        graph.append(node)
        x = node.outputs[0]
        x.name = node.name
    graph.outputs.append(x)
    model = ir.Model(graph, ir_version=10)
    config = BuildConfig(target="cuda:sm_90", profiles=[Profile(x=((1, 4), (2, 4), (3, 4)))], level=0, verify=False)
    return compiler.package(model, compiler.compile_variants(model, model, config, BuildLog()), config, BuildLog())


def together(work: Callable[[int, SharedGroup], Any]) -> list[Any]:
    """What the ranks' threads return, or their errors."""

    def guarded(group: SharedGroup) -> Any:
        with closing(group):
            try:
                return work(group.rank, group)
            except IngotError as error:
                return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(guarded, shared_groups(2)))


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNccl]:
    """NCCL between two GPUs."""
    driver, groups = FakeDriver(TWO), shared_groups(2)
    use(monkeypatch, driver)
    library = FakeNccl(driver, groups)
    monkeypatch.setattr(nccl, "_library", lambda: library)
    yield library
    for group in groups:
        group.close()


def doubled(made: ingot.Engine, device: str, group: SharedGroup) -> list[Array]:
    """Two runs of a rank's session, and one of another size."""
    with closing(Session(made, device, group=group)) as session:
        found = [session.run({"x": np.full((n, 4), group.rank + n, np.float32)})["AllGather3"] for n in (2, 2, 3)]
        assert session.goes_on == bool(session._executor.ranks)  # type: ignore[attr-defined]
        return found


def test_sums_are_in_one_graph(two: FakeNccl) -> None:
    driver, made = two.driver, engine()
    kinds = [type(s) for s in made.variants[0].plan.segments]
    assert kinds == [GraphSegment, CollectiveSegment, GraphSegment, CollectiveSegment]
    for found in together(lambda rank, group: doubled(made, f"cuda:{rank}", group)):
        assert [x.tolist() for x in found] == [np.full((2, n, 4), 4 * n + 6).tolist() for n in (2, 2, 3)]
    assert driver.calls["cuGraphInstantiate"] == 4 and driver.calls["cuGraphLaunch"] == 6  # two sizes, two ranks
    assert driver.calls["cuGraphExecDestroy"] >= 4
    assert two.calls == {"all_reduce": 4, "all_gather": 4, "comm_destroy": 2}


def behind(made: ingot.Engine, device: str, group: SharedGroup) -> list[Array]:
    """Two runs of a rank's session, the second begun before anybody has waited for the first."""
    with closing(Session(made, device, group=group)) as session:
        assert session.goes_on
        first = session.begin({"x": np.ones((2, 4), np.float32)}, ["AllGather3"])
        second = session.begin({"x": np.full((2, 4), group.rank + 2, np.float32)}, ["AllGather3"], first)
        return [run.result()["AllGather3"] for run in (first, second)]


def test_runs_of_ranks_follow_each_other(two: FakeNccl) -> None:
    made = engine()
    for found in together(lambda rank, group: behind(made, f"cuda:{rank}", group)):
        assert [x.tolist() for x in found] == [np.full((2, 2, 4), n).tolist() for n in (8, 14)]


def test_steps_are_timed_one_by_one(two: FakeNccl) -> None:
    made = engine()

    def work(rank: int, group: SharedGroup) -> list[str]:
        with closing(Session(made, f"cuda:{rank}", group=group)) as session:
            return [step.name for step in session.profile({"x": np.ones((2, 4), np.float32)})]

    assert together(work) == [["Pointwise0", "AllReduce1", "Pointwise2", "AllGather3"]] * 2


@pytest.mark.parametrize("why", ["one GPU", "no NCCL"])
def test_the_host_adds_up_where_nccl_cannot(why: str, two: FakeNccl, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = two.driver
    driver.devices = TWO if why == "no NCCL" else TWO[:1]
    if why == "no NCCL":
        monkeypatch.setattr(two, "get_version", lambda: (_ for _ in ()).throw(ImportError("no libnccl.so.2")))
    made = engine()
    for found in together(lambda rank, group: doubled(made, f"cuda:{rank}" if why == "no NCCL" else "cuda", group)):
        assert found[0].tolist() == np.full((2, 2, 4), 14).tolist()
    assert not two.calls and driver.calls["cuGraphInstantiate"] == 8  # a graph for each segment of kernels


@pytest.mark.parametrize(("failing", "words"), [
    ("comm_init", r"rank \d cannot reach the others' GPUs through NCCL \(unhandled"),
    ("all_reduce", r"NCCL failed among 2 ranks \(invalid usage\)"),
])  # fmt: skip
def test_what_nccl_refuses(failing: str, words: str, two: FakeNccl) -> None:
    two.failing, made = failing, engine()
    for error in together(lambda rank, group: doubled(made, f"cuda:{rank}", group)):
        with pytest.raises(DeviceError, match=words):
            raise error


def test_a_rank_that_ends_ends_what_waits_on_the_gpu(two: FakeNccl) -> None:
    made = engine()

    def work(rank: int, group: SharedGroup) -> None:
        session = Session(made, f"cuda:{rank}", group=group)
        ranks = session._executor.ranks  # type: ignore[attr-defined]
        assert group.ended(0.0) == ""
        group.all_gather(np.ones(1))
        if rank:
            return  # as a process that is killed
        ranks._watcher.join(30.0)
        assert group.ended(0.0) == "rank 1 of 2 has ended"
        with pytest.raises(GroupLost, match="rank 1 of 2 has ended"):
            session.run({"x": np.ones((2, 4), np.float32)})
        session.close()

    assert together(work) == [None, None]
    assert two.calls["comm_abort"] >= 1 and not two.calls["comm_destroy"]
