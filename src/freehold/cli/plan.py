"""`freehold plan`: what a deployment needs, how fast it is, what it costs, when it beats an API, how to launch it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from freehold.cli.plan_options import Asked, question_of, with_options
from freehold.errors import InvalidRequest

_ON = "8xh200"
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
HtmlOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also write one self-contained HTML file.", show_default=False)
]


@with_options
def plan(
    asked: Asked,
    invocation: typer.Context,
    on: Annotated[str, typer.Option(metavar="[N]xGPU|TOML", help="Hardware, as in 8xh200.")] = _ON,
    manifest: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the Kubernetes manifest of the choice.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """Size a deployment: memory, speed, cost, and how to launch it."""
    if invocation.invoked_subcommand is not None:
        _refuse_options(invocation)
        return
    from freehold.plan.planner import plan as solve

    answer = solve(question_of(asked, on))
    if html is not None:
        from freehold.plan.html import page

        html.write_text(page([answer]), encoding="utf-8")
    if manifest is not None:
        text = answer.started[0].manifest if answer.started else None
        if text is None:
            raise InvalidRequest("there is no manifest for this choice: no container image is known", param="manifest")
        manifest.write_text(text, encoding="utf-8")
    if as_json:
        from freehold.plan.as_json import plan_as_dict

        typer.echo(json.dumps(plan_as_dict(answer), indent=2))
    else:
        from rich.console import Console

        from freehold.plan.report import print_plan

        print_plan(answer, Console(highlight=False, width=None))


@with_options
def compare(
    asked: Asked,
    on: Annotated[
        list[str],
        typer.Option(metavar="[N]xGPU|TOML", help="Hardware; give it once for each option.", show_default=False),
    ],
    as_json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """Several hardware options side by side."""
    from rich.console import Console

    from freehold.plan.as_json import plan_as_dict
    from freehold.plan.html import page
    from freehold.plan.planner import compare as solve
    from freehold.plan.report import compare_table, refusal_lines

    plans, refusals = solve([question_of(asked, hardware) for hardware in on])
    if not plans:
        raise InvalidRequest("; ".join(f"{name}: {why}" for name, why in refusals.items()), param="on")
    if html is not None:
        html.write_text(page(plans, refusals), encoding="utf-8")
    if as_json:
        document = {"plans": [plan_as_dict(item) for item in plans], "refused": refusals}
        typer.echo(json.dumps(document, indent=2))
    else:
        console = Console(highlight=False)
        console.print(compare_table(plans))
        for line in refusal_lines(refusals):
            console.print(line, soft_wrap=True, markup=False)


def calibrate(
    results: Annotated[
        list[Path],
        typer.Argument(help="Results of AIPerf, vllm bench serve or sglang.bench_serving.", show_default=False),
    ],
    model: Annotated[str, typer.Option(metavar="DIR|NAME", help="What was served.")] = "glm-5.2-fp8",
    on: Annotated[str, typer.Option(metavar="[N]xGPU|TOML", help="On what: the GPUs of one replica.")] = _ON,
    engine: Annotated[str, typer.Option(help="By what: vllm or sglang.")] = "sglang",
    tp: Annotated[int | None, typer.Option(help="GPUs that share one attention.", min=1, show_default="all")] = None,
    cache: Annotated[str | None, typer.Option(help="Latent cache.", show_default="the engine's")] = None,
    drafts: Annotated[int, typer.Option(help="Tokens drafted a step.", min=0, max=7)] = 0,
    acceptance: Annotated[
        float | None, typer.Option(help="Tokens a step that came of it; needed with drafts.", show_default=False)
    ] = None,
    bundled: Annotated[
        bool, typer.Option("--with-bundled", help="Fit to the published runs that Freehold has, too.")
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the efficiencies, for --efficiencies.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Refit the speed model to measured runs, and show their residuals before and after."""
    from rich.console import Console

    from freehold.cli.plan_options import setup_of
    from freehold.plan.calibrate import recalibrate
    from freehold.plan.kept import efficiencies_toml
    from freehold.plan.measured import read_results
    from freehold.plan.precedents import row_of
    from freehold.plan.recalibrated import calibration_as_dict, calibration_table

    setup = setup_of(model, on, engine, tp, cache)
    runs = [read_results(path, setup, drafts=drafts, acceptance=acceptance) for path in results]
    found = recalibrate(runs, with_bundled=bundled)
    if save is not None:
        save.write_text(efficiencies_toml(found.efficiencies, [row_of(run) for run in runs]), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(calibration_as_dict(found), indent=2))
    else:
        console = Console(highlight=False)
        for table in calibration_table(found):
            console.print(table)


RUNS_ALONE = True
SUBCOMMANDS: Mapping[str, tuple[str, str]] = {
    "compare": ("freehold.cli.plan", "Several hardware options side by side."),
    "calibrate": (
        "freehold.cli.plan",
        "Refit the speed model to measured runs, and show their residuals before and after.",
    ),
}


def _refuse_options(invocation: typer.Context) -> None:
    """Options before a sub-command would be ignored."""
    for name in invocation.params:
        source = invocation.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-")
            raise InvalidRequest(f"{option} belongs after {invocation.invoked_subcommand}", param=name)
