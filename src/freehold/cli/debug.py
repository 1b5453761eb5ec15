"""`freehold debug DIR`: compare a checkpoint layer by layer with `transformers`, and name the first that differs."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def debug(
    directory: Annotated[Path, typer.Argument(help="Checkpoint directory, small enough to load twice in fp32.")],
    tokens: Annotated[int, typer.Option(help="Prompt length; must exceed index_topk to test the indexer.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of the random prompt.")] = 0,
    tolerance: Annotated[float, typer.Option(help="Relative difference above which a point differs.")] = 1e-4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Name the first layer whose output differs from transformers'."""
    from freehold.model.oracle import compare_layers, load_oracle, load_ours, stable_selection

    ours = load_ours(directory)
    topk = ours.config.index_topk
    if tokens <= topk:
        print(f"warning: {tokens} tokens do not exceed index_topk = {topk}: the indexer is not tested", file=sys.stderr)
    generator = random.Random(seed)
    prompt = [generator.randrange(min(ours.config.eos_token_ids)) for _ in range(tokens)]
    with stable_selection():
        found = compare_layers(ours, load_oracle(directory), prompt, tolerance=tolerance)
    first = next((point for point in found if point.differs), None)
    if as_json:
        print(json.dumps({"first": first and first.point, "points": [asdict(point) for point in found]}))
    else:
        for point in found:
            mark = f"differs from row {point.first_row}" if point.differs else "same"
            print(f"{point.point:24s} {point.error:10.2e}  {mark}")
        print(f"first difference: {first.point}" if first else f"all {len(found)} points agree within {tolerance:g}")
    if first:
        raise typer.Exit(1)
