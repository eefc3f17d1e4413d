"""`build_llm(folder)`: from a checkpoint to an engine; kernels, tuner, memory plan and file are those of all models."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir
from threadpoolctl import threadpool_limits

from ingot import compiler
from ingot.config import BuildConfig, Profile
from ingot.engine import Engine
from ingot.errors import BuildError, ConfigError, EngineError, ImportFailure
from ingot.ir.ops_paged import line_of
from ingot.ir.ops_sample import DRAW, EDIT
from ingot.llm import evidence
from ingot.llm.batch import FORMS, MOST_EDITS
from ingot.llm.cached_attention import attend_at_once
from ingot.llm.calibration import drawn, lines_of, matrices_of, observed
from ingot.llm.chain import chain_projections
from ingot.llm.decoder import Array, Decoder
from ingot.llm.early import begin_early
from ingot.llm.formats import Format, format_of, with_cache
from ingot.llm.graph import BLOCK, GATHERED, draw_tokens, graph_of
from ingot.llm.models import decoder_of
from ingot.llm.projections import project
from ingot.llm.shards import shard
from ingot.llm.text import Text
from ingot.llm.weights import Checkpoint, open_checkpoint
from ingot.precision import half
from ingot.report import BuildLog
from ingot.runtime.session import features

Progress = Callable[[str, float], None]
_ROWS_OF_TILES = 64  # tokens that kernels of bytes are chosen for: prompts gain more by it than answers lose
_DRAWN_FREELY = 100_000_000  # weights of a model that writes its calibration's text within half a minute or so
MOST_BLOCKS = 1 << 20  # of a pool, whose size is decided when the engine is run


@dataclass(frozen=True)
class BuildOptions:
    """What a user decides. target, level, variants: as `ingot.BuildConfig`'s.

    context: tokens of prompt and answer together, None for the model's (at most 8192); token_budget, sequence_budget:
    most tokens and sequences of one step; typical: tokens of the step to tune for. verify: compare with the reference;
    text: file on which the mean negative log-likelihood of a token may rise by `max_rise`. kv: how keys and values are
    kept, where not as the precision says. calibration: what rounding to four bits goes by: a file of text, "drawn" (a
    text of the model's own) or "none"; None: drawn where the model is small. ranks: processes, each with a device of
    its own, that share the model."""

    precision: str = "fp32"
    target: str = "cpu"
    context: int | None = None
    token_budget: int = 512
    sequence_budget: int = 64
    typical: int = 1
    level: int = 1
    variants: tuple[str, ...] = ()
    timing_cache: str | None = None
    verify: bool = True
    text: str | None = None
    max_rise: float = 0.05
    kv: str | None = None
    calibration: str | None = None
    ranks: int = 1

    def __post_init__(self) -> None:
        for name in ("token_budget", "sequence_budget", "typical", "ranks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        on_gpu, kept = self.target.startswith("cuda"), with_cache(format_of(self.precision), self.kv)
        if kept.name.startswith("fp8") and not on_gpu:
            raise ConfigError(f"precision {kept.name} is for GPUs alone: build with --target cuda:sm_90, or take int8 "
                              "or w8a8 for the CPU")  # fmt: skip
        if on_gpu and (kept.cache == "int8" or (kept.cache == "float32" and kept.bits < 32)):
            raise ConfigError(f"keys and values cannot be kept as {self.kv} on a GPU where precision is {kept.name}: "
                              "leave --kv out, or take --precision fp8_cache for eight bits")  # fmt: skip
        if self.calibration not in (None, "none") and not kept.compensates:
            raise ConfigError(f"calibration is what rounding to four bits goes by; precision {kept.name} has none: "
                              "leave it out")  # fmt: skip
        if self.context is not None and self.context < 1:
            raise ConfigError(f"context must be at least 1, not {self.context}")


def build_llm(folder: str | Path, options: BuildOptions | None = None, progress: Progress | None = None) -> Engine:
    """The engine of a Hugging Face style folder. ImportFailure names the tensor or key that does not fit."""
    options = options or BuildOptions()
    if options.ranks > 1:
        raise ConfigError(f"a model for {options.ranks} ranks is several engines: build_ranks gives them")
    return build_ranks(folder, options, progress)[0]


@threadpool_limits.wrap(limits=1, user_api="blas")  # loaded cores: threads of a product wait for each other
def build_ranks(folder: str | Path, options: BuildOptions, progress: Progress | None = None) -> list[Engine]:
    """An engine for each rank, to be opened together (parallel.py)."""
    log, kept = BuildLog(progress), with_cache(format_of(options.precision), options.kv)
    with log.stage("import"):
        checkpoint = open_checkpoint(folder)
        decoder = decoder_of(checkpoint, options.context)
        _check_text(checkpoint.files(), decoder.vocabulary)
        text = None
        if options.text is not None:
            text = evidence.tokens_of(Path(options.text), checkpoint.files(), decoder.vocabulary)
    calibration, known = _calibration_of(decoder, kept, options), decoder
    if calibration != "none":
        with log.stage("calibrate"):
            known = observed(decoder, _texts(checkpoint, decoder, calibration))
    made = [_built(checkpoint, shard(known, n, options.ranks), kept, options, n, log) for n in range(options.ranks)]
    kind = options.target.partition(":")[0]
    if not options.verify or not frozenset(made[0].variants[0].requires) <= features(kind):
        return made
    with log.stage("verify"):
        found = evidence.verified(made, decoder, kept, text, options.max_rise, checkpoint.tensors)
    return [replace(engine, details={**engine.details, "evidence": found}) for engine in made]


def _check_text(files: Mapping[str, bytes], vocabulary: int) -> None:
    """ImportFailure where the tokenizer beside the weights is broken, or another model's, as far as one is there."""
    if "tokenizer.json" in files and importlib.util.find_spec("tokenizers"):
        try:
            Text.from_files(files, vocabulary)
        except EngineError as error:
            raise ImportFailure(str(error)) from error


def _calibration_of(decoder: Decoder, kept: Format, options: BuildOptions) -> str:
    """"none", "drawn" or a file."""
    if not kept.compensates:
        return "none"
    small = sum(matrix.size for layer in decoder.layers for matrix in matrices_of(layer).values()) <= _DRAWN_FREELY
    return options.calibration or ("drawn" if small else "none")


def _texts(checkpoint: Checkpoint, decoder: Decoder, calibration: str) -> list[Array]:
    if calibration == "drawn":
        return drawn(decoder, _first(checkpoint.config.get("bos_token_id"), decoder.vocabulary))
    return lines_of(evidence.tokens_of(Path(calibration), checkpoint.files(), decoder.vocabulary), decoder.context)


def _built(checkpoint: Checkpoint, decoder: Decoder, kept: Format, options: BuildOptions, rank: int,
           log: BuildLog) -> Engine:  # fmt: skip
    """The engine of a rank's decoder, not verified."""
    with log.stage("import"):
        model = graph_for(decoder, kept, str(checkpoint.config.get("model_type")), options)
    config = _config(decoder, options)
    compiled = compiler.compile_variants(model, model, config, log)
    if log.figures.get("host steps"):
        hosts = [str(notice) for notice in log.notices if notice.kind == "host step"]
        more = f" (and {len(hosts) - 1} more)" if len(hosts) > 1 else ""
        raise BuildError(f"a step of a language model has no native form on {options.target}; {hosts[0]}{more}. Take "
                         "another precision: bf16 has the widest kernels")  # fmt: skip
    engine = compiler.package(model, compiled, config, log)
    facts = described(checkpoint, decoder, kept, options) | {"ranks": options.ranks, "rank": rank}
    return replace(engine, details={**engine.details, "llm": facts, "evidence": []})


def graph_for(decoder: Decoder, kept: Format, name: str, options: BuildOptions) -> onnx_ir.Model:
    """The step's graph as the target wants it: on a GPU with narrow activations, products that hold their norms,
    attention that holds the cache's update and chains of products where all stream float8, and an output `chosen` [R]
    more, the tokens that inputs `draws`, `edits` and `masks` (as Sample's) make of the logits, and `likely` [L, LIKELY]
    of the rows of input `told` (as Likely's)."""
    on_gpu = options.target.startswith("cuda")
    model = graph_of(decoder, kept, name, inside=on_gpu)
    if not on_gpu:
        return model
    if kept.bits < 32:
        half.convert(model, "bfloat16", _narrow(model, decoder.ranks))
    project(model)
    if compiler.hosts_two(_config(decoder, options)) and begin_early(model):
        attend_at_once(model)
        if options.typical == 1:
            chain_projections(model)
    draw_tokens(model, decoder.vocabulary)
    return model


def _narrow(model: onnx_ir.Model, ranks: int) -> half.Scope:
    """All but logits, which ranks give each other in float32."""
    usual, own = half.Scope(), frozenset(node for node in model.graph if node.name == "logits.own")
    return half.Scope(lambda node: usual.takes(node) and not (ranks > 1 and node.name in GATHERED), closes=own)


def _config(decoder: Decoder, options: BuildOptions) -> BuildConfig:
    width = -(-decoder.context // BLOCK)
    kept = with_cache(format_of(options.precision), options.kv)
    pool = (2, decoder.groups, line_of(BLOCK, decoder.depth, kept.cache))
    typical = max(options.typical, _ROWS_OF_TILES) if kept.narrow_rows else options.typical
    typical = min(typical, options.token_budget)
    words, most = -(-decoder.vocabulary // 32), min(options.sequence_budget, options.token_budget)
    budget = options.token_budget
    drawn = {"draws": ((0, DRAW), (1, DRAW), (budget, DRAW)), "edits": ((1, EDIT), (1, EDIT), (MOST_EDITS, EDIT)),
             "masks": ((1, words), (1, words), (most, words)), "told": ((0,), (1,), (budget,))}  # fmt: skip
    on_gpu, kinds = options.target.startswith("cuda"), [decoder.kind_of(layer) for layer in decoder.layers]
    firsts = sorted(kinds.index(kind) for kind in set(kinds))
    profile = Profile(
        **{
            **(drawn if on_gpu else {}),
            "states": ((0 if on_gpu else 1,), (1,), (options.token_budget,)),  # of no states a graph has no launches
            "token_ids": ((1,), (typical,), (options.token_budget,)),
            "rows": ((1,), (min(options.typical, most),), (options.token_budget,)),
            "tables": ((1, width), (1, width), (options.sequence_budget, width)),
            **{f"cache.{n}": ((1, *pool), (width, *pool), (MOST_BLOCKS, *pool)) for n in firsts},
        }
    )
    return BuildConfig(
        target=options.target, profiles=[profile], level=options.level, variants=options.variants, verify=False,
        precision="fp32" if options.precision == "fp32" else "bf16", timing_cache=options.timing_cache,
    )  # fmt: skip


def described(checkpoint: Checkpoint, decoder: Decoder, kept: Format, options: BuildOptions) -> dict[str, Any]:
    """What a runner must know, as JSON."""
    return {
        "form": FORMS[len(decoder.windows) > 1],
        "family": checkpoint.config.get("model_type"),
        "vocabulary": decoder.vocabulary,
        "layers": len(decoder.layers),
        "groups": decoder.groups,
        "depth": decoder.depth,
        "block_size": BLOCK,
        "context": decoder.context,
        "windows": list(decoder.windows),
        "kinds": [decoder.kind_of(layer) for layer in decoder.layers],
        "token_budget": options.token_budget,
        "sequence_budget": options.sequence_budget,
        "format": asdict(kept),
        "bos": _first(checkpoint.config.get("bos_token_id"), decoder.vocabulary),
        "eos": sorted(each for each in _ends(checkpoint) if 0 <= each < decoder.vocabulary),  # no others are drawn
        "identity": _identity(checkpoint, options),
        "files": {name: _packed(data) for name, data in checkpoint.files().items()},
    }


def _identity(checkpoint: Checkpoint, options: BuildOptions) -> str:
    """What ranks of one build have in common: options, config.json, and of each tensor its name, form and beginning."""
    digest = hashlib.sha256(repr((options, sorted(checkpoint.config.items()))).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(repr((name, tensor.shape, tensor.dtype.name)).encode() + tensor.reshape(-1)[:64].tobytes())
    return digest.hexdigest()


def _first(value: Any, vocabulary: int) -> int | None:
    """A token, or the first of several; None where it is none of the model's."""
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) and 0 <= first < vocabulary else None


def _ends(checkpoint: Checkpoint) -> set[int]:
    """Tokens that end an answer: generation_config.json's beside config.json's."""
    found: set[int] = set()
    for settings in (checkpoint.config, checkpoint.settings("generation_config.json")):
        value: Any = settings.get("eos_token_id")
        found.update(each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int))
    return found


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 6)).decode()
