"""Sums, differences, products, comparisons and small word problems, with the steps written out. Torch-free.

Which pairs of numbers belong to the test split is decided by a hash of the pair.
"""

from __future__ import annotations

from random import Random

from freehold.train.data.example import Effort, Example, assistant, user
from freehold.train.data.thinking import thinking
from freehold.train.data.words import FOODS, OBJECTS, Words, split_of


def pair(rng: Random, words: Words, low: int, high: int) -> tuple[int, int]:
    """Two numbers of low..high whose pair belongs to the split."""
    while True:
        a, b = rng.randint(low, high), rng.randint(low, high)
        if split_of(f"{a} {b}") == words.split:
            return a, b


def sum_steps(a: int, b: int) -> str:
    """Column by column from the right, with the carry."""
    steps, carry, place = [], 0, 1
    while place <= max(a, b):
        x, y = a // place % 10, b // place % 10
        total = x + y + carry
        terms = f"{x} + {y}" + (f" + {carry}" if carry else "")
        steps.append(f"{terms} = {total}: write {total % 10}" + (f", carry {total // 10}." if total > 9 else "."))
        carry, place = total // 10, place * 10
    if carry:
        steps.append(f"Write {carry}.")
    return " ".join([*steps, f"So {a} + {b} = {a + b}."])


def difference_steps(a: int, b: int) -> str:
    """Column by column from the right, with the borrow; a >= b."""
    steps, borrow, place = [], 0, 1
    while place <= a:
        x, y = a // place % 10, b // place % 10
        left, took = x - y - borrow, borrow
        borrow = int(left < 0)
        terms = f"{x + 10 * borrow} - {y}" + (" - 1" if took else "")
        steps.append(f"{terms} = {left + 10 * borrow}" + (", borrow 1." if borrow else "."))
        place *= 10
    return " ".join([*steps, f"So {a} - {b} = {a - b}."])


def product_steps(a: int, b: int) -> str:
    """Tens and ones of a two-digit number times a digit; of a digit, counting up."""
    if a < 10:
        return " ".join([f"{a} times {b}:", ", ".join(str(a * i) for i in range(1, b + 1)) + ".", f"So {a * b}."])
    tens, ones = a // 10 * 10, a % 10
    return f"{tens} x {b} = {tens * b}. {ones} x {b} = {ones * b}. {sum_steps(tens * b, ones * b)}"


def comparison_steps(a: int, b: int) -> str:
    """Digit by digit from the left; a and b have as many digits."""
    steps = []
    for x, y in zip(str(a), str(b), strict=True):
        sign = "=" if x == y else "<" if x < y else ">"
        steps.append(f"{x} {sign} {y}.")
        if x != y:
            break
    return " ".join([*steps, f"So {max(a, b)} is larger."])


def make(rng: Random, words: Words, effort: Effort) -> Example:
    maker = rng.choices((_sum, _difference, _product, _compare, _problem), (4, 3, 2, 3, 2))[0]
    return maker(rng, words, effort)


def _example(question: str, thoughts: str, answer: str, value: int, effort: Effort) -> Example:
    messages = (user(question), assistant(answer, thinking=thoughts))
    return Example("arithmetic", messages, effort=effort, check={"type": "number", "value": value})


def _asked(rng: Random, term: str) -> str:
    return rng.choice((f"What is {term}?", f"{term} = ?", f"Compute {term}.", f"How much is {term}?"))


def _sum(rng: Random, words: Words, effort: Effort) -> Example:
    a, b = pair(rng, words, *rng.choice(((1, 20), (10, 99), (10, 99), (100, 999))))
    term = f"{a} + {b}"
    thoughts = thinking(effort, f"I add {a} and {b}.", sum_steps(a, b), f"The other way: {sum_steps(b, a)}")
    return _example(_asked(rng, term), thoughts, f"{term} = {a + b}", a + b, effort)


def _difference(rng: Random, words: Words, effort: Effort) -> Example:
    b, a = sorted(pair(rng, words, *rng.choice(((1, 20), (10, 99), (10, 99), (100, 999)))))
    term = f"{a} - {b}"
    check = f"Back again: {sum_steps(a - b, b)}"
    thoughts = thinking(effort, f"I take {b} from {a}.", difference_steps(a, b), check)
    return _example(_asked(rng, term), thoughts, f"{term} = {a - b}", a - b, effort)


def _product(rng: Random, words: Words, effort: Effort) -> Example:
    a, b = pair(rng, words, 2, 9) if rng.random() < 0.6 else (pair(rng, words, 11, 49)[0], rng.randint(2, 9))
    term = f"{a} x {b}"
    check = f"Once more: {product_steps(a, b)}"
    thoughts = thinking(effort, f"I multiply {a} by {b}.", product_steps(a, b), check)
    return _example(_asked(rng, term), thoughts, f"{term} = {a * b}", a * b, effort)


def _compare(rng: Random, words: Words, effort: Effort) -> Example:
    digits = rng.choice((2, 2, 3, 4))
    a, b = pair(rng, words, 10 ** (digits - 1), 10**digits - 1)
    if a == b:
        b = a + 1 if a + 1 < 10**digits else a - 1
    larger = rng.random() < 0.5
    word = rng.choice(("larger", "bigger", "greater") if larger else ("smaller", "less"))
    value = max(a, b) if larger else min(a, b)
    question = rng.choice((f"Which is {word}, {a} or {b}?", f"{a} or {b}: which is {word}?"))
    end = "" if larger else f" {min(a, b)} is smaller."
    thoughts = thinking(
        effort,
        f"I compare {a} and {b}.",
        comparison_steps(a, b) + end,
        f"The other way: {comparison_steps(b, a)}{end}",
    )
    return _example(question, thoughts, f"{value} is {word}.", value, effort)


def _problem(rng: Random, words: Words, effort: Effort) -> Example:
    a, b = sorted(pair(rng, words, 2, 30), reverse=True)
    name, other = words.several(rng, 2)
    thing = rng.choice(FOODS + OBJECTS)
    more = rng.random() < 0.5
    if more:
        event = rng.choice((f"{other} gives {name} {b} more", f"{name} finds {b} more", f"Then {name} buys {b} more"))
    else:
        event = rng.choice((f"{name} gives {b} to {other}", f"{name} loses {b}", f"Then {other} takes {b}"))
    value = a + b if more else a - b
    sign = "+" if more else "-"
    question = (
        f"{name} has {a} of {thing}. {event}. How many does {name} have now?"
        if rng.random() < 0.5
        else f"{name} has {a} of {thing}. {event}. How many are left with {name}?"
    )
    steps = f"{a} {sign} {b}. " + (sum_steps(a, b) if more else difference_steps(a, b))
    check = f"The other way: {sum_steps(b, a)}" if more else f"Back again: {sum_steps(value, b)}"
    thoughts = thinking(effort, f"{name} has {a} first. {event}.", steps, check)
    return _example(question, thoughts, f"{name} has {value} now.", value, effort)
