"""Fields of config.pbtxt that this server does not act on: those that change results are refused, others named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ingot.server.config import Config
from ingot.server.request import Code, ServerError

log = logging.getLogger("ingot.server")
Rule = tuple[Callable[[Config], Any], str]

REFUSED: tuple[Rule, ...] = (
    (lambda c: c.batch_input, "batch_input is not supported: an engine has no use for derived batch inputs"),
    (lambda c: c.batch_output, "batch_output is not supported: outputs are split by rows"),
    (lambda c: any(i.allow_ragged_batch for i in c.input),
     "allow_ragged_batch is not supported: requests of different shapes run in batches of their own"),
    (lambda c: any(i.is_shape_tensor for i in (*c.input, *c.output)),
     "is_shape_tensor is not supported: an engine takes such inputs as ordinary tensors"),
    (lambda c: any(i.is_non_linear_format_io for i in (*c.input, *c.output)),
     "is_non_linear_format_io is not supported: engines take row-major tensors"),
    (lambda c: any(i.format == type(i).FORMAT_NHWC and len(i.dims) != 3 for i in c.input),
     "format FORMAT_NHWC takes dims of three extents"),
    (lambda c: c.model_transaction_policy.decoupled and c.backend != "python",
     "only a model.py can be decoupled: an engine answers each request once"),
    (lambda c: c.model_transaction_policy.decoupled and c.response_cache.enable,
     "the responses of a decoupled model cannot be cached"),
    (lambda c: c.model_transaction_policy.decoupled and c.HasField("sequence_batching"),
     "sequences of a decoupled model are not supported"),
    (lambda c: c.model_operations.op_library_filename, "op_library_filename is not supported: use an Ingot plugin"),
    (lambda c: c.model_repository_agents.agents, "model_repository_agents are not supported"),
    (lambda c: c.sequence_batching.iterative_sequence, "iterative_sequence is not supported"),
    (lambda c: any(g.passive for g in c.instance_group), "passive instances are not supported"),
    (lambda c: any(g.secondary_devices for g in c.instance_group), "secondary_devices are not supported"),
    (lambda c: c.runtime, "a runtime of its own is not supported"),
    (lambda c: any(s.model_namespace for s in c.ensemble_scheduling.step), "model_namespace is not supported"),
)  # fmt: skip

IGNORED: tuple[Rule, ...] = (
    (lambda c: c.HasField("optimization"), "optimization (an engine is optimised when it is built)"),
    (lambda c: c.cc_model_filenames, "cc_model_filenames (an engine holds variants of its own)"),
    (lambda c: any(g.HasField("rate_limiter") for g in c.instance_group), "rate_limiter"),
    (lambda c: any(g.profile for g in c.instance_group), "instance_group.profile (profiles are chosen by shape)"),
    (lambda c: c.ensemble_scheduling.max_inflight_requests, "ensemble_scheduling.max_inflight_requests"),
    (lambda c: c.model_metrics.metric_control, "model_metrics"),
    (lambda c: any(s.use_growable_memory or s.use_same_buffer_for_input_output for s in c.sequence_batching.state),
     "hints about the memory of sequence states"),
)  # fmt: skip


def check_support(config: Config) -> None:
    """UNSUPPORTED for a field that would change what a model answers; a line in the log for one that would not."""
    for holds, reason in REFUSED:
        if holds(config):
            raise ServerError(Code.UNSUPPORTED, f"model '{config.name}': {reason}")
    ignored = [what for holds, what in IGNORED if holds(config)]
    if ignored:
        log.warning("model %s: this server takes no notice of %s", config.name, ", ".join(ignored))
