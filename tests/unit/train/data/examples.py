"""What the tests of generated data share: examples of every kind, and a small tokenizer trained on them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from freehold.model.chat.template import ChatTemplate
from freehold.model.tokenizer import Tokenizer
from freehold.train.data.example import EFFORTS, Effort, Example
from freehold.train.data.mixture import KINDS, generate
from freehold.train.data.words import Split
from freehold.train.tokenizer import generated_texts, train_tokenizer

TEMPLATE = ChatTemplate.builtin()


@cache
def small_tokenizer() -> Tokenizer:
    return train_tokenizer(generated_texts(TEMPLATE, per_kind=60, repeats=400))


def samples(count: int, split: Split = "train", *, efforts: tuple[Effort, ...] = EFFORTS) -> Iterator[Example]:
    """So many examples of every kind, with the efforts in turn."""
    for kind in KINDS:
        for index in range(count):
            yield generate(kind, split, 11, index, effort=efforts[index % len(efforts)])
