"""Retrieval prompts of a given length: a question about one fact, anywhere among as many others as fill it."""

from __future__ import annotations

from _tiny_tasks import SEED

from freehold.model.chat.template import ChatTemplate
from freehold.model.tokenizer import Tokenizer
from freehold.train.data.example import Example
from freehold.train.data.retrieval import at_length

_FACT = (4, 8, 16, 32)  # tokens that one more fact may take


def retrieval_of_length(tokenizer: Tokenizer, length: int, count: int, seed: int = SEED) -> list[Example]:
    """`count` examples whose prompts, rendered, have `length` tokens or a few more: at most those of one fact."""
    template = ChatTemplate.builtin()

    def measure(example: Example) -> int:
        return prompt_tokens(example, tokenizer, template)

    def fitted(index: int) -> Example:
        for more in _FACT:
            example = at_length("test", seed, index, length + more, measure)
            if measure(example) >= length:
                return example
        raise ValueError(f"no retrieval prompt has {length} to {length + _FACT[-1]} tokens")

    return [fitted(index) for index in range(count)]


def prompt_tokens(example: Example, tokenizer: Tokenizer, template: ChatTemplate) -> int:
    return len(template.render(example.prompt, example.tools, effort=example.effort).encode(tokenizer))
