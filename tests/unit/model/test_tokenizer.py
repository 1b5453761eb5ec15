"""The tokenizer wrapper: exact bytes, no forged control tokens, and a toy vocabulary that is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.errors import ConfigError
from freehold.model.tokenizer import GLM_SPECIAL_TOKENS, LONG_TEXT, SPECIAL, Tokenizer, byte_alphabet

TEXT = '[gMASK]<sop><|user|>What is the weather in 北京 🙂?<|assistant|><think>ok</think>{"name": "x"}\n\n'


@pytest.fixture(scope="module")
def toy() -> Tokenizer:
    return Tokenizer.toy(8192)


def test_special_offsets_are_those_of_glm() -> None:
    glm_first = 154820
    published = {
        "<|endoftext|>": 154820, "[gMASK]": 154822, "<sop>": 154824, "<|user|>": 154827, "<|observation|>": 154829,
        "<|end_of_video|>": 154833, "<think>": 154841, "</think>": 154842, "<tool_call>": 154843,
        "<|image|>": 154854, "<|video|>": 154855,
    }  # fmt: skip
    assert {text: glm_first + SPECIAL[text] for text in published} == published
    assert len(set(GLM_SPECIAL_TOKENS)) == 36


@pytest.mark.parametrize("vocab_size", [320, 512, 8192, 32768])
def test_toy_maps_every_id_below_the_reserve(vocab_size: int) -> None:
    tokenizer = Tokenizer.toy(vocab_size)
    assert sorted(tokenizer.backend.get_vocab().values()) == list(range(vocab_size - 64 + 36))
    assert all(tokenizer.token_bytes(i) for i in range(vocab_size - 64))
    assert tokenizer.special_id("<|user|>") == vocab_size - 64 + 7
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.token_bytes(0) == b"!"


def test_toy_tokens_are_reachable_and_english_is_short(toy: Tokenizer) -> None:
    for token_id in range(256, toy.vocab_size - 64):
        assert toy.encode(toy.decode([token_id])) == [token_id]
    assert len(toy.encode(" think about the weather")) == 4


def test_toy_is_the_same_every_time(tmp_path: Path) -> None:
    first, second = Tokenizer.toy(512).backend.to_str(), Tokenizer.toy(512).backend.to_str()
    assert first == second


def test_toy_refuses_a_vocabulary_without_room() -> None:
    with pytest.raises(ConfigError, match="at least 320"):
        Tokenizer.toy(319)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    tokenizer = Tokenizer.toy(512)
    for special in (True, False):
        ids = tokenizer.encode(text, special=special)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert tokenizer.decode(ids) == tokenizer.backend.decode(ids, skip_special_tokens=False)


@given(st.lists(st.sampled_from([*GLM_SPECIAL_TOKENS, "a", " the", "<", "|>", "é"])).map("".join))
def test_user_content_cannot_forge_control_tokens(text: str) -> None:
    tokenizer = Tokenizer.toy(512)
    ids = tokenizer.encode(text, special=False)
    assert not any(map(tokenizer.is_special, ids))
    assert tokenizer.decode(ids) == text


def test_a_normaliser_cannot_be_used_to_forge(toy: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(toy.backend.to_str())
    backend.normalizer = tokenizers.normalizers.NFKC()
    backend.add_special_tokens([tokenizers.AddedToken("<|boss|>", special=True, normalized=True)])
    tokenizer = Tokenizer(backend)
    forged = "＜|boss|＞"  # full-width brackets, which NFKC makes plain
    assert tokenizer.is_special(tokenizer.encode(forged)[0])
    assert not any(map(tokenizer.is_special, tokenizer.encode(forged, special=False)))


def test_special_tokens(toy: Tokenizer) -> None:
    ids = toy.encode(TEXT)
    assert [toy.decode([i]) for i in ids if toy.is_special(i)] == [
        "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<think>", "</think>"
    ]  # fmt: skip
    assert toy.decode(ids) == TEXT
    assert toy.decode(ids, skip_special=True) == 'What is the weather in 北京 🙂?ok{"name": "x"}\n\n'
    assert toy.token_bytes(ids[0]) == b"[gMASK]"
    assert toy.special_id("<|nobody|>") is None


def test_unmapped_ids_decode_to_nothing_and_cut_characters_to_a_mark(toy: Tokenizer) -> None:
    assert [toy.token_bytes(i) for i in (toy.vocab_size - 1, toy.vocab_size, -1)] == [b"", b"", b""]
    assert toy.decode([toy.vocab_size - 1]) == ""
    assert toy.decode(toy.encode("京")[:-1]) == "\ufffd"


def test_byte_alphabet_is_the_one_of_the_library() -> None:
    assert set(byte_alphabet().values()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert byte_alphabet()[ord(" ")] == "Ġ"


def test_saved_files_load_again(toy: Tokenizer, tmp_path: Path) -> None:
    toy.save(tmp_path)
    assert Tokenizer.from_dir(tmp_path).vocab_size == toy.vocab_size - 28  # no config.json: the mapped ids
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 8192}))
    again = Tokenizer.from_dir(tmp_path)
    assert again.vocab_size == 8192
    assert again.encode(TEXT) == toy.encode(TEXT)


def test_saved_files_load_in_transformers(toy: Tokenizer, tmp_path: Path) -> None:
    import transformers

    toy.save(tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert other(TEXT, add_special_tokens=False)["input_ids"] == toy.encode(TEXT)
    assert other.eos_token_id == toy.special_id("<|endoftext|>")


def test_wrong_files_are_refused_by_name(toy: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a tokenizer"):
        Tokenizer.from_dir(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁a": 0}, unk_token="▁a"))
    with pytest.raises(ConfigError, match="not byte-level"):
        Tokenizer(words)
    with pytest.raises(ConfigError, match="belongs to another model"):
        Tokenizer(toy.backend, vocab_size=4096)


@settings(deadline=None)
@given(st.text())
def test_no_text_has_fewer_tokens_than_the_fewest(text: str) -> None:
    toy = Tokenizer.toy(512)
    assert len(toy.encode(text)) >= toy.fewest_tokens(len(text.encode("utf-8")))


def test_the_fewest_tokens_are_not_known_where_a_token_may_take_any_number_of_bytes(toy: Tokenizer) -> None:
    longest = max(len(toy.token_bytes(i)) for i in range(toy.vocab_size))
    assert toy.fewest_tokens(10 * longest + 1) == 11
    backend = tokenizers.Tokenizer.from_str(toy.backend.to_str())
    backend.add_special_tokens([tokenizers.AddedToken("<wide>", lstrip=True)])
    assert Tokenizer(backend).fewest_tokens(1_000_000) == 0


def test_a_long_text_gets_the_same_tokens_as_a_short_one(toy: Tokenizer) -> None:
    text = "Grüezi <|user|> 世界 and more.\n" * (LONG_TEXT // 10)
    for special in (True, False):
        backend = toy.backend if special else toy._plain
        assert toy.encode(text, special=special) == backend.encode(text, add_special_tokens=False).ids
