"""A new model ends what it says where its tokenizer's turns end, wherever the control tokens lie."""

from __future__ import annotations

import pytest
import tokenizers

from freehold.errors import ConfigError
from freehold.model.config import GlmConfig
from freehold.model.tokenizer import Tokenizer
from freehold.train.shape import ENDS, tiny_config, with_ends
from freehold.train.tokenizer import train_tokenizer


def test_ends_follow_a_tokenizer_that_found_few_pieces() -> None:
    tokenizer = train_tokenizer(["a few words only, a few words"], 4096)
    plain = tiny_config()
    ends = [tokenizer.special_id(text) for text in ENDS]
    assert ends != plain["eos_token_id"]  # it has far fewer pieces than room
    found = with_ends(plain, tokenizer)
    assert found["eos_token_id"] == ends
    assert found["pad_token_id"] == ends[0]
    assert found | {key: plain[key] for key in ("eos_token_id", "pad_token_id")} == plain
    GlmConfig.from_dict(found)


def test_a_full_tokenizer_ends_where_the_shape_says() -> None:
    config = tiny_config()
    assert with_ends(config, Tokenizer.toy(config["vocab_size"])) == config


def test_a_tokenizer_without_control_tokens_is_refused() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["words"], trainer)
    with pytest.raises(ConfigError, match=r"lacks <\|endoftext\|>"):
        with_ends(tiny_config(), Tokenizer(backend))
