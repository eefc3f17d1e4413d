"""torch modules through torch's exporter, compared with torch itself."""

import numpy as np
import pytest

from ingot.errors import ConfigError, ImportFailure
from ingot.importers import torch as importer
from ingot.ir import oracle, shapes

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")


class Classifier(torch.nn.Module):
    """Convolution, normalisation, activation, pooling, projection."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x, scale=None):
        y = torch.nn.functional.silu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(y if scale is None else y * scale)


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return Classifier().train()


def test_free_dimensions_are_symbols_and_the_result_is_torchs(module):
    model = importer.load(module, torch.randn(2, 3, 16, 16), dynamic={"x": {0: "N"}})
    assert module.training, "the module's mode is put back"
    shapes.infer(model)
    (x,), (y,) = model.graph.inputs, model.graph.outputs
    assert (x.name, shapes.shape_of(x), shapes.shape_of(y)) == ("x", ("N", 3, 16, 16), ("N", 5))
    example = torch.randn(5, 3, 16, 16)
    outputs = oracle.evaluate_model(model, {"x": example.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(outputs[y.name], module.eval()(example), rtol=1e-4, atol=1e-5)


def test_several_inputs_by_position(module):
    model = importer.load(module, (torch.randn(2, 3, 8, 8), torch.randn(8)))
    assert [value.name for value in model.graph.inputs] == ["x", "scale"]


def test_what_torch_cannot_export_is_one_error():
    class Branching(torch.nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(ImportFailure, match="torch cannot export Branching"):
        importer.load(Branching(), torch.randn(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((lambda x: x, torch.zeros(1)), "expected"), ((torch.nn.ReLU(), (torch.zeros(1),) * 2), "takes 1 inputs")],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        importer.load(*arguments)


def test_unknown_dynamic_input():
    with pytest.raises(ConfigError, match=r"\['y'\]"):
        importer.load(torch.nn.ReLU(), torch.zeros(2), dynamic={"y": {0: "N"}})


def test_without_torch_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ConfigError, match=r"pip install 'ingot\[torch\]'"):
        importer.load(object(), ())
