"""Which kinds of examples there are and how often each comes; random access to all of them. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from random import Random

from freehold.train.data import retrieval, stories, tools
from freehold.train.data.example import Example
from freehold.train.data.words import Split, Words

Maker = Callable[[Random, Words], Example]
KINDS: Mapping[str, Maker] = {
    "story": stories.make,
    "retrieval": retrieval.make,
    "tool": tools.make,
}
# Shares of examples (not of tokens).
MIXTURE: Mapping[str, float] = {"story": 0.3, "retrieval": 0.4, "tool": 0.3}


def generate(kind: str, split: Split, seed: int, index: int, *, words: Words | None = None) -> Example:
    """Example number index of a kind: always the same one for the same arguments. Raises KeyError for no such kind.

    words: what made-up words are drawn from, if not the split's.
    """
    return KINDS[kind](Random(f"{kind}/{split}/{seed}/{index}"), words or Words(split))


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
