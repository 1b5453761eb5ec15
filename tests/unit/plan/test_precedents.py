"""Measured runs beside predictions of the same setup: which belong together, and how they are said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from freehold.cli.plan_options import Asked, question_of, setup_of
from freehold.errors import ConfigError
from freehold.plan.as_json import plan_as_dict
from freehold.plan.kept import bundled, efficiencies_toml, read_kept
from freehold.plan.lengths import lengths
from freehold.plan.measured import read_results
from freehold.plan.planner import plan
from freehold.plan.precedents import Row, precedent, published, row_of
from freehold.plan.report import measured_words, speed_table
from freehold.plan.search import Candidate, candidates
from freehold.plan.speeds import Speeds
from freehold.plan.types import Layout, Slo
from freehold.plan.workload import Workload

LOAD = Workload(lengths("8192"), lengths("1024"), concurrency=16)


def candidate(layout: Layout | None = None, *, model: str = "glm-5-fp8", drafts: int = 0) -> Candidate:
    asked = question_of(Asked(model=model, engine=["sglang"], drafts=drafts), "8xh200")
    run, _, _ = candidates(asked.model, asked.cluster, ("sglang",), drafts=(drafts > 0,))
    return next(item for item in run if item.layout == (layout or Layout(tp=8)))


def test_a_published_run_of_the_same_setup_is_found() -> None:
    row = precedent(published(), candidate(), LOAD)
    assert row is not None
    assert (row.ttft, row.tpot) == pytest.approx((1.5500510309, 0.0355514172))
    dealt = precedent(published(), candidate(Layout(tp=8, ep=8)), LOAD)
    assert dealt == row, "in one attention group, how experts are spread changes no time"


@pytest.mark.parametrize(
    "changed",
    [
        {"concurrency": 17},
        {"concurrency": None, "rate": 1.0},
        {"hit_rate": 0.5},
        {"effort": "off"},
        {"prompt_lengths": lengths("9000")},
        {"prompt_lengths": lengths("1000-8192")},
        {"output_lengths": lengths("512")},
    ],
)
def test_another_load_is_not_the_same(changed: dict[str, object]) -> None:
    assert precedent(published(), candidate(), replace(LOAD, **changed)) is None  # type: ignore[arg-type]


def test_other_setups_are_not_the_same() -> None:
    assert precedent(published(), candidate(model="glm-5.1-fp8"), LOAD) is None
    assert precedent(published(), candidate(Layout(tp=1, dp=8, ep=8)), LOAD) is None
    drafted = replace(LOAD, drafts=5)
    assert precedent(published(), candidate(model="glm-5.2-fp8", drafts=5), drafted) is None, "another acceptance"
    same = replace(drafted, acceptance_length=5.97)
    assert precedent(published(), candidate(model="glm-5.2-fp8", drafts=5), same) is not None


def test_speeds_and_reports_show_it_as_measured() -> None:
    asked = question_of(Asked(model="glm-5-fp8", engine=["sglang"], drafts=0, concurrency=8, input="1024"), "8xh200")
    made = plan(asked)
    seen = [option for option in made.found.options if option.speed.measured is not None]
    assert seen
    for option in seen:
        run = option.speed.measured
        assert run is not None
        assert run.tpot is not None
        assert run.tpot.basis == "measured"
        assert run.tpot.value == pytest.approx(0.02095226208)
        assert option.speed.tpot.mean.value == pytest.approx(run.tpot.value, rel=0.15)
    (words,) = measured_words(seen)
    assert "mean TPOT 21.0 ms, predicted" in words
    assert "aiconfigurator" in words
    chosen = replace(made, chosen=seen[0])
    assert "TPOT, measured run" in list(speed_table(chosen).columns[0].cells)
    document = json.loads(json.dumps(plan_as_dict(made)))
    bases = [
        option["speed"]["measured"]["tpot"]["basis"] for option in document["options"] if option["speed"]["measured"]
    ]
    assert set(bases) == {"measured"}


def own_run(tmp_path: Path) -> Row:
    result = {
        "completed": 64,
        "mean_ttft_ms": 900.0,
        "mean_tpot_ms": 31.0,
        "total_input_tokens": 64 * 5000,
        "total_output_tokens": 64 * 300,
        "max_concurrency": 4,
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(result))
    return row_of(read_results(path, setup_of("glm-5.2-fp8", "8xh200", "sglang", None, None)))


def test_own_runs_are_kept_with_the_efficiencies(tmp_path: Path) -> None:
    row = own_run(tmp_path)
    file = tmp_path / "efficiencies.toml"
    file.write_text(efficiencies_toml(bundled(), [row]))
    kept, rows = read_kept(file)
    assert kept == bundled()
    assert rows == (row,)
    load = Workload(lengths("5000"), lengths("300"), concurrency=4)
    speed = Speeds(load, Slo(), kept, rows).of(candidate(model="glm-5.2-fp8"))
    assert speed.measured is not None
    assert speed.measured.ttft is not None
    assert (speed.measured.ttft.value, speed.measured.ttft.basis) == (0.9, "measured")
    assert Speeds(load, Slo()).of(candidate(model="glm-5.2-fp8")).measured is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("colour = 3", "has no 'colour'"),
        ('model = "m"', "lacks"),
    ],
)
def test_a_run_that_is_none_is_refused(tmp_path: Path, wrong: str, message: str) -> None:
    file = tmp_path / "efficiencies.toml"
    file.write_text(efficiencies_toml(bundled(), []) + f"\n[[runs]]\n{wrong}\n")
    with pytest.raises(ConfigError, match=message):
        read_kept(file)


def test_times_below_zero_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "efficiencies.toml"
    file.write_text(efficiencies_toml(bundled(), [own_run(tmp_path)]).replace("ttft = 0.9", "ttft = -0.9"))
    with pytest.raises(ConfigError, match="above 0"):
        read_kept(file)
