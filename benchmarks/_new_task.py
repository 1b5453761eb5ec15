"""A task that freehold-tiny was not trained for: orders of a made-up shop, written in the shop's own form.

    Order for Belnor: 7 lamp, red, by Monday.
    Monday | Belnor | lamp | red | 7

Everything is to be copied, in an order and with a mark between that no other task has. The words are those that the
model has in its vocabulary (a tokenizer cuts others into letters that it has hardly seen); names of the test split are
never in the train split. `adapt` is what a user would do with 200 such chats.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from freehold.train.data.example import Example, assistant, user
from freehold.train.data.mixture import MIXTURE, drawn
from freehold.train.data.words import COLOURS, DAYS, OBJECTS, Split, Words
from freehold.train.finetune import Finetuned, FinetuneSettings, Reports, finetune
from freehold.train.jsonl import read_chats
from freehold.train.loop import StepReport
from freehold.train.merge import merge_adapter

TRAINED_ON = 200
REPEATED, REHEARSED = 4, 1200  # how often each order stands in the file, and how many other chats beside them
SETTINGS = FinetuneSettings(lr=1e-3, epochs=1.0, batch_tokens=1024)
_ASKED = (
    "Order for {name}: {count} {item}, {colour}, by {day}.",
    "{name} needs {count} {item} in {colour} by {day}.",
    "By {day}, send {count} {item} to {name}. The colour is {colour}.",
)


def order(split: Split, seed: int, index: int) -> Example:
    """Example number index: always the same for the same arguments."""
    rng, words = Random(f"order/{split}/{seed}/{index}"), Words(split)
    name, count, item = words.name(rng), rng.randint(2, 99), rng.choice(OBJECTS)
    colour, day = rng.choice(COLOURS), rng.choice(DAYS)
    asked = rng.choice(_ASKED).format(name=name, count=count, item=item, colour=colour, day=day)
    answer = f"{day} | {name} | {item} | {colour} | {count}"
    return Example("order", (user(asked), assistant(answer)), check={"type": "equals", "value": answer})


def orders(split: Split, count: int, seed: int = 0) -> list[Example]:
    return [order(split, seed, index) for index in range(count)]


def rehearsed(count: int) -> list[Example]:
    """Chats of what the model does already, from its training data: without them it forgets that for the new task."""
    shares = {kind: share for kind, share in MIXTURE.items() if kind != "text"}
    return [drawn(shares, "train", 77, index) for index in range(count)]


def write_jsonl(path: Path, examples: list[Example]) -> None:
    """As a user's file of chats."""
    lines = [json.dumps(_line(example)) for example in examples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(example: Example) -> dict[str, Any]:
    tools = {"tools": example.tools} if example.tools else {}
    return {"messages": example.messages, "effort": example.effort, **tools}


@dataclass(frozen=True)
class Adapted:
    """adapter: as PEFT saves it. merged: the checkpoint with it. seconds: from the file of chats to the adapter."""

    adapter: Path
    merged: Path
    seconds: float
    result: Finetuned


def adapt(
    checkpoint: Path,
    work: Path,
    *,
    settings: FinetuneSettings | None = None,
    report: Callable[[StepReport], None] = lambda step: None,
) -> Adapted:
    """Train an adapter on 200 orders by the ways a user has, and merge it."""
    from freehold.model.chat.template import ChatTemplate

    work.mkdir(parents=True, exist_ok=True)
    write_jsonl(work / "orders.jsonl", [*orders("train", TRAINED_ON) * REPEATED, *rehearsed(REHEARSED)])
    started = time.perf_counter()
    chats = read_chats(work / "orders.jsonl", ChatTemplate.from_dir(checkpoint))
    result = finetune(checkpoint, chats, [], work / "run", settings or SETTINGS, reports=Reports(step=report))
    seconds = time.perf_counter() - started
    merge_adapter(checkpoint, result.artefact, work / "merged", replace=True)
    return Adapted(result.artefact, work / "merged", seconds, result)
