"""Rows of the ledger as Prometheus sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from freehold.gateway.metrics import DURATION_BUCKETS, TPOT_BUCKETS, TTFT_BUCKETS, GatewayMetrics
from freehold.gateway.parts import Asked
from freehold.ledger import Row


def row(**more: Any) -> Row:
    told: dict[str, Any] = {"row_id": "r", "request_id": "q", "at": 0.0, "endpoint": "chat", "alias": "glm"}
    told |= {"upstream": "engine", "model_id": "glm-5.2", "status": 200, "duration": 2.0} | more
    return Row(**told)


def samples(metrics: GatewayMetrics) -> dict[str, list[tuple[Mapping[str, str], float]]]:
    found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            found.setdefault(sample.name.removeprefix("freehold_gateway_"), []).append((sample.labels, sample.value))
    return found


def test_attempts_tokens_and_money() -> None:
    metrics = GatewayMetrics()
    metrics(row(input_tokens=100, cached_tokens=40, output_tokens=7, reasoning_tokens=3, cost=1_500_000))
    metrics(row(input_tokens=1, output_tokens=2, undelivered_tokens=2, cost=250_000, error="client_gone"))
    metrics(row(status=0, error="timeout", experiment="trial", arm="new", served_arm="old"))
    metrics(row(shadow_of="r"))
    found = samples(metrics)
    by_outcome = {(one["error"], one["arm"], one["shadow"]): value for one, value in found["attempts_total"]}
    assert by_outcome == {
        ("", "", "no"): 1,
        ("client_gone", "", "no"): 1,
        ("timeout", "old", "no"): 1,
        ("", "", "yes"): 1,
    }
    tokens = {one["kind"]: value for one, value in found["tokens_total"] if not one["arm"] and one["shadow"] == "no"}
    assert tokens == {"input": 101, "cached": 40, "output": 9, "reasoning": 3, "undelivered": 2}
    assert sum(value for _, value in found["cost_dollars_total"]) == 1.75
    labels = found["cost_dollars_total"][0][0]
    assert labels == {
        "endpoint": "chat",
        "alias": "glm",
        "upstream": "engine",
        "model": "glm-5.2",
        "experiment": "",
        "arm": "",
        "shadow": "no",
    }


def test_latencies() -> None:
    metrics = GatewayMetrics()
    metrics(row(ttft=0.02, tpot=0.03, duration=1.5))
    metrics(row(ttft=500.0, duration=0.2))
    metrics(row(duration=0.2))
    found = samples(metrics)
    ttft = {one["le"]: value for one, value in found["time_to_first_token_seconds_bucket"]}
    assert (ttft["0.01"], ttft["0.02"], ttft["160.0"], ttft["+Inf"]) == (0, 1, 1, 2)
    assert found["time_to_first_token_seconds_sum"][0][1] == 500.02
    assert found["time_per_output_token_seconds_count"][0][1] == 1
    assert found["attempt_duration_seconds_count"][0][1] == 3


@pytest.mark.parametrize("bounds", [TTFT_BUCKETS, TPOT_BUCKETS, DURATION_BUCKETS])
def test_buckets_rise(bounds: tuple[float, ...]) -> None:
    assert list(bounds) == sorted(set(bounds))


def test_text_of_a_client_is_in_no_label() -> None:
    metrics = GatewayMetrics()
    secret = "my private words"
    for number in range(100):
        told = {"alias": f"{secret}{number}", "upstream": "", "model_id": "", "status": 404, "error": "refused_here"}
        metrics(row(**told, prompt_name=secret, user=secret, key_id=secret, team=secret, request_id=secret))
    metrics(row(prompt_name=secret, prompt_version=secret, user=secret, key_id=secret, finish_reason=secret))
    assert secret not in metrics.text().decode()
    assert samples(metrics)["refused_total"] == [({"endpoint": "chat", "status": "404"}, 100.0)]
    assert len(samples(metrics)["attempts_total"]) == 1


def test_gauges_are_read_at_a_scrape_and_the_route_answers() -> None:
    running = [3]
    metrics = GatewayMetrics({"calls_running": ("Calls that run now.", lambda: running[0])})
    assert samples(metrics)["calls_running"] == [({}, 3.0)]
    running[0] = 4
    answer = asyncio.run(metrics.route(Asked("GET", "/metrics", {}, {}, b"")))
    assert b"freehold_gateway_calls_running 4.0\n" in answer.body
    assert answer.content_type.startswith("text/plain")
