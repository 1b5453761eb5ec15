"""A small version of benchmarks/canary_false_alarms.py: few false alarms, and power."""

from __future__ import annotations

from _canary_peers import naive, watch
from _canary_sim import Truth, experiment, run

RAILS = [{"metric": name} for name in ("error", "ttft", "cost")]
SETTINGS = experiment(800, guardrails=RAILS)


def rolled_back(truth: Truth, runs: int) -> int:
    return sum(run(truth, seed, SETTINGS).state == "rolled_back" for seed in range(runs))


def test_equal_arms_are_rarely_rolled_back_where_repeated_tests_often_would() -> None:
    assert rolled_back(Truth("equal"), 40) <= 3
    assert rolled_back(Truth("conversations", cluster=4.0), 20) <= 3
    assert sum(naive(watch(Truth("equal"), seed, 16, 0.05), 0.05) for seed in range(40)) > 8


def test_harm_is_seen() -> None:
    assert rolled_back(Truth("failing", error=0.05), 20) >= 19
    assert rolled_back(Truth("slow", ttft=1.3), 20) >= 19
    assert rolled_back(Truth("dear", cost=1.3), 20) >= 19


def test_a_healthy_one_is_promoted_and_one_at_the_margin_is_not() -> None:
    wide = experiment(2000, guardrails=[{"metric": "error", "margin": 0.02}, {"metric": "ttft", "margin": 0.15}])
    assert sum(run(Truth("healthy"), seed, wide).state == "promoted" for seed in range(20)) >= 17
    assert sum(run(Truth("at the margin", ttft=1.15), seed, wide).state == "promoted" for seed in range(20)) <= 2
