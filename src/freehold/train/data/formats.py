"""Instructions whose answer has a form that a program can check. Torch-free.

The words to be arranged are given in the request, mostly made-up ones, so that the answer copies them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from freehold.train.data.example import Effort, Example, assistant, user
from freehold.train.data.thinking import thinking
from freehold.train.data.words import ANIMALS, COLOURS, FOODS, OBJECTS, PLACES, Words

COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "animals": tuple(ANIMALS),
    "colours": tuple(COLOURS),
    "foods": tuple(FOODS),
    "places": tuple(PLACES),
    "objects": tuple(OBJECTS),
}


@dataclass(frozen=True, slots=True)
class Task:
    """One instruction: what is asked, the right answer, how it is checked, and what thinking says of it."""

    request: str
    answer: str
    check: Mapping[str, Any]
    steps: str
    review: str


def some(rng: Random, words: Words, low: int = 2, high: int = 6) -> list[str]:
    """Words to arrange: made-up ones, sometimes names, sometimes plain ones."""
    count, draw = rng.randint(low, high), rng.random()
    if draw < 0.2:
        return rng.sample(rng.choice(list(CATEGORIES.values())), count)
    return words.several(rng, count, names=draw < 0.45)


def _given(rng: Random, items: list[str]) -> str:
    return rng.choice((", ".join(items), " ".join(items)))


def _exact(value: str) -> dict[str, Any]:
    return {"type": "equals", "value": value}


def _number(rng: Random, count: int) -> str:
    return rng.choice((str(count), COUNTS[count]))


def numbered(rng: Random, words: Words) -> Task:
    items = some(rng, words)
    request = rng.choice(
        ("Make a numbered list of these: {}", "Write these as a numbered list: {}", "Number these: {}")
    ).format(_given(rng, items))
    answer = "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))
    check = {"type": "numbered_list", "count": len(items), "items": items}
    return Task(request, answer, check, f"A numbered list of {len(items)}.", f"{len(items)}: {', '.join(items)}.")


def bullets(rng: Random, words: Words) -> Task:
    items = some(rng, words)
    request = rng.choice(
        ("Make a bullet list of these: {}", "Write these as bullet points: {}", "Bullet list: {}")
    ).format(_given(rng, items))
    answer = "\n".join(f"- {item}" for item in items)
    check = {"type": "bullet_list", "count": len(items), "items": items}
    return Task(request, answer, check, f"A bullet list of {len(items)}.", f"{len(items)}: {', '.join(items)}.")


def named(rng: Random, words: Words) -> Task:
    """So many members of a category, as a list of a kind: neighbours in our list, so that each foretells the next."""
    category = rng.choice(list(CATEGORIES))
    count = rng.randint(2, 6)
    first = rng.randrange(len(CATEGORIES[category]) - count + 1)
    items = CATEGORIES[category][first : first + count]
    number = _number(rng, count)
    kind = rng.choice(("numbered_list", "bullet_list", "comma_list"))
    asked = {
        "numbered_list": ("Write a numbered list of {} {}.", "List {} {} in a numbered list.", "Name {} {}, numbered."),
        "bullet_list": ("Write a bullet list of {} {}.", "List {} {} as bullet points."),
        "comma_list": ("Name {} {}, separated by commas.", "List {} {} on one line with commas."),
    }[kind]
    lines = {
        "numbered_list": "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1)),
        "bullet_list": "\n".join(f"- {item}" for item in items),
        "comma_list": ", ".join(items),
    }
    check = {"type": kind, "count": count, "among": list(CATEGORIES[category])}
    steps = f"I need {count} {category}."
    return Task(rng.choice(asked).format(number, category), lines[kind], check, steps, f"{', '.join(items)}: {count}.")


def commas(rng: Random, words: Words) -> Task:
    items = some(rng, words)
    request = rng.choice(
        ("Separate these with commas: {}", "Write these on one line with commas: {}", "Join with commas: {}")
    ).format(rng.choice((" ", "\n")).join(items))
    check = {"type": "comma_list", "count": len(items), "items": items}
    return Task(request, ", ".join(items), check, f"{len(items)} words with commas.", f"{len(items)} words.")


def as_json(rng: Random, words: Words) -> Task:
    keys = rng.sample(("name", "code", "city", "colour", "food", "friend", "room", "item"), rng.randint(1, 4))
    value: dict[str, str | int] = {
        key: int(words.code(rng, rng.choice((3, 4)))) if key in ("code", "room") else words.name(rng) for key in keys
    }
    said = ", ".join(f"{key} {each}" for key, each in value.items())
    request = rng.choice(("Write JSON with {}", "Make a JSON object with {}", "Give me JSON: {}")).format(said)
    check = {"type": "json", "keys": keys, "value": value}
    return Task(request, json.dumps(value), check, f"JSON with {', '.join(keys)}.", f"The keys are {', '.join(keys)}.")


def upper(rng: Random, words: Words) -> Task:
    text = " ".join(some(rng, words, 1, 4))
    request = rng.choice(("Write in upper case: {}", "Put this in capital letters: {}", "Upper case: {}")).format(text)
    return Task(request, text.upper(), _exact(text.upper()), "Upper case.", f"{text} is {text.upper()}.")


def lower(rng: Random, words: Words) -> Task:
    text = " ".join(some(rng, words, 1, 4)).lower()
    request = rng.choice(("Write in lower case: {}", "Put this in small letters: {}")).format(text.upper())
    return Task(request, text, _exact(text), "Lower case.", f"{text.upper()} is {text}.")


def repeat(rng: Random, words: Words) -> Task:
    word, count = words.coined(rng), rng.randint(2, 6)
    number = _number(rng, count)
    request = rng.choice((f"Say {word} {number} times.", f"Repeat the word {word} {number} times."))
    answer = " ".join([word] * count)
    return Task(
        request, answer, {"type": "words", "count": count, "word": word}, f"{word}, {count} times.", f"{answer}."
    )


def table(rng: Random, words: Words) -> Task:
    names = words.several(rng, rng.randint(2, 4))
    second = rng.choice(("code", "friend"))
    values = [words.code(rng) if second == "code" else words.name(rng) for _ in names]
    rows = list(zip(names, values, strict=True))
    said = ", ".join(f"{name} {value}" for name, value in rows)
    request = rng.choice(("Make a table of name and {}: {}", "Write a table with name and {}: {}")).format(second, said)
    answer = "\n".join([f"| name | {second} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    check = {"type": "table", "columns": 2, "rows": [list(row) for row in rows]}
    return Task(request, answer, check, f"A table of {len(rows)} rows.", f"{said}.")


def member(rng: Random, words: Words) -> Task:
    items = some(rng, words, 3, 8)
    inside = rng.random() < 0.5
    word = rng.choice(items)
    if not inside:
        fresh = words.coined(rng)
        word = fresh.capitalize() if items[0][0].isupper() else fresh
        inside = word in items
    said = ", ".join(items)
    request = rng.choice(
        (f"Is {word} in this list? {said}. Answer yes or no.", f"{said}. Is {word} in this list? Answer yes or no.")
    )
    answer = "yes" if inside else "no"
    steps = f"I look for {word}. " + (f"I see {word}." if inside else "It is not there.")
    return Task(request, answer, _exact(answer), steps, f"The list: {', '.join(items)}.")


def position(rng: Random, words: Words) -> Task:
    items = some(rng, words, 3, 5)
    place, index = rng.choice((("first", 0), ("last", -1), ("second", 1), ("first", 0), ("last", -1)))
    request = rng.choice(("What is the {} word of this? {}", "Give me only the {} word: {}")).format(
        place, " ".join(items)
    )
    answer = items[index]
    return Task(request, answer, _exact(answer), f"The {place} word is {answer}.", f"{', '.join(items)}.")


def counted(rng: Random, words: Words) -> Task:
    """Counted aloud: the number that is the answer follows from the one before it."""
    items = some(rng, words, 1, 7)
    request = rng.choice(("How many words are here? {}", "Count these words: {}")).format(" ".join(items))
    aloud = ", ".join(f"{i} {item}" for i, item in enumerate(items, 1))
    total = f"{len(items)} word{'s' * (len(items) > 1)}."
    check = {"type": "ends", "value": total, "sentences": 1}
    return Task(request, f"{aloud}: {total}", check, f"{aloud}.", f"The last number is {len(items)}.")


def wrapped(rng: Random, words: Words) -> Task:
    text = " ".join(some(rng, words, 1, 3))
    name, left, right = rng.choice(
        (("quotes", '"', '"'), ("brackets", "[", "]"), ("stars", "**", "**"), ("round brackets", "(", ")"))
    )
    request = rng.choice(("Put this in {}: {}", "Write in {}: {}")).format(name, text)
    answer = f"{left}{text}{right}"
    return Task(request, answer, _exact(answer), f"I use {name}.", f"{answer} has {name}.")


def joined(rng: Random, words: Words) -> Task:
    items = some(rng, words, 2, 4)
    name, sign = rng.choice((("a dash", "-"), ("a slash", "/"), ("a plus", "+"), ("a colon", ":")))
    request = rng.choice(("Join these with {}: {}", "Put {} between these: {}")).format(name, " ".join(items))
    answer = sign.join(items)
    return Task(request, answer, _exact(answer), f"I join {len(items)} words.", f"{answer} has {name}.")


def opened(rng: Random, words: Words) -> Task:
    """A sentence that has to begin or end with a word."""
    word, other = words.name(rng), rng.choice(PLACES)
    if rng.random() < 0.5:
        request = rng.choice((f"Write a sentence that begins with {word}.", f"Begin a sentence with the word {word}."))
        answer = rng.choice((f"{word} lives in the {other}.", f"{word} went to the {other}."))
        check = {"type": "starts", "value": word, "sentences": 1}
    else:
        request = rng.choice((f"Write a sentence that ends with {word}.", f"End a sentence with the word {word}."))
        answer = rng.choice((f"In the {other} lives {word}.", f"I went to the {other} to see {word}."))
        check = {"type": "ends", "value": f"{word}.", "sentences": 1}
    return Task(request, answer, check, f"The word is {word}.", f"{answer}")


def backwards(rng: Random, words: Words) -> Task:
    items = some(rng, words, 2, 4)
    request = rng.choice(("Write these in reverse order: {}", "Turn the order around: {}")).format(", ".join(items))
    answer = ", ".join(reversed(items))
    return Task(request, answer, _exact(answer), f"The last is {items[-1]}.", f"{', '.join(items)}.")


def echo(rng: Random, words: Words) -> Task:
    text = " ".join(some(rng, words, 1, 6))
    request = rng.choice(("Repeat after me: {}", "Say exactly this: {}", "Copy this: {}")).format(text)
    return Task(request, text, _exact(text), "I copy it.", f"{text}.")


TASKS: tuple[Callable[[Random, Words], Task], ...] = (
    numbered, bullets, named, commas, as_json, upper, lower, repeat, table, member, position, counted, wrapped,
    joined, opened, backwards, echo,
)  # fmt: skip
# What is hard to learn is practised more often; a test asks for all alike.
PRACTICE: Mapping[Callable[[Random, Words], Task], int] = {
    **dict.fromkeys(TASKS, 2), opened: 1, wrapped: 1, as_json: 1, echo: 1,
    upper: 4, lower: 4, backwards: 4, position: 4, member: 3, counted: 3, repeat: 3, commas: 3,
}  # fmt: skip


# What a model gets wrong last: to stop at a number, to compare words, to change case.
EXERCISES: Mapping[Callable[[Random, Words], Task], int] = {
    named: 5, repeat: 4, member: 4, upper: 4, backwards: 2, counted: 1, commas: 1, lower: 1,
}  # fmt: skip


def make(rng: Random, words: Words, effort: Effort) -> Example:
    """One instruction; without thinking a chat of several."""
    shares = [PRACTICE[task] if words.split == "train" else 1 for task in TASKS]
    tasks = [task(rng, words) for task in rng.choices(TASKS, shares, k=rng.randint(2, 7))]
    messages, last = _chat(tasks, effort)
    return Example("format", messages, effort=effort, check=last.check)


def exercise(rng: Random, words: Words, effort: Effort) -> Example:
    """The same of what is hard only. Nothing is checked: it is practice."""
    tasks = [task(rng, words) for task in rng.choices(list(EXERCISES), list(EXERCISES.values()), k=rng.randint(4, 8))]
    return Example("exercise", _chat(tasks, effort)[0], effort=effort)


def _chat(tasks: list[Task], effort: Effort) -> tuple[tuple[dict[str, Any], ...], Task]:
    """The messages, and the last task; with thinking only that one."""
    messages: list[dict[str, Any]] = []
    for task in tasks if effort == "none" else tasks[-1:]:
        thoughts = thinking(effort, "The user wants this: " + task.request, task.steps, task.review)
        messages += [user(task.request), assistant(task.answer, thinking=thoughts)]
    return tuple(messages), tasks[-1]
