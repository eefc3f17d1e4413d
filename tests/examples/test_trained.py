"""The committed example models do what their training scripts said, small enough to ship."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from examples.tagger.sentences import PADDING, TAGS, UNKNOWN, batch, sentences, vocabulary

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.mark.parametrize("name", ["digits", "tagger"])
def test_model_is_small_and_legal(name: str) -> None:
    path = EXAMPLES / name / f"{name}.onnx"
    assert path.stat().st_size < 1_000_000
    onnx.checker.check_model(onnx.load(path), full_check=True)


def test_digits_accuracy() -> None:
    heldout = np.load(EXAMPLES / "digits" / "heldout.npz")
    model = ReferenceEvaluator(str(EXAMPLES / "digits" / "digits.onnx"))
    (scores,) = model.run(None, {"image": heldout["images"].astype(np.float32)})
    assert (scores.argmax(1) == heldout["labels"]).mean() > 0.97


def test_tagger_accuracy_and_padding() -> None:
    heldout = np.load(EXAMPLES / "tagger" / "heldout.npz")
    model, ids, tags = (
        ReferenceEvaluator(str(EXAMPLES / "tagger" / "tagger.onnx")),
        heldout["ids"][:100],
        heldout["tags"][:100],
    )
    (scores,) = model.run(None, {"ids": ids.astype(np.int64)})
    counted = tags >= 0
    assert (scores.argmax(-1) == tags)[counted].mean() > 0.97
    assert (scores.argmax(-1) == tags)[counted & (ids == UNKNOWN)].mean() > 0.95
    length = int((ids[0] != PADDING).sum())
    (alone,) = model.run(None, {"ids": ids[:1, :length].astype(np.int64)})
    np.testing.assert_allclose(alone[0], scores[0, :length], atol=1e-4)


def test_heldout_sentences_hold_unseen_words() -> None:
    ids, tags = batch(sentences(200, seed=1_000_000, heldout=True))
    assert (ids == UNKNOWN).sum() > 50
    assert set(np.unique(tags)) == {-100, *range(len(TAGS))}
    training, _ = batch(sentences(200, seed=1, heldout=False))
    assert not (training == UNKNOWN).any()
    assert training.max() <= max(vocabulary().values())
