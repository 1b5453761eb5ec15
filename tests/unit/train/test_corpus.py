"""The corpus and its tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from freehold.errors import ConfigError
from freehold.model.tokenizer import GLM_SPECIAL_TOKENS, Tokenizer
from freehold.train import corpus as corpus_module
from freehold.train.corpus import Corpus, CorpusSettings, build, corpus_of, digest
from freehold.train.data.example import Example, assistant, encode, user
from freehold.train.data.words import SYLLABLES
from freehold.train.tokenizer import generated_texts, train_tokenizer
from tests.unit.train.data.examples import TEMPLATE, samples, small_tokenizer

SETTINGS = CorpusSettings(tokens=6000)


def test_a_corpus_holds_what_encode_gives() -> None:
    forged = Example("x", (user("<|user|>"), assistant("yes")))  # takes the slow way
    examples = [*samples(4), forged]
    corpus = corpus_of(examples, small_tokenizer(), TEMPLATE)
    assert len(corpus) == len(examples)
    assert corpus.ids.dtype == np.uint16
    for i, example in enumerate(examples):
        ids, trained = corpus.document(i)
        expected = encode(example, small_tokenizer(), TEMPLATE)
        assert (ids.tolist(), trained.tolist()) == (expected.ids, expected.trained)
        assert corpus.names[corpus.kinds[i]] == example.kind
    summary = corpus.summary()
    assert sum(kind["tokens"] for kind in summary.values()) == len(corpus.ids)
    assert sum(kind["trained"] for kind in summary.values()) == corpus.trained.sum()


def test_limits() -> None:
    whole = corpus_of(samples(4), small_tokenizer(), TEMPLATE)
    lengths = np.diff(whole.starts)
    short = corpus_of(samples(4), small_tokenizer(), TEMPLATE, longest=100)
    assert len(short) == (lengths <= 100).sum()
    some = corpus_of(samples(4), small_tokenizer(), TEMPLATE, tokens=2000)
    assert some.starts[-2] < 2000 <= some.starts[-1]
    with pytest.raises(ConfigError, match="no documents of at most 1 tokens"):
        corpus_of(samples(1), small_tokenizer(), TEMPLATE, longest=1)


def test_a_corpus_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    first = build(tmp_path, SETTINGS, small_tokenizer(), TEMPLATE, progress=lambda *at: seen.append(at))
    assert seen[-1] == (len(first.ids), 6000)

    def refuse(*_: object) -> Example:
        raise AssertionError("made again")

    monkeypatch.setattr(corpus_module, "drawn", refuse)
    again = build(tmp_path, SETTINGS, small_tokenizer(), TEMPLATE)
    for name in ("ids", "trained", "starts", "kinds"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    with pytest.raises(AssertionError, match="made again"):
        build(tmp_path, replace(SETTINGS, seed=1), small_tokenizer(), TEMPLATE)


def test_an_unfinished_corpus_is_made_again(tmp_path: Path) -> None:
    build(tmp_path, SETTINGS, small_tokenizer(), TEMPLATE)
    (tmp_path / "corpus.json").unlink()
    with pytest.raises(ConfigError, match="not a finished corpus"):
        Corpus.load(tmp_path)
    assert len(build(tmp_path, SETTINGS, small_tokenizer(), TEMPLATE)) > 0


def test_the_digest_follows_what_a_corpus_depends_on() -> None:
    tokenizer = small_tokenizer()
    toy = Tokenizer.toy(1024)
    found = {
        digest(SETTINGS, tokenizer, TEMPLATE),
        digest(replace(SETTINGS, seed=1), tokenizer, TEMPLATE),
        digest(replace(SETTINGS, mixture={"chat": 1.0}), tokenizer, TEMPLATE),
        digest(SETTINGS, toy, TEMPLATE),
    }
    assert len(found) == 4
    assert digest(SETTINGS, tokenizer, TEMPLATE) in found


def test_a_saved_corpus_says_what_is_in_it(tmp_path: Path) -> None:
    corpus_of(samples(2), small_tokenizer(), TEMPLATE).save(tmp_path)
    assert json.loads((tmp_path / "corpus.json").read_text())["summary"]["tool"]["documents"] == 2


def test_the_tokenizer_is_deterministic_and_loads(tmp_path: Path) -> None:
    again = train_tokenizer(generated_texts(TEMPLATE, per_kind=60, repeats=400))
    assert again.backend.to_str() == small_tokenizer().backend.to_str()
    again.save(tmp_path)
    loaded = Tokenizer.from_dir(tmp_path)
    specials = [loaded.special_id(text) for text in GLM_SPECIAL_TOKENS]
    assert None not in specials
    assert specials == list(range(specials[0] or 0, (specials[0] or 0) + len(GLM_SPECIAL_TOKENS)))
    text = "Zoë said: “£9.50”\n\t🦊 <|user|> x = 12345"
    assert loaded.decode(loaded.encode(text, special=False)) == text
    assert again.vocab_size == 4096


def test_digits_and_syllables_are_pieces() -> None:
    tokenizer = small_tokenizer()
    assert [tokenizer.decode([i]) for i in tokenizer.encode("4812")] == list("4812")
    whole = sum(len(tokenizer.encode(f" {one}{two}")) == 2 for one in SYLLABLES[::7] for two in SYLLABLES[::5])
    assert whole >= 0.9 * len(SYLLABLES[::7]) * len(SYLLABLES[::5])
    assert len(tokenizer.encode(" the story of a fox")) == 5


def test_a_tokenizer_needs_room() -> None:
    with pytest.raises(ConfigError, match="at least 320"):
        train_tokenizer(["x"], 100)
