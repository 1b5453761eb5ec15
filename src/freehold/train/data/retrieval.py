"""Questions whose answers stand somewhere in a given context, among others of the same form. Torch-free.

A context is a list of facts ("The code of Velkan is 4812."), of records ("Velkan: 4812"), or a table, each key once.
One chat asks several questions about one context; some are about a key that is not there. `at_length` builds
contexts of a given number of tokens for measuring.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from freehold.train.data.example import Effort, Example, assistant, user
from freehold.train.data.thinking import thinking
from freehold.train.data.words import CITIES, COLOURS, FOODS, OBJECTS, Split, Words

MISSING = "I don't know. The text does not say."


@dataclass(frozen=True, slots=True)
class Attribute:
    """What facts tell of a key: its noun, about how many tokens a value has, and how one is drawn."""

    noun: str
    tokens: float
    value: Callable[[Random, Words], str]


ATTRIBUTES = (
    Attribute("code", 5, lambda rng, words: words.code(rng)),
    Attribute("number", 4, lambda rng, words: words.code(rng, 3)),
    Attribute("motto", 2.2, lambda rng, words: words.coined(rng)),
    Attribute("friend", 2.2, lambda rng, words: words.name(rng)),
    Attribute("colour", 1, lambda rng, words: rng.choice(COLOURS)),
    Attribute("city", 1, lambda rng, words: rng.choice(CITIES)),
    Attribute("gift", 1, lambda rng, words: rng.choice(OBJECTS)),
    Attribute("food", 1, lambda rng, words: rng.choice(FOODS)),
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


def facts(rng: Random, words: Words, count: int, attributes: Sequence[Attribute]) -> list[Fact]:
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


def _cost(style: Style, pool: Sequence[Attribute]) -> float:
    """About how many tokens a fact of a style takes."""
    value = sum(attribute.tokens for attribute in pool) / len(pool)
    return value + (9.2 if "{noun}" in style.line else 5.2 if "|" in style.line else 4.2)


def chat(rng: Random, words: Words, effort: Effort, tokens: int, questions: int, *, missing: float = 0.0) -> Example:
    """A chat that asks so many questions about a context of about so many tokens, at least 3 facts.

    missing: how often a question is about a key that is not there. Thinking, only the last question is asked.
    """
    style = rng.choice(STYLES)
    # Records and tables do not name the attribute, so all their facts have the same one.
    pool = rng.sample(ATTRIBUTES, rng.randint(1, 4) if "{noun}" in style.line else 1)
    known = facts(rng, words, max(3, round(tokens / _cost(style, pool))), pool)
    asked = rng.sample(known, min(questions, len(known)))
    keys = {fact.key for fact in known}
    for i in range(len(asked)):
        if rng.random() < missing:
            asked[i] = Fact(_other(rng, words, keys), asked[i].noun, "")
    return _asking(rng, effort, context(rng, known, style), asked)


def _other(rng: Random, words: Words, keys: Container[str]) -> str:
    while (key := words.name(rng)) in keys:
        pass
    return key


def _asking(rng: Random, effort: Effort, text: str, asked: list[Fact]) -> Example:
    """The chat about a context. A fact without a value is one that the context lacks."""
    phrasings = [rng.choice(_ASKS) for _ in asked]
    before = rng.random() < 0.15  # the question before the context
    if effort != "none":
        asked, phrasings = asked[-1:], phrasings[-1:]
    messages: list[dict[str, Any]] = []
    answer = ""
    for fact, phrasing in zip(asked, phrasings, strict=True):
        answer = fact.told(_ANSWER) if fact.value else MISSING
        question = fact.told(phrasing)
        found = f"{fact.key}: {fact.value}." if fact.value else f"{fact.key} is not there."
        thoughts = thinking(
            effort, f"The question: {question} I look for {fact.key}.", found, f"{fact.key} again: {answer}"
        )
        if not messages:
            question = f"{question}\n\n{text}" if before else f"{text}\n\n{question}"
        messages += [user(question), assistant(answer, thinking=thoughts)]
    check = {"type": "equals", "value": answer} | ({"key": fact.value} if fact.value else {})
    return Example("retrieval", tuple(messages), effort=effort, check=check)


def make(rng: Random, words: Words, effort: Effort) -> Example:
    """Contexts of about 40 to 1,150 tokens, as many short as long on a logarithmic scale; 4 to 12 questions."""
    tokens = 40 * 29 ** rng.random()
    questions = rng.randint(4, 12)
    if tokens < 300:
        return chat(rng, words, effort, round(tokens), questions, missing=0.08)
    questions = min(questions, int((1240 - tokens) / 27))
    return chat(rng, words, effort, round(tokens), max(2, questions))


def records(rng: Random, words: Words, effort: Effort) -> Example:
    """Several attributes of each key in one line; the question names both."""
    attributes = rng.sample(ATTRIBUTES, rng.randint(2, 3))
    keys = words.several(rng, rng.randint(2, 24))
    known = [[Fact(key, each.noun, each.value(rng, words)) for each in attributes] for key in keys]
    if rng.random() < 0.5:
        lines = [f"{row[0].key}: " + ", ".join(f"{fact.noun} {fact.value}" for fact in row) for row in known]
    else:
        head = ["name", *(each.noun for each in attributes)]
        rows = [[row[0].key, *(fact.value for fact in row)] for row in known]
        lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
        lines.insert(1, "|---" * len(head) + "|")
    asked = rng.sample([fact for row in known for fact in row], rng.randint(4, 6) if len(keys) > 2 else 4)
    return _asking(rng, effort, "\n".join(lines), asked)


def at_length(
    split: Split, seed: int, index: int, tokens: int, measure: Callable[[Example], int], *, effort: Effort = "none"
) -> Example:
    """One question about a context, as an example of just under so many tokens by `measure`.

    The fact is as likely anywhere in the context. Raises ValueError below about 60 tokens, where no context fits.
    """
    rng, words = Random(f"length/{tokens}/{split}/{seed}/{index}"), Words(split)
    style = rng.choice(STYLES)
    pool = rng.sample(ATTRIBUTES, rng.randint(1, 4) if "{noun}" in style.line else 1)
    known = facts(rng, words, max(3, round(1.3 * tokens / _cost(style, pool))), pool)
    position, start = rng.random(), rng.randrange(1 << 30)

    def of(count: int) -> Example:
        again = Random(start)
        return _asking(again, effort, context(again, known[:count], style), [known[int(position * count)]])

    low, high = 1, len(known)
    while low < high:  # the most facts that fit
        middle = (low + high + 1) // 2
        low, high = (middle, high) if measure(of(middle)) <= tokens else (low, middle - 1)
    if measure(of(low)) > tokens:
        raise ValueError(f"no context fits in {tokens} tokens")
    return of(low)
