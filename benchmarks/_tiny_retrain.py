"""Trains the models that freehold-tiny is compared with, by its own recipe, and keeps their figures.

    python benchmarks/_tiny_retrain.py index-share every-layer dense --tokens 2500000 --work DIR

Each arm is trained from nothing on the same corpora in the same order, with as many tokens (--tokens, shared among the
recipe's stages as there; default: as many as freehold-tiny). The dense model has no indexer, so its recipe leaves out
the stage that only trains indexers, and attends to everything in the others.

Killed at any moment, the same command goes on where it was. Figures go to `results/tiny_retrained_ARM.json`; the model
stays in DIR/ARM/published. Needs the tokenizer of a checkpoint (--tokenizer) or makes the one of the recipe.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from _common import ROOT, commit, hardware
from _tiny_arms import ARMS, active_parameters, arm_config
from _tiny_kept import Retrained
from _tiny_losses import DOCUMENTS, digest, held_out_documents, model_losses
from _tiny_retrieval import retrieval_of_length
from _tiny_tasks import CALLS, checked, open_model, rate, shown, solve
from rich.console import Console
from rich.progress import Progress

from freehold.model.chat.template import ChatTemplate
from freehold.model.tokenizer import Tokenizer
from freehold.stats import Interval
from freehold.train.corpus import Corpus, CorpusSettings, build
from freehold.train.corpus import digest as digest_of
from freehold.train.loop import StepReport
from freehold.train.publish import write
from freehold.train.recipe import Recipe, Stage, tiny_recipe
from freehold.train.stages import from_directory, from_nothing, run_stage
from freehold.train.tiny import averaged
from freehold.train.tokenizer import generated_tokenizer

CHECKPOINT = ROOT / "models" / "freehold-tiny"


def arm_recipe(arm: str, recipe: Recipe, tokens: int | None) -> Recipe:
    """The recipe of an arm, with about `tokens` tokens in all stages that train the language model."""
    stages = recipe.stages
    if arm == "dense":
        stages = tuple(_dense_stage(stage) for stage in stages if stage.objective.indexer != "warm-up")
    config = arm_config(arm, recipe.config)
    made = replace(recipe, name=arm, config=config, stages=stages)
    return made if tokens is None else made.scaled(tokens / language_tokens(recipe))


def language_tokens(recipe: Recipe) -> int:
    """Tokens that train more than indexers."""
    return sum(stage.tokens for stage in recipe.stages if stage.objective.indexer != "warm-up")


def _dense_stage(stage: Stage) -> Stage:
    return replace(stage, objective=replace(stage.objective, indexer="none"))


def train(recipe: Recipe, tokenizer: Tokenizer, work: Path) -> tuple[Path, int, float]:
    """All stages; the model that the recipe would publish, the tokens and the seconds of training."""
    runs: list[Path] = []
    tokens, seconds = 0, 0.0
    for stage in recipe.stages:
        directory = work / recipe.name / stage.name
        corpus = _corpus(work / "corpora", stage.corpus(), tokenizer)
        start = from_directory(runs[-1]) if runs else from_nothing(recipe.config, tokenizer, recipe.seed)
        with _bar(f"{recipe.name}: {stage.name}") as report:
            finished = run_stage(stage, start, corpus, directory, report=report)
        print(f"{recipe.name}: {stage.name}: {finished.tokens:,} tokens in {finished.seconds:.0f} s", flush=True)
        tokens, seconds = tokens + finished.tokens, seconds + finished.seconds
        runs.append(directory)
    last = averaged([from_directory(run) for run in runs[-recipe.averaged :]])
    model = work / recipe.name / "published"
    write(last.model, last.tokenizer, last.config, model, replace=True)
    return model, tokens, seconds


def _corpus(directory: Path, settings: CorpusSettings, tokenizer: Tokenizer) -> Corpus:
    """Made once, for all arms."""
    name = digest_of(settings, tokenizer, ChatTemplate.builtin())[:16]
    return build(directory / name, settings, tokenizer, ChatTemplate.builtin())


@contextmanager
def _bar(label: str) -> Iterator[Callable[[StepReport], None]]:
    """A progress bar with loss and tokens a second, on a terminal."""
    console = Console(stderr=True)
    columns = Progress.get_default_columns()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)

        def report(step: StepReport) -> None:
            text = f"{label}: loss {step.loss:.3f}, {step.tokens / max(step.seconds, 1e-9):,.0f} tokens/s"
            bar.update(task, completed=step.step, total=step.steps, description=text)

        yield report


def measure(arm: str, model: Path, base: dict[str, Any], prompts: int, documents: int) -> Retrained:
    """Figures of a trained arm; training's are filled in by the caller."""
    topk = int(base["index_topk"])
    rates: dict[str, list[float]] = {}
    with open_model(model) as llm:
        held_out = held_out_documents(llm.tokenizer, documents)
        losses = model_losses(llm, held_out, topk)
        for times in (4, 16):
            answered = solve(llm, retrieval_of_length(llm.tokenizer, times * topk, prompts), max_tokens=64)
            rates[f"retrieval at {times}x"] = rate(answered).as_list()
        rates["tool calls"] = rate(solve(llm, checked("tool", prompts, checks=CALLS))).as_list()
        rates["format"] = rate(solve(llm, checked("format", prompts))).as_list()
    return Retrained(arm, 0, 0.0, digest(held_out), losses, rates, {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", choices=ARMS)
    parser.add_argument("--tokens", type=int, help="of each arm")
    parser.add_argument("--work", type=Path, required=True, help="where runs and corpora are kept")
    parser.add_argument("--tokenizer", type=Path, default=CHECKPOINT, help="a checkpoint whose tokenizer is used")
    parser.add_argument("--prompts", type=int, default=300, help="of each kind and length, to measure with")
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="held out, to measure perplexity on")
    parser.add_argument("--keep-nothing", action="store_true", help="print the figures only")
    args = parser.parse_args()
    template = ChatTemplate.builtin()
    known = (args.tokenizer / "tokenizer.json").exists()
    tokenizer = Tokenizer.from_dir(args.tokenizer) if known else generated_tokenizer(template)
    base = dict(tiny_recipe().config)
    for arm in args.arms:
        recipe = arm_recipe(arm, tiny_recipe(), args.tokens)
        start = time.perf_counter()
        model, tokens, seconds = train(recipe, tokenizer, args.work)
        facts = {
            "active parameters": active_parameters(recipe.config, attends_to_all=arm == "dense"),
            "tokens a second": round(tokens / max(seconds, 1e-9)),
            "command": f"python benchmarks/_tiny_retrain.py {arm} --work DIR"
            + ("" if args.tokens is None else f" --tokens {args.tokens}"),
            "commit": commit(),
            "hardware": hardware(),
        }
        found = measure(arm, model, base, args.prompts, args.documents)
        found = replace(found, tokens=tokens, seconds=round(seconds, 1), facts=facts)
        for name, each in found.rates.items():
            print(f"  {name:20}{shown(Interval(*each))}")
        print(f"  {time.perf_counter() - start:.0f} s in all")
        if not args.keep_nothing:
            found.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
