"""Incremental decoding: whole characters, stop strings over token borders, control tokens apart, tokens with text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.model.tokenizer import Tokenizer
from freehold.serve.detokenize import Detokenizer, Piece, text_token
from freehold.serve.turn import TextToken
from freehold.types import TokenLogprobs

TOY = Tokenizer.toy(512)
MANY = settings(max_examples=max(300, settings().max_examples))  # the nightly profile has more


def decode(ids: list[int], detokenizer: Detokenizer) -> list[Piece]:
    return [piece for id_ in ids for piece in detokenizer.feed(id_)] + detokenizer.finish()


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


ids_of_any_kind = st.lists(
    st.one_of(
        st.integers(0, 511),
        st.sampled_from(TOY.encode("né 京🙂 the answer</think>")),
        st.sampled_from(list(range(448, 484))),
    ),
    max_size=40,
)


@MANY
@given(ids_of_any_kind)
def test_the_pieces_are_the_whole(ids: list[int]) -> None:
    pieces = decode(ids, Detokenizer(TOY))
    assert text_of(pieces) == TOY.decode(ids)
    assert [piece.text for piece in pieces if piece.control] == [TOY.decode([i]) for i in ids if TOY.is_special(i)]
    assert sum(piece.starts for piece in pieces) == len(ids)


@MANY
@given(st.text(alphabet="ab京", max_size=12), st.lists(st.text(alphabet="ab京", min_size=1, max_size=4), max_size=3))
def test_stop_strings_are_those_of_a_simple_search(text: str, stop: list[str]) -> None:
    for include in (False, True):
        detokenizer = Detokenizer(TOY, tuple(stop), include)
        found = text_of(decode(TOY.encode(text), detokenizer))
        ends = [(text.index(s) + len(s), text.index(s), s) for s in stop if s in text]
        if not ends:
            assert (found, detokenizer.stopped) == (text, None)
        else:
            end, start, matched = min(ends)
            assert (found, detokenizer.stopped) == (text[: end if include else start], matched)


@MANY
@given(ids_of_any_kind, st.lists(st.integers(0, 40), max_size=6), st.sampled_from([(), ("the",), ("é 京",)]))
def test_runs_are_the_tokens_one_by_one(ids: list[int], cuts: list[int], stop: tuple[str, ...]) -> None:
    one_by_one, in_runs = Detokenizer(TOY, stop), Detokenizer(TOY, stop)
    expected, found = decode(ids, one_by_one), list[Piece]()
    borders = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    for first, last in pairwise(borders):
        found += in_runs.feed_runs(ids[first:last])
    found += in_runs.finish()
    assert text_of(found) == text_of(expected)
    assert [piece.text for piece in found if piece.control] == [piece.text for piece in expected if piece.control]
    assert sum(piece.starts for piece in found) == sum(piece.starts for piece in expected)
    assert (in_runs.count, in_runs.stopped) == (one_by_one.count, one_by_one.stopped)


def test_characters_come_whole() -> None:
    detokenizer = Detokenizer(TOY)
    ids = TOY.encode("京")
    assert len(ids) == 3
    assert [detokenizer.feed(i) for i in ids] == [[], [], [Piece("京", False, 3)]]
    assert detokenizer.feed(ids[0]) == []
    assert detokenizer.finish() == [Piece("\ufffd", False, 1)]


def test_a_control_token_breaks_off_a_character() -> None:
    detokenizer = Detokenizer(TOY)
    think = TOY.special_id("<think>")
    assert think is not None
    assert detokenizer.feed(TOY.encode("京")[0]) == []
    assert detokenizer.feed(think) == [Piece("\ufffd", False, 1), Piece("<think>", True, 1)]


def test_only_what_may_become_a_stop_string_is_held() -> None:
    detokenizer = Detokenizer(TOY, ("STOP",))
    seen = [text_of([p for i in TOY.encode(part) for p in detokenizer.feed(i)]) for part in ("a S", "T", "x S", "TOP")]
    assert seen == ["a ", "", "STx ", ""]
    assert detokenizer.stopped == "STOP"
    assert detokenizer.feed(0) == []
    assert detokenizer.finish() == []


def test_what_was_held_comes_at_the_end() -> None:
    assert text_of(decode(TOY.encode("a STO"), Detokenizer(TOY, ("STOP",)))) == "a STO"


def test_the_text_of_control_tokens_is_searched_too() -> None:
    ids = TOY.encode("thought</think>\nX")
    for stop, text in (("</think>", "thought"), ("t</think>\n", "though"), ("k>\nX", "thought")):
        detokenizer = Detokenizer(TOY, (stop,))
        assert text_of(decode(ids, detokenizer)) == text, "a control token comes whole or not at all"
        assert detokenizer.stopped == stop
    included = decode(ids, Detokenizer(TOY, ("t</think>",), include_stop=True))
    assert included[-1] == Piece("</think>", True, 1)
    assert text_of(included) == "thought</think>"


@pytest.mark.parametrize("min_tokens", [2, 3])
def test_the_first_tokens_are_not_searched(min_tokens: int) -> None:
    ids = TOY.encode("a.b.c.")
    assert len(ids) == 6
    detokenizer = Detokenizer(TOY, (".",), min_tokens=min_tokens)
    assert text_of(decode(ids, detokenizer)) == "a.b"
    assert detokenizer.count == 4


def test_added_words_are_text_and_added_control_tokens_are_not() -> None:
    backend = Tokenizer.toy(512).backend
    backend.add_tokens(["<word>"])
    backend.add_special_tokens(["<|control|>"])
    tokenizer = Tokenizer(backend)
    pieces = decode(tokenizer.encode("a<word><|control|>"), Detokenizer(tokenizer))
    assert pieces == [Piece("a", False, 1), Piece("<word>", False, 1), Piece("<|control|>", True, 1)]


def test_count_stops_with_the_match() -> None:
    detokenizer = Detokenizer(TOY, ("b",))
    decode(TOY.encode("a b c d", special=False), detokenizer)
    assert detokenizer.count == 1 + len(TOY.encode(" b"))


@pytest.mark.parametrize("stop", [(), ("",)])
def test_no_stop_strings(stop: tuple[str, ...]) -> None:
    assert text_of(decode(TOY.encode("abc"), Detokenizer(TOY, stop))) == "abc"


def token(name: str) -> TextToken:
    return TextToken(name, name.encode(), TokenLogprobs(0, -1.0, 1), ())


@MANY
@given(ids_of_any_kind, st.sampled_from([(), ("京</think>",), ("answer", "e京"), ("\ufffd\ufffd",)]))
def test_tokens_go_with_the_text_that_they_begin(ids: list[int], stop: tuple[str, ...]) -> None:
    detokenizer = Detokenizer(TOY, stop)
    pieces = [p for n, i in enumerate(ids) for p in detokenizer.feed(i, token(str(n)))] + detokenizer.finish()
    assert all(len(piece.tokens) == piece.starts for piece in pieces)
    given_out = [int(t.text) for piece in pieces for t in piece.tokens]
    assert given_out == list(range(len(given_out)))
    if detokenizer.stopped is None:
        assert len(given_out) == len(ids)


def test_a_held_token_goes_with_its_first_character() -> None:
    detokenizer = Detokenizer(TOY, ("cd",))
    found = [detokenizer.feed(i, token(TOY.decode([i]))) for i in (*TOY.encode("b"), *TOY.encode(" the"))]
    assert [[(p.text, [t.text for t in p.tokens]) for p in pieces] for pieces in found] == [
        [("b", ["b"])], [(" the", [" the"])]
    ]  # fmt: skip
    detokenizer = Detokenizer(TOY, ("ex",))
    pieces = [p for i in (*TOY.encode(" the"), *TOY.encode("y")) for p in detokenizer.feed(i, token(TOY.decode([i])))]
    assert [(p.text, [t.text for t in p.tokens]) for p in pieces] == [(" th", [" the"]), ("e", []), ("y", ["y"])]


def test_text_tokens_have_exact_bytes() -> None:
    first, second = TOY.encode("é")
    think = TOY.special_id("<think>")
    assert think is not None
    found = text_token(TOY, TokenLogprobs(first, -0.5, 1, ((first, -0.5), (think, -1.5), (511, -9.0))))
    assert (found.text, found.bytes_) == ("\ufffd", b"\xc3")
    assert found.top_text == (("\ufffd", b"\xc3", -0.5), ("<think>", b"<think>", -1.5), ("", b"", -9.0))
    assert text_token(TOY, TokenLogprobs(second, -0.5, 1)).bytes_ == b"\xa9"
