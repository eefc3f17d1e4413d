"""The trained digits model, served: as accurate as it is, batched by the server."""

import json
import shutil
import threading
import urllib.request
from pathlib import Path

import numpy as np

from ingot.server.app import BackgroundServer
from tests.server.conftest import options

DIGITS = Path(__file__).parents[2] / "examples" / "digits"


def test_digits(tmp_path: Path, engine_cache: Path) -> None:
    (tmp_path / "digits" / "1").mkdir(parents=True)
    shutil.copy(DIGITS / "digits.onnx", tmp_path / "digits" / "1" / "model.onnx")
    held_out = np.load(DIGITS / "heldout.npz")
    images, labels = (held_out[name] for name in sorted(held_out.files, key=lambda name: -held_out[name].ndim))
    images, labels = images[:64].astype(np.float32), labels[:64]
    found: dict[int, int] = {}
    with BackgroundServer(options(tmp_path, engine_cache)) as server:
        ports = server.repository.find("digits").ports
        address = f"http://127.0.0.1:{server.ports['http']}/v2/models/digits/infer"

        def ask(first: int) -> None:
            for number in range(first, first + 8):
                shape = [1, *ports.inputs[0].dims]
                entry = {"name": ports.inputs[0].name, "datatype": "FP32", "shape": shape}
                entry["data"] = images[number].ravel().tolist()
                answer = json.load(urllib.request.urlopen(address, json.dumps({"inputs": [entry]}).encode()))
                found[number] = int(np.argmax(answer["outputs"][0]["data"]))

        threads = [threading.Thread(target=ask, args=(first,)) for first in range(0, 64, 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statistics = server.repository.find("digits").statistics
        assert statistics.counts.inferences == 64
    assert np.mean([found[number] == labels[number] for number in range(64)]) > 0.95
