"""float16 that would overflow: observed on data, kept in float32, named with its range."""

import numpy as np
import pytest

import ingot
from benchmarks.precision_overflow import halved, imported, layer_norm, measure, naively_cast, samples
from ingot.ir.oracle import compile_model, trace_model
from ingot.precision import overflow
from ingot.report import BuildLog


@pytest.mark.parametrize(("scale", "kept"), [(2.0, []), (100.0, ["h"])])
def test_naive_casting_overflows_and_ingot_holds(scale: float, kept: list[str]) -> None:
    model, data = imported(), samples(scale)
    wanted = compile_model(model)(data[0])["y"]
    half = {"x": data[0]["x"].astype(np.float16)}
    assert np.isinf(trace_model(naively_cast(layer_norm()), half)["squares"]).any()

    found = overflow.find(model, overflow.observe(model, data))
    log = BuildLog()
    mine = compile_model(halved(model, overflow.kept(found), log))(data[0])["y"]
    assert np.isfinite(mine).all() and np.abs(mine - wanted).max() < 0.01 * np.abs(wanted).max()

    assert "the_squares" in [o.node for o in found if o.inside]
    assert [o.value for o in found if not o.inside] == kept
    assert [n.node for n in log.notices if n.kind == "kept in float32"] == [f"the_{name}" for name in kept]


def test_without_the_analysis_the_large_tensor_is_lost() -> None:
    model, data = imported(), samples(100.0)
    mine = compile_model(halved(model, {}, BuildLog()))(data[0])["y"]
    assert not np.isfinite(mine).all()


def test_the_range_is_that_of_the_samples_and_said() -> None:
    model, data = imported(), samples(100.0)
    ranges = overflow.observe(model, data)
    h = np.concatenate([trace_model(model, sample)["h"] for sample in data])
    assert ranges["h"] == (h.min(), h.max())
    said = [str(o) for o in overflow.find(model, ranges) if o.value == "h"]
    assert said == [f"the_h: h ranges from {h.min():.4g} to {h.max():.4g}; kept in float32"]


def test_small_numbers_keep_everything_narrow() -> None:
    model = imported()
    assert overflow.find(model, overflow.observe(model, samples(0.01))) == []


def test_an_engine_for_a_gpu_says_what_it_keeps() -> None:
    model, data = imported(), samples(100.0)
    overflows = overflow.kept(overflow.find(model, overflow.observe(model, data)))
    engine = ingot.build(model, target="cuda:sm_90", precision="fp16", overflows=overflows, level=0, verify=False,
                         profiles=[ingot.Profile(x=(4, 64))])  # fmt: skip
    assert any(notice.startswith("kept in float32: the_h: h ranges from") for notice in engine.details["notices"])
    assert engine.details["config"]["overflows"].keys() == {"h"}


def test_the_benchmark_says_so() -> None:
    row = measure(100.0)
    assert row.passed and row.naive_infinite[0] == "h" and row.kept[0].startswith("the_h: h ranges from")
