"""config.pbtxt through its schema: read, completed from the engine, checked against it, turned into rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf import json_format, text_format

from ingot.plan.plan import TensorSpec
from ingot.server.batcher import QueuePolicy, Rules
from ingot.server.request import BY_NUMPY, invalid
from ingot.server.schema import POOL, message

ModelConfig = message("inference.ModelConfig")
Config = Any  # an instance of ModelConfig: protobuf's own schema is the type
DATA_TYPES = POOL.FindEnumTypeByName("inference.DataType").values_by_name
UNBOUNDED_BATCH = 16  # max_batch_size where neither a configuration nor a profile bounds the batch

# backend or platform -> file names looked for, best first; any backend may also hold an engine built from its model
MODEL_FILES = {
    "": ("model.engine", "model.plan", "model.onnx"),
    "ingot": ("model.engine", "model.plan", "model.onnx"),
    "tensorrt": ("model.plan", "model.engine"),
    "tensorrt_plan": ("model.plan", "model.engine"),
    "onnxruntime": ("model.onnx", "model.engine"),
    "onnxruntime_onnx": ("model.onnx", "model.engine"),
}


def read_config(text: str, source: str) -> Config:
    """A configuration from config.pbtxt's text; ServerError with protobuf's line and column if it is malformed."""
    try:
        return text_format.Parse(text, ModelConfig(), descriptor_pool=POOL)
    except text_format.ParseError as error:
        raise invalid(f"{source}: {error}") from error


def read_override(text: str, name: str) -> Config:
    """A configuration a load request carries as JSON."""
    try:
        return json_format.Parse(text, ModelConfig(), descriptor_pool=POOL)
    except (json_format.ParseError, ValueError) as error:
        raise invalid(
            f"failed to load '{name}', the config of the request is no model configuration: {error}"
        ) from error


def enum_name(item: Any, field: str) -> str:
    """The name of an enum field's value."""
    return item.DESCRIPTOR.fields_by_name[field].enum_type.values_by_number[getattr(item, field)].name


def files_of(config: Config) -> tuple[str, ...]:
    """Names the model's file may have in a version's folder, best first."""
    backend = config.backend or config.platform
    if backend not in MODEL_FILES:
        raise invalid(
            f"model '{config.name}': this server has no backend '{backend}'; "
            f"it serves {', '.join(sorted(filter(None, MODEL_FILES)))}, python and ensembles"
        )
    return (config.default_model_filename,) if config.default_model_filename else MODEL_FILES[backend]


def completed(config: Config, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Config:
    """The configuration with what it leaves out taken from the engine; ServerError where the two contradict."""
    full = ModelConfig()
    full.CopyFrom(config)
    if not full.backend and not full.platform:
        full.backend = "ingot"
    if not full.max_batch_size and not full.input:
        full.max_batch_size = _largest_batch(inputs, outputs)
    if not full.HasField("sequence_batching"):  # a state's batch axis is checked when it runs
        _check_batch(full, (*inputs, *outputs))
    own = _kept_names(full)
    _complete_tensors(full, full.input, [spec for spec in inputs if spec.name not in own], "input")
    _complete_tensors(full, full.output, [spec for spec in outputs if spec.name not in own], "output")
    if not full.instance_group:
        full.instance_group.add(name=full.name, kind="KIND_AUTO", count=1)
    if not full.HasField("version_policy"):
        full.version_policy.latest.num_versions = 1
    if full.max_batch_size > 1 and full.WhichOneof("scheduling_choice") is None:
        full.dynamic_batching.default_queue_policy.allow_timeout_override = True
    return full


def _largest_batch(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> int:
    """0 unless every tensor begins with one and the same symbol; then the profile's largest."""
    first = {spec.shape[0] if spec.shape else None for spec in (*inputs, *outputs)}
    if len(first) != 1 or not isinstance(next(iter(first)), str):
        return 0
    bounds = [spec.max[0] for spec in inputs if spec.max]
    return min(bounds, default=UNBOUNDED_BATCH)


def _kept_names(config: Config) -> set[str]:
    """Tensors between the server and the model alone: controls and states."""
    batching = config.sequence_batching
    states = {name for item in batching.state for name in (item.input_name, item.output_name)}
    return states | {item.name for item in batching.control_input}


def _check_batch(config: Config, specs: Sequence[TensorSpec]) -> None:
    most = config.max_batch_size
    for spec in specs if most else ():
        first = spec.shape[0] if spec.shape else None
        bound = first if isinstance(first, int) else spec.max[0] if spec.max else most
        if first is None or bound < most:
            raise invalid(
                f"model '{config.name}': max_batch_size is {most}, but '{spec.name}' of the engine has shape "
                f"{list(spec.shape)} up to {list(spec.max or spec.shape)}; build it for a larger batch or say 0"
            )


def _complete_tensors(config: Config, listed: Any, specs: Sequence[TensorSpec], kind: str) -> None:
    known = {spec.name: spec for spec in specs}
    for item in listed:
        if item.name not in known:
            raise invalid(
                f"model '{config.name}': config.pbtxt lists the {kind} '{item.name}', "
                f"which the engine does not have; it has {', '.join(known)}"
            )
        _check_tensor(config, item, known[item.name], kind)
    given = {item.name for item in listed}
    for spec in specs:
        if spec.name not in given and (kind == "input" or not given):
            listed.add(name=spec.name, data_type=BY_NUMPY[spec.dtype].config, dims=_dims(config, spec))


def _dims(config: Config, spec: TensorSpec) -> list[int]:
    shape = spec.shape[1:] if config.max_batch_size else spec.shape
    return [extent if isinstance(extent, int) else -1 for extent in shape]


def _check_tensor(config: Config, item: Any, spec: TensorSpec, kind: str) -> None:
    where = f"model '{config.name}', {kind} '{item.name}'"
    if spec.dtype not in BY_NUMPY:
        raise invalid(f"{where}: the protocol has no name for the engine's {spec.dtype}")
    if not item.data_type:
        item.data_type = DATA_TYPES[BY_NUMPY[spec.dtype].config].number
    stated = enum_name(item, "data_type")
    if stated != BY_NUMPY[spec.dtype].config:
        raise invalid(f"{where}: config.pbtxt says {stated}, the engine has {BY_NUMPY[spec.dtype].config}")
    if not item.dims:
        item.dims.extend(_dims(config, spec))
    dims = tuple(item.reshape.shape) if item.HasField("reshape") else tuple(item.dims)
    expected = _dims(config, spec)
    if len(dims) != len(expected) or any(-1 not in (a, b) and a != b for a, b in zip(dims, expected, strict=True)):
        raise invalid(
            f"{where}: config.pbtxt says dims {list(dims)}, the engine has {expected}"
            + (" after the batch dimension" if config.max_batch_size else "")
        )


def check_name(config: Config, folder: str) -> None:
    """A configuration names its folder, or nothing."""
    if config.name and config.name != folder:
        raise invalid(f"config.pbtxt names the model '{config.name}', its folder is '{folder}'; they must be equal")
    config.name = folder
    if config.max_batch_size < 0:
        raise invalid(f"model '{folder}': max_batch_size must not be negative, it is {config.max_batch_size}")


def chosen_versions(config: Config, available: Sequence[int]) -> tuple[int, ...]:
    """The versions the policy wants of those there are (default: the latest one)."""
    policy = config.version_policy
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return tuple(sorted(available))
    if choice == "specific":
        return tuple(sorted(set(policy.specific.versions) & set(available)))
    return tuple(sorted(available)[-max(policy.latest.num_versions, 1) :])


# -- rules ------------------------------------------------------------------------------------------------------------
def rules_of(config: Config) -> Rules:
    """The batcher's rules: dynamic_batching where it is stated; one request an execution if the model cannot batch."""
    batching = config.dynamic_batching
    levels = int(batching.priority_levels)
    if levels and not 1 <= batching.default_priority_level <= levels:
        raise invalid(
            f"model '{config.name}': default_priority_level must be 1 to {levels}, "
            f"it is {batching.default_priority_level}"
        )
    for size in batching.preferred_batch_size:
        if not 1 <= size <= config.max_batch_size:
            raise invalid(
                f"model '{config.name}': dynamic batching preferred size must be <= max batch size "
                f"{config.max_batch_size}, it is {size}"
            )
    return Rules(
        max_rows=max(config.max_batch_size, 1),
        preferred=tuple(sorted(batching.preferred_batch_size)),
        max_delay=batching.max_queue_delay_microseconds * 1000,
        levels=levels,
        default_level=int(batching.default_priority_level) or 1,
        policy=_queue_policy(batching.default_queue_policy),
        policies={int(level): _queue_policy(policy) for level, policy in batching.priority_queue_policy.items()},
    )


def limit_queue(config: Config, size: int) -> None:
    """Give a configuration that says nothing of its queue this size; 0: leave it as it is."""
    if size and config.WhichOneof("scheduling_choice") in (None, "dynamic_batching"):
        stated = config.HasField("dynamic_batching")
        policy = config.dynamic_batching.default_queue_policy
        policy.max_queue_size = policy.max_queue_size or size
        policy.allow_timeout_override = policy.allow_timeout_override or not stated


def _queue_policy(policy: Any) -> QueuePolicy:
    return QueuePolicy(
        action="DELAY" if policy.timeout_action else "REJECT",
        default_timeout=policy.default_timeout_microseconds * 1000,
        allow_override=policy.allow_timeout_override,
        max_size=policy.max_queue_size,
    )
