"""The example of docs/plugins.md runs as it stands there."""

import re
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

import ingot
from ingot import plugins
from ingot.errors import ConfigError, UnsupportedOperator
from ingot.importers.onnx import load
from ingot.ir import oracle, shapes

DOCUMENT = Path(__file__).parents[2] / "docs" / "plugins.md"
MODEL = """<ir_version: 8, opset_import: ["" : 17, "acme": 1]> g (float[N,6] x) => (float[N,3] y, bool[N,3] z) {
  c = acme.Softcap<cap=2.0>(x)
  r = Relu(c)
  y, z = acme.PairSums(r)
}"""


@pytest.fixture(scope="module", autouse=True)
def example():
    """Refused before, then the document's code."""
    with pytest.raises(UnsupportedOperator, match=r"acme::Softcap .*acme::PairSums .*@ingot.plugin"):
        load(onnx.parser.parse_model(MODEL))
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    namespace = {}
    exec(compile(code, str(DOCUMENT), "exec"), namespace)
    return namespace


def test_the_example_imports_infers_and_runs(example):
    model = load(onnx.parser.parse_model(MODEL))
    shapes.infer(model)
    assert [shapes.shape_of(output) for output in model.graph.outputs] == [("N", 3), ("N", 3)]
    x = np.linspace(-5, 5, 12, dtype=np.float32).reshape(2, 6)
    capped = np.maximum(np.tanh(x / 2) * 2, 0)
    outputs = oracle.evaluate_model(model, {"x": x})
    np.testing.assert_allclose(outputs["y"], capped[:, 0::2] + capped[:, 1::2], rtol=1e-6)
    np.testing.assert_array_equal(outputs["z"], outputs["y"] > 0)


def test_a_plugin_is_a_function(example):
    x = np.float32([-100, 0, 100])
    np.testing.assert_allclose(example["softcap"](x, cap=2.0), [-2, 0, 2], atol=1e-6)
    assert plugins.registered()["acme", "Softcap"] is example["softcap"]


@pytest.mark.parametrize("name", ["Softcap", "::Softcap", "acme::", "ai.onnx::Relu", "ingot::Linear"])
def test_a_plugin_needs_a_domain_of_its_own(name):
    with pytest.raises(ConfigError, match="domain"):
        ingot.plugin(name)


def test_a_second_plugin_of_the_same_name_is_refused(example):
    with pytest.raises(ConfigError, match="registered already"):
        ingot.plugin("acme::Softcap")(lambda x: x)
