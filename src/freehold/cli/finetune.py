"""`freehold train finetune` and `freehold train merge`: one's own chats on a model one has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from freehold.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.console import Console

    from freehold.train.finetune import Finetuned, Reports
    from freehold.train.lora import Target
    from freehold.train.measure import Measured


def finetune(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The checkpoint's directory.", show_default=False)],
    chats: Annotated[Path, typer.Argument(metavar="CHATS", help="A JSONL file: a chat a line.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The run's directory: new, or one to go on in.")],
    method: Annotated[
        Literal["lora", "full"], typer.Option(help="lora: an adapter of low rank. full: every weight.")
    ] = "lora",
    epochs: Annotated[float, typer.Option(help="How often every chat is seen.")] = 10.0,
    lr: Annotated[float | None, typer.Option(help="The peak learning rate. Default: what suits the method.")] = None,
    rank: Annotated[int, typer.Option(help="Of the adapter.")] = 16,
    alpha: Annotated[float | None, typer.Option(help="The adapter counts alpha / rank times. Default: twice.")] = None,
    targets: Annotated[
        str,
        typer.Option(help="What the adapter changes: attention, dense_mlp, shared_expert, routed_expert."),
    ] = "attention,dense_mlp,shared_expert",
    held_out: Annotated[
        float, typer.Option(help="Share of the chats that are kept to measure with; 0 for none.")
    ] = 0.1,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a step, about.")] = 2048,
    longest: Annotated[int, typer.Option(help="Tokens of the longest chat that is allowed.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of the order of the chats, and of the adapter's first weights.")] = 0,
    threads: Annotated[int | None, typer.Option(help="Compute threads. Default: what the machine has.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fine-tune a checkpoint on your own chats, and show what that did to those held out."""
    from rich.console import Console

    from freehold.cli.train_stage import set_threads
    from freehold.engine.loading import EngineOptions
    from freehold.model.chat.template import ChatTemplate
    from freehold.train.finetune import FinetuneSettings, finetune
    from freehold.train.jsonl import read_chats, split_held_out
    from freehold.train.lora import LoraSettings

    settings = FinetuneSettings(
        method=method,
        lora=LoraSettings(rank, alpha, _targets(targets)),
        epochs=epochs,
        lr=lr,
        batch_tokens=batch_tokens,
        longest=longest,
        held_out=held_out,
        seed=seed,
    )
    train, held = split_held_out(read_chats(chats, ChatTemplate.from_dir(model)), held_out)
    set_threads(threads)
    with _reports() as reports:
        result = finetune(model, train, held, out, settings, options=EngineOptions(threads=threads), reports=reports)
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))
    else:
        _print_result(result, model, Console(highlight=False, soft_wrap=True))


def merge(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The checkpoint's directory.", show_default=False)],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="As PEFT saves one.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write the new checkpoint; never overwritten.")],
) -> None:
    """Merge an adapter into a new checkpoint."""
    from rich.console import Console

    from freehold.cli.progress import byte_progress
    from freehold.train.merge import merge_adapter

    with byte_progress("merging") as progress:
        merged = merge_adapter(model, adapter, out, progress=progress)
    console = Console(highlight=False, soft_wrap=True)
    changed = f"{merged.changed:,} of {merged.tensors:,} tensors changed"
    console.print(f"{out}: {changed}; {merged.data_bytes:,} bytes")
    if merged.dequantised:
        console.print(f"{model} is quantised, and this is not: `freehold quantize` makes it so again")


def _targets(text: str) -> tuple[Target, ...]:
    from freehold.train.lora import TARGETS

    found: list[Target] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        target = next((target for target in TARGETS if target == name), None)
        if target is None:
            raise InvalidRequest(f"--targets {name!r}: choose from {', '.join(TARGETS)}", param="targets")
        found.append(target)
    return tuple(found)


@contextmanager
def _reports() -> Iterator[Reports]:
    """Progress on stderr, of one phase at a time."""
    from freehold.cli.progress import count_progress
    from freehold.cli.training_progress import training_progress
    from freehold.train.finetune import Phase, Reports
    from freehold.train.loop import StepReport

    with ExitStack() as stack:
        measuring: dict[Phase, Callable[[int, int], None]] = {}
        training: list[Callable[[StepReport], None]] = []

        def measured(phase: Phase, done: int, total: int) -> None:
            if phase not in measuring:
                stack.close()
                measuring[phase] = stack.enter_context(count_progress(f"held-out chats, {phase}", "chats"))
            measuring[phase](done, total)

        def step(report: StepReport) -> None:
            if not training:
                stack.close()
                training.append(stack.enter_context(training_progress("training")))
            training[0](report)

        yield Reports(measured, step)


def _print_result(result: Finetuned, model: Path, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    finished = result.finished
    console.print(
        f"[bold]{escape(str(result.artefact))}[/bold]: {result.weights:,} weights trained on {result.trained_on:,} "
        f"chats, {finished.steps:,} steps, {finished.tokens:,} tokens, {finished.seconds:.0f} s"
    )
    if result.before is not None and result.after is not None:
        table = Table(
            title=f"{result.held_out} held-out chat{'s' if result.held_out > 1 else ''}",
            title_justify="left",
            box=None,
            padding=(0, 2, 0, 0),
        )
        table.add_column("")
        for heading in ("loss", "perplexity", "answers exactly as given"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, measured in (("before", result.before), ("after", result.after)):
            table.add_row(name, *_figures(measured))
        console.print(table)
    if result.method == "lora":
        console.print(f"Serve it: freehold serve {escape(str(model))} --lora NAME={escape(str(result.artefact))}")
        console.print(f"Or merge: freehold train merge {escape(str(model))} {escape(str(result.artefact))} OUT")
    else:
        console.print(f"Serve it: freehold serve {escape(str(result.artefact))}")


def _figures(measured: Measured) -> tuple[str, str, str]:
    exact = f"{measured.exact} of {measured.chats} ({measured.exact_share:.0%})"
    return f"{measured.loss:.3f}", f"{measured.perplexity:,.2f}", exact
