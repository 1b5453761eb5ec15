"""A plan, or several side by side, as one self-contained HTML file: charts, tables, launches. Torch-free.

No script, no font and no picture from elsewhere: it can be mailed, printed and kept. Light and dark follow the reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from freehold.plan.answer import Plan
from freehold.plan.charts import Bar, Mark, Part, Series, lines, stacks
from freehold.plan.layouts import engines
from freehold.plan.report import compare_table, maker_words, memory_parts, refusal_lines, sections
from freehold.plan.wording import count, dollars, gb, per_user, seconds

# Okabe and Ito's eight colours, which people with any colour vision tell apart.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#888888")
_STYLE = """
:root{color-scheme:light dark;--ink:#1b1b1b;--soft:#666;--line:#ddd;--page:#fff;--box:#f6f6f4}
@media(prefers-color-scheme:dark){:root{--ink:#eee;--soft:#aaa;--line:#444;--page:#16181a;--box:#202326}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:60rem;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}
table{border-collapse:collapse;font-size:.9rem;display:block;overflow-x:auto}
td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}th{color:var(--soft);font-weight:600}
td.n{text-align:right;font-variant-numeric:tabular-nums}
pre{background:var(--box);padding:.8rem;overflow-x:auto;font-size:.85rem;border-radius:4px}
figure{margin:1rem 0}figcaption{font-weight:600}svg{width:100%;height:auto}
.tick{font-size:12px;fill:var(--soft)}.axis{font-size:13px;fill:var(--ink)}.note{font-size:12px;fill:var(--ink)}
.grid{stroke:var(--line)}.limit{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:3 3}
.line{fill:none;stroke-width:2.2}.band{opacity:.18}
.legend span{margin-right:1.1rem;font-size:.85rem;white-space:nowrap}
.legend i{display:inline-block;width:.8rem;height:.8rem;margin-right:.35rem;border-radius:2px}
.big{display:flex;flex-wrap:wrap;gap:1rem}.big div{background:var(--box);border-radius:6px;padding:.6rem 1rem}
.big b{display:block;font-size:1.25rem}.soft{color:var(--soft)}
"""


def page(plans: Sequence[Plan], refusals: Mapping[str, str] | None = None) -> str:
    """One HTML document. Several plans are several hardware options for the same question."""
    if not plans:
        raise ValueError("a page needs a plan")
    colours = "".join(
        f".c{index}{{fill:{colour};background:{colour}}}.l{index}{{stroke:{colour}}}"
        for index, colour in enumerate(_COLOURS)
    )
    first = plans[0]
    names = " or ".join(f"{plan.question.cluster.gpus} x {plan.question.cluster.gpu.name}" for plan in plans)
    title = f"{first.question.model.name} on {names}"
    body = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(str(first.question.workload))}</p>']
    if len(plans) > 1 or refusals:
        body.append(_side_by_side(plans, refusals or {}))
    body += [_charts(plans), *(_plan(plan, alone=len(plans) == 1) for plan in plans)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}{colours}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _charts(plans: Sequence[Plan]) -> str:
    return "".join([memory_chart(plans), speed_chart(plans), *(cost_chart(plan) for plan in plans)])


def memory_chart(plans: Sequence[Plan]) -> str:
    """Bytes of the fullest GPU of each plan's choice."""
    bars = []
    for plan in plans:
        held = plan.question.workload.tokens_in_flight(plan.chosen.speed.concurrency)
        parts = [Part(name, size / 1e9, f"{name}: {gb(size)}") for name, size in memory_parts(plan.chosen, held)]
        candidate = plan.chosen.candidate
        name = f"{candidate.gpu.name}, {candidate.layout}"
        bars.append(Bar(name, [part for part in parts if part.value > 0], candidate.gpu.memory / 1e9))
    return stacks("Memory of the fullest GPU", bars, unit="GB a GPU")


def speed_chart(plans: Sequence[Plan]) -> str:
    """Tokens a second and GPU against tokens a second that a caller sees, by load."""
    series = []
    for plan in plans:
        gpus = plan.chosen.candidate.layout.gpus
        points, labels = [], []
        for load in sorted(plan.sweep, key=lambda load: per_user(load.speed)):
            rate = (load.speed.input_rate.value + load.speed.output_rate.value) / gpus
            points.append((per_user(load.speed), rate))
            labels.append(
                f"{load.concurrency} requests at a time: {per_user(load.speed):.1f} tokens/s for each, "
                f"{rate:,.0f} tokens/s/GPU, TTFT p90 {seconds(load.speed.ttft.p90.value)}"
            )
        candidate = plan.chosen.candidate
        series.append(Series(f"{candidate.gpu.name}, {candidate.layout}", points, labels=labels))
    slo = plans[0].question.slo
    marks = [Mark(f"TPOT {seconds(slo.tpot)}", x=1 / slo.tpot)] if slo.tpot else []
    return lines(
        "Throughput against interactivity",
        series,
        x="output tokens a second for each caller (p50)",
        y="all tokens a second and GPU",
        marks=marks,
    )


def cost_chart(plan: Plan) -> str:
    """US dollars a million output tokens by volume, ours with its interval and the API's, and where they cross."""
    output = plan.economics.tokens.output
    ours = [(point.requests * output / 1e6, point.ours) for point in plan.curve]
    band = [(point.requests * output / 1e6, point.low, point.high) for point in plan.curve]
    labels = [
        f"{count(x * 1e6)} output tokens a month: {dollars(y)} a million, {point.replicas} replicas"
        for (x, y), point in zip(ours, plan.curve, strict=True)
    ]
    series = [Series("this plan", ours, band=band, labels=labels, marks=False)]
    marks = []
    for found in plan.crossovers:
        price = found.per_request / output * 1e6
        name = f"{found.api.model}, {found.api.provider}"
        series.append(Series(name, [(ours[0][0], price), (ours[-1][0], price)], dashed=True, marks=False))
        if found.expected.first is not None and ours[0][0] <= found.expected.first * output / 1e6 <= ours[-1][0]:
            at = found.expected.first * output
            marks.append(Mark(f"{found.api.model}: from {count(at)}", x=at / 1e6))
    gpu = plan.question.cluster.gpu.name
    return lines(
        f"Cost of a million output tokens, prompts included, by volume: {gpu}, {plan.question.money.tenure}",
        series,
        x="million output tokens a month",
        y="US dollars",
        log_x=True,
        log_y=True,
        marks=marks[:3],
    )


def _plan(plan: Plan, *, alone: bool) -> str:
    cost, speed = plan.chosen.cost, plan.chosen.speed
    name = f"{plan.question.cluster.gpus} x {plan.question.cluster.gpu.name}"
    words = "" if alone else f"<h1>{escape(name)}</h1>"
    verdict = "" if plan.meets else "<p><b>Nothing here meets the SLOs; this comes nearest.</b></p>"
    figures = [
        (str(plan.chosen.candidate), "recommended" if plan.meets else "nearest"),
        (seconds(speed.ttft.p90.value), "to the first token, p90"),
        (seconds(speed.tpot.p90.value), "a token, p90"),
        (dollars(cost.per_mtok_whole.value), "a million output tokens, with prompts"),
        (dollars(cost.per_hour.value), "an hour"),
    ]
    big = "".join(f"<div><b>{escape(value)}</b>{escape(what)}</div>" for value, what in figures)
    parts = [words, verdict, f'<div class="big">{big}</div>']
    for title, blocks in list(sections(plan))[1:]:
        if title == "Before you run it":
            notes = "".join(f"<li>{escape(text)}</li>" for text in maker_words(plan))
            parts.append(f"<h2>{escape(title)}</h2><ul>{notes}</ul>")
            continue
        inner = [_block(block, code=title.startswith("Launch")) for block in blocks]
        parts.append(f"<h2>{escape(title)}</h2>{''.join(inner)}")
    for started in plan.started:
        if started.manifest is not None:
            engine = engines()[started.option.candidate.engine].name
            parts.append(f"<h2>Kubernetes, {escape(engine)}</h2><pre>{escape(started.manifest)}</pre>")
    return "".join(parts)


def _block(block: object, *, code: bool) -> str:
    if isinstance(block, str):
        is_command = code and not block.startswith("- ")
        return f"<pre>{escape(block)}</pre>" if is_command else f"<p>{escape(block)}</p>"
    return _table(block)


def _table(table: object) -> str:
    """A rich table as an HTML one."""
    from rich.table import Table

    assert isinstance(table, Table)
    heads = "".join(f"<th>{escape(str(column.header))}</th>" for column in table.columns)
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    right = [column.justify == "right" for column in table.columns]
    rows = []
    for row in zip(*cells, strict=True):
        made = "".join(
            f'<td class="n">{escape(cell)}</td>' if number else f"<td>{escape(cell)}</td>"
            for cell, number in zip(row, right, strict=True)
        )
        rows.append(f"<tr>{made}</tr>")
    return f"<table><tr>{heads}</tr>{''.join(rows)}</table>"


def _side_by_side(plans: Sequence[Plan], refusals: Mapping[str, str]) -> str:
    lines = "".join(f"<p>{escape(line)}</p>" for line in refusal_lines(refusals))
    return _table(compare_table(plans)) + lines
