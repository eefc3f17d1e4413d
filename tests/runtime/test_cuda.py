"""CUDA engines from model to result, on a driver that interprets their kernels."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

import ingot
from ingot.errors import ConfigError, DeviceError, EngineError, InputError
from ingot.kernels.cuda import backend
from ingot.plan.plan import GraphSegment, HostSegment
from ingot.runtime import cuda, cuda_executor, dlpack
from ingot.tune import beginnings
from tests.runtime.fake_cuda import FakeDevice, FakeDriver, Pool

ROOT = Path(__file__).parent.parent.parent
DIGITS = ROOT / "examples" / "digits" / "digits.onnx"
TAGGER = ROOT / "examples" / "tagger" / "tagger.onnx"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    made = FakeDriver()
    use(monkeypatch, made)
    return made


def use(monkeypatch: pytest.MonkeyPatch, made: FakeDriver) -> None:
    monkeypatch.setattr(cuda, "_bindings", lambda: made)
    monkeypatch.setattr(cuda, "_DRIVERS", [])
    monkeypatch.setattr(cuda, "_CONTEXTS", {})
    monkeypatch.setattr(cuda_executor, "_LOADED", type(cuda_executor._LOADED)())
    monkeypatch.setattr(backend, "WorkerPool", Pool)
    monkeypatch.setattr(beginnings, "_measure", lambda *_: None)  # interpreted, that takes minutes
    monkeypatch.setattr(beginnings, "_LANES", ())


def build(model: Path, profile: ingot.Profile, **options: Any) -> ingot.Engine:
    return ingot.build(model, target="cuda:sm_90", profiles=[profile], verify=False, level=0, **options)


def digits(**options: Any) -> ingot.Engine:
    return build(DIGITS, ingot.Profile(image=((1, 1, 8, 8), (2, 1, 8, 8), (4, 1, 8, 8))), **options)


def images(count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).uniform(0, 16, (count, 1, 8, 8)).astype(np.float32)


def reference(model: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    engine = ingot.build(model, target="host", verify=False)
    with ingot.Session(engine, device="host") as session:
        return session.run(feeds)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 2e-2)])
def test_digits(fake: FakeDriver, precision: str, tolerance: float) -> None:
    engine = digits(precision=precision)
    assert [type(s) for s in engine.variants[0].plan.segments] == [GraphSegment]
    with ingot.Session(engine, device="cuda") as session:
        for count in (1, 3, 1):
            feeds = {"image": images(count)}
            mine, wanted = session.run(feeds)["scores"], reference(DIGITS, feeds)["scores"]
            np.testing.assert_allclose(mine, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())
    assert fake.calls["cuGraphInstantiate"] == 2  # once per shape
    assert fake.calls["cuGraphLaunch"] == 3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tagger(fake: FakeDriver, precision: str) -> None:
    engine = build(TAGGER, ingot.Profile(ids=((1, 1), (1, 16), (4, 64))), precision=precision)
    ids = np.random.default_rng(0).integers(0, 40, (2, 11))
    with ingot.Session(engine, device="cuda") as session:
        mine = session.run({"ids": ids})
    for name, wanted in reference(TAGGER, {"ids": ids}).items():
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(mine[name], wanted, atol=scale * (5e-2 if precision == "fp16" else 1e-3))


def test_runs_that_follow_each_other_on_the_device(fake: FakeDriver) -> None:
    """The second is begun before the first has ended, and takes numbers that the first one computes."""
    text = '<ir_version: 10, opset_import: ["": 21]> g (int32[N] ids, int32[N] more) => (int32[N] next, int32[N] less)'
    model = onnx.parser.parse_model(text + "{ next = Add(ids, more)\n less = Sub(ids, more) }")
    engine = ingot.build(model, target="cuda:sm_90", profiles=[ingot.Profile(ids=((1,), (8,), (64,)))], verify=False)
    ids, more = np.arange(24, dtype=np.int32), np.full(24, 100, np.int32)
    pairs = np.array([[3, 5], [4, 6], [20, 1]], np.int32)
    wanted = ids.copy()
    wanted[[3, 4, 20]] = [105, 106, 101]
    with ingot.Session(engine, device="cuda") as session:
        one = session.begin({"ids": ids, "more": more}, ["next"])
        two = session.begin({"ids": ids, "more": more}, ["less", "next"], one, {"ids": ("next", pairs)})
        assert one.frame is not two.frame and fake.calls["cuStreamWaitEvent"] == 1
        assert fake.calls["cuMemcpyDtoDAsync"] == 2, "those that lie side by side together"
        assert one.result()["next"].tolist() == (ids + 100).tolist()
        found = two.result()
        assert found["next"].tolist() == (wanted + 100).tolist() and found["less"].tolist() == (wanted - 100).tolist()
        assert session.begin({"ids": ids, "more": more}, [], two).frame in (one.frame, two.frame), "used again"


def test_where_memory_is_short_shapes_of_before_give_theirs_back(fake: FakeDriver) -> None:
    with ingot.Session(digits(), device="cuda") as session:
        session.run({"image": images(1)})
        fake.devices = (FakeDevice(memory=fake.used + 1024),)
        assert session.run({"image": images(3)})["scores"].shape == (3, 10)
        assert fake.calls["cuStreamDestroy"] == 1, "and its stream and graph with it"
        begun = session.begin({"image": images(3)}, ["scores"])
        begun.result()
        fake.devices = (FakeDevice(memory=fake.used + (1 << 16)),)
        begun = session.begin({"image": images(1)}, ["scores"], begun)
        assert begun.result()["scores"].shape == (1, 10) and not fake.calls["cuStreamWaitEvent"], "forgotten: it ended"
        fake.devices = (FakeDevice(memory=fake.used + (1 << 16)),)
        begun = session.begin({"image": images(3)}, ["scores"], begun)
        with pytest.raises(DeviceError, match="are free"):
            session.begin({"image": images(3)}, ["scores"], begun)
        assert begun.result()["scores"].shape == (3, 10), "what is under way keeps what it has"


def test_a_session_on_a_cpu_carries_nothing_over(fake: FakeDriver) -> None:
    engine = ingot.build(DIGITS, target="host", verify=False)
    with ingot.Session(engine, device="host") as session:
        begun = session.begin({"image": images(1)}, ["scores"])
        assert begun.result()["scores"].shape == session.run({"image": images(1)})["scores"].shape
        with pytest.raises(InputError, match="on a GPU alone"):
            session.begin({"image": images(1)}, ["scores"], begun, {"image": ("scores", np.zeros((1, 2), np.int32))})


def test_graphs_are_captured_at_warm_up(fake: FakeDriver) -> None:
    """For the smallest, usual and largest shapes of the profile; runs at these shapes capture none, others one."""
    with ingot.Session(digits(), device="cuda") as session:
        assert session.warm_up() == 3
        captured = fake.calls["cuGraphInstantiate"]
        assert captured == 3
        for count in (1, 2, 4):
            session.run({"image": images(count)})
        assert fake.calls["cuGraphInstantiate"] == captured
        session.run({"image": images(3)})
        assert fake.calls["cuGraphInstantiate"] == captured + 1


def test_a_file_is_as_good(fake: FakeDriver, tmp_path: Path) -> None:
    engine = digits(precision="fp16")
    engine.save(tmp_path / "digits.engine")
    loaded = ingot.Engine.load(tmp_path / "digits.engine")
    feeds = {"image": images(2)}
    with ingot.Session(engine, device="cuda") as a, ingot.Session(loaded, device="cuda:0") as b:
        assert np.array_equal(a.run(feeds)["scores"], b.run(feeds)["scores"])


def test_host_steps_between_graphs(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    from ingot import kernels

    digits()  # registers the kernels
    held = kernels._TABLE["Pool", "cuda"]
    monkeypatch.setitem(kernels._TABLE, ("Pool", "cuda"), [])
    assert held
    engine = digits()
    kinds = [type(s) for s in engine.variants[0].plan.segments]
    assert kinds == [GraphSegment, HostSegment, GraphSegment]
    (host,) = engine.variants[0].plan.host_steps
    assert "no cuda kernel takes Pool" in host.reason and host.step.nodes
    feeds = {"image": images(2)}
    with ingot.Session(engine, device="cuda") as session:
        wanted = reference(DIGITS, feeds)["scores"]
        np.testing.assert_allclose(session.run(feeds)["scores"], wanted, rtol=1e-4, atol=1e-3)
        times = session.profile(feeds)
    assert [t.kernel for t in times].count("host") == 1 and len(times) > 5


def test_profile_names_the_users_nodes(fake: FakeDriver) -> None:
    with ingot.Session(digits(), device="cuda") as session:
        times = session.profile({"image": images(1)})
    assert {"second", "second_norm", "residual", "relu_10"} in [set(t.nodes) for t in times]
    assert all(t.microseconds == pytest.approx(2.0) for t in times)


def test_outputs_into_buffers(fake: FakeDriver) -> None:
    with ingot.Session(digits(), device="cuda") as session:
        feeds, buffer = {"image": images(2)}, np.zeros((2, 10), np.float32)
        result = session.run(feeds, out={"scores": buffer})
        assert result["scores"] is buffer and np.array_equal(buffer, session.run(feeds)["scores"])
        with pytest.raises(ingot.IngotError, match="has shape"):
            session.run(feeds, out={"scores": np.zeros((3, 10), np.float32)})


# tensors that are on the device


def test_results_that_stay_are_taken_as_they_lie(fake: FakeDriver) -> None:
    with ingot.Session(digits(), device="cuda") as session:
        feeds = {"image": images(2)}
        wanted = session.run(feeds)["scores"]
        kept = session.run(feeds, on_device=True)["scores"]
        assert kept.shape == (2, 10) and kept.__dlpack_device__() == (2, 0) and np.array_equal(kept.numpy(), wanted)
        assert kept.__cuda_array_interface__["typestr"] == "<f4"


def test_inputs_and_outputs_on_the_device(fake: FakeDriver) -> None:
    with ingot.Session(digits(), device="cuda") as session:
        lent = [on_device(session, images(2) + k) for k in range(2)]
        targets = [on_device(session, np.zeros((2, 10), np.float32)) for _ in range(2)]
        wanted = [session.run({"image": images(2) + k})["scores"] for k in range(2)]
        graphs, copies = fake.calls["cuGraphInstantiate"], fake.calls["cuMemcpyDtoDAsync"]
        uploads = fake.calls["cuMemcpyHtoDAsync"]
        for _ in range(3):
            for x, y, right in zip(lent, targets, wanted, strict=True):
                assert session.run({"image": x}, out={"scores": y})["scores"] is y
                assert np.array_equal(y.numpy(), right)
        assert fake.calls["cuMemcpyHtoDAsync"] == uploads
        assert fake.calls["cuMemcpyDtoDAsync"] == copies + 4  # in the first run with each pair of addresses
        assert fake.calls["cuGraphInstantiate"] == graphs + 2  # afterwards a graph for each of them
        assert np.array_equal(session.run({"image": images(2)})["scores"], wanted[0])


def on_device(session: ingot.Session, array: np.ndarray[Any, Any]) -> Any:
    """The array in device memory, as somebody else's tensor."""
    context = session._executor.loaded.context  # type: ignore[attr-defined]
    memory = context.allocate(array.nbytes, "a test")
    context.call("cuMemcpyHtoD", memory.address, array.ctypes.data, array.nbytes)
    view = dlpack.View(memory.address, array.shape, array.dtype.name, memory)
    return dlpack.DeviceArray(view, 0, lambda view: cuda_executor._fetch(context, view))


def test_graphs_for_tensors_of_others_are_few(fake: FakeDriver) -> None:
    with ingot.Session(digits(), device="cuda") as session:
        lent = [on_device(session, images(1)) for _ in range(20)]
        for x in lent:
            for _ in range(2):
                session.run({"image": x})
    made, gone = fake.calls["cuGraphInstantiate"], fake.calls["cuGraphExecDestroy"]
    assert made == 21 and gone >= 4


def test_tensors_that_do_not_fit(fake: FakeDriver) -> None:
    with ingot.Session(digits(), device="cuda") as session, ingot.Session(host_digits(), device="host") as host:
        wrong = on_device(session, images(2).astype(np.float64))
        with pytest.raises(ingot.IngotError, match="is float64, the model has float32"):
            session.run({"image": wrong})
        with pytest.raises(ingot.IngotError, match="is on a GPU, the session is not"):
            host.run({"image": wrong})
        with pytest.raises(ingot.IngotError, match="for a session on a GPU"):
            host.run({"image": images(1)}, on_device=True)


def host_digits() -> ingot.Engine:
    return ingot.build(DIGITS, target="host", verify=False)


def test_exported_tensors_live_as_long_as_somebody_has_them(fake: FakeDriver) -> None:
    with ingot.Session(digits(), device="cuda") as session:
        kept = session.run({"image": images(1)}, on_device=True)["scores"]
    before = len(dlpack._ALIVE)
    capsule = kept.__dlpack__(stream=7)
    assert len(dlpack._ALIVE) == before + 1
    del capsule
    assert len(dlpack._ALIVE) == before


def test_ranges_are_called_after_nodes(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def annotate(name: str, domain: str) -> AbstractContextManager[None]:
        names.append(name)
        return nullcontext()

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=annotate))
    monkeypatch.setenv("INGOT_NVTX", "1")
    with ingot.Session(digits(), device="cuda") as session:
        session.run({"image": images(1)})
    assert names[0] == "run" and any("residual" in name and "(conv" in name for name in names)
    assert fake.calls["cuGraphInstantiate"] == 0


def test_weights_are_uploaded_once(fake: FakeDriver) -> None:
    engine = digits()
    with ingot.Session(engine, device="cuda") as a, ingot.Session(engine, device="cuda") as b:
        a.run({"image": images(1)})
        b.run({"image": images(1)})
    assert fake.calls["cuMemcpyHtoD"] == 1


# devices

MIG = FakeDevice("NVIDIA H200 MIG 1g.18gb", "aaaa2222-3333-4444-5555-666677778888")
ANCIENT = FakeDevice("Tesla V100", "bbbb2222-3333-4444-5555-666677778888", (7, 0))


def test_devices_by_number_and_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeDriver((FakeDevice(), MIG, ANCIENT)))
    assert cuda.select("cuda").ordinal == 0
    assert cuda.select("cuda:1").uuid.startswith("MIG-aaaa2222")
    assert cuda.select("cuda:MIG-aaaa2222-3333-4444-5555-666677778888").ordinal == 1
    assert cuda.select("cuda:GPU-bbbb").ordinal == 2
    with pytest.raises(ConfigError, match=r"'cuda:7' is not there: this machine has cuda:0 NVIDIA H200"):
        cuda.select("cuda:7")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=MIG"):
        cuda.select("cuda:MIG-cccc")


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeDriver(failures={"cuInit": 100}))
    with pytest.raises(DeviceError, match="no usable NVIDIA driver"):
        cuda.devices()


def test_driver_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeDriver(version=11040))
    with pytest.raises(DeviceError, match=r"is for CUDA 11\.4, CUDA 12\.0 is the oldest"):
        cuda.devices()


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeDriver(()))
    with pytest.raises(DeviceError, match="lists no GPU"):
        cuda.select("cuda")


def test_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeDriver((ANCIENT,)))
    with pytest.raises(EngineError, match=r"holds cuda sm_90; this machine is with Tesla V100 \(sm_70"):
        ingot.Session(digits(), device="cuda")


RUNS = [((8, 0), {80}), ((8, 9), {80, 86, 89}), ((9, 0), {90}), ((12, 0), {120})]


@pytest.mark.parametrize(("capability", "runs"), RUNS)
def test_what_a_device_runs(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: set[int]) -> None:
    use(monkeypatch, FakeDriver((FakeDevice(capability=capability),)))
    assert {f"sm_{n}" for n in runs} <= cuda.select("cuda").features
    assert not {f"sm_{n}" for n in {80, 86, 89, 90, 100, 120} - runs} & cuda.select("cuda").features


def test_out_of_memory_before_anything_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDriver((FakeDevice(memory=4_000_000),))
    use(monkeypatch, fake)
    with ingot.Session(digits(), device="cuda") as session:
        before = fake.calls["cuMemAlloc"]
        with pytest.raises(DeviceError, match=r"a run at \{'N': 4000\} needs .* MiB, of the .* only .* MiB are free"):
            session._executor.take(((4000, 1, 8, 8),))
        assert fake.calls["cuMemAlloc"] == before


def test_a_fault_ends_the_context(fake: FakeDriver) -> None:
    with ingot.Session(digits(), device="cuda") as session:
        fake.broken = "libdevice"
        for _ in range(2):
            with pytest.raises(DeviceError, match=r"context is gone, start the process anew"):
                session.run({"image": images(1)})


def test_a_fault_is_named_step_by_step(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGOT_CUDA_SYNC", "1")
    with ingot.Session(digits(), device="cuda") as session:
        fake.broken = "tl.dot"
        with pytest.raises(DeviceError, match=r"during step 'relu_3' \(conv, nodes .*stem.*ILLEGAL_ADDRESS"):
            session.run({"image": images(1)})


def test_what_stays_on_the_device_may_be_large(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values, whose kernels count blocks; other tensors are counted in 32 bits."""
    from onnx import helper

    x, y = (helper.make_tensor_value_info(name, 1, ["N", width]) for name, width in (("x", 40), ("y", 1)))
    node = helper.make_node("ReduceMax", ["x"], ["y"], axes=[1])
    model = helper.make_model(helper.make_graph([node], "wide", [x], [y]), opset_imports=[helper.make_opsetid("", 13)])
    engine = ingot.build(model, target="cuda:sm_90", profiles=[ingot.Profile(x=((1, 40), (1, 40), (2, 40)))], level=0,
                         verify=False)  # fmt: skip
    monkeypatch.setattr(cuda_executor, "_MOST_ELEMENTS", 41)
    held = np.arange(80, dtype=np.float32).reshape(2, 40)
    with ingot.Session(engine, device="cuda") as session:
        with pytest.raises(InputError, match="'x' has 2\\^31 elements or more"):
            session.run({"x": held})
        memory = session.context.allocate(held.nbytes, "a test")
        session.context.call("cuMemcpyHtoD", memory.address, held.ctypes.data, held.nbytes)
        session.keep({"x": (memory.address, held.shape)})
        assert session.run({})["y"].tolist() == [[39.0], [79.0]]
