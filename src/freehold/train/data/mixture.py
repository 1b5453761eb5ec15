"""Which kinds of examples there are and how often each comes; random access to all of them. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from random import Random

from freehold.train.data import arithmetic, chats, echo, formats, reading, retrieval, stories, tools
from freehold.train.data.example import Effort, Example
from freehold.train.data.words import Split, Words

Maker = Callable[[Random, Words, Effort], Example]
KINDS: Mapping[str, Maker] = {
    "text": stories.plain,
    "story": stories.make,
    "description": reading.description,
    "reading": reading.make,
    "retrieval": retrieval.make,
    "records": retrieval.records,
    "arithmetic": arithmetic.make,
    "format": formats.make,
    "tool": tools.make,
    "chat": chats.talk,
    "memory": chats.memory,
    "persona": chats.persona,
    "refusal": chats.refusal,
    "echo": echo.make,
    "drill": echo.drill,
    "exercise": formats.exercise,
}
# Shares of examples. Of tokens, retrieval and tools are about 30 % each, formats 13 %, stories 15 %, arithmetic 7 %.
MIXTURE: Mapping[str, float] = {
    "text": 0.04,
    "story": 0.04,
    "description": 0.02,
    "reading": 0.05,
    "retrieval": 0.12,
    "records": 0.02,
    "arithmetic": 0.12,
    "format": 0.33,
    "tool": 0.15,
    "chat": 0.045,
    "memory": 0.035,
    "persona": 0.01,
    "refusal": 0.02,
}
# Of a model that knows nothing yet: every fourth example is lines that come again, as they were or changed.
FIRST_MIXTURE: Mapping[str, float] = {
    **{kind: share * 3 / 4 for kind, share in MIXTURE.items()},
    "echo": 1 / 8,
    "drill": 1 / 8,
}
# At the end: mostly what is still got wrong, and of all else enough to keep it.
LAST_MIXTURE: Mapping[str, float] = {
    "text": 0.01,
    "story": 0.02,
    "description": 0.01,
    "reading": 0.04,
    "retrieval": 0.10,
    "records": 0.02,
    "arithmetic": 0.05,
    "format": 0.22,
    "tool": 0.20,
    "chat": 0.02,
    "memory": 0.02,
    "persona": 0.01,
    "refusal": 0.01,
    "exercise": 0.27,
}
EFFORT_SHARES: Mapping[Effort, float] = {"none": 0.6, "high": 0.2, "max": 0.2}


def generate(
    kind: str, split: Split, seed: int, index: int, *, effort: Effort | None = None, words: Words | None = None
) -> Example:
    """Example number index of a kind: always the same one for the same arguments. Raises KeyError for no such kind.

    effort: how much it thinks, if not drawn; the question and the answer do not depend on it, but with thinking the
    turns before the last may be left out. words: what made-up words are drawn from, if not the split's.
    """
    name = f"{kind}/{split}/{seed}/{index}"
    if effort is None:
        (effort,) = Random(f"effort/{name}").choices(list(EFFORT_SHARES), list(EFFORT_SHARES.values()))
    return KINDS[kind](Random(name), words or Words(split), effort)


def drawn(mixture: Mapping[str, float], split: Split, seed: int, index: int) -> Example:
    """Example number index of a mixture of kinds."""
    kinds = list(mixture)
    (kind,) = Random(f"mixture/{split}/{seed}/{index}").choices(kinds, [mixture[each] for each in kinds])
    return generate(kind, split, seed, index)


def stream(mixture: Mapping[str, float], split: Split, seed: int) -> Iterator[Example]:
    """Examples of a mixture without end."""
    index = 0
    while True:
        yield drawn(mixture, split, seed, index)
        index += 1
