"""--layerPrecisions, --layerOutputTypes, --precisionConstraints: read as trtexec reads them, and kept."""

from pathlib import Path

import onnx_ir
import pytest

from ingot.errors import ConfigError
from ingot.importers import onnx as importer
from ingot.precision import constraints
from ingot.precision.constraints import Settled

DIGITS = Path(__file__).parent.parent.parent / "examples" / "digits" / "digits.onnx"
PRODUCTS = ("stem", "first", "second", "hidden", "scores")


@pytest.fixture(scope="module")
def model() -> onnx_ir.Model:
    return importer.load(DIGITS)


def settled(model: onnx_ir.Model, kind: str, precisions: str = "", outputs: str = "") -> tuple[Settled, list[str]]:
    told: list[str] = []
    rules = constraints.parse(kind, precisions, outputs)
    available = dict.fromkeys(PRODUCTS, ("int8",))
    return constraints.settle(rules, model, available, "fp32", told.append), told


def test_later_ones_override_earlier_ones(model: onnx_ir.Model) -> None:
    found, told = settled(model, "obey", "s*:int8,scores:fp32")
    assert found == Settled({"stem": "int8", "second": "int8"}, frozenset({"scores"})) and not told


def test_a_pattern_without_a_layer_that_can_is_refused(model: onnx_ir.Model) -> None:
    with pytest.raises(ConfigError, match="layer 'stem_norm' cannot be computed in int8"):
        settled(model, "obey", "*_norm:int8")


def test_they_count_only_with_constraints(model: onnx_ir.Model) -> None:
    found, told = settled(model, "none", "stem:int8")
    assert found == Settled() and "count only with --precisionConstraints" in told[0]


def test_obey_refuses_what_cannot_be_had_and_prefer_tells(model: onnx_ir.Model) -> None:
    with pytest.raises(ConfigError, match=r"layer 'stem' cannot be computed in fp8 here, it has int8, fp32"):
        settled(model, "obey", "stem:fp8")
    found, told = settled(model, "prefer", "stem:fp8,first:int8")
    assert found.narrow == {"first": "int8"} and "'stem' cannot be computed in fp8" in told[0]


def test_an_output_type_is_what_the_readers_compute_in(model: onnx_ir.Model) -> None:
    hidden = next(node for node in model.graph if node.name == "hidden")
    maker = hidden.inputs[0].producer()  # type: ignore[union-attr]
    found, _ = settled(model, "obey", outputs=f"{maker.name}:int8")  # type: ignore[union-attr]
    assert found.narrow == {"hidden": "int8"}


@pytest.mark.parametrize(
    ("kind", "precisions", "said"),
    [
        ("obey", "stem", "should read layer:precision"),
        ("obey", "stem:int7", "'stem:int7' should read layer:precision"),
        ("obey", "s*e*m:int8", "more than one"),
        ("prefer", "nothing:int8", "no layer of the model is called 'nothing'"),
        ("always", "", "choose from none, obey, prefer"),
    ],
)
def test_what_cannot_be_read_is_refused(model: onnx_ir.Model, kind: str, precisions: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settled(model, kind, precisions)
