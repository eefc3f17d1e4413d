"""Real models end to end, where INGOT_ASSETS says they lie: MNIST's accuracy, silero VAD with its state kept here."""

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.client import Client
from ingot.server.app import BackgroundServer
from tests.server.conftest import options

ASSETS = Path(os.environ.get("INGOT_ASSETS") or "/nonexistent")
if not ASSETS.is_dir():
    pytest.skip("INGOT_ASSETS does not name the folder of shared models", allow_module_level=True)

from benchmarks import asset_data  # noqa: E402  after the skip: Pillow and the data may be missing
from benchmarks.assets import VAD_CONTEXT, VAD_RATE, VAD_WINDOW, speech_probabilities  # noqa: E402

# The context of earlier samples travels with the client, the state stays here; `sr` is a scalar in the model.
SPEECH = """
input [ { name: "input" data_type: TYPE_FP32 dims: [ 1, 576 ] },
        { name: "sr" data_type: TYPE_INT64 dims: [ 1 ] reshape { shape: [ ] } } ]
output [ { name: "output" data_type: TYPE_FP32 dims: [ 1, 1 ] } ]
sequence_batching {
  max_sequence_idle_microseconds: 60000000
  oldest { max_candidate_sequences: 8 }
  state { input_name: "state" output_name: "stateN" data_type: TYPE_FP32 dims: [ 2, 1, 128 ] }
}
"""


def serving(root: Path, name: str, file: str, config: str, cache: Path, **more: Any) -> BackgroundServer:
    (root / name / "1").mkdir(parents=True)
    shutil.copy(ASSETS / file, root / name / "1" / "model.onnx")
    (root / name / "config.pbtxt").write_text(config)
    return BackgroundServer(options(root, cache, **more))


@pytest.mark.parametrize("processes", [True, False])
def test_mnist(tmp_path: Path, engine_cache: Path, processes: bool) -> None:
    """onnxruntime's prediction for each of 2,000 test images, asked for by four clients at once."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(ASSETS / "vision/mnist/mnist.onnx"), providers=["CPUExecutionProvider"])
    images, labels = (data[:2000] for data in asset_data.mnist(ASSETS))
    wanted = [int(session.run(None, {"Input3": image[None]})[0].argmax()) for image in images]
    found = np.zeros(2000, int)
    with serving(tmp_path, "mnist", "vision/mnist/mnist.onnx", "", engine_cache, processes=processes) as server:

        def ask(part: int) -> None:
            with Client(f"http://127.0.0.1:{server.ports['http']}") as client:
                for number in range(part, 2000, 4):
                    (scores,) = client.infer("mnist", {"Input3": images[number][None]}).values()
                    found[number] = scores.argmax()

        threads = [threading.Thread(target=ask, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.repository.find("mnist").statistics.counts.inferences == 2000
    assert found.tolist() == wanted and np.mean(found == labels) > 0.98


@pytest.mark.parametrize("file", ["silero_vad.onnx", "silero_vad_16k_op15.onnx"])
def test_speech(tmp_path: Path, engine_cache: Path, file: str) -> None:
    """Two clients at once, each a sequence of its own: onnxruntime's probabilities with the state carried along."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(
        str(ASSETS / "audio" / "silero_vad" / file), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    recordings = [asset_data.recording(ASSETS)[start : start + VAD_RATE * 4] for start in (0, VAD_RATE * 5)]
    wanted = [
        speech_probabilities(lambda feeds: dict(zip(names, session.run(None, feeds), strict=True)), samples)[0]
        for samples in recordings
    ]
    found: list[list[float]] = [[], []]
    with serving(tmp_path, "speech", f"audio/silero_vad/{file}", SPEECH, engine_cache, threads=1) as server:

        def listen(number: int) -> None:
            samples, count = recordings[number], len(wanted[number])
            padded = np.concatenate([np.zeros(VAD_CONTEXT, np.float32), samples])
            with Client(f"http://127.0.0.1:{server.ports['http']}") as client:
                for at in range(count):
                    window = padded[None, at * VAD_WINDOW : at * VAD_WINDOW + VAD_CONTEXT + VAD_WINDOW]
                    feeds = {"input": window, "sr": np.array([VAD_RATE], np.int64)}
                    place = {"sequence_id": number + 1, "sequence_start": at == 0, "sequence_end": at == count - 1}
                    found[number].append(client.infer("speech", feeds, **place)["output"].item())

        threads = [threading.Thread(target=listen, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for mine, reference in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-4)
    assert max(map(max, found)) > 0.9 > 0.1 > min(map(min, found))
