"""The example of sentences to vectors: an ensemble of a tokeniser in Python, MiniLM and a pool in Python."""

import importlib.metadata
import json
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from examples.minilm import PACKAGE
from examples.sentences.write import write_repository
from ingot.server.app import BackgroundServer
from tests.examples.test_minilm import PUBLISHED, SENTENCES
from tests.server.conftest import options

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
try:
    importlib.metadata.version(PACKAGE)
except importlib.metadata.PackageNotFoundError:
    pytest.skip(f"{PACKAGE} is not installed (scripts/test installs it)", allow_module_level=True)


def test_sentences(tmp_path: Path, engine_cache: Path) -> None:
    """Similarities are the published ones, for requests of one sentence and of three."""
    with BackgroundServer(options(write_repository(tmp_path), engine_cache)) as server:
        address = f"http://127.0.0.1:{server.ports['http']}/v2/models/sentences/infer"

        def vectors(*texts: str) -> np.ndarray:
            entry = {"name": "text", "datatype": "BYTES", "shape": [len(texts), 1], "data": texts}
            (output,) = json.load(urllib.request.urlopen(address, json.dumps({"inputs": [entry]}).encode()))["outputs"]
            return np.array(output["data"]).reshape(output["shape"])

        together = vectors(*SENTENCES)
        alone = np.concatenate([vectors(text) for text in SENTENCES])
        assert server.repository.find("tokenise").statistics.counts.inferences == 6
    np.testing.assert_allclose(together @ together.T, PUBLISHED, atol=2e-4)
    np.testing.assert_allclose(alone, together, atol=1e-4)
