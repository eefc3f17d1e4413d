"""stories260K, a trained model of llama2.c, through the whole of Ingot: converted, built in every precision, run.

    python -m benchmarks.llm_stories FOLDER STORIES    # stories260K.bin, tok512.bin and stories260K.md; five stories

FOLDER has stories260K.bin and tok512.bin of https://huggingface.co/karpathy/tinyllamas/tree/main/stories260K, and
llama2_c/stories260K/stories260K.md of https://github.com/icppWorld/icpp_llm. STORIES are five texts of TinyStories,
each ended by <|endoftext|>, which are not part of this project:

    curl -LO https://raw.githubusercontent.com/stanford-cs336/assignment1-basics/main/tests/fixtures/tinystories_sample.txt

a file of 3,793 bytes, whose digest is compared. What is told: greedy text beside the one that llama2.c prints; the same
in a batch, in chunks and after a prefix that is in the cache; the mean negative log-likelihood of a token of the five
stories, of five drawn from the model, and of those in stories260K.md.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import RESULTS, write_json
from ingot.llm.batch import Batch
from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.evidence import mean_nll, run
from ingot.llm.formats import FORMATS
from ingot.llm.runner import EngineRunner

Array = np.ndarray[Any, Any]
STORIES, LONGEST, GREEDY = 5, 500, 256  # llama2.c stops after 256 tokens
END = "<|endoftext|>"  # of a story
DIGEST = "f862d5c0f004d7c38ede6bb25d1c7a213dbd2064edd55c00504999d0d282d31b"  # of the five stories
CONVERT = Path(__file__).parent.parent / "examples" / "llama2c" / "convert.py"


def main() -> None:
    """Everything, as JSON and in lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("stories", type=Path)
    given = parser.parse_args()
    source, five = given.folder, stories_of(given.stories)
    for name in ("stories260K.bin", "tok512.bin", "stories260K.md"):
        if not (source / name).is_file():
            raise SystemExit(f"{source / name} is not there; --help says where the model's files are")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        files = [source / "stories260K.bin", source / "tok512.bin", folder]
        subprocess.run([sys.executable, CONVERT, *files], check=True)
        known = texts_of((source / "stories260K.md").read_text(encoding="utf-8"))
        result = measured(folder, known, five)
    print(*claims(result["mean nll"]), sep="\n")
    rows = [{"precision": name, "mean nll": values} for name, values in result.pop("mean nll").items()]
    write_json(RESULTS / "llm_stories.json", "stories260K: greedy text, likelihood by precision", rows, **result)


def stories_of(path: Path) -> list[str]:
    """The five texts; what is said of the likelihood holds of no others."""
    if not path.is_file():
        raise SystemExit(f"{path} is not there; --help says where the five stories are")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != DIGEST:
        raise SystemExit(f"{path} is another text (SHA-256 {digest}); --help says where the five stories are")
    return [text.strip() for text in path.read_text(encoding="utf-8").split(END) if text.strip()]


def claims(found: dict[str, dict[str, float]]) -> Iterator[str]:
    """What must hold of the five stories, and whether it does."""
    exact = found["fp32"]["five"]
    for what, value, most in [
        ("fp32 from 1.266", abs(exact - 1.266), 0.005),
        *((f"{name} above fp32", found[name]["five"] - exact, most) for name, most in (("int8", 0.01), ("int4", 0.05))),
    ]:
        yield f"five stories: {what}: {value:.4f} (at most {most})  {'PASS' if value <= most else 'FAIL'}"


def texts_of(page: str) -> list[str]:
    """What the page says that llama2.c prints: greedy first."""
    return [text.strip() for text in re.findall(r"\$ \./run [^\n]*\n(.*?)```", page, re.DOTALL)]


def measured(folder: Path, known: list[str], five: list[str]) -> dict[str, Any]:
    """Every precision beside the first, float32."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    kept: list[tuple[str, str | None]] = [(name, None) for name in FORMATS if not name.startswith("fp8")]
    kept += [(name, "int8") for name in ("fp32", "int8", "int4")]
    runners = {f"{name}, kv {kv}" if kv else name: EngineRunner(build_llm(folder, options_of(name, kv)))
               for name, kv in kept}  # fmt: skip
    exact = runners["fp32"]
    greedy = answer(exact, [1], GREEDY)
    drawn = [story(exact, seed) for seed in range(STORIES)]
    texts = {"five": [tokenizer.encode(text).ids for text in five], "drawn": drawn,
             "written": [tokenizer.encode(text).ids for text in known]}  # fmt: skip
    result: dict[str, Any] = {
        "greedy text is llama2.c's": tokenizer.decode(greedy).strip() == known[0],
        "batched = single = chunked = after a cached prefix": alike(exact),
        "tokens": {kind: sum(len(s) - 1 for s in stories) for kind, stories in texts.items()},
        "mean nll": {name: {kind: likelihood(runner, stories) for kind, stories in texts.items()}
                     for name, runner in runners.items()},
    }  # fmt: skip
    print(*(f"{key}: {value}" for key, value in result.items()), sep="\n")
    return result


def options_of(precision: str, kv: str | None) -> BuildOptions:
    """For builds that are not timed."""
    return BuildOptions(precision=precision, level=0, kv=kv)


def likelihood(runner: EngineRunner, stories: Sequence[Sequence[int]]) -> float:
    """Mean over all tokens."""
    parts = [(mean_nll(run(runner, np.array(s[:-1]), len(s) - 1), np.array(s[1:])), len(s) - 1) for s in stories]
    return round(sum(mean * count for mean, count in parts) / sum(count for _, count in parts), 4)


def story(runner: EngineRunner, seed: int) -> list[int]:
    """Tokens drawn at temperature 1, up to the mark that ends a story."""
    rng, tokens = np.random.default_rng(seed), [1]
    while len(tokens) < LONGEST and (len(tokens) == 1 or tokens[-1] not in runner.eos):
        logits = runner.step(part(runner, [tokens[-1:]], [len(tokens) - 1]))[0].astype(np.float64)
        powers = np.exp(logits - logits.max())
        tokens.append(int(rng.choice(len(powers), p=powers / powers.sum())))
    return tokens


def answer(runner: EngineRunner, prompt: list[int], count: int, chunk: int = 64) -> list[int]:
    """Greedy tokens after a prompt, up to the mark that ends a story."""
    return answers(runner, [prompt], count, chunk)[0]


def answers(
    runner: EngineRunner, prompts: list[list[int]], count: int, chunk: int = 64, first: int = 0
) -> list[list[int]]:
    """The same for several in one batch; `first` tokens of each are in the cache already."""
    texts, done = [list(prompt) for prompt in prompts], [first] * len(prompts)
    while any(len(text) < len(prompt) + count for text, prompt in zip(texts, prompts, strict=True)):
        logits = runner.step(part(runner, [text[d : d + chunk] for text, d in zip(texts, done, strict=True)], done))
        row = -1
        for n, text in enumerate(texts):
            taken = len(text[done[n] : done[n] + chunk])
            row, done[n] = row + taken, done[n] + taken
            if done[n] == len(text):
                text.append(int(logits[row].argmax()))
    cut = [text[len(prompt) : len(prompt) + count] for text, prompt in zip(texts, prompts, strict=True)]
    return [tokens[: next((i for i, t in enumerate(tokens) if t in runner.eos), len(tokens))] for tokens in cut]


def part(runner: EngineRunner, pieces: Sequence[Sequence[int]], firsts: Sequence[int]) -> Batch:
    """A step of one piece of each sequence, whose blocks are its own; all rows are wanted."""
    width = min(runner.width, runner.blocks // len(pieces))
    places = [np.arange(first, first + len(piece)) for piece, first in zip(pieces, firsts, strict=True)]
    slots = [n * width * runner.block_size + place for n, place in enumerate(places)]
    starts = np.cumsum([0, *map(len, pieces)])
    lengths = [first + len(piece) for piece, first in zip(pieces, firsts, strict=True)]
    tables = np.arange(len(pieces) * width).reshape(len(pieces), width)
    arrays = [np.concatenate(pieces), np.concatenate(places), np.concatenate(slots), starts, lengths, tables,
              np.arange(starts[-1])]  # fmt: skip
    return Batch(*(np.asarray(array, np.int32) for array in arrays))


def alike(runner: EngineRunner) -> bool:
    """Whether 60 greedy tokens after four prompts are the same in every company."""
    whole = answer(runner, [1], 100)
    prompts = [[1], [1, *whole[:7]], [1, *whole[:33]], [1, *whole[20:61]]]
    alone = [answer(runner, prompt, 60) for prompt in prompts]
    chunked = [answer(runner, prompt, 60, chunk=5) for prompt in prompts]
    answers(runner, prompts[3:], 1)
    cached = answers(runner, prompts[3:], 60, first=32)
    return answers(runner, prompts, 60) == alone == chunked and cached == alone[3:]


if __name__ == "__main__":
    main()
