"""One engine file for several GPU architectures, made where there is none of them."""

from __future__ import annotations

from pathlib import Path

import pytest

import ingot
from ingot.engine import Variant
from ingot.errors import ConfigError, EngineError
from ingot.plan.plan import GraphSegment
from ingot.runtime import cubins
from ingot.runtime.cuda import Device

DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "digits.onnx"
PROFILE = ingot.Profile(image=((1, 1, 8, 8), (4, 1, 8, 8), (8, 1, 8, 8)))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> ingot.Engine:
    path = tmp_path_factory.mktemp("variants") / "digits.engine"
    ingot.build(DIGITS, target="cuda:sm_80,sm_120,sm_90", precision="fp16", level=0, verify=False,
                profiles=[PROFILE]).save(path)  # fmt: skip
    return ingot.Engine.load(path)


def pick(engine: ingot.Engine, capability: int) -> Variant:
    device = Device(0, "a GPU", "GPU-0", capability, 1 << 30)
    return engine.pick(("cuda",), device.features, f"with {device}")


@pytest.mark.parametrize(("capability", "wanted"), [(80, "sm_80"), (86, "sm_80"), (89, "sm_80"), (90, "sm_90"),
                                                    (120, "sm_120")])  # fmt: skip
def test_every_device_gets_its_own(engine: ingot.Engine, capability: int, wanted: str) -> None:
    assert [v.isa for v in engine.variants] == ["sm_120", "sm_90", "sm_80"]
    variant = pick(engine, capability)
    assert variant.isa == wanted
    (segment,) = variant.plan.segments
    assert isinstance(segment, GraphSegment)
    codes = cubins.unpack(variant.code)
    assert {launch.entry for launch in segment.launches} <= codes.keys()


@pytest.mark.parametrize("capability", [75, 100])
def test_a_device_of_another_architecture_is_told_what_there_is(engine: ingot.Engine, capability: int) -> None:
    with pytest.raises(EngineError, match=rf"holds cuda sm_120; cuda sm_90; cuda sm_80; .* \(sm_{capability}, GPU-0\)"):
        pick(engine, capability)


def test_an_unknown_architecture() -> None:
    with pytest.raises(ConfigError, match="no GPU architecture 'sm_77'; choose from sm_80, sm_86, sm_89, sm_90"):
        ingot.build(DIGITS, target="cuda:sm_90,sm_77", level=0, verify=False, profiles=[PROFILE])
