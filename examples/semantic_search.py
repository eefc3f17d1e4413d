"""Finds the sentences that mean what you ask, with the real MiniLM compiled into an engine.

    python -m examples.semantic_search "how do I get my money back?" [--corpus lines.txt]

The first call builds the engine (batches of 1 to 64 sentences, 4 to 256 tokens); later ones only load it.
"""

import argparse
from pathlib import Path

import numpy as np

import ingot
from examples.minilm import minilm_model, tokenize

ENGINE = Path("build/minilm.engine")
CORPUS = (
    "Refunds are paid within fourteen days to the card you used.",
    "Our opening hours are nine to five, Monday to Friday.",
    "To reset your password, follow the link in the mail we send you.",
    "Parcels to the islands take two days longer.",
    "The warranty covers faults in material and workmanship for two years.",
    "You can change the delivery address until the parcel has left our warehouse.",
    "We never store the number of your credit card.",
    "Batteries and lamps can be handed back in any of our shops.",
    "Invoices are sent by mail on the first of the month.",
    "Students pay half of the price with a valid card.",
)


def build_engine(path: Path = ENGINE, level: int = 1) -> ingot.Engine:
    """The sentence encoder as an engine file, built on the first call."""
    if not path.exists():
        shapes = ((1, 4), (8, 32), (64, 256))
        profile = ingot.Profile(input_ids=shapes, attention_mask=shapes, token_type_ids=shapes)
        path.parent.mkdir(parents=True, exist_ok=True)
        ingot.build(minilm_model(), ingot.BuildConfig(target="cpu", profiles=[profile], level=level)).save(path)
    return ingot.Engine.load(path)


def embed(session: ingot.Session, sentences: list[str]) -> np.ndarray:
    """One vector of length 1 a sentence; the dot product of two is their similarity."""
    return session.run(tokenize(sentences))["sentence_embedding"]


def search(session: ingot.Session, question: str, corpus: list[str]) -> list[tuple[float, str]]:
    """The corpus, most similar first."""
    similarities = embed(session, corpus) @ embed(session, [question])[0]
    return sorted(zip(similarities.tolist(), corpus, strict=True), reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--corpus", type=Path, help="a text file, a sentence a line, at most 64")
    options = parser.parse_args()
    corpus = options.corpus.read_text().splitlines() if options.corpus else list(CORPUS)
    with ingot.Session(build_engine()) as session:
        for similarity, sentence in search(session, options.question, corpus)[:3]:
            print(f"{similarity:.3f}  {sentence}")


if __name__ == "__main__":
    main()
