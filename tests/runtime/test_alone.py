"""Kernels whose blocks wait for each other: one such launch on a device at a time, with a processor for each block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import pytest

import ingot
from ingot.errors import DeviceError, EngineError
from ingot.kernels.cuda.build import TOGETHER, FunctionBuilder
from ingot.runtime import cuda
from ingot.runtime.cubins import Code, pack, unpack
from tests.runtime.fake_cuda import FakeDevice, FakeDriver
from tests.runtime.test_cuda import use

CHAIN = Code(b"x", "f", 64, 0, True, True, True)
FAULT = 700


@dataclass
class Watched(FakeDriver):
    """Writes down what streams are told, and what grids are launched."""

    told: list[tuple[Any, ...]] = field(default_factory=list)
    streams: Iterator[int] = field(default_factory=lambda: iter(range(1000, 2000)))

    def _cuStreamCreate(self, flags: int) -> Any:
        return f"stream {next(self.streams)}"

    def _cuEventRecord(self, event: str, stream: Any) -> None:
        self.told.append(("record", stream))

    def _cuStreamWaitEvent(self, stream: Any, event: str, flags: int) -> None:
        self.told.append(("wait", stream))

    def _cuGraphLaunch(self, graph: Any, stream: Any) -> None:
        self.told.append(("run", stream))
        super()._cuGraphLaunch(graph, stream)

    def _cuModuleLoadData(self, code: bytes) -> Any:
        return code if code == b"x" else super()._cuModuleLoadData(code)

    def _cuLaunchKernel(self, function: Any, *rest: Any) -> None:
        if function == b"x":
            self.told.append(("grid", *rest[:3]))
        else:
            super()._cuLaunchKernel(function, *rest)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Watched:
    made = Watched(devices=(FakeDevice(processors=5),))
    use(monkeypatch, made)
    return made


@pytest.fixture
def context(fake: Watched) -> cuda.Context:
    return cuda.context_of(cuda.select("cuda"))


def test_another_stream_waits_for_what_was_alone_before(context: cuda.Context, fake: Watched) -> None:
    for stream in ("a", "a", "b", "b", "a", "c"):
        with context.alone(stream):
            fake.told.append(("put", stream))
    assert fake.told == [
        ("put", "a"), ("record", "a"), ("put", "a"), ("record", "a"), ("wait", "b"), ("put", "b"), ("record", "b"),
        ("put", "b"), ("record", "b"), ("wait", "a"), ("put", "a"), ("record", "a"), ("wait", "c"), ("put", "c"),
        ("record", "c"),
    ]  # fmt: skip
    assert fake.calls["cuEventCreate"] == 1, "one, recorded anew"


def test_threads_put_theirs_one_after_the_other(context: cuda.Context, fake: Watched) -> None:
    begun, done = threading.Event(), threading.Event()

    def second() -> None:
        begun.set()
        with context.alone("b"):
            fake.told.append(("put", "b"))
        done.set()

    thread = threading.Thread(target=second)
    with context.alone("a"):
        thread.start()
        assert begun.wait(10) and not done.wait(0.05)
        fake.told.append(("put", "a"))
    thread.join(10)
    assert fake.told == [("put", "a"), ("record", "a"), ("wait", "b"), ("put", "b"), ("record", "b")]


def test_what_was_put_before_an_error_is_waited_for(context: cuda.Context, fake: Watched) -> None:
    with pytest.raises(ValueError, match="half-way"), context.alone("a"):
        raise ValueError("half-way")
    with context.alone("b"):
        pass
    assert fake.told == [("record", "a"), ("wait", "b"), ("record", "b")]


def test_a_fault_is_told_as_it_was(context: cuda.Context, fake: Watched) -> None:
    """Recording would fail too, with less to say."""
    with pytest.raises(DeviceError, match="during this step"), context.alone("a"):
        fake.fault = FAULT
        context.fail(FAULT, "this step")
    assert not fake.told


@pytest.mark.parametrize(("code", "grid", "launched"), [
    (CHAIN, (132, 1, 1), (5, 1, 1)), (CHAIN, (4, 1, 1), (4, 1, 1)), (CHAIN, (5, 1, 1), (5, 1, 1)),
    (replace(CHAIN, together=False), (132, 2, 1), (132, 2, 1)),
])  # fmt: skip
@pytest.mark.parametrize("version", [12000, 13000])
def test_no_more_blocks_than_processors(context: cuda.Context, fake: Watched, code: Code, grid: tuple[int, ...],
                                        launched: tuple[int, ...], version: int) -> None:  # fmt: skip
    """Others would have to wait for one to end, which waits for them."""
    context.driver.version = version
    kernels = cuda.Kernels(context, {"k": code})
    assert kernels.together == code.together
    for _ in range(2):
        kernels.launch("k", grid, ((), ()), "a")
    assert fake.told == [("grid", *launched)] * 2
    assert fake.calls["cuLaunchKernelEx"] == (2 if version == 13000 else 0)


def test_the_code_section_says_what_is_together() -> None:
    kinds = {"a": (False, False, False), "b": (True, False, False), "c": (True, True, False), "d": (True, True, True)}
    codes = {name: Code(name.encode() * 3, "f", 32, 64, *kind) for name, kind in kinds.items()}
    assert unpack(pack(codes)) == codes
    with pytest.raises(EngineError):
        unpack(pack(codes)[:-300])


def _engine(monkeypatch: pytest.MonkeyPatch, together: bool) -> ingot.Engine:
    """Of one launch, that says of itself that its blocks wait for each other."""
    if together:
        body = FunctionBuilder.launch

        def launch(self: FunctionBuilder, *grid: Any) -> None:
            self.together = True
            body(self, *grid)

        monkeypatch.setattr(FunctionBuilder, "launch", launch)
    text = '<ir_version: 10, opset_import: ["": 21]> g (float[N, 3] x) => (float[N, 3] y) { y = Neg(x) }'
    profile = ingot.Profile(x=((1, 3), (2, 3), (4, 3)))
    return ingot.build(onnx.parser.parse_model(text), target="cuda:sm_90", profiles=[profile], verify=False, level=0)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("together", [True, False])
def test_sessions_of_engines_with_such_kernels_take_turns(fake: Watched, monkeypatch: pytest.MonkeyPatch,
                                                          together: bool, eager: bool) -> None:  # fmt: skip
    """Two sessions on one device; without such kernels nothing is recorded or waited for."""
    if eager:
        monkeypatch.setenv("INGOT_CUDA_SYNC", "1")
    engine = _engine(monkeypatch, together)
    x = np.ones((2, 3), np.float32)
    with ingot.Session(engine, device="cuda") as one, ingot.Session(engine, device="cuda") as two:
        for session in (one, one, two, one):
            assert np.array_equal(session.run({"x": x})["y"], -x)
    told = [what for what, _ in fake.told if what != "grid" and what != "run"]
    turns = ["record", "record", "wait", "record", "wait", "record"]
    assert told == (turns if together else [])
    if together and not eager:
        whats = [what for what, _ in fake.told]
        assert whats == ["run", "record"] * 2 + ["wait", "run", "record"] * 2
        assert len({stream for _, stream in fake.told}) == 2


def test_a_profile_takes_its_turn_too(fake: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine(monkeypatch, True)
    x = np.ones((2, 3), np.float32)
    with ingot.Session(engine, device="cuda") as one, ingot.Session(engine, device="cuda") as two:
        one.run({"x": x})
        fake.told.clear()
        two.profile({"x": x})
    whats = [what for what, _ in fake.told]
    assert whats[0] == "wait" and whats.count("wait") == 1
    assert whats.count("run") == whats.count("record") > 0


def test_a_unit_says_that_its_blocks_wait_for_each_other(fake: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    for together in (False, True):
        engine = _engine(monkeypatch, together)
        codes = unpack(engine.variants[0].code)
        assert [code.together for code in codes.values()] == [together]
        assert all((TOGETHER.encode() in bytes(code.cubin)) == together for code in codes.values())
