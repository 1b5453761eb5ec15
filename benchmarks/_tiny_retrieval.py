"""Retrieval prompts of a given length: a question about one fact, anywhere among as many others as fill it."""

from __future__ import annotations

from random import Random

from _tiny_tasks import SEED

from freehold.model.chat.template import ChatTemplate
from freehold.model.tokenizer import Tokenizer
from freehold.train.data import retrieval
from freehold.train.data.example import Example
from freehold.train.data.words import Words

_MOST_FACTS = 4096


def retrieval_of_length(tokenizer: Tokenizer, length: int, count: int, seed: int = SEED) -> list[Example]:
    """`count` examples whose prompts, rendered, have at least `length` tokens, and as few more as one fact has."""
    template = ChatTemplate.builtin()
    return [_fitted(tokenizer, template, length, f"length/{length}/{seed}/{index}") for index in range(count)]


def prompt_tokens(example: Example, tokenizer: Tokenizer, template: ChatTemplate) -> int:
    return len(template.render(example.prompt, example.tools, effort=example.effort).encode(tokenizer))


def _fitted(tokenizer: Tokenizer, template: ChatTemplate, length: int, seed: str) -> Example:
    """The fewest facts that are enough, by bisection: the same seed draws the same form whatever the number."""

    def made(facts: int) -> Example:
        return retrieval.chat(Random(seed), Words("test"), facts, questions=1, missing=0.0)

    low, high = 1, 2
    while prompt_tokens(made(high), tokenizer, template) < length:
        low, high = high, 2 * high
        if high > _MOST_FACTS:
            raise ValueError(f"no retrieval prompt reaches {length} tokens")
    while high - low > 1:
        middle = (low + high) // 2
        if prompt_tokens(made(middle), tokenizer, template) < length:
            low = middle
        else:
            high = middle
    return made(high)
