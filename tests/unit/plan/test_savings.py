"""The volumes and savings that docs/how-to/plan-a-deployment.md tells, computed again by the planner."""

from __future__ import annotations

from functools import cache

import pytest

from freehold.cli.plan_options import Asked, question_of
from freehold.plan.answer import Plan
from freehold.plan.cost import month_bill
from freehold.plan.planner import plan
from freehold.plan.prices import HOURS_A_MONTH
from tests.source_checks import ROOT

TEXT = " ".join((ROOT / "docs" / "how-to" / "plan-a-deployment.md").read_text().split())
APIS = ["claude-opus-5.5", "openai gpt-5.5", "z.ai glm-5.2", "openrouter glm-5.2"]
ROWS = {
    "rented at $4.00, half an engineer": {},
    "rented at $4.00, no staff, constant load": {"staff": 0.0, "profile": "flat"},
    "owned, half an engineer": {"own": True},
    "owned, no staff, constant load": {"own": True, "staff": 0.0, "profile": "flat"},
}


@cache
def answer(name: str) -> Plan:
    return plan(question_of(Asked(api=APIS, **ROWS[name]), "8xh200"))  # type: ignore[arg-type]


def volumes(made: Plan) -> list[float | None]:
    output = made.economics.tokens.output
    return [None if x.expected.first is None else x.expected.first * output for x in made.crossovers]


def full(made: Plan) -> float:
    """Output tokens a month of one node at its planned load."""
    economics = made.economics
    return economics.capacity.value * economics.utilisation * HOURS_A_MONTH * 3600 * economics.tokens.output


def savings(made: Plan, volume: float) -> list[float]:
    requests = volume / made.economics.tokens.output
    bill = month_bill(made.economics, requests * (1 - 1e-9)).value
    return [1 - bill / (requests * crossed.per_request) for crossed in made.crossovers]


def said(*figures: str) -> None:
    for figure in figures:
        assert figure in TEXT, figure


def ends(of: list[list[float]]) -> tuple[str, str]:
    values = [value for several in of for value in several]
    return f"{min(values):.0%}".replace("-", "\u2212"), f"{max(values):.0%}"


def test_the_table_of_break_even_volumes() -> None:
    for name in ROWS:
        opus, gpt, own, cheapest = volumes(answer(name))
        assert opus is not None
        assert gpt is not None
        cells = [f"{opus / 1e6:.0f} million", f"{gpt / 1e6:.0f} million"]
        for volume in (own, cheapest):
            over = volume is not None and volume > 1e10
            cells.append("never" if volume is None else "over 10 billion" if over else f"{volume / 1e9:.1f} billion")
        said(f"| {name} | {' | '.join(cells)} |")
    said(f"about {full(answer('rented at $4.00, half an engineer')) / 1e9:.1f} billion output tokens a month")


def test_savings_against_frontier_prices() -> None:
    rented, owned = ([answer(name) for name in ROWS if name.startswith(word)] for word in ("rented", "owned"))
    at_full = [ends([savings(made, full(made))[:2] for made in several]) for several in (rented, owned)]
    said(f"with the node full: {at_full[0][0][:-1]} to {at_full[0][1]} rented")
    said(f"{at_full[1][0][:-1]} to {at_full[1][1]} owned")
    at_half = [ends([savings(made, 5e8)[:2] for made in several]) for several in (rented, owned)]
    said(f"it is {at_half[0][0][:-1]} to {at_half[0][1]} rented and {at_half[1][0][:-1]} to {at_half[1][1]} owned")


def test_savings_against_the_models_own_price() -> None:
    low, high = ends([[savings(made, full(made))[2]] for made in map(answer, ROWS)])
    said(f"from {low} (rented, full, staff paid) to {high} (owned, constant load, no staff)")


def test_other_mixes() -> None:
    for options, figure in (
        ({"input": "32768", "hit_rate": 0.95}, "0.95 billion for prompts of 32,768 tokens of which 95% are cached"),
        ({"input": "1024", "output": "4096"}, "1.5 billion for answers four times as long as their prompts"),
    ):
        volume = volumes(plan(question_of(Asked(api=APIS[:1], **options), "8xh200")))[0]  # type: ignore[arg-type]
        assert volume is not None
        said(figure)
        digits = len(figure.split(" ")[0].partition(".")[2])
        assert figure.startswith(f"{volume / 1e9:.{digits}f} billion")


def test_four_b200_with_nvfp4() -> None:
    changes = []
    for name, options in ROWS.items():
        small = plan(question_of(Asked(model="glm-5.2-nvfp4", api=APIS, **options), "4xb200"))  # type: ignore[arg-type]
        pairs = zip(volumes(small)[:2], volumes(answer(name))[:2], strict=True)
        changes += [1 - mine / other for mine, other in pairs if mine is not None and other is not None]
        assert full(small) / full(answer(name)) == pytest.approx(1.2, abs=0.05)
    assert min(changes) > 0.17
    assert max(changes) < 0.43
    said("does a fifth more than eight H200", "by a fifth to two fifths")
