"""Models on a GPU behind the server, with processes and without; runs only where there is one."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from ingot.client import Client
from ingot.errors import IngotError
from ingot.runtime.session import features
from ingot.server.app import BackgroundServer
from tests.server.conftest import options
from tests.server.test_examples import DIGITS
from tests.server.test_metrics import page, parsed

CONFIG = """
max_batch_size: 16
input [ { name: "image" data_type: TYPE_FP32 dims: [ 1, 8, 8 ] } ]
output [ { name: "scores" data_type: TYPE_FP32 dims: [ 10 ] } ]
instance_group { kind: KIND_GPU count: 2 gpus: [ 0 ] }
"""


def there_is_a_gpu() -> bool:
    try:
        return bool(features("cuda"))
    except IngotError:
        return False


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not there_is_a_gpu(), reason="no GPU")]


@pytest.mark.parametrize("processes", [True, False])
def test_digits_on_a_gpu(tmp_path: Path, engine_cache: Path, processes: bool) -> None:
    (tmp_path / "digits" / "1").mkdir(parents=True)
    shutil.copy(DIGITS / "digits.onnx", tmp_path / "digits" / "1" / "model.onnx")
    (tmp_path / "digits" / "config.pbtxt").write_text(CONFIG)
    held_out = np.load(DIGITS / "heldout.npz")
    images, labels = held_out["images"].astype(np.float32), held_out["labels"]
    with BackgroundServer(options(tmp_path, engine_cache, processes=processes)) as server:
        with Client(f"http://127.0.0.1:{server.ports['http']}") as client:
            found = [client.infer("digits", {"image": images[at : at + 16]})["scores"] for at in range(0, 320, 16)]
        assert np.mean(np.concatenate(found).argmax(1) == labels[:320]) > 0.95
        values = parsed(page(server))[1]
    assert next(iter(values["nv_gpu_memory_used_bytes"].values())) > 0
