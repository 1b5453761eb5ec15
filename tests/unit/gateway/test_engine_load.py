"""How busy engines say they are, in their own words."""

from __future__ import annotations

import pytest
from prometheus_client import generate_latest

from freehold.engine.metrics import EngineMetrics, EngineStats
from freehold.gateway.routing.engine_load import Load, read_load

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="glm {5.2}"} 3.0
vllm:num_requests_running{engine="1",model_name="glm {5.2}"} 4.0
vllm:num_requests_waiting{engine="0",model_name="glm {5.2}"} 1.0
vllm:num_requests_waiting{engine="1",model_name="glm {5.2}"} 2.0
vllm:num_requests_waiting_by_reason{engine="0"} 100.0
vllm:kv_cache_usage_perc{engine="0",model_name="glm {5.2}"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="glm {5.2}"} 0.5
"""
SGLANG = """\
sglang:num_running_reqs{model_name="glm"} 8
sglang:num_queue_reqs{model_name="glm"} 4
sglang:token_usage{model_name="glm"} 0.52
"""
LLAMACPP = """\
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 2
llamacpp:requests_deferred 46"""


@pytest.mark.parametrize(
    ("engine", "text", "load"),
    [
        ("vllm", VLLM, Load(7, 3, 0.5)),
        ("vllm", VLLM.replace("kv_cache_usage_perc", "gpu_cache_usage_perc"), Load(7, 3, 0.5)),
        ("vllm", VLLM.replace("} 3.0\n", "} 3.0 1700000000000\n"), Load(7, 3, 0.5)),  # with a timestamp
        ("sglang", SGLANG, Load(8, 4, 0.52)),
        ("llamacpp", LLAMACPP, Load(2, 46, 0.0)),
        ("sglang", VLLM, None),
        ("api", VLLM, None),
        ("vllm", "", None),
        ("vllm", "<html>vllm:num_requests_running 1 vllm:num_requests_waiting 2</html>", None),
        ("llamacpp", LLAMACPP.replace(" 46", " NaN"), None),
        ("llamacpp", LLAMACPP.replace(" 46", " many"), None),
        ("llamacpp", LLAMACPP.replace(" 46", ""), None),
        ("llamacpp", LLAMACPP.replace(" 46", " -1"), None),
        ("sglang", SGLANG.replace("0.52", "7"), Load(8, 4, 1.0)),
    ],
)
def test_load_is_read_from_prometheus_text(engine: str, text: str, load: Load | None) -> None:
    assert read_load(engine, text) == load


def test_our_own_engine_is_understood_by_its_name_and_as_vllm() -> None:
    stats = EngineStats(running=5, waiting=2, kv_usage=0.75)
    text = generate_latest(EngineMetrics("m", lambda: stats).registry).decode()
    assert read_load("freehold", text) == read_load("vllm", text) == Load(5, 2, 0.75)


def test_waiting_weighs_more_than_running_and_a_full_cache_adds_to_it() -> None:
    assert Load(4, 0).score < Load(3, 1).score < Load(0, 4).score
    assert Load(4, 0, 0.9).score == Load(4, 0, 0.1).score
    assert Load(4, 0, 1.0).score == pytest.approx(6)
