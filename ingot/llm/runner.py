"""Running an engine of a language model: steps are padded to a few sizes, keys and values stay in pools."""

from __future__ import annotations

import base64
import bisect
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ingot.dtypes import size_of
from ingot.engine import Engine
from ingot.errors import ConfigError, DeviceError, EngineError, InputError
from ingot.ir.ops_likely import likely
from ingot.ir.ops_paged import line_of
from ingot.ir.ops_sample import DRAW, EDIT, sample
from ingot.llm.batch import FORMS, MOST_EDITS, Batch, Copy, Floats, Integers, Kind, Wanted, input_of
from ingot.llm.pools import DevicePools, HostPools, Pools, free_memory, spare_memory
from ingot.runtime.group import Group
from ingot.runtime.session import Begun, Session

_EDITS = (16, 256, 4096, 1 << 15, 1 << 17, 1 << 18, MOST_EDITS)
_FEW = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_UNDRAWN = 8  # rows to which a step that draws nothing is one of its own
_MANY, _FEWER = 1024, (128, 512, 2048)  # rows of a step of so many tokens


def open_runner(
    engine: Engine | str | Path, threads: int | None = None, blocks: int | None = None, device: str | None = None,
    alike: bool = False,
) -> EngineRunner:  # fmt: skip
    """A runner for an engine file of `ingot llm build`. blocks: of keys and values; None: as many as all sequences can
    fill, in at most a quarter of the memory that is free, or nine tenths of a GPU's. Layers that see less far get no
    more of them than sequences can hold there; alike: as many, for draft models and steps made by hand, whose tables
    are the same for all layers. device: as a session's; None: what the engine was built for. An engine of several ranks
    begins them all."""
    if isinstance(engine, str | Path) and Path(engine).is_dir():
        raise EngineError(f"{engine} is a folder; make an engine of the checkpoint first, `ingot llm build {engine}`")
    loaded = engine if isinstance(engine, Engine) else Engine.load(engine)
    if loaded.details.get("llm", {}).get("ranks", 1) > 1:
        if isinstance(engine, Engine):
            raise EngineError(f"{loaded.source} is one of several ranks; open them by their path")
        from ingot.llm.parallel import open_ranks

        return open_ranks(Path(engine), loaded, threads, blocks, device or _device_of(loaded), alike)
    return EngineRunner(loaded, threads, blocks, device, alike=alike)


@dataclass(frozen=True)
class Stepping:
    """A step that was begun (`Begun` of ingot/llm/batch.py)."""

    finish: Callable[[], Mapping[str, Any]]

    def result(self) -> Mapping[str, Any]:
        """What was wanted of it."""
        return self.finish()


class EngineRunner:
    """A `Runner` (ingot/llm/batch.py) on a session: on a GPU a step is put behind the one under way, and takes what
    that one chooses from where it lies; on a CPU it is computed when its result is asked for."""

    def __init__(self, engine: Engine, threads: int | None = None, blocks: int | None = None,
                 device: str | None = None, group: Group | None = None, alike: bool = False) -> None:  # fmt: skip
        facts = engine.details.get("llm")
        if not isinstance(facts, Mapping) or facts.get("form") not in FORMS:
            raise EngineError(f"{engine.source} is no language model of this Ingot; make one with `ingot llm build`")
        given = {"draws", "told"} & {spec.name for spec in engine.inputs}
        if len(given) == 1:
            raise EngineError(f"{engine.source} is of an Ingot that gave no log-probabilities on a GPU; make it anew "
                              "with `ingot llm build`")  # fmt: skip
        self.facts: Mapping[str, Any] = facts
        self.engine = engine
        self.session = Session(engine, device or _device_of(engine), threads, group=group)
        self.vocabulary, self.context = int(facts["vocabulary"]), int(facts["context"])
        self.block_size = int(facts["block_size"])
        self.token_budget, self.sequence_budget = int(facts["token_budget"]), int(facts["sequence_budget"])
        self.hidden = next((int(spec.shape[-1]) for spec in engine.outputs if spec.name == "hidden"), 0)
        self._fewest = next((spec.min[0] for spec in engine.inputs if spec.name == "states" and spec.min), 1)
        self.bos: int | None = facts["bos"]
        self.eos = frozenset(map(int, facts["eos"]))
        self.width = -(-self.context // self.block_size)
        if blocks is not None and blocks < 1:
            raise ConfigError(f"blocks of keys and values must be at least 1, not {blocks}")
        self.draws = bool(given)
        self._undrawn = any(spec.name == "draws" and spec.min and not spec.min[0] for spec in engine.inputs)
        self.ahead = self.session.goes_on and self.draws
        self._alike = alike
        self._windows = facts.get("windows") or [facts.get("window", 0)]  # engines of before have one kind of layers
        self._kinds = facts.get("kinds") or [0] * int(facts["layers"])  # of each layer
        self.kinds = self._with(blocks or self._affordable())
        self._check_memory()
        self._pools = self._made_pools()
        self._tables = np.zeros((len(self.kinds), self.sequence_budget, self.width), np.int32)
        self._before: tuple[Begun, int] | None = None  # what was begun last, and its rows

    @property
    def files(self) -> dict[str, bytes]:
        """What lay beside the checkpoint: tokenizer.json, tokenizer_config.json, …"""
        return {name: zlib.decompress(base64.b64decode(text)) for name, text in self.facts["files"].items()}

    @property
    def blocks(self) -> int:
        """Of the layers that see farthest."""
        return self.kinds[0].blocks

    @property
    def memory(self) -> dict[str, int]:
        """Bytes planned: weights (mapped), activations at the token budget, keys and values."""
        return {"weights": len(self.session.variant.weights), "activations": self._activations(),
                "cache": self._pools.nbytes}  # fmt: skip

    def step(self, batch: Batch) -> Floats:
        """Logits [R, vocabulary] of the batch's rows."""
        logits: Floats = self.begin(batch, "logits").result()["logits"]
        return logits

    def step_states(self, batch: Batch) -> tuple[Floats, Floats]:
        """Logits of the batch's rows, and the hidden states [E, hidden] of its `states`."""
        found = self.begin(batch, "logits", "hidden").result()
        return found["logits"], found["hidden"]

    def choose(self, batch: Batch) -> Integers:
        """The token [R] drawn after each of the batch's rows: on a GPU nothing else comes back from there."""
        chosen: Integers = self.begin(batch, "chosen").result()["chosen"]
        return chosen

    def begin(self, batch: Batch, *wanted: Wanted) -> Stepping:
        """Begin a step."""
        self._check(batch)
        if not len(batch.rows) and not len(batch.token_ids):
            nothing = {"logits": np.zeros((0, self.vocabulary), np.float32)}
            return Stepping(lambda: _wanted(nothing, wanted, batch))
        drawn = () if self.draws else ("chosen", "likely")
        outputs = list(dict.fromkeys(w if w not in drawn else "logits" for w in wanted))
        begun = self._begun(batch, outputs)
        self._before = begun, len(batch.rows)
        return Stepping(lambda: _wanted(begun.result(), wanted, batch))

    def _begun(self, batch: Batch, outputs: Sequence[str]) -> Begun:
        if not self.ahead:
            return self.session.begin(self._feeds(batch), outputs)
        before = self._before[0] if self._before is not None else None
        carried = {"token_ids": ("chosen", batch.carried)} if len(batch.carried) else {}
        return self.session.begin(self._feeds(batch), outputs, before, carried)

    def _feeds(self, batch: Batch) -> dict[str, Any]:
        """The inputs, padded."""
        wide, count = self._padded(len(batch.token_ids)), batch.tables.shape[-2]
        tall = self._padded(max(len(batch.rows), 1), beside=wide)
        feeds: dict[str, Any] = {
            "token_ids": _filled(batch.token_ids, wide, 0),
            "positions": _filled(batch.positions, wide, -1),
            "owners": _filled(np.repeat(np.arange(count), np.diff(batch.starts)), wide, 0),
            **self._placed_by(batch, wide),
            "rows": _filled(batch.rows, tall, 0),
            **self._pools.feeds,
        }
        if self.hidden:
            some = max(len(batch.states), self._fewest)
            feeds["states"] = _filled(batch.states, self._padded(some, beside=wide) if some else 0, 0)
        return feeds | (self._drawn_by(batch, tall) if self.draws else {})

    def _placed_by(self, batch: Batch, wide: int) -> dict[str, Integers]:
        """Where keys and values are, in the blocks of each kind of layers."""
        slots, tables = self._of_kinds(batch)
        count, width = tables.shape[1:]
        self._tables[:, :count, :width] = tables
        rows = self._rows_of_tables(count, wide)
        return {input_of("slots", kind): _filled(each, wide, -1) for kind, each in enumerate(slots)} | {
            input_of("tables", kind): each[:rows] for kind, each in enumerate(self._tables)
        }

    def _of_kinds(self, batch: Batch) -> tuple[Integers, Integers]:
        """Its slots [K, T] and tables [K, S, any]."""
        kinds, tokens, slots, tables = len(self.kinds), len(batch.token_ids), batch.slots, batch.tables
        try:
            return np.broadcast_to(slots, (kinds, tokens)), np.broadcast_to(tables, (kinds, *tables.shape[-2:]))
        except ValueError:
            raise InputError(f"slots {slots.shape} and tables {tables.shape} do not fit {tokens} tokens and {kinds} "
                             "kinds of layers") from None  # fmt: skip

    def _drawn_by(self, batch: Batch, tall: int) -> dict[str, Integers]:
        """How tokens are drawn, padded: the likeliest of rows that nobody wants; nothing where that goes for all."""
        few = next(size for size in _EDITS if len(batch.edits) <= size)
        words, many = -(-self.vocabulary // 32), self._padded(max(len(batch.masks), 1))
        told = tall if len(batch.told) else 0  # without any nothing is launched; more sizes would be more graphs
        plain = self._undrawn and tall <= _UNDRAWN and _likeliest(batch.draws)
        draws = batch.draws[:0] if plain else _grown(batch.draws, tall, DRAW)
        return {"draws": draws, "edits": _grown(batch.edits, few, EDIT),
                "masks": _grown(batch.masks, many, words), "told": _filled(batch.told, told, -1)}  # fmt: skip

    def _rows_of_tables(self, count: int, wide: int) -> int:
        """On a GPU tables travel: no more of them than a padded size, unless the step takes long anyhow."""
        if not self.session.on_device or wide >= _MANY:
            return self.sequence_budget
        return next((n for n in _FEW if count <= n <= self.sequence_budget), self.sequence_budget)

    def copy_blocks(self, copies: Sequence[Copy]) -> None:
        """Copy the keys and values of block a into block b of a kind, for every (kind, a, b), after all steps that were
        begun."""
        self._pools.copy(copies)

    def close(self) -> None:
        """Stop the session's threads; idempotent."""
        self.session.close()

    # -- memory ---------------------------------------------------------------------------------------------------
    def _with(self, blocks: int) -> tuple[Kind, ...]:
        """The kinds of layers, with so many blocks for those that see farthest. The others get no more than sequences
        can hold at once: what a window and its two ends touch each, and the tokens of the steps under way."""
        size, steps = self.block_size, 1 + self.ahead
        held = (self.sequence_budget * (-(-window // size) + 2) + -(-steps * self.token_budget // size)
                for window in self._windows[1:])  # fmt: skip
        counts = [blocks, *(blocks if self._alike else min(blocks, most) for most in held)]
        return tuple(Kind(count, window) for count, window in zip(counts, self._windows, strict=True))

    def _cache_bytes(self, blocks: int) -> int:
        """What so many blocks take, with those of the other kinds."""
        kinds = self._with(blocks)
        return sum(int(np.prod(self._shape(kinds[kind]))) for kind in self._kinds) * size_of(self._dtype)

    def _shape(self, kind: Kind) -> tuple[int, ...]:
        """Of a layer's pool."""
        facts = self.facts
        return kind.blocks, 2, int(facts["groups"]), line_of(self.block_size, int(facts["depth"]), self._dtype)

    @property
    def _dtype(self) -> str:
        return str(self.facts["format"]["cache"])

    def _activations(self) -> int:
        plan = self.session.plan
        return max((m.bytes for m in plan.memory), default=0) + plan.scratch * self.session.threads

    def _affordable(self) -> int:
        wanted = self.sequence_budget * self.width
        steps = 1 + self.session.on_device  # one may be under way beside the one that is begun
        spare = spare_memory(self.session, steps * self._activations())
        return max(bisect.bisect_right(range(1, wanted + 1), spare, key=self._cache_bytes), 1)

    def _made_pools(self) -> Pools:
        shapes = [self._shape(kind) for kind in self.kinds]
        if self.session.on_device:
            return DevicePools(self.session, self._kinds, shapes, self._dtype)
        return HostPools(self._kinds, shapes, self._dtype)

    def _check_memory(self) -> None:
        needed = self._cache_bytes(self.blocks) + self._activations()
        free, blocks = free_memory(self.session), " and ".join(str(kind.blocks) for kind in self.kinds)
        if needed > free:
            raise DeviceError(
                f"{blocks} blocks of {self.block_size} tokens and the activations need {needed / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} GiB are free; use fewer blocks, or an engine with a smaller token budget"
            )

    # -- steps ----------------------------------------------------------------------------------------------------
    def _padded(self, size: int, beside: int = 0) -> int:
        """The next size up. On a GPU each combination of sizes has graphs and memory of its own: there are fewer
        beside many tokens."""
        sizes = _FEWER if beside >= _MANY and self.session.on_device else _FEW
        return next((n for n in sizes if size <= n <= self.token_budget), self.token_budget)

    def _check(self, batch: Batch) -> None:
        tokens, (count, width) = len(batch.token_ids), batch.tables.shape[-2:]
        if tokens > self.token_budget or count > self.sequence_budget or len(batch.rows) > self.token_budget:
            raise InputError(
                f"a step takes {self.token_budget} tokens of {self.sequence_budget} sequences, this batch has {tokens} "
                f"of {count} and {len(batch.rows)} rows"
            )
        if width > self.width:
            raise InputError(f"the engine's context is {self.width} blocks, a table has {width}")
        if len(batch.starts) != count + 1 or batch.starts[-1] != tokens:
            raise InputError(f"starts {batch.starts.tolist()} do not part {tokens} tokens into {count} sequences")
        self._within("token_ids", batch.token_ids, self.vocabulary)
        self._within("positions", batch.positions, self.context)
        self._check_places(batch)
        self._within("rows", batch.rows, tokens)
        self._within("states", batch.states, tokens)
        self._within("carried", batch.carried[:, 0], tokens)
        self._check_draws(batch)
        before = self._before[1] if self._before is not None and self.ahead else 0
        self._within("rows of the step before", batch.carried[:, 1], before)

    def _check_places(self, batch: Batch) -> None:
        for number, (kind, slots, tables) in enumerate(zip(self.kinds, *self._of_kinds(batch), strict=True)):
            self._within(input_of("slots", number), slots, kind.blocks * self.block_size)
            self._within(input_of("tables", number), tables, kind.blocks)

    def _check_draws(self, batch: Batch) -> None:
        edits = len(batch.edits)
        if len(batch.draws) not in (0, len(batch.rows)) or edits > _EDITS[-1] or len(batch.told) > len(batch.rows):
            raise InputError(f"{len(batch.rows)} rows have {len(batch.draws)} draws and {edits} edits, "
                             f"{len(batch.told)} are told of")  # fmt: skip
        self._within("tokens of edits", batch.edits[:, 0], self.vocabulary)
        self._within("edits of draws", batch.draws[:, 6:8], edits + 1)
        self._within("masks of draws", batch.draws[:, 8], len(batch.masks) + 1)
        self._within("rows that are told of", batch.told, len(batch.rows))

    def _within(self, name: str, numbers: Integers, stop: int) -> None:
        """Anything else would be read or written outside the pools."""
        if numbers.size and not (int(numbers.min()) >= 0 and int(numbers.max()) < stop):
            raise InputError(f"{name} must be within 0 and {stop - 1}, found {numbers.min()} to {numbers.max()}")


def _filled(values: Any, size: int, rest: int) -> Integers:
    filled = np.full(size, rest, np.int32)
    filled[: len(values)] = values
    return filled


def _grown(rows: Integers, count: int, width: int) -> Integers:
    """As many rows as that, and as long, the rest zeros."""
    if rows.shape == (count, width):
        return rows
    grown = np.zeros((count, width), np.int32)
    kept = rows[:, :width]
    grown[: len(kept), : kept.shape[1]] = kept
    return grown


def _likeliest(draws: Integers) -> bool:
    """Whether every row gets the likeliest token of its logits as they are."""
    return not (draws[:, [2, 8]].any() or (draws[:, 6] != draws[:, 7]).any())


def _device_of(engine: Engine) -> str:
    return "cuda" if engine.variants and all(v.target == "cuda" for v in engine.variants) else "cpu"


def _wanted(found: Mapping[str, Any], wanted: Sequence[Wanted], batch: Batch) -> dict[str, Any]:
    """What was wanted, without padding; tokens are drawn here where the engine does not."""
    extents = {"logits": len(batch.rows), "chosen": len(batch.rows), "hidden": len(batch.states),
               "likely": len(batch.told)}  # fmt: skip
    cut = {name: array[: extents[name]] for name, array in found.items()}
    if not cut.keys() >= set(wanted):
        cut["chosen"] = _drawn(cut["logits"], batch)
        cut["likely"] = likely(cut["logits"], cut["chosen"], batch.told)
    return {name: cut[name] for name in wanted}


def _drawn(logits_RV: Floats, batch: Batch) -> Integers:
    draws = batch.draws if len(batch.draws) else np.zeros((len(logits_RV), DRAW), np.int32)
    return np.asarray(sample(logits_RV, draws, batch.edits, batch.masks))
