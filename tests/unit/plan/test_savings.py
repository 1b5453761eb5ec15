"""The volumes and savings that docs/how-to/plan-a-deployment.md tells, computed again by the planner."""

from __future__ import annotations

from functools import cache

import pytest

from freehold.cli.plan_options import Asked, question_of
from freehold.plan.answer import Plan
from freehold.plan.cost import month_bill
from freehold.plan.planner import plan
from freehold.plan.prices import HOURS_A_MONTH
from freehold.plan.wording import count
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


def main() -> None:
    for name in ROWS:
        made = answer(name)
        print(name, made.chosen.candidate, count(full(made)), [v and count(v) for v in volumes(made)])
        print("   full", [f"{s:.1%}" for s in savings(made, full(made))], "500M", [f"{s:.1%}" for s in savings(made, 5e8)])


if __name__ == "__main__":
    main()
