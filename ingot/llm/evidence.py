"""Every engine of a language model is compared with the numpy reference before anybody gets it.

Logits of a few drawn tokens, computed in a chunk and then one by one, must be within the format's distance. On a text
the mean negative log-likelihood of the checkpoint and of the engine go into the file; too large a rise is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ingot.engine import Engine
from ingot.errors import ConfigError, VerificationFailed
from ingot.llm.batch import Batch
from ingot.llm.decoder import Array, Decoder
from ingot.llm.formats import Format
from ingot.llm.parallel import local_ranks
from ingot.llm.reference import logits_of
from ingot.llm.runner import EngineRunner
from ingot.llm.text import words_of

_DRAWN, _LONGEST = 12, 1024  # tokens


def verified(ranks: Sequence[Engine], decoder: Decoder, kept: Format, text: Array | None, most: float,
             tensors: Mapping[str, Array]) -> list[dict[str, Any]]:  # fmt: skip
    """What is known of the errors of an engine, or of the ranks of one. VerificationFailed when they are beyond the
    format's, or the negative log-likelihood of the text's tokens rises by more than `most`. tensors: the checkpoint's,
    of which one is named that holds what is no number."""
    blocks = -(-decoder.context // int(ranks[0].details["llm"]["block_size"]))
    whole = EngineRunner(ranks[0], blocks=blocks, alike=True) if len(ranks) == 1 else None
    runner = whole or local_ranks(ranks, blocks, alike=True)
    try:
        found = [_near(runner, decoder, kept, tensors)]
        if text is not None:
            found.append(_likely(runner, decoder, text[: min(_LONGEST, decoder.context)], most))
    finally:
        runner.close()
    return found


def _near(runner: EngineRunner, decoder: Decoder, kept: Format, tensors: Mapping[str, Array]) -> dict[str, Any]:
    count = min(_DRAWN, decoder.context)
    tokens = np.random.default_rng(0).integers(0, decoder.vocabulary, count)
    expected, found = logits_of(decoder, tokens), run(runner, tokens, count // 2)
    if not np.isfinite(expected).all():
        raise VerificationFailed(f"the checkpoint's own logits are no finite numbers; {_broken(tensors)}")
    distance = float(np.sqrt(np.mean((found - expected) ** 2)) / max(float(expected.std()), 1e-30))
    if not distance <= kept.within:
        raise VerificationFailed(
            f"the engine's logits are {distance:.1e} of their spread away from the reference, {kept.name} allows "
            f"{kept.within:.0e}; no engine was made. This is a bug in Ingot, or weights for which {kept.name} is too "
            "coarse: try --precision fp32"
        )
    return {"output": "logits", "tokens": count, "distance": _two(distance)}


def _broken(tensors: Mapping[str, Array]) -> str:
    """Where that comes from."""
    wrong = next((name for name, x in tensors.items() if not np.isfinite(np.asarray(x, np.float32)).all()), None)
    if wrong is None:
        return "its weights are finite, what they give is beyond float32"
    return f"tensor '{wrong}' holds NaN or infinity: download it again, or ask who made it"


def _likely(runner: EngineRunner, decoder: Decoder, text: Array, most: float) -> dict[str, Any]:
    before = mean_nll(logits_of(decoder, text[:-1]), text[1:])
    after = mean_nll(run(runner, text[:-1], len(text) - 1), text[1:])
    if not after - before <= most:
        raise VerificationFailed(
            f"the mean negative log-likelihood of the text's tokens rises from {before:.4f} to {after:.4f}, more than "
            f"--max-rise {most:g}; no engine was made. Keep more bits: --precision int8 or bf16"
        )
    return {"output": "nll", "tokens": len(text) - 1, "before": round(before, 4), "after": round(after, 4)}


def run(runner: EngineRunner, tokens: Array, together: int) -> Array:
    """Logits of one sequence: the first tokens in pieces as large as a step takes, those from `together` on alone."""
    stops = [*range(0, together, runner.token_budget), *range(together, len(tokens)), len(tokens)]
    return np.concatenate([runner.step(_part(runner, tokens, a, b)) for a, b in itertools.pairwise(stops)])


def _part(runner: EngineRunner, tokens: Array, start: int, stop: int) -> Batch:
    places, table = np.arange(start, stop), np.arange(-(-stop // runner.block_size))[None]
    rows, starts, lengths = np.arange(stop - start), np.array([0, stop - start]), np.array([stop])
    parts = (tokens[start:stop], places, places, starts, lengths, table, rows)
    return Batch(*(np.asarray(part, np.int32) for part in parts))


def mean_nll(logits: Array, following: Array) -> float:
    """Mean negative log-likelihood of the tokens that follow."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    chosen = wide[np.arange(len(following)), following]
    return float(np.mean(np.log(np.exp(wide).sum(-1)) - chosen))


def tokens_of(path: Path, files: dict[str, bytes], vocabulary: int) -> Array:
    """Tokens of a text file, by the checkpoint's tokenizer, or of a .npy file."""
    if path.suffix == ".npy":
        tokens = _numbers(path)
    elif "tokenizer.json" not in files:
        raise ConfigError(f"there is no tokenizer.json beside the weights to read {path} with; give token ids as .npy")
    else:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        tokens = np.asarray(tokenizer.encode(words_of(path, "ids of tokens are given as .npy")).ids)
    if len(tokens) < 2 or tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ConfigError(f"{path} does not hold two or more tokens of the {vocabulary} there are")
    return np.asarray(tokens, np.int64)


def _numbers(path: Path) -> Array:
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ConfigError(f"{path} is no array of numpy: {error}") from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu":
        raise ConfigError(f"{path} does not hold whole numbers, ids of tokens")
    return found.reshape(-1)


def _two(x: float) -> float:
    return float(f"{x:.1e}")
