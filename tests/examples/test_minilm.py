"""The MiniLM graph means what sentence-transformers' model means."""

import importlib.metadata

import numpy as np
import pytest

from examples.minilm import PACKAGE, minilm_config, minilm_model, tokenize

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
try:
    importlib.metadata.version(PACKAGE)
except importlib.metadata.PackageNotFoundError:
    pytest.skip(f"{PACKAGE} is not installed (scripts/test installs it)", allow_module_level=True)

# The example at the head of sentence-transformers' README, with the figures printed there for all-MiniLM-L6-v2.
SENTENCES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
PUBLISHED = np.array([[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]])


def test_similarities_are_the_published_ones() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(minilm_model().SerializeToString(), providers=["CPUExecutionProvider"])
    vectors = session.run(None, tokenize(SENTENCES))[0]
    np.testing.assert_allclose(vectors @ vectors.T, PUBLISHED, atol=1e-4)
    padded = session.run(None, tokenize(SENTENCES, length=48))[0]
    np.testing.assert_allclose(padded, vectors, atol=1e-5)


def test_tokenizer_pads_and_truncates() -> None:
    inputs = tokenize(["short", "a rather longer sentence than the first"], length=6)
    assert {array.shape for array in inputs.values()} == {(2, 6)}
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert inputs["input_ids"][0, 0] == 101


def test_configuration_is_the_packages_own() -> None:
    config = minilm_config()
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (6, 384, 12)
