"""Generated examples: the same for the same arguments, of their split's words alone, right by their own checks."""

from __future__ import annotations

import json
import re
from itertools import islice
from random import Random

import pytest

from freehold.train.data.checks import judge
from freehold.train.data.example import EFFORTS, Example, rendered
from freehold.train.data.mixture import FIRST_MIXTURE, KINDS, LAST_MIXTURE, MIXTURE, drawn, generate, stream
from freehold.train.data.retrieval import at_length
from freehold.train.data.words import ENGLISH, SPLITS, SYLLABLES, Split, Words, split_of
from tests.unit.train.data.examples import TEMPLATE, samples, small_tokenizer

COINED = re.compile(rf"\b(?:{'|'.join(SYLLABLES)}){{2,3}}\b", re.IGNORECASE)
PLAIN = ENGLISH | {"person", "larger", "helper"}  # the latter: words of phrasings
# Kinds in which every number of three or more digits is a code.
CODED = ("retrieval", "records", "memory", "tool", "format")


def text_of(example: Example) -> str:
    return example.text + json.dumps([example.messages, example.tools])


def foreign_words(text: str, split: Split, *, codes: bool) -> list[str]:
    """Made-up words, and codes if asked for, that belong to the other split."""
    words = [word for word in COINED.findall(text) if word.lower() not in PLAIN]
    words += re.findall(r"(?<![\d.])\d{3,}", text) if codes else []
    return [word for word in words if split_of(word) != split]


@pytest.mark.parametrize("split", SPLITS)
def test_no_word_of_the_other_split_is_shown(split: Split) -> None:
    for kind in KINDS:
        for index in range(60):
            example = generate(kind, split, 3, index)
            assert foreign_words(text_of(example), split, codes=kind in CODED) == [], example


def test_a_leaked_word_is_found() -> None:
    leaked = Words("test").name(Random(0))
    assert foreign_words(f"Where is {leaked}?", "train", codes=False) == [leaked]
    assert foreign_words(f"Where is {leaked}?", "test", codes=False) == []
    code = Words("test").code(Random(0))
    assert foreign_words(f"The code is {code}.", "train", codes=True) == [code]


def test_the_test_split_has_made_up_words_to_show() -> None:
    """The check above could not fail if the pattern found nothing."""
    for kind in KINDS:
        texts = " ".join(text_of(generate(kind, "test", 3, index)) for index in range(60))
        if kind not in ("arithmetic", "chat"):
            assert len(COINED.findall(texts)) > 20, kind


def test_test_pairs_of_numbers_are_not_trained_on() -> None:
    for split in SPLITS:
        for index in range(200):
            question = str(generate("arithmetic", split, 0, index).messages[0]["content"])
            found = re.search(r"(\d+) [+-] (\d+)", question)
            if found:
                assert split in (split_of(f"{found[1]} {found[2]}"), split_of(f"{found[2]} {found[1]}"))


def test_examples_are_a_function_of_their_arguments() -> None:
    forwards = [generate(kind, "train", 5, index) for kind in KINDS for index in range(8)]
    backwards = [generate(kind, "train", 5, index) for kind in reversed(KINDS) for index in reversed(range(8))]
    assert forwards == backwards[::-1]
    assert forwards != [generate(kind, "train", 6, index) for kind in KINDS for index in range(8)]
    assert forwards != [generate(kind, "test", 5, index) for kind in KINDS for index in range(8)]


def test_a_stream_is_what_random_access_gives() -> None:
    assert list(islice(stream(MIXTURE, "train", 2), 30)) == [drawn(MIXTURE, "train", 2, i) for i in range(30)]


def test_the_mixture_has_every_kind() -> None:
    assert set(FIRST_MIXTURE) == set(KINDS) - {"exercise"}
    assert set(MIXTURE) == set(KINDS) - {"echo", "drill", "exercise"}
    assert set(LAST_MIXTURE) == set(MIXTURE) | {"exercise"}
    for mixture in (MIXTURE, FIRST_MIXTURE, LAST_MIXTURE):
        assert sum(mixture.values()) == pytest.approx(1.0)
    with pytest.raises(KeyError):
        generate("nonsense", "train", 0, 0)


def test_own_answers_pass_their_checks() -> None:
    for example in samples(60):
        if not example.messages or example.kind == "exercise":
            continue
        last = example.messages[-1]
        calls = [(c["function"]["name"], c["function"]["arguments"]) for c in last.get("tool_calls", ())]
        verdict = judge(example, str(last["content"]), calls, str(last.get("reasoning_content", "")))
        assert verdict.right, (verdict.why, example)


def test_another_answer_of_the_kind_is_wrong() -> None:
    """An answer belongs to its question: that of another example is refused, but for rare coincidences."""
    for kind in ("retrieval", "records", "arithmetic", "reading", "tool"):
        wrong = 0
        for index in range(40):
            example, other = (generate(kind, "train", seed, index, effort="none") for seed in (0, 1))
            wrong += not judge(example, str(other.messages[-1]["content"])).right
        assert wrong >= 36, kind


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("text", "echo", "drill", "exercise")])
def test_thinking_grows_with_effort_and_the_answer_stays(kind: str) -> None:
    for index in range(40):
        none, high, most = (generate(kind, "test", 1, index, effort=effort) for effort in EFFORTS)
        thoughts = [str(e.messages[-1].get("reasoning_content", "")) for e in (none, high, most)]
        assert thoughts[0] == ""
        counts = [len(small_tokenizer().encode(text)) for text in thoughts]
        assert 0 < counts[1] < counts[2], thoughts
        assert none.check == high.check == most.check
        assert len({str(e.messages[-1]["content"]) for e in (none, high, most)}) == 1
        for thinker in (high, most):
            last_user = max(i for i, m in enumerate(thinker.messages) if m["role"] == "user")
            trained = [m for m in thinker.messages[last_user:] if m["role"] == "assistant"]
            assert trained
            assert all(m.get("reasoning_content") for m in trained), thinker.messages


def prompt_tokens(example: Example) -> int:
    prompt = TEMPLATE.render(example.prompt, example.tools, effort=example.effort)
    return len(prompt.encode(small_tokenizer()))


@pytest.mark.parametrize("tokens", [64, 128, 256, 512, 1024])
def test_contexts_of_a_given_length(tokens: int) -> None:
    places = []
    for index in range(10):
        example = at_length("test", 0, index, tokens, prompt_tokens)
        assert example == at_length("test", 0, index, tokens, prompt_tokens)
        assert tokens - 24 <= prompt_tokens(example) <= tokens
        assert example.check is not None
        content, value = str(example.messages[0]["content"]), str(example.check["key"])
        assert value in content
        assert value in str(example.check["value"])
        places.append(content.index(value) / len(content))
    assert tokens < 256 or max(places) - min(places) > 0.3  # anywhere in the context


def test_no_context_fits_in_too_few_tokens() -> None:
    with pytest.raises(ValueError, match="no context fits in 10 tokens"):
        at_length("test", 0, 0, 10, prompt_tokens)


def test_keys_of_a_context_are_different() -> None:
    for index in range(20):
        example = at_length("test", 1, index, 512, prompt_tokens)
        names = [word for word in COINED.findall(str(example.messages[0]["content"])) if word[0].isupper()]
        assert len(names) > 20


def test_retrieval_lengths_span_what_is_trained_on() -> None:
    tokenizer = small_tokenizer()
    lengths = [
        len(tokenizer.encode(rendered(generate("retrieval", "train", 0, i, effort="none"), TEMPLATE) or ""))
        for i in range(80)
    ]
    assert min(lengths) < 260
    assert max(lengths) > 1000
    assert sum(length <= 1280 for length in lengths) >= 76


def test_stories_do_not_repeat() -> None:
    texts = [str(generate("story", "train", 0, i, effort="none").messages[-1]["content"]) for i in range(300)]
    shapes = {COINED.sub("X", text) for text in texts}
    assert len(shapes) == len(texts)
