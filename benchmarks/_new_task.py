"""A task that freehold-tiny was not trained for: tickets of a made-up house, sorted in the house's own form.

    Ticket 4821 from Belnor: the lamp in the kitchen is cracked.
    {"queue": "repairs", "item": "lamp", "place": "kitchen", "from": "Belnor", "ticket": 4821}

The queue follows from the last word by a rule that is nowhere but in the examples; the rest is to be copied. Names and
numbers of the test split are never in the train split. `adapt` is what a user would do with 200 such chats.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from freehold.train.data.example import Example, assistant, user
from freehold.train.data.words import OBJECTS, PLACES, Split, Words
from freehold.train.finetune import Finetuned, FinetuneSettings, Reports, finetune
from freehold.train.jsonl import read_chats
from freehold.train.loop import StepReport
from freehold.train.merge import merge_adapter

TRAINED_ON = 200
QUEUES: Mapping[str, tuple[str, ...]] = {
    "repairs": ("broken", "cracked", "stuck"),
    "cleaning": ("dirty", "wet", "dusty"),
    "security": ("gone", "stolen", "lost"),
    "supplies": ("empty", "old", "used up"),
}
_ASKED = (
    "Ticket {ticket} from {name}: the {item} in the {place} is {state}.",
    "Ticket {ticket}: {name} says that the {item} in the {place} is {state}.",
    "{name} writes in ticket {ticket} that the {item} in the {place} is {state}.",
)


def ticket(split: Split, seed: int, index: int) -> Example:
    """Example number index: always the same for the same arguments."""
    rng, words = Random(f"ticket/{split}/{seed}/{index}"), Words(split)
    queue = rng.choice(list(QUEUES))
    number, name = words.code(rng), words.name(rng)
    item, place = rng.choice(OBJECTS), rng.choice(PLACES)
    asked = rng.choice(_ASKED).format(ticket=number, name=name, item=item, place=place, state=rng.choice(QUEUES[queue]))
    answer = json.dumps({"queue": queue, "item": item, "place": place, "from": name, "ticket": int(number)})
    return Example("ticket", (user(asked), assistant(answer)), check={"type": "equals", "value": answer})


def tickets(split: Split, count: int, seed: int = 0) -> list[Example]:
    return [ticket(split, seed, index) for index in range(count)]


def write_jsonl(path: Path, examples: list[Example]) -> None:
    """As a user's file of chats."""
    lines = [json.dumps({"messages": example.messages, "effort": example.effort}) for example in examples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


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
    """Train an adapter on 200 tickets by the ways a user has, and merge it."""
    from freehold.model.chat.template import ChatTemplate

    work.mkdir(parents=True, exist_ok=True)
    write_jsonl(work / "tickets.jsonl", tickets("train", TRAINED_ON))
    started = time.perf_counter()
    chats = read_chats(work / "tickets.jsonl", ChatTemplate.from_dir(checkpoint))
    result = finetune(checkpoint, chats, [], work / "run", settings, reports=Reports(step=report))
    seconds = time.perf_counter() - started
    merge_adapter(checkpoint, result.artefact, work / "merged", replace=True)
    return Adapted(result.artefact, work / "merged", seconds, result)
