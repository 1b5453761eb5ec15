"""Fits find the factors that made the data, refuse nonsense, and the bundled ones are what a fit gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from freehold.errors import InvalidRequest
from freehold.plan.accuracy import expected
from freehold.plan.calibrate import fit, left_out, mape, outcome, recalibrate, residuals
from freehold.plan.hardware import gpu
from freehold.plan.kept import bundled
from freehold.plan.measured import Measured, Setup, checks, read_results, runs
from freehold.plan.models import load
from freehold.plan.roofline import Efficiencies
from freehold.plan.types import CacheFormat, Layout

SMALL = [run for run in runs() if run.requests <= 40]
TRUTH = Efficiencies(0.7, 0.2, 0.7, 5e-6, 15e-6, 0.0, 0.03)


def setup(group: str = "") -> Setup:
    return Setup(
        group, load("glm-5-fp8"), gpu("h200"), "sglang", Layout(tp=8), CacheFormat("bf16", all_layers=True), 0.85, 8192
    )


def told(run: Measured, efficiencies: Efficiencies) -> Measured:
    """The run as it would have been with these efficiencies."""
    made = outcome(run, efficiencies)
    return replace(run, ttft=made.ttft, tpot=made.tpot)


def test_a_fit_explains_data_of_its_own_kind() -> None:
    data = [told(run, TRUTH) for run in SMALL]
    fitted = fit(data, bundled())
    found = residuals(data, fitted)
    assert mape(one.tpot for one in found) < 0.02
    assert mape(one.ttft for one in found) < 0.04
    assert fitted.kernels == pytest.approx(TRUTH.kernels, rel=0.1)


def test_one_wrong_run_does_not_pull_the_fit_away() -> None:
    data = [told(run, TRUTH) for run in SMALL]
    assert data[0].tpot is not None
    broken = [replace(data[0], tpot=3 * data[0].tpot), *data[1:]]
    found = residuals(data[1:], fit(broken, bundled()))
    assert mape(one.tpot for one in found) < 0.04


def test_left_out_groups_are_not_seen() -> None:
    data = [told(run, TRUTH) for run in SMALL]
    wrong = [
        replace(run, tpot=2 * run.tpot) if run.setup.group == "H200 FP8" and run.tpot is not None else run
        for run in data
    ]
    honest = {group: fitted for group, fitted, _ in left_out(data, bundled(), rounds=2)}
    lied_to = {group: fitted for group, fitted, _ in left_out(wrong, bundled(), rounds=2)}
    assert honest["H200 FP8"] == lied_to["H200 FP8"]
    assert honest["B200 FP8"] != lied_to["B200 FP8"]


def test_bundled_runs_and_what_is_said_of_them() -> None:
    assert len(runs()) == 26
    assert {run.setup.group for run in runs()} == {"B200 FP8", "H200 FP8", "B200 NVFP4"}
    assert all(run.source.where and run.source.date for run in (*runs(), *checks()))
    assert len({run.name for run in runs()}) == 26


def test_small_runs_lie_within_the_interval_that_is_claimed() -> None:
    found = residuals(SMALL, bundled())
    inside = 0
    for one in found:
        run = one.run.setup
        claimed = expected(run.engine, run.gpu, run.model, run.layout, drafts=0)
        assert claimed.basis == "interpolated"
        assert run.gpu.kind == "cuda"
        assert one.tpot is not None
        inside += claimed.tpot[0] <= 1 / (1 + one.tpot) <= claimed.tpot[1]
    assert inside >= 0.8 * len(found)


def test_the_further_from_what_was_measured_the_wider() -> None:
    glm5, glm52 = load("glm-5-fp8"), load("glm-5.2-fp8")
    near = expected("sglang", gpu("h200"), glm5, Layout(tp=8), drafts=0)
    apart = expected("sglang", gpu("h100"), load("glm-5"), Layout(tp=8), drafts=0)
    far = expected("vllm", gpu("h200"), glm52, Layout(tp=8), drafts=3)
    assert [one.distance for one in (near, apart, far)] == ["near", "apart", "far"]
    for narrow, wide in ((near, apart), (apart, far)):
        assert narrow.tpot[1] / narrow.tpot[0] < wide.tpot[1] / wide.tpot[0]
    assert far.basis == "roofline"
    assert near.of_tpot(0.02).low < 0.02 < near.of_tpot(0.02).high
    assert near.of_rate(100).low == pytest.approx(100 / near.tpot[1])


# ── own results ───────────────────────────────────────────────────────────────────────────────────────────────────────

BENCH = {
    "completed": 40,
    "total_input_tokens": 40 * 900,
    "total_output_tokens": 40 * 900,
    "mean_ttft_ms": 300.0,
    "mean_tpot_ms": 18.0,
    "max_concurrency": 4,
}
AIPERF = {
    "time_to_first_token": {"unit": "ms", "avg": 300.0},
    "inter_token_latency": {"unit": "ms", "avg": 18.0},
    "input_sequence_length": {"unit": "tokens", "avg": 900.0},
    "output_sequence_length": {"unit": "tokens", "avg": 900.0},
    "request_count": {"unit": "requests", "avg": 40.0},
    "input_config": {"loadgen": {"concurrency": 4}},
}


@pytest.mark.parametrize("document", [BENCH, AIPERF])
def test_results_of_load_generators(tmp_path: Path, document: dict[str, object]) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(document))
    run = read_results(path, setup())
    assert [run.ttft, run.tpot] == pytest.approx([0.3, 0.018])
    assert run.requests == 40
    assert (run.workload.prompt, run.workload.output, run.workload.concurrency) == (900, 900, 4)
    assert run.setup.group == "result.json"


def test_recalibrating_brings_own_runs_nearer(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(BENCH | {"mean_tpot_ms": 40.0}))
    found = recalibrate([read_results(path, setup())], bundled())
    before, after = found.before[0].tpot, found.after[0].tpot
    assert before is not None
    assert after is not None
    assert abs(after) < 0.1 < abs(before)


@pytest.mark.parametrize(
    ("text", "told_of"),
    [
        ("{", "JSON"),
        ("[1]", "object"),
        ("{}", "completed"),
        (json.dumps(BENCH | {"max_concurrency": None}), "max_concurrency"),
        (json.dumps(BENCH | {"mean_tpot_ms": -1}), "mean_tpot_ms"),
        (json.dumps(AIPERF | {"request_count": {}}), "request_count"),
    ],
)
def test_results_that_are_none(tmp_path: Path, text: str, told_of: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=told_of):
        read_results(path, setup())


def test_drafts_without_an_acceptance_length_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(BENCH))
    with pytest.raises(InvalidRequest, match="acceptance"):
        read_results(path, setup(), drafts=3)
    assert read_results(path, setup(), drafts=3, acceptance=2.4).workload.acceptance == 2.4


def test_nothing_to_calibrate_with() -> None:
    with pytest.raises(InvalidRequest, match="no runs"):
        fit([])
    with pytest.raises(InvalidRequest, match="another"):
        left_out([SMALL[0]], bundled())
