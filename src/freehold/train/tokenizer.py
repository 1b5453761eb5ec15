"""A byte-level BPE tokenizer with GLM's control tokens, trained on examples. Torch-free.

Ids: merged pieces from 0, then `GLM_SPECIAL_TOKENS` in their order, then ids that stand for nothing up to vocab_size:
the order of GLM's own. Digits are single tokens, so that a number is copied and computed digit by digit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import tokenizers

from freehold.errors import ConfigError
from freehold.model.chat.template import ChatTemplate
from freehold.model.tokenizer import GLM_SPECIAL_TOKENS, TOY_RESERVED, Tokenizer
from freehold.train.data.example import pieces
from freehold.train.data.mixture import FIRST_MIXTURE, generate
from freehold.train.data.words import SYLLABLES, Words

RESERVED = TOY_RESERVED  # ids at the top: the control tokens, then unmapped ids
SYLLABLE_REPEATS = 8000


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """Learn a tokenizer from texts; the same texts always give the same one. Raises ConfigError below 320 ids."""
    if vocab_size < 256 + RESERVED:
        raise ConfigError(f"vocab_size = {vocab_size}: a tokenizer needs at least {256 + RESERVED}")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - RESERVED,
        min_frequency=2,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(
        [tokenizers.AddedToken(text, special=True, normalized=False) for text in GLM_SPECIAL_TOKENS]
    )
    return Tokenizer(backend, vocab_size=vocab_size)


def generated_texts(
    template: ChatTemplate, *, per_kind: int = 3000, repeats: int = SYLLABLE_REPEATS, seed: int = 0
) -> Iterator[str]:
    """What the tokenizer of the generated kinds is trained on: the texts between control tokens of examples.

    Made-up words are single syllables here, and every syllable comes in each of its forms: so the pieces of a made-up
    word are its syllables, for words that training shows and for those it never does.
    """
    forms = [form for each in SYLLABLES for form in (each, each.capitalize(), each.upper())]
    spread = "\n".join(forms) + "\n " + " ".join(forms) + "\n"
    # So often that these merges come before those of English words, which would cut syllables elsewhere.
    for _ in range(repeats // 100):
        yield spread * 100
    words = Words("train", short=True)
    for kind in FIRST_MIXTURE:
        for index in range(per_kind):
            yield from pieces(generate(kind, "train", seed, index, words=words), template)


def generated_tokenizer(template: ChatTemplate, vocab_size: int = 4096) -> Tokenizer:
    """The tokenizer of the generated kinds of examples: about 20 seconds, always the same."""
    return train_tokenizer(generated_texts(template), vocab_size)
