"""Counting and judging answers as they go by, in every API."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freehold.gateway.door.meter import Meter, is_looping
from freehold.gateway.http.sse import MAX_EVENT_BYTES, NotAStream, Splitter, data_of


def chat(delta: dict[str, Any] | None = None, reason: str | None = None, **more: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason}]
    return json.dumps({"choices": choices, **more}).encode()


def run(meter: Meter, *events: bytes, step: float = 0.1) -> list[bool]:
    return [meter.event(event, 10.0 + step * (at + 1)) for at, event in enumerate(events)]


def usage(prompt: int, output: int, **more: Any) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": output, **more}


def test_the_upstreams_usage_is_what_counts() -> None:
    meter = Meter("chat", 10.0)
    details = {"prompt_tokens_details": {"cached_tokens": 3}, "completion_tokens_details": {"reasoning_tokens": 2}}
    only = run(
        meter,
        chat({"role": "assistant", "content": ""}),
        chat({"reasoning_content": "hm"}),
        chat({"content": "yes"}),
        chat({}, "stop"),
        chat(usage=usage(7, 9, **details)),
        b"[DONE]",
    )
    assert only == [False, False, False, False, True, False]
    assert (meter.input_tokens, meter.cached_tokens, meter.output_tokens, meter.reasoning_tokens) == (7, 3, 9, 2)
    assert (meter.counted, meter.complete, meter.finish_reason, meter.failure()) == ("upstream", True, "stop", "")
    assert meter.clock.ttft == pytest.approx(0.2), "the first token of any kind; a role is none"
    assert meter.itl() == (pytest.approx(0.1), pytest.approx(0.1))
    assert meter.tpot == pytest.approx(0.1 / 8)


def test_without_usage_chunks_with_text_are_counted() -> None:
    meter = Meter("chat", 10.0)
    run(meter, chat({"content": ""}), chat({"content": "a"}), chat({"reasoning": "b"}), chat({"tool_calls": [{}]}))
    assert (meter.output_tokens, meter.counted, meter.complete) == (3, "counted", False)


def test_usage_in_every_chunk_counts_up_to_there_and_chunks_after_it() -> None:
    meter = Meter("chat", 10.0)
    assert run(meter, chat({"content": "abc"}, usage=usage(5, 3))) == [False]
    assert (meter.output_tokens, meter.counted) == (3, "upstream")
    run(meter, chat({"content": "d"}))
    assert (meter.output_tokens, meter.counted) == (4, "counted")
    run(meter, chat({"content": "ef"}, usage=usage(5, 6)))
    assert (meter.output_tokens, meter.counted) == (6, "upstream")


@pytest.mark.parametrize(
    ("events", "failure"),
    [
        ([chat({"role": "assistant"}), chat({}, "stop")], "empty"),
        ([chat({"reasoning_content": "hm"}), chat({}, "length")], "thinking_cut"),
        ([chat({"reasoning_content": "hm"}), chat({"content": "so"}), chat({}, "length")], ""),
        ([chat({"refusal": "no"}), chat({}, "stop")], "refusal"),
        ([chat({"content": "x"}), chat({}, "content_filter")], "refusal"),
        ([chat({"content": "and so on, "})] * 100 + [chat({}, "length")], "looping"),
        ([chat({"content": "and so on, "})] * 100 + [chat({}, "stop")], ""),
        ([chat({"content": f"{at}, "}) for at in range(300)] + [chat({}, "length")], ""),
    ],
)
def test_failures_of_a_stream(events: list[bytes], failure: str) -> None:
    meter = Meter("chat", 10.0)
    run(meter, *events, b"[DONE]")
    assert meter.failure() == failure


@pytest.mark.parametrize(("parts", "failure"), [(['{"a":', "1}"], ""), (['{"a":', ""], "tool_json"), ([""], "")])
def test_arguments_of_tools_must_be_json(parts: list[str], failure: str) -> None:
    meter = Meter("chat", 10.0)
    calls = [chat({"tool_calls": [{"index": 1, "function": {"arguments": part}}]}) for part in parts]
    run(meter, *calls, chat({}, "tool_calls"))
    assert meter.failure() == failure


def test_messages_count_input_with_what_was_cached() -> None:
    meter = Meter("messages", 10.0)
    start = {"input_tokens": 4, "cache_read_input_tokens": 6, "cache_creation_input_tokens": 1, "output_tokens": 1}
    events = [
        {"type": "message_start", "message": {"usage": start}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "tool_use", "id": "t", "name": "f"}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '{"a":1}'}},
        {"type": "ping"},
    ]
    run(meter, *(json.dumps(event).encode() for event in events))
    assert (meter.input_tokens, meter.cached_tokens, meter.output_tokens, meter.counted) == (11, 6, 2, "counted")
    end = {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 12}}
    run(meter, json.dumps(end).encode(), b'{"type":"message_stop"}')
    assert (meter.output_tokens, meter.finish_reason, meter.complete, meter.failure()) == (12, "tool_use", True, "")


def test_responses_are_complete_with_their_last_event() -> None:
    meter = Meter("responses", 10.0)
    run(meter, b'{"type":"response.output_text.delta","delta":"Hi"}')
    assert (meter.output_tokens, meter.complete) == (1, False)
    counts = {"input_tokens": 3, "output_tokens": 5, "output_tokens_details": {"reasoning_tokens": 4}}
    end = {
        "type": "response.incomplete",
        "response": {"usage": counts, "incomplete_details": {"reason": "max_output_tokens"}},
    }
    run(meter, json.dumps(end).encode())
    assert (meter.output_tokens, meter.reasoning_tokens, meter.complete) == (5, 4, True)
    assert meter.finish_reason == "max_output_tokens"


@pytest.mark.parametrize("endpoint", ["chat", "completions", "messages", "responses", "embeddings"])
@pytest.mark.parametrize("body", [b"", b"[]", b"7", b'{"error":{"message":"no"}}', b"{", b'"x"', b'{"choices":7}'])
def test_what_is_no_answer_is_said_so(endpoint: Any, body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  whatever it says, it is the class that is acted on
        Meter(endpoint, 0.0).whole(body)


def test_embeddings() -> None:
    meter = Meter("embeddings", 0.0)
    meter.whole(b'{"data":[{"embedding":[0.1]}],"usage":{"prompt_tokens":8,"total_tokens":8}}')
    assert (meter.input_tokens, meter.output_tokens, meter.failure()) == (8, None, "")


def test_text_is_kept_only_for_samplers() -> None:
    kept, not_kept = Meter("chat", 0.0, keep_text=True), Meter("chat", 0.0)
    for meter in (kept, not_kept):
        run(meter, chat({"content": "a"}), chat({"content": [{"type": "text", "text": "b"}]}))
    assert (kept.text, not_kept.text) == ("ab", "")


@given(st.text(alphabet="ab ", min_size=1, max_size=120), st.integers(0, 119))
def test_whatever_repeats_is_looping(period: str, cut: int) -> None:
    assert is_looping((period * 800)[cut : cut + 600])


def test_what_ends_in_a_repetition_but_began_otherwise_is_not() -> None:
    assert not is_looping("x" + "ab" * 10)
    assert not is_looping("".join(f"{at} " for at in range(400))[-600:])


# ---- events --------------------------------------------------------------------------------------------------


EVENTS = [b"data: {}", b"event: a\ndata: 1\ndata: 2", b": comment", b"data:x", b"id: 3", b"data: \xc3\xa9"]


@given(st.lists(st.sampled_from(EVENTS), max_size=8), st.sampled_from([b"\n", b"\r\n", b"\r"]), st.data())
def test_events_are_whole_however_they_arrive(events: list[bytes], line_end: bytes, data: st.DataObject) -> None:
    stream = b"".join(event.replace(b"\n", line_end) + line_end * 2 for event in events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    splitter = Splitter()
    out = b""
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        whole = splitter.feed(stream[start:end])
        assert not whole or whole.endswith(b"\n\n")
        out += whole
    out += splitter.feed(b"\n\n") if line_end == b"\r" and events else b""  # a last \r waits for its \n
    assert [data_of(event) for event in out.split(b"\n\n") if event.strip(b"\n")] == [
        data_of(event) for event in events
    ]


def test_half_an_event_is_held_back() -> None:
    splitter = Splitter()
    assert splitter.feed(b"data: 1\n\ndata: 2") == b"data: 1\n\n"
    assert splitter.rest == b"data: 2"


def test_a_stream_without_ends_is_given_up() -> None:
    splitter = Splitter()
    for _ in range(MAX_EVENT_BYTES // 65_536):
        assert splitter.feed(b"x" * 65_536) == b""
    with pytest.raises(NotAStream):
        splitter.feed(b"x")
