"""Prometheus text of an engine, under the names that vLLM's dashboards know."""

from __future__ import annotations

from collections.abc import Iterator

from ingot.llm.counters import Histogram
from ingot.llm.engine import Engine
from ingot.server.metrics import head, sample


def exposition(engine: Engine, model: str) -> str:
    """The page."""
    lines: list[str] = []
    for name, kind, text, value in _plain(engine):
        lines += [*head(name, kind, text), sample(name, {"model_name": model}, value)]
    name = "vllm:request_success_total"
    lines += head(name, "counter", "Answers that ended, by why")
    for reason, count in sorted(engine.counters.finished.items()):
        lines.append(sample(name, {"model_name": model, "finished_reason": reason}, count))
    for name, text, histogram in _histograms(engine):
        lines += head(name, "histogram", text)
        lines += _buckets(name, model, histogram)
    return "\n".join(lines) + "\n"


def _plain(engine: Engine) -> Iterator[tuple[str, str, str, float]]:
    scheduler, counters, cache = engine.scheduler, engine.counters, engine.scheduler.cache
    yield "vllm:num_requests_running", "gauge", "Sequences that have blocks", len(scheduler.running)
    yield "vllm:num_requests_waiting", "gauge", "Sequences that wait for blocks", scheduler.waiting
    yield "vllm:kv_cache_usage_perc", "gauge", "Share of blocks that have an owner, of the fullest pool", cache.usage
    yield "vllm:prefix_cache_queries_total", "counter", "Tokens of prompts looked for in the cache", cache.asked
    yield "vllm:prefix_cache_hits_total", "counter", "Tokens of prompts found there", cache.found
    yield "vllm:prompt_tokens_total", "counter", "Tokens of prompts", counters.prompt_tokens
    yield "vllm:generation_tokens_total", "counter", "Tokens of answers", counters.answer_tokens
    yield "vllm:num_preemptions_total", "counter", "Sequences that gave their blocks to others", scheduler.preemptions
    yield "vllm:spec_decode_num_draft_tokens_total", "counter", "Drafts that were checked", counters.proposed
    yield "vllm:spec_decode_num_accepted_tokens_total", "counter", "Drafts that were right", counters.accepted
    yield "ingot_llm_steps_total", "counter", "Steps of the model", counters.steps
    yield "ingot_llm_step_faults_total", "counter", "Steps that failed and were computed one by one", counters.faults
    yield "ingot_llm_healthy", "gauge", "1 unless the engine has failed or hangs", not engine.health


def _histograms(engine: Engine) -> Iterator[tuple[str, str, Histogram]]:
    counters = engine.counters
    yield "vllm:time_to_first_token_seconds", "From a request's arrival to its first token", counters.first_token
    yield "vllm:inter_token_latency_seconds", "Between tokens of an answer", counters.between_tokens
    yield "vllm:e2e_request_latency_seconds", "From a request's arrival to its end", counters.whole
    yield "vllm:request_queue_time_seconds", "From a request's arrival to its first step", counters.queued
    yield "ingot_llm_step_seconds", "Steps of the model", counters.step


def _buckets(name: str, model: str, histogram: Histogram) -> Iterator[str]:
    counts, total = list(histogram.counts), 0
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), counts, strict=True):
        total += count
        yield sample(f"{name}_bucket", {"model_name": model, "le": bound}, total)
    yield sample(f"{name}_sum", {"model_name": model}, histogram.total)
    yield sample(f"{name}_count", {"model_name": model}, total)
