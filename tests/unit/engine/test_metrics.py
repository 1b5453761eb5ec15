"""Metrics: the names that scrapers know, and numbers computed by hand."""

from __future__ import annotations

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from freehold.engine.metrics import EngineMetrics, EngineStats, Histogram
from freehold.engine.scheduler import SchedulerCounters
from freehold.types import FinishReason, TokenChunk, Usage


def scrape(metrics: EngineMetrics) -> dict[str, float]:
    """Every sample by its name, with labels other than the model's appended."""
    samples = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            assert sample.labels["model_name"] == "m"
            extra = [value for key, value in sorted(sample.labels.items()) if key != "model_name"]
            samples["/".join([sample.name, *extra])] = sample.value
    return samples


def test_names_that_gateways_scrape() -> None:
    stats = EngineStats(finished=dict.fromkeys(FinishReason, 0))
    names = set(scrape(EngineMetrics("m", lambda: stats, {"block_size": 16, "num_gpu_blocks": 100})))
    expected = {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:num_preemptions_total",
        "vllm:spec_decode_num_drafts_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
        "vllm:request_success_total/stop",
        "vllm:request_success_total/length",
        "vllm:request_success_total/abort",
        "vllm:time_to_first_token_seconds_count",
        "vllm:time_to_first_token_seconds_sum",
        "vllm:inter_token_latency_seconds_count",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:e2e_request_latency_seconds_bucket/+Inf",
        "vllm:cache_config_info/16/100",
        "freehold_num_requests_running",
        "freehold_kv_cache_usage_ratio",
        "freehold_time_to_first_token_seconds_count",
        "freehold_requests_finished_total/error",
        "freehold_step_seconds_count",
    }
    assert expected <= names, expected - names


def test_latencies_by_hand() -> None:
    metrics = EngineMetrics("m", EngineStats)
    metrics.begin("a", 10.0)
    usage = Usage(prompt_tokens=5)
    metrics.record([TokenChunk("a", (1,), usage=usage)], 10.5, step_seconds=0.5)
    metrics.record([TokenChunk("a", (1, 2), usage=usage)], 10.75, step_seconds=0.25)
    metrics.record([TokenChunk("a", (3,), finish_reason=FinishReason.STOP, usage=usage)], 11.75)
    samples = scrape(metrics)
    for prefix in ("vllm:", "freehold_"):
        assert samples[f"{prefix}time_to_first_token_seconds_sum"] == 0.5
        assert samples[f"{prefix}inter_token_latency_seconds_count"] == 2
        assert samples[f"{prefix}inter_token_latency_seconds_sum"] == 1.25
        assert samples[f"{prefix}e2e_request_latency_seconds_sum"] == 1.75
        assert samples[f"{prefix}request_time_per_output_token_seconds_sum"] == 1.25 / 3
    assert samples["freehold_steps_total"] == 2
    assert samples["freehold_step_seconds_sum"] == 0.75
    assert (metrics.prompt_tokens, metrics.generation_tokens) == (5, 4)
    assert metrics.finished[FinishReason.STOP] == 1
    assert metrics.mean_e2e() == 1.75


def test_aborted_requests_have_a_reason_but_no_latency() -> None:
    metrics = EngineMetrics("m", EngineStats)
    metrics.begin("a", 0.0)
    metrics.record([TokenChunk("a", finish_reason=FinishReason.ABORT)], 1.0)
    assert metrics.finished[FinishReason.ABORT] == 1
    assert scrape(metrics)["vllm:e2e_request_latency_seconds_count"] == 0
    assert metrics.mean_e2e() is None


def test_requests_that_are_not_measured_leave_no_trace() -> None:
    metrics = EngineMetrics("m", EngineStats)
    metrics.record([TokenChunk("warm-up", (1,), finish_reason=FinishReason.LENGTH)], 1.0, step_seconds=0.1)
    assert metrics.generation_tokens == 0
    assert sum(metrics.finished.values()) == 0


def test_max_tokens_zero_counts_its_prompt() -> None:
    metrics = EngineMetrics("m", EngineStats)
    metrics.begin("a", 0.0)
    metrics.record([TokenChunk("a", finish_reason=FinishReason.LENGTH, usage=Usage(prompt_tokens=7))], 1.0)
    assert metrics.prompt_tokens == 7


def test_histogram_buckets_include_their_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    family = histogram.family("x", "text", "m")
    buckets = {sample.labels["le"]: sample.value for sample in family.samples if sample.name == "x_bucket"}
    assert buckets == {"1.0": 2, "2.0": 4, "+Inf": 5}


def test_drafts_by_place() -> None:
    counters = SchedulerCounters()
    for proposed, accepted in ((3, 2), (3, 0), (1, 1), (2, 2)):
        counters.count_drafts(proposed, accepted)
    assert (counters.draft_rounds, counters.draft_proposed, counters.draft_accepted) == (4, 9, 5)
    assert (counters.draft_proposed_at, counters.draft_accepted_at) == ([4, 3, 2], [3, 2, 0])
    stats = EngineStats(
        draft_rounds=4, draft_proposed=9, draft_accepted=5, draft_proposed_at=(4, 3, 2), draft_accepted_at=(3, 2, 0)
    )
    assert stats.acceptance_rate == 5 / 9
    assert stats.acceptance_length == 1 + 5 / 4
    samples = scrape(EngineMetrics("m", lambda: stats))
    assert [samples[f"vllm:spec_decode_num_accepted_tokens_per_pos_total/{at}"] for at in range(3)] == [3, 2, 0]
    assert samples["freehold_spec_decode_num_draft_tokens_per_pos_total/2"] == 2
