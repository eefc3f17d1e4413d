"""`ingot release publish`: every step once, resumed where it ended, stopped by its gates."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ingot.cli import main
from ingot.release.store import Store

ROOT = Path(__file__).parent.parent.parent
DIGITS = ROOT / "examples" / "digits"
Publish = Callable[..., tuple[int, str]]


def half_right(outputs: dict[str, np.ndarray], labels: np.ndarray) -> float:
    return 0.5


@pytest.fixture
def publish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Publish:
    def run(*more: str, data: Path = DIGITS / "heldout.npz") -> tuple[int, str]:
        words = ["publish", str(DIGITS / "digits.onnx"), "--name=digits", "--version=v2", f"--data={data}", "--level=0",
                 "--minimum=0.95", "--shapes=image:1..64x1x8x8", f"--repository={tmp_path / 'models'}",
                 f"--work={tmp_path / 'work'}", f"--store=sqlite:///{tmp_path / 'release.db'}"]  # fmt: skip
        code = main(["release", *words, *more])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_from_a_model_to_a_rollout_and_resumed(publish: Publish, tmp_path: Path) -> None:
    rollout = f"--rollout={ROOT / 'examples' / 'release' / 'rollout.yaml'}"
    code, text = publish(rollout)
    assert code == 0, text
    steps = [line.split()[0] for line in text.splitlines()]
    assert steps == ["build", "verify", "gate", "benchmark", "register", "start"] and "done before" not in text
    engine = tmp_path / "models" / "digits_v2" / "1" / "model.engine"
    assert engine.exists() and '"accuracy"' in (engine.parent.parent / "published.json").read_text()
    store = Store(f"sqlite:///{tmp_path / 'release.db'}")
    assert store.models() == {"digits": 1}
    store.close()
    code, text = publish(rollout)
    assert code == 0 and text.count("done before") == 6
    engine.unlink()
    code, text = publish(rollout)
    assert code == 0 and text.count("done before") == 5 and engine.exists(), "what is gone is made again"

    code, text = publish("--minimum=1.01")
    assert code == 1 and "accuracy" in text and "below --minimum 1.01" in text and "register" not in text
    code, text = publish("--max-latency=0.0001")
    assert code == 1 and "above --max-latency" in text
    code, text = publish("--metric=tests.release.test_publish:half_right", "--minimum=0.4", "--drop=0.1",
                         f"--baseline={engine}")  # fmt: skip
    assert code == 0 and "baseline 0.5" in text


def test_mistakes_are_sentences(publish: Publish, tmp_path: Path) -> None:
    np.savez(tmp_path / "bare.npz", images=np.zeros((3, 1, 8, 8), np.float32))
    code, text = publish(data=tmp_path / "bare.npz")
    assert code == 1 and "has no array `labels`" in text
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3), labels=np.zeros(3))
    code, text = publish(data=tmp_path / "two.npz")
    assert code == 1 and "no array for the input 'image'; it has a, b" in text
    code, text = publish("--metric=precision")
    assert code == 1 and "accuracy or module:function" in text
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    words = ["release", "publish", str(tmp_path / "bad.onnx"), "--name=d", "--version=v", "--minimum=0"]
    words += [f"--data={DIGITS / 'heldout.npz'}", f"--repository={tmp_path}", f"--work={tmp_path / 'w'}"]
    assert main(words) == 1
