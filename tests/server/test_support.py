"""Fields of config.pbtxt that this server refuses, and those it takes no notice of."""

import logging

import pytest

from ingot.server.config import read_config
from ingot.server.request import Code, ServerError
from ingot.server.support import IGNORED, REFUSED, check_support

REFUSALS = {
    'batch_input { kind: BATCH_ELEMENT_COUNT target_name: "x" }': "batch_input",
    'batch_output { target_name: "x" }': "batch_output",
    'input { name: "x" allow_ragged_batch: true }': "allow_ragged_batch",
    'output { name: "x" is_shape_tensor: true }': "is_shape_tensor",
    'input { name: "x" is_non_linear_format_io: true }': "is_non_linear_format_io",
    'input { name: "x" format: FORMAT_NHWC dims: [ 3 ] }': "FORMAT_NHWC",
    "model_transaction_policy { decoupled: true }": "only a model.py can be decoupled",
    'backend: "python" model_transaction_policy { decoupled: true } response_cache { enable: true }': "cached",
    'backend: "python" model_transaction_policy { decoupled: true } sequence_batching {}': "sequences of a decoupled",
    'model_operations { op_library_filename: "x.so" }': "op_library_filename",
    'model_repository_agents { agents { name: "checksum" } }': "agents",
    "sequence_batching { iterative_sequence: true }": "iterative_sequence",
    "instance_group { passive: true }": "passive",
    "instance_group { secondary_devices { device_id: 1 } }": "secondary_devices",
    'runtime: "x"': "runtime",
    'ensemble_scheduling { step { model_namespace: "x" } }': "model_namespace",
}
UNNOTICED = {
    "optimization { graph { level: 1 } }": "optimization",
    'cc_model_filenames { key: "7.5" value: "x.plan" }': "cc_model_filenames",
    "instance_group { rate_limiter { priority: 1 } }": "rate_limiter",
    'instance_group { profile: "1" }': "profile",
    "ensemble_scheduling { max_inflight_requests: 3 }": "max_inflight_requests",
    'model_metrics { metric_control { metric_identifier { family: "x" } } }': "model_metrics",
    "sequence_batching { state { use_growable_memory: true } }": "memory of sequence states",
}


@pytest.mark.parametrize("text", REFUSALS)
def test_what_would_change_results_is_refused(text: str) -> None:
    with pytest.raises(ServerError, match=REFUSALS[text]) as refusal:
        check_support(read_config(f'name: "m" {text}', "config.pbtxt"))
    assert refusal.value.code is Code.UNSUPPORTED and "model 'm'" in str(refusal.value)


@pytest.mark.parametrize("text", UNNOTICED)
def test_what_would_not_is_named(text: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_support(read_config(f'name: "m" {text}', "config.pbtxt"))
    assert [record.message for record in caplog.records if UNNOTICED[text] in record.message]


def test_every_rule_is_tried() -> None:
    assert len(REFUSALS) == len(REFUSED) and len(UNNOTICED) == len(IGNORED)
    check_support(read_config('name: "m" max_batch_size: 8 dynamic_batching {} parameters {}', "config.pbtxt"))
