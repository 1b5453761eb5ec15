"""The canary's machine: what promotes, what rolls back, what holds, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest

from freehold.errors import ConfigError, InvalidRequest
from freehold.gateway.canary import machine
from freehold.gateway.canary.guardrails import Finding, judge
from freehold.gateway.canary.machine import LOOK, SETTLE_SECONDS, Canary
from freehold.gateway.canary.record import Record
from freehold.gateway.canary.windows import Compared
from freehold.gateway.config import Settings, parse
from freehold.ledger import Note, Row
from tests.canarying import NAME, experiment, row, settings, traffic


class Driven:
    """A canary with its records, fed with traffic that follows its share."""

    def __init__(self, *metrics: str, **more: Any) -> None:
        self.records: list[Record] = []
        self.canary = Canary(NAME, experiment(*metrics, **more), 0.0, emit=self.records.append)
        self.at = 0.0
        self.position = 0

    def feed(self, count: int, share: float | None = None, fails: tuple[float, float] = (0.01, 0.01)) -> None:
        """Calls from now on, until a state or step changes."""
        given = self.canary.plan.share if share is None else share
        before = (self.canary.state, self.canary.step)
        for each in traffic(count, given, self.at, first=self.position, fails=fails):
            self.add(each)
            if (self.canary.state, self.canary.step) != before:
                return

    def add(self, each: Row) -> None:
        self.position += 1
        self.at = max(self.at, each.at)
        self.canary.add(each, self.position, self.at)

    @property
    def changes(self) -> list[str]:
        return [record.state for record in self.records if record.changed]


def test_a_healthy_canary_climbs_its_ramp_and_is_promoted() -> None:
    driven = Driven(guardrails=[{"metric": "error", "margin": 0.03}, {"metric": "ttft", "margin": 0.2}])
    shares = []
    while driven.canary.state == "ramping":
        shares.append(driven.canary.plan.share)
        driven.feed(60_000)
    assert shares == [0.05, 0.25, 0.5]
    assert driven.canary.plan.share == 1.0
    assert driven.changes == ["ramping", "ramping", "promoted"]
    last = driven.records[-1]
    assert last.reason == "every guardrail is within its margin"
    assert all(each.fine and each.high is not None and each.high < each.margin for each in last.guardrails) or (
        driven.canary.shown == {"error", "ttft"}
    )


def test_a_failing_canary_is_rolled_back_and_the_record_says_why() -> None:
    driven = Driven("error", "ttft")
    driven.feed(60_000, fails=(0.01, 0.10))
    assert driven.canary.state == "rolled_back"
    assert driven.canary.plan.share == 0.0
    assert driven.canary.requests <= 300
    last = driven.records[-1]
    assert last.changed
    assert last.reason.startswith("error: ")
    assert "worse" in last.reason
    before = len(driven.records)
    driven.feed(2000, share=0.05)
    assert len(driven.records) == before  # over is over


def test_one_that_always_fails_is_rolled_back_at_the_first_look() -> None:
    driven = Driven()
    driven.feed(2000, fails=(0.01, 1.0))
    assert driven.canary.state == "rolled_back"
    assert driven.canary.requests == 10


def test_one_that_is_worse_within_the_margin_is_not_rolled_back() -> None:
    driven = Driven(guardrails=[{"metric": "error", "margin": 0.3}], min_step_requests=2000)
    driven.feed(30_000, fails=(0.01, 0.06))
    error = driven.records[-1].guardrails[0]
    assert (error.worse, error.fine) == (True, True)
    assert driven.canary.state != "rolled_back"


@pytest.mark.parametrize(("choice", "share"), [("rollback", 0.0), ("hold", 0.05)])
def test_what_cannot_be_shown_in_time_is_inconclusive(choice: str, share: float) -> None:
    driven = Driven("error", "quality", max_requests=300, when_inconclusive=choice)
    driven.feed(20_000)
    assert driven.canary.state == "inconclusive"
    assert driven.records[-1].reason == "300 requests, and not shown: error, quality"
    assert driven.canary.plan.share == share


def test_while_it_waits_the_guard_goes_on() -> None:
    driven = Driven(max_requests=100, when_inconclusive="hold")
    driven.feed(20_000)
    assert driven.canary.state == "inconclusive"
    driven.feed(20_000, fails=(0.01, 0.2))
    assert driven.canary.state == "rolled_back"


def test_an_uneven_split_holds_the_ramp_and_resuming_begins_anew() -> None:
    driven = Driven()
    driven.feed(20_000, share=0.12)
    assert driven.canary.state == "hold"
    assert "where 0.05 of them were drawn" in driven.records[-1].reason
    driven.canary.command("resume", driven.at, "ann")
    assert driven.canary.state == "ramping"
    assert driven.canary.window.requests == [0, 0]
    assert driven.records[-1].by == "ann"


def test_a_pause_stops_the_ramp_and_not_the_guard() -> None:
    driven = Driven(guardrails=[{"metric": "error", "margin": 0.5}])
    driven.canary.command("pause", 0.0)
    driven.feed(20_000)
    assert driven.canary.state == "hold"
    assert driven.canary.shown == {"error"}
    driven.canary.command("resume", driven.at)
    assert driven.canary.window.requests[1] > 500  # what came meanwhile still counts
    driven.canary.command("pause", driven.at)
    driven.feed(60_000, fails=(0.0, 1.0))
    assert driven.canary.state == "rolled_back"


def test_force_takes_the_next_step_and_abort_ends_it() -> None:
    driven = Driven()
    for share in (0.25, 0.5, 1.0):
        driven.canary.command("force", driven.at)
        assert driven.canary.plan.share == share
    assert driven.canary.state == "promoted"
    with pytest.raises(InvalidRequest, match="cannot force"):
        driven.canary.command("force", driven.at)
    driven.canary.command("abort", driven.at)
    assert driven.canary.plan.share == 0.0
    for command in ("pause", "resume", "force", "abort"):
        with pytest.raises(InvalidRequest, match=f"cannot {command}"):
            driven.canary.command(command, driven.at)


def test_a_a_comes_first_and_then_the_ramp() -> None:
    driven = Driven("error", "ttft", aa_units=3000)
    assert driven.canary.plan.aa
    driven.feed(20_000)
    assert driven.changes == ["ramping"]
    assert "without a difference" in driven.records[-1].reason
    assert not driven.canary.plan.aa
    assert driven.canary.requests == 0
    assert not driven.canary.shown  # equal arms show nothing about the canary


def test_a_a_that_differs_is_held() -> None:
    driven = Driven(aa_units=3000)
    driven.feed(20_000, fails=(0.01, 0.5))
    assert driven.canary.state == "hold"
    assert driven.records[-1].reason.startswith("A/A: error differs")
    assert driven.canary.plan.aa
    driven.canary.command("resume", driven.at)
    assert (driven.canary.state, driven.canary.plan.aa) == ("aa", True)


def test_each_window_gets_half_of_the_alpha_that_is_left() -> None:
    driven = Driven(alpha=0.08)
    spent = []
    for _ in range(3):
        spent.append(driven.canary._alpha())
        driven.canary.command("force", driven.at)
    assert spent == [0.04, 0.02, 0.01]


def test_what_may_be_wrongly_fine_adds_up_to_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def noted(compared: Compared, margin: float, worse: float, fine: float) -> Finding:
        given.append(fine)
        return judge(compared, margin, worse, fine)

    monkeypatch.setattr(machine, "judge", noted)
    driven = Driven(alpha=0.08)
    for _ in range(3):
        driven.canary.findings()
        driven.canary.command("force", driven.at)
    assert given == pytest.approx([0.06, 0.015, 0.00375])
    assert sum(given) < 0.08


def test_warm_up_is_left_out() -> None:
    driven = Driven(warm_up_requests=20)
    driven.feed(200, fails=(0.0, 1.0))
    assert driven.canary.requests == 0
    driven = Driven(warm_up_requests=20)
    for n in range(100):
        driven.add(row(n, "new", 10.0 + n, warm_up=n % 2 == 0))
    assert driven.canary.requests == 30


def test_what_began_before_a_step_is_left_out_of_it() -> None:
    driven = Driven()
    driven.add(row(1, "old", SETTLE_SECONDS - 1, conversation="early"))
    driven.add(row(2, "old", SETTLE_SECONDS + 1, conversation="c"))
    assert driven.canary.window.requests == [1, 0]
    driven.canary.command("force", 100.0)
    driven.add(row(3, "old", 100.0 + SETTLE_SECONDS - 1))
    driven.add(row(4, "old", 100.0 + SETTLE_SECONDS, conversation="c"))
    driven.add(row(5, "old", 100.0 + SETTLE_SECONDS, conversation="early"))
    assert driven.canary.window.requests == [0, 0]
    driven.add(row(6, "old", 100.0 + SETTLE_SECONDS, conversation="later"))
    driven.add(row(7, "old", 100.0 + SETTLE_SECONDS))
    assert driven.canary.window.requests == [2, 0]


def test_judged_pairs_decide_too_and_notes_of_unknown_rows_do_not() -> None:
    driven = Driven("quality")
    for n in range(400):
        driven.add(row(2 * n, "old", 10.0 + n))
        driven.add(row(2 * n + 1, "new", 10.0 + n, shadow_of=f"r{2 * n}", unit=f"u{2 * n}"))
        for row_id, value in ((f"r{2 * n}", 0.8), (f"r{2 * n + 1}", 0.6), (f"x{n}", 0.0)):
            driven.canary.add_note(Note(row_id=row_id, at=0.0, name="judge.quality", value=value), n)
    for n in range(LOOK):
        driven.add(row(1000 + n, "new", 500.0 + n))
    assert driven.canary.state == "rolled_back"
    assert "in judged pairs" in driven.records[-1].reason
    assert driven.records[-1].guardrails[0].effect == pytest.approx(0.2)


def test_a_look_says_what_could_be_seen_by_now() -> None:
    driven = Driven("error", "ttft", "ttft_p95", "cost", max_requests=20_000)
    driven.canary.command("pause", 0.0)
    driven.feed(8000, share=0.05)
    early = {each.metric: each.detectable for each in driven.records[5].guardrails}
    late = {each.metric: each.detectable for each in driven.records[-1].guardrails}
    for metric in ("error", "ttft", "ttft_p95"):
        after, before = late[metric], early[metric]
        assert after is not None
        assert before is None or after < before
    assert 0.01 < (late["error"] or 0) < 0.1


def test_settings_name_known_metrics_and_have_their_margins() -> None:
    assert experiment("ttft_p95").guardrails[0].accepted == 0.20
    assert experiment(guardrails=[{"metric": "cost", "margin": 0.5}]).guardrails[0].accepted == 0.5
    with pytest.raises(ValueError, match="there is no metric 'speed'"):
        experiment("speed")
    with pytest.raises(ValueError, match="greater than 0"):
        experiment(guardrails=[{"metric": "cost", "margin": 0}])


def test_a_judge_must_be_a_model() -> None:
    text = """
[upstreams.here]
url = "http://127.0.0.1:1"
models.m = {}
[models.chat]
arms = [{name = "old", upstream = "here", model = "m"}, {name = "new", upstream = "here", model = "m"}]
[experiments.e]
alias = "chat"
control = "old"
canary = "new"
guardrails = [{metric = "quality"}]
judge = {model = "JUDGE"}
"""
    assert isinstance(parse(text.replace("JUDGE", "chat")), Settings)
    with pytest.raises(ConfigError, match="no model 'JUDGE' to judge"):
        parse(text)
    assert settings(experiment()).experiments[NAME].judge is None
