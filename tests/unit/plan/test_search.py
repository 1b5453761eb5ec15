"""The search: what is recommended and what never is, the Pareto front, fewest replicas, sensitivity."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from freehold.errors import InsufficientMemory, InvalidRequest
from freehold.plan.hardware import cluster
from freehold.plan.models import load
from freehold.plan.search import Candidate, Option, candidates, check_engines, pareto, search, sensitivity
from freehold.plan.types import CacheFormat, Cost, Figure, Percentiles, Speed

GLM = load("glm-5.2-fp8")


def exact(value: float) -> Figure:
    return Figure.exact(value, "test")


def all_alike(value: float) -> Percentiles:
    return Percentiles(*(exact(value),) * 4)


def speed(ttft: float, tpot: float, meets: bool = True) -> Speed:
    rate = exact(1 / tpot)
    return Speed(all_alike(ttft), all_alike(tpot), rate, exact(0), rate, rate, rate, 1.0, 0.0, meets)


def speed_of(candidate: Candidate) -> Speed:
    """Wider is faster; six replicas' worth of load."""
    tpot = 0.1 / candidate.layout.tp * (0.6 if candidate.mtp else 1.0)
    return speed(1.0, tpot, candidate.gpus >= 8 and tpot < 0.05)


def cost_of(candidate: Candidate, speed: Speed) -> Cost:
    dollars = 4.0 * candidate.gpus
    per_token = exact(dollars / 3600 / (speed.output_rate.value * candidate.replicas) * 1e6)
    return Cost(exact(dollars), per_token, per_token, per_token, per_token)


def option(cost: float, tpot: float, ttft: float, meets: bool = True) -> Option:
    run, _, _ = candidates(GLM, cluster("8xh200"), ("sglang",))
    price = exact(cost)
    return Option(run[0], speed(ttft, tpot, meets), Cost(price, price, price, price, price))


def test_the_best_meets_the_slos_and_is_cheapest() -> None:
    found = search(GLM, cluster("16xh200"), ("vllm", "sglang"), speed_of, cost_of)
    assert found.best is not None
    assert found.best.speed.meets_slo
    meeting = [one for one in found.options if one.speed.meets_slo]
    assert found.best.objectives == min(one.objectives for one in meeting)
    assert {one.candidate.support.status for one in found.options} == {"runs"}
    assert set(found.front) <= set(meeting)
    assert found.too_large > 0


def test_no_slo_met_means_no_best_but_a_front() -> None:
    found = search(GLM, cluster("8xh200"), ("sglang",), lambda _: speed(9.0, 0.5, meets=False), cost_of)
    assert found.best is None
    assert found.front


def test_what_no_engine_runs_is_shown_and_never_recommended() -> None:
    found = search(load("glm-5.2-w4a16"), cluster("8xa100"), ("vllm", "sglang"), speed_of, cost_of)
    assert not found.options
    assert found.best is None
    assert found.unknown
    reasons = {one.why for one in found.unknown}
    assert any("runs it only with patches: no upstream sparse-attention backend before SM90" in why for why in reasons)
    assert all("https://" in why for why in reasons)


def test_dp_groups_only_where_they_are_known_to_run() -> None:
    run, fit, _ = candidates(GLM, cluster("8xmi355x"), ("sglang",))
    assert run
    assert all(made.layout.dp == 1 for made in run)
    assert any(one.candidate.layout.dp > 1 and "data-parallel groups" in one.why for one in fit)


def test_a_cache_format_that_the_engine_lacks_is_not_recommended() -> None:
    run, fit, _ = candidates(GLM, cluster("8xh200"), ("sglang",), cache=CacheFormat("nvfp4_ds_mla"))
    assert not run
    assert "no nvfp4_ds_mla cache" in fit[0].why


def test_room_for_a_long_sequence_is_asked_of_every_candidate() -> None:
    run, _, _ = candidates(GLM, cluster("8xb200"), ("vllm",), context=1_000_000)
    assert run
    assert all(made.footprint.max_context >= 1_000_000 for made in run)


def test_what_fits_nowhere_is_refused_with_what_would() -> None:
    with pytest.raises(InsufficientMemory, match=r"it needs at least 16 of them; glm-5\.2-fp8 would fit"):
        search(load("glm-5.2"), cluster("8xh200"), ("sglang",), speed_of, cost_of)


def test_replicas_are_as_few_as_meet_the_slos() -> None:
    tried = []

    def needs_three(candidate: Candidate) -> Speed:
        tried.append(candidate.replicas)
        return speed(1.0, 0.01, candidate.replicas >= 3)

    found = search(GLM, cluster("64xh200"), ("sglang",), needs_three, cost_of, drafts=(False,))
    assert found.best is not None
    several = [one for one in found.options if one.candidate.layout.gpus == 8]
    assert {one.candidate.replicas for one in several} == {3}
    assert max(tried) == 8
    everything = search(GLM, cluster("64xh200"), ("sglang",), needs_three, cost_of, drafts=(False,), fewer=False)
    assert {one.candidate.replicas for one in everything.options if one.candidate.layout.gpus == 8} == {8}


def test_a_screen_limits_what_is_evaluated() -> None:
    evaluated: list[Candidate] = []

    def counting(candidate: Candidate) -> Speed:
        evaluated.append(candidate)
        return speed_of(candidate)

    wide = search(GLM, cluster("8xh200"), ("sglang",), counting, cost_of, screen=lambda made: -made.layout.tp, limit=2)
    assert len(evaluated) == 4  # two with drafts, two without
    assert {one.candidate.layout.tp for one in wide.options} == {8}


def test_the_front_has_no_option_that_another_beats() -> None:
    points = [option(*values) for values in ((1, 9, 9), (2, 5, 5), (2, 6, 5), (3, 5, 5), (4, 1, 9), (1, 9, 9))]
    front = pareto(points)
    assert {one.objectives for one in front} == {(1, 9, 9), (2, 5, 5), (4, 1, 9)}
    assert [one.objectives[0] for one in front] == sorted(one.objectives[0] for one in front)


def test_sensitivity_solves_again_and_says_when_the_answer_changes() -> None:
    base = option(2.0, 0.01, 1.0)
    other = Option(replace(base.candidate, replicas=7), base.speed, base.cost)

    def solve(name: str, value: float) -> Option | None:
        if name == "price":
            price = exact(value)
            return Option(base.candidate, base.speed, Cost(price, price, price, price, price))
        return other if value > 0.5 else None

    found = sensitivity({"hit rate": (0.9, 0.1), "price": (1.0, 4.0)}, base, solve)
    assert [one.name for one in found] == ["price", "hit rate"]
    assert found[0].spread == 4.0
    assert [point.changed for point in found[0].points] == [False, False]
    assert [point.value for point in found[1].points] == [0.1, 0.9]
    assert [point.changed for point in found[1].points] == [True, True]
    assert found[1].spread == 1.0


def test_cost_falls_as_the_front_slows() -> None:
    found = search(GLM, cluster("16xh200"), ("vllm", "sglang"), speed_of, cost_of)
    for one, following in pairwise(found.front):
        assert one.objectives[0] <= following.objectives[0]


def test_engines_are_checked() -> None:
    assert check_engines(["sglang", "vllm"]) == ("vllm", "sglang")
    with pytest.raises(InvalidRequest, match="engine 'tgi' is not known; there are vllm, sglang, freehold"):
        check_engines(["tgi"])
