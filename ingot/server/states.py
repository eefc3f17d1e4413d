"""Implicit state: what a stateful model gets besides the client's tensors, and what it keeps for the next request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.server.batcher import Entry
from ingot.server.config import Config, enum_name
from ingot.server.ports import Feeds
from ingot.server.request import BY_CONFIG, Array, SequencePlace, invalid
from ingot.server.sequences import SequenceRules


@dataclass(frozen=True)
class Control:
    """An input that tells the model where in its sequence a request stands."""

    name: str
    dtype: str
    value: Callable[[SequencePlace], Any]


@dataclass(frozen=True)
class StateSlot:
    """An output that is an input of the next request."""

    input: str
    output: str
    initial: Array


@dataclass(frozen=True)
class States:
    """All of a model; `batched`: every tensor has a leading batch axis."""

    controls: tuple[Control, ...] = ()
    slots: tuple[StateSlot, ...] = ()
    batched: bool = False

    def feeds(self, batch: Sequence[Entry]) -> Feeds:
        """Controls and states of a batch."""
        places, runs = [entry.token.place for entry in batch], [entry.token.run for entry in batch]
        made: Feeds = {control.name: self._controls(control, places) for control in self.controls}
        for slot in self.slots:
            arrays = [
                slot.initial if p.start else r.state.get(slot.input, slot.initial)
                for p, r in zip(places, runs, strict=True)
            ]
            made[slot.input] = np.stack(arrays) if self.batched else arrays[0]
        return made

    def _controls(self, control: Control, places: Sequence[SequencePlace]) -> Array:
        values = np.array([control.value(place) for place in places], numpy_dtype(control.dtype))
        return values.reshape(-1, 1) if self.batched else values.reshape(1)

    def keep(self, batch: Sequence[Entry], results: Mapping[str, Array]) -> None:
        """Remember the new states; copies, because a batch's rows share their memory."""
        for slot in self.slots:
            data = results[slot.output]
            for row, entry in enumerate(batch):
                entry.token.run.state[slot.input] = data[row].copy() if self.batched else data.copy()


def states_of(config: Config, folder: Path) -> States:
    """What sequence_batching says about controls and states."""
    batching = config.sequence_batching
    controls = tuple(
        _control(config, item.name, control) for item in batching.control_input for control in item.control
    )
    slots = tuple(_slot(config, item, folder) for item in batching.state)
    return States(controls, slots, bool(config.max_batch_size))


_PLACES: dict[str, Callable[[SequencePlace], bool]] = {
    "CONTROL_SEQUENCE_START": lambda place: place.start,
    "CONTROL_SEQUENCE_END": lambda place: place.end,
    "CONTROL_SEQUENCE_READY": lambda place: True,
}


def _control(config: Config, name: str, control: Any) -> Control:
    kind = enum_name(control, "kind")
    if kind == "CONTROL_SEQUENCE_CORRID":
        stated = enum_name(control, "data_type")
        if stated not in BY_CONFIG:
            raise invalid(f"model '{config.name}': the control '{name}' needs a data_type, it says {stated}")
        return Control(name, BY_CONFIG[stated].numpy, lambda place: place.identity)
    choices = {"int32": control.int32_false_true, "float32": control.fp32_false_true, "bool": control.bool_false_true}
    given = {dtype: tuple(values) for dtype, values in choices.items() if values}
    if len(given) != 1 or len(next(iter(given.values()))) != 2:
        raise invalid(f"model '{config.name}': the control '{name}' needs exactly one …_false_true with two values")
    ((dtype, values),) = given.items()
    holds = _PLACES[kind]
    return Control(name, dtype, lambda place: values[holds(place)])


def _slot(config: Config, item: Any, folder: Path) -> StateSlot:
    stated = enum_name(item, "data_type")
    if stated not in BY_CONFIG or BY_CONFIG[stated].size is None:
        raise invalid(
            f"model '{config.name}': the state '{item.input_name}' needs a numeric data_type, it says {stated}"
        )
    dtype = numpy_dtype(BY_CONFIG[stated].numpy)
    dims = tuple(item.initial_state[0].dims) if item.initial_state else tuple(item.dims)
    if any(extent < 0 for extent in dims):
        raise invalid(
            f"model '{config.name}': the state '{item.input_name}' has free dims, give initial_state its dims"
        )
    initial = np.zeros(dims, dtype)
    if item.initial_state and item.initial_state[0].WhichOneof("state_data") == "data_file":
        initial = _from_file(config, folder, item.initial_state[0].data_file, initial)
    return StateSlot(item.input_name, item.output_name, initial)


def _from_file(config: Config, folder: Path, name: str, like: Array) -> Array:
    base = (folder / "initial_state").resolve()
    file = (base / name).resolve()
    if not file.is_relative_to(base) or not file.is_file():
        raise invalid(f"model '{config.name}': there is no initial_state/{name}")
    raw = file.read_bytes()
    if len(raw) != like.nbytes:
        raise invalid(
            f"model '{config.name}': initial_state/{name} has {len(raw)} bytes, the state takes {like.nbytes}"
        )
    return np.frombuffer(raw, like.dtype).reshape(like.shape)


def sequence_rules(config: Config, instances: int) -> SequenceRules:
    """Slots and delays of sequence_batching; `oldest` states its candidates, `direct` has one slot a row."""
    batching, rows = config.sequence_batching, max(config.max_batch_size, 1)
    oldest = batching.WhichOneof("strategy_choice") == "oldest"
    strategy = batching.oldest if oldest else batching.direct
    per_instance = (strategy.max_candidate_sequences or rows) if oldest else rows
    return SequenceRules(
        config.name, per_instance * instances, (batching.max_sequence_idle_microseconds or 1_000_000) * 1000, rows,
        tuple(strategy.preferred_batch_size) if oldest else (), strategy.max_queue_delay_microseconds * 1000,
    )  # fmt: skip
