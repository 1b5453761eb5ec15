"""Questions whose answers stand somewhere in a given context, among others of the same form. Torch-free.

A context is a list of facts ("The code of Velkan is 4812."), of records ("Velkan: 4812"), or a table, each key once.
One chat asks several questions about one context; some are about a key that is not there. `at_length` builds
contexts of a given number of tokens for measuring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from freehold.train.data.example import Example, assistant, user
from freehold.train.data.words import CITIES, COLOURS, FOODS, OBJECTS, Words

MISSING = "I don't know. The text does not say."


@dataclass(frozen=True, slots=True)
class Attribute:
    """What facts tell of a key: its noun, and how a value is drawn."""

    noun: str
    value: Callable[[Random, Words], str]


ATTRIBUTES = (
    Attribute("code", lambda rng, words: words.code(rng)),
    Attribute("number", lambda rng, words: words.code(rng, 3)),
    Attribute("password", lambda rng, words: words.coined(rng)),
    Attribute("friend", lambda rng, words: words.name(rng)),
    Attribute("colour", lambda rng, words: rng.choice(COLOURS)),
    Attribute("city", lambda rng, words: rng.choice(CITIES)),
    Attribute("gift", lambda rng, words: rng.choice(OBJECTS)),
    Attribute("food", lambda rng, words: rng.choice(FOODS)),
)


@dataclass(frozen=True, slots=True)
class Style:
    """How a fact is written in the context, and how a fact is asked for and told."""

    line: str
    title: str = ""


STYLES = (
    Style("The {noun} of {key} is {value}."),
    Style("{key}: {value}", "{Noun} list:"),
    Style("The {noun} of {key} is {value}.", "Facts:"),
    Style("| {key} | {value} |", "| name | {noun} |\n|---|---|"),
    Style("- {key}: {value}", "The {noun} of each:"),
)
_ASKS = (
    "What is the {noun} of {key}?",
    "Tell me the {noun} of {key}.",
    "And the {noun} of {key}?",
)
_ANSWER = "The {noun} of {key} is {value}."


@dataclass(frozen=True, slots=True)
class Fact:
    key: str
    noun: str
    value: str

    def told(self, form: str) -> str:
        return form.format(key=self.key, noun=self.noun, Noun=self.noun.capitalize(), value=self.value)


def facts(rng: Random, words: Words, count: int, attributes: tuple[Attribute, ...]) -> list[Fact]:
    """So many facts with different keys; the attributes take turns at random."""
    found = []
    for key in words.several(rng, count):
        attribute = rng.choice(attributes)
        found.append(Fact(key, attribute.noun, attribute.value(rng, words)))
    return found


def context(rng: Random, known: list[Fact], style: Style) -> str:
    lines = [fact.told(style.line) for fact in known]
    if style.title:
        lines.insert(0, known[0].told(style.title))
    # Sentences may run on in a paragraph; records are lines.
    return (" " if not style.title and rng.random() < 0.3 else "\n").join(lines)


def chat(rng: Random, words: Words, count: int, questions: int, *, missing: float = 0.15) -> Example:
    """A chat that asks so many questions about a context of so many facts."""
    style = rng.choice(STYLES)
    # Records and tables do not name the attribute, so all their facts have the same one.
    pool = (rng.choice(ATTRIBUTES),) if "{noun}" not in style.line else tuple(rng.sample(ATTRIBUTES, rng.randint(1, 4)))
    known = facts(rng, words, count, pool)
    asked = rng.sample(known, min(questions, count))
    text = context(rng, known, style)
    messages: list[dict[str, Any]] = []
    answer = ""
    for i, fact in enumerate(asked):
        if rng.random() < missing:
            keys = {each.key for each in known}
            fact = Fact(next(k for k in iter(lambda: words.name(rng), None) if k not in keys), fact.noun, "")
            answer = MISSING
        else:
            answer = fact.told(_ANSWER)
        question = fact.told(rng.choice(_ASKS[: 2 if i == 0 else 3]))
        if i == 0:
            question = f"{text}\n\n{question}" if rng.random() < 0.8 else f"{question}\n\n{text}"
        messages += [user(question), assistant(answer)]
    return Example("retrieval", tuple(messages), check={"type": "equals", "value": answer})


def make(rng: Random, words: Words) -> Example:
    """Contexts of about 60 to 1,150 tokens, short ones more often; 4 to 10 questions."""
    count = round(4 * (22 ** rng.random()))  # 4..88 facts, as many short as long on a logarithmic scale
    return chat(rng, words, count, rng.randint(4, 10))
