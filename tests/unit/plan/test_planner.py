"""From a question to an answer, over a scripted speed model: what is chosen, shown, written, and refused."""

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from html.parser import HTMLParser
from io import StringIO

import pytest
from rich.console import Console

from freehold.cli.plan_options import Asked, question_of
from freehold.errors import InsufficientMemory, InvalidRequest
from freehold.plan.answer import Plan
from freehold.plan.as_json import plan_as_dict
from freehold.plan.html import page
from freehold.plan.planner import compare, plan
from freehold.plan.report import compare_table, memory_parts, print_plan, refusal_lines
from tests.scripted_speeds import ScriptedSpeeds


@cache
def answer(on: str = "8xh200", **options: object) -> Plan:
    question = question_of(Asked(**options), on)  # type: ignore[arg-type]
    return plan(question, ScriptedSpeeds(question.workload, question.slo))


def shown(item: Plan, width: int = 100) -> str:
    stream = StringIO()
    print_plan(item, Console(file=stream, width=width, highlight=False))
    return stream.getvalue()


def test_the_cheapest_that_meets_the_promises() -> None:
    made = answer(tpot=0.05)
    assert made.meets
    assert made.chosen.speed.tpot.p90.value <= 0.05
    others = [option for option in made.found.options if option.speed.meets_slo]
    cheapest = min(option.cost.per_mtok_whole.value for option in others)
    assert made.chosen.cost.per_mtok_whole.value <= 1.05 * cheapest
    nearly = [option for option in others if option.cost.per_mtok_whole.value <= 1.05 * cheapest]
    assert made.chosen.candidate.layout.pp == min(option.candidate.layout.pp for option in nearly)


def test_the_nearest_if_nothing_meets_them() -> None:
    made = answer(tpot=0.000001)
    assert not made.meets
    assert "Nothing here meets the SLOs" in shown(made)


def test_both_engines_are_launched_with_what_fits() -> None:
    made = answer()
    assert [started.launch.engine for started in made.started] in (["vllm", "sglang"], ["sglang", "vllm"])
    for started in made.started:
        room = started.deployment.footprint
        assert started.deployment.max_context == room.max_context
        assert started.deployment.max_sequences <= max(room.layout.dp, room.max_sequences(8704))
        assert started.manifest is not None


def test_spares_are_launched_and_paid_for() -> None:
    plain, spare = answer(staff=0.0), answer(staff=0.0, spare=1)
    assert spare.started[0].deployment.replicas == plain.started[0].deployment.replicas + 1
    assert spare.chosen.cost.per_hour.value == pytest.approx(2 * plain.chosen.cost.per_hour.value)


def test_memory_parts_fill_the_gpu() -> None:
    for made in (answer(), answer("8xb200"), answer(model="glm-5.2-nvfp4")):
        parts = memory_parts(made.chosen, 100_000)
        assert all(size >= 0 for _, size in parts)
        assert sum(size for _, size in parts) == pytest.approx(made.chosen.candidate.gpu.memory, rel=1e-3)


def test_the_report_has_every_section_and_basis() -> None:
    text = shown(answer(task_tokens=43_000.0, tpot=0.05))
    for title in (
        "Memory of a GPU",
        "Speed",
        "Cost",
        "Against APIs",
        "What the answer depends on",
        "Before you run it",
    ):
        assert re.search(rf"^{title}", text, re.MULTILINE), title
    assert "755,617,140,416 B" in text
    assert "licence MIT" in text
    assert "vllm serve zai-org/GLM-5.2-FP8" in text
    assert "sglang serve" in text
    assert "2.74 times" in text
    assert "a task" in text
    assert "Entity List" in text


def test_never_is_said_when_the_api_is_always_cheaper() -> None:
    made = answer(api=("0.001/0.001",), utilisation=0.1)  # type: ignore[arg-type]
    assert made.crossovers[0].expected.first is None
    assert "never" in shown(made)


def test_json_has_every_figure_with_its_interval() -> None:
    document = json.loads(json.dumps(plan_as_dict(answer(task_tokens=43_000.0))))
    tpot = document["chosen"]["speed"]["tpot"]["p50"]
    assert tpot["low"] <= tpot["value"] <= tpot["high"]
    assert tpot["basis"] == "roofline"
    assert document["chosen"]["cost"]["per_task"]["value"] > 0
    assert document["flops"][-1]["flops_without_index_share"] / document["flops"][-1]["flops"] == pytest.approx(
        2.737, abs=0.001
    )
    assert document["model"]["bytes"] == 755_617_140_416
    assert document["launches"][0]["commands"]


class Outline(HTMLParser):
    """Tags that are open at the end, and everything that would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "xlink:href", "onclick")]
        if tag not in ("meta", "line", "rect", "circle", "polyline", "polygon"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_html_is_one_whole_file() -> None:
    text = page([answer(tpot=0.05)])
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    assert outline.loads == []
    assert "script" not in outline.tags
    assert "url(" not in text
    assert "@import" not in text
    assert outline.tags.count("svg") == 3
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    assert "TPOT 50.0 ms" in text
    assert "leaderworkerset.x-k8s.io/v1" in text


def test_html_escapes_names() -> None:
    made = answer()
    workload = made.question
    renamed = dataclasses.replace(workload, model=dataclasses.replace(workload.model, name="<img src=x>"))
    assert "<img" not in page([dataclasses.replace(made, question=renamed)])


def test_several_options_side_by_side() -> None:
    plans = [answer("8xh200"), answer("8xb200")]
    text = page(plans, {"4 x H100 SXM": "does not fit"})
    assert text.count("<svg") == 4, "one memory chart, one speed chart, a cost chart each"
    assert "does not fit" in text
    assert compare_table(plans).row_count == 2
    assert refusal_lines({"4 x H100 SXM": "does not fit"}) == ["4 x H100 SXM: does not fit"]


def test_what_cannot_fit_says_what_would() -> None:
    with pytest.raises(InsufficientMemory, match=r"755\.6 GB.*it needs at least 16 of them"):
        answer("4xh100")


def test_what_no_engine_runs_is_not_recommended() -> None:
    with pytest.raises(InvalidRequest, match="no engine is known to run it there"):
        answer("16xa100")


def test_compare_goes_on_where_one_fits_nothing() -> None:
    questions = [question_of(Asked(), on) for on in ("4xh100", "16xa100")]
    plans, refusals = compare(questions)
    assert plans == []
    assert set(refusals) == {"4 x H100 SXM", "16 x A100 80GB SXM"}


def test_hit_rates_acceptance_price_and_utilisation_are_varied() -> None:
    made = answer()
    names = {item.name for item in made.sensitivities}
    assert {"utilisation", "price of a GPU-hour", "prefix-cache hit rate"} <= names
    assert ("acceptance length" in names) == made.chosen.candidate.mtp
    dear = next(item for item in made.sensitivities if item.name == "price of a GPU-hour")
    costs = [point.option.cost.per_mtok_whole.value for point in dear.points if point.option is not None]
    assert costs == sorted(costs)


def test_the_curve_holds_the_crossings() -> None:
    made = answer()
    volumes = [point.requests for point in made.curve]
    for found in made.crossovers:
        if found.expected.first is not None:
            assert volumes[0] < found.expected.first < volumes[-1]
