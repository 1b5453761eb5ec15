"""Lines that come again, as they were or changed by a rule: the plainest text in which what was said before foretells
what comes next. Torch-free.

A model that learns to go on with a line it has seen has the circuit that every task of copying needs (induction heads,
Olsson et al. 2022); here half of all tokens teach it, in a conversation only the few that an answer takes over. Drills
do the same for copying that changes what it copies: case, order, number.
"""

from __future__ import annotations

from random import Random

from freehold.train.data.example import Effort, Example
from freehold.train.data.formats import COUNTS, some
from freehold.train.data.words import Words


def make(rng: Random, words: Words, effort: Effort) -> Example:
    """One line of 4 to 24 made-up names, or names and numbers, from two to six times."""
    count = rng.randint(4, 24)
    names = words.several(rng, count)
    if rng.random() < 0.4:
        names = [name if rng.random() < 0.5 else words.code(rng, rng.randint(3, 4)) for name in names]
    times = min(max(2, 60 // count), 6)
    return Example("echo", text=rng.choice(("\n", " ", ". ", ", ")).join([" ".join(names)] * times))


def drill(rng: Random, words: Words, effort: Effort) -> Example:
    """Six to ten lines, each some words and what a rule makes of them; mostly one rule in all of them."""
    rules = rng.sample(_RULES, 1 if rng.random() < 0.7 else 3)
    lines = [rng.choice(rules)(rng, some(rng, words, 1, 5)) for _ in range(rng.randint(6, 10))]
    return Example("drill", text="\n".join(lines))


def _upper(rng: Random, items: list[str]) -> str:
    text = " ".join(items)
    return f"{text} in upper case: {text.upper()}"


def _lower(rng: Random, items: list[str]) -> str:
    text = " ".join(items)
    return f"{text.upper()} in lower case: {text.lower()}"


def _backwards(rng: Random, items: list[str]) -> str:
    return f"{', '.join(items)} in reverse order: {', '.join(reversed(items))}"


def _place(rng: Random, items: list[str]) -> str:
    place, index = rng.choice((("first", 0), ("second", min(1, len(items) - 1)), ("last", -1)))
    return f"{' '.join(items)}: the {place if index else 'first'} word is {items[index]}"


def _times(rng: Random, items: list[str]) -> str:
    count = rng.randint(2, 6)
    return f"{items[0]} {rng.choice((str(count), COUNTS[count]))} times: {' '.join([items[0]] * count)}"


def _counted(rng: Random, items: list[str]) -> str:
    return f"{' '.join(items)}: {', '.join(f'{i} {item}' for i, item in enumerate(items, 1))}: {len(items)}"


_RULES = (_upper, _lower, _backwards, _place, _times, _counted)
