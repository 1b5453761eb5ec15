"""`LLM` on the simulated engine: order, defaults, refusals, failures, streams, and nothing left behind."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from freehold import LLM, SamplingParams
from freehold.engine.sim import SimConfig
from freehold.errors import ConfigError, ContextTooLong, EngineError, InvalidRequest, NotFound, UnknownField
from freehold.serve.turn import ContentDelta, ReasoningDelta, TurnFinished
from freehold.types import Guide

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("sim", max_model_len=4096, max_num_seqs=4, max_queue=3) as opened:
        yield opened


def wait_until_idle(llm: LLM) -> None:
    for _ in range(2000):
        stats = llm._state.engine.stats()
        if not stats.running and not stats.waiting:
            return
        time.sleep(0.005)
    raise AssertionError("requests still run")


def test_generate_keeps_the_order_of_many_prompts(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=1 + number % 17) for number in range(60)]
    results = llm.generate([f"prompt {number}" for number in range(60)], params)
    assert [result.usage.completion_tokens for result in results] == [p.max_tokens for p in params]
    assert {result.finish_reason for result in results} == {"length"}
    alone = llm.generate("prompt 7", params[7])
    assert alone == [results[7]]


def test_generate_takes_text_and_token_ids(llm: LLM) -> None:
    ids = llm.tokenizer.encode("Once upon a time")
    by_text, by_ids = llm.generate("Once upon a time")[0], llm.generate(ids)[0]
    assert by_text.text == by_ids.text != ""
    assert by_text.usage.completion_tokens == 16
    assert [r.text for r in llm.generate([ids, ids])] == [by_text.text] * 2
    assert llm.generate([]) == []


def test_logprobs_come_with_their_text(llm: LLM) -> None:
    (result,) = llm.generate("abc", SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=1))
    assert "".join(token.text for token in result.scored) == result.text
    assert result.prompt_scored is not None
    assert result.prompt_scored[0] is None
    assert len(result.prompt_scored) == result.usage.prompt_tokens


def test_an_adapter_is_chosen_by_name() -> None:
    with LLM("sim", adapters=("one", "two")) as llm:
        prompt, params = list(range(300)), SamplingParams(max_tokens=2)
        for adapter in (None, "one", "two"):  # each has a prefix cache of its own
            (first,), (again,) = (llm.generate(prompt, params, adapter=adapter) for _ in range(2))
            assert (first.usage.cached_tokens, again.usage.cached_tokens) == (0, 256)
        long = [{"role": "user", "content": "x " * 400}]
        for adapter in (None, "one"):
            cached = [llm.chat(long, adapter=adapter, max_tokens=2)[0].usage.cached_tokens for _ in range(2)]
            assert cached[0] == 0 < cached[1]
        assert [type(event) for event in llm.stream_chat(HELLO, adapter="two")][-1] is TurnFinished
        for ask in (llm.generate, llm.chat, llm.stream_chat):
            with pytest.raises(NotFound, match="adapter 'three' is not loaded; loaded are: one, two"):
                ask(HELLO if ask != llm.generate else "x", adapter="three")  # type: ignore[operator]


def test_the_simulator_has_no_adapters_to_load() -> None:
    with pytest.raises(UnknownField, match=r"LLM\(\"sim\"\) has no option 'lora'"):
        LLM("sim", lora={"one": "somewhere"})


def test_stop_strings_end_a_text(llm: LLM) -> None:
    whole = llm.generate("Tell", SamplingParams(max_tokens=60))[0].text
    word = whole.split()[4]
    (result,) = llm.generate("Tell", SamplingParams(max_tokens=60), stop=word)
    assert result.text == whole[: whole.index(word)]
    assert (result.finish_reason, result.stop_sequence) == ("stop", word)


def test_chat_answers_one_or_many(llm: LLM) -> None:
    (one,) = llm.chat(HELLO)
    assert "Hello" in one.content
    assert one.reasoning
    assert one.finish_reason == "stop"
    assert one.usage.completion_tokens > one.reasoning_tokens > 0
    conversations = [[{"role": "user", "content": f"number {number}"}] for number in range(10)]
    assert [f"number {n}" in r.content for n, r in enumerate(llm.chat(conversations))] == [True] * 10


def test_a_conversation_goes_on_with_the_message(llm: LLM) -> None:
    messages: list[Any] = [*HELLO]
    for turn in range(3):
        (answer,) = llm.chat(messages)
        messages += [answer.message, {"role": "user", "content": f"turn {turn}"}]
    assert "turn 2" in llm.chat(messages)[0].content


def test_chat_knows_the_fields_of_the_api(llm: LLM) -> None:
    (off,) = llm.chat(HELLO, effort="none")
    assert off.reasoning == ""
    (mapped,) = llm.chat(HELLO, effort="medium", max_tokens=3, temperature=0.5)
    assert "medium" in mapped.warnings[0]
    assert (mapped.usage.completion_tokens, mapped.finish_reason) == (3, "length")
    (called,) = llm.chat(HELLO, tools=[TOOL], tool_choice="required", effort="none")
    assert called.finish_reason == "tool_calls"
    assert called.tool_calls[0].name == "add"
    assert set(json.loads(called.tool_calls[0].arguments)) == {"a"}
    reply = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "3"}
    assert llm.chat([*HELLO, called.message, reply], tools=[TOOL])[0].content
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    assert isinstance(json.loads(llm.chat(HELLO, response_format=schema)[0].content), dict)


def test_arguments_are_left_as_they_are(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi", "name": "Ada"}]
    (answer,) = llm.chat(messages)
    assert messages == [{"role": "user", "content": "Hi", "name": "Ada"}]
    assert "name" in answer.warnings[0]


@pytest.mark.parametrize(
    ("ask", "error", "param"),
    [
        (lambda llm: llm.generate("x", SamplingParams(temperature=-1)), InvalidRequest, "temperature"),
        (lambda llm: llm.generate(["x", "y"], [SamplingParams()]), InvalidRequest, "params"),
        (lambda llm: llm.generate([["x"]]), InvalidRequest, "prompts"),
        (lambda llm: llm.generate([[99_999]]), InvalidRequest, "prompt"),
        (lambda llm: llm.generate("x", SamplingParams(max_tokens=5000)), ContextTooLong, "max_tokens"),
        (lambda llm: llm.generate("x", stop=""), InvalidRequest, "stop"),
        (
            lambda llm: llm.generate("x", SamplingParams(guide=Guide("json_schema", schema={"type": "?"}))),
            InvalidRequest,
            "response_format",
        ),
        (lambda llm: llm.chat([{"role": "user"}]), InvalidRequest, "messages[0].content"),
        (lambda llm: llm.chat([]), InvalidRequest, "messages"),
        (lambda llm: llm.chat(HELLO, temprature=1), UnknownField, "temprature"),
        (lambda llm: llm.chat(HELLO, n=2), UnknownField, "n"),
        (lambda llm: llm.chat(HELLO, SamplingParams(), temperature=1), InvalidRequest, "temperature"),
        (lambda llm: llm.chat(HELLO, SamplingParams(top_p=7)), InvalidRequest, "top_p"),
        (lambda llm: llm.stream_chat(HELLO, effort="enormous"), InvalidRequest, "reasoning_effort"),
        (lambda llm: LLM("sim", cache_bytes=1), UnknownField, "cache_bytes"),
        (lambda llm: LLM("sim", sim=SimConfig(), colour="red"), UnknownField, "colour"),
        (lambda llm: LLM("/nowhere", sim=SimConfig()), InvalidRequest, "sim"),
    ],
)
def test_refusals_come_at_once_and_name_the_field(llm: LLM, ask: Any, error: type[Exception], param: str) -> None:
    before = llm._state.engine.stats()
    with pytest.raises(error) as caught:
        ask(llm)
    assert getattr(caught.value, "param", None) == param
    assert llm._state.engine.stats() == before


def failing(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"[[sim error after=2]] {text}"}]


def test_a_failure_is_raised_and_ends_the_others(llm: LLM) -> None:
    with pytest.raises(EngineError, match="after 2 tokens"):
        llm.chat([HELLO, failing("x"), *[HELLO] * 20])
    wait_until_idle(llm)


def test_a_failure_can_be_returned_instead(llm: LLM) -> None:
    results = llm.chat([HELLO, failing("x"), HELLO], on_error="return")
    assert [result.finish_reason for result in results] == ["stop", "error", "stop"]
    assert isinstance(results[1].error, EngineError)
    assert results[0].error is results[2].error is None


def test_stream_chat_gives_what_chat_gives(llm: LLM) -> None:
    slowly = [{"role": "user", "content": "[[sim slow seconds=0.02]] Hello"}]
    (whole,) = llm.chat(slowly, temperature=0, max_tokens=12)
    with llm.stream_chat(slowly, temperature=0, max_tokens=12, effort="low") as stream:
        assert "low" in stream.warnings[0]
        events = list(stream)
    assert "".join(e.text for e in events if isinstance(e, ReasoningDelta)) == whole.reasoning
    assert "".join(e.text for e in events if isinstance(e, ContentDelta)) == whole.content
    assert isinstance(events[-1], TurnFinished)
    assert len(events) > 5


def test_closing_a_stream_aborts_its_request(llm: LLM) -> None:
    long = [{"role": "user", "content": "[[sim words=900]] [[sim slow seconds=0.01]]"}]
    for _ in range(8):  # more than run at once: each must have made room
        with llm.stream_chat(long) as stream:
            next(stream)
    wait_until_idle(llm)


def test_it_may_be_used_from_several_threads(llm: LLM) -> None:
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = llm.chat([{"role": "user", "content": f"thread {number}"}])[0].content

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [f"thread {number}" in found[number] for number in range(12)] == [True] * 12


def test_an_interrupt_aborts_what_runs() -> None:
    code = """
import signal, threading, time, os
from freehold import LLM, SamplingParams
llm = LLM("sim")
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
slow = [{"role": "user", "content": "[[sim words=2000]] [[sim slow seconds=0.02]]"}]
try:
    llm.chat([slow, slow])
except KeyboardInterrupt:
    pass
else:
    raise SystemExit("not interrupted")
for _ in range(500):
    stats = llm._state.engine.stats()
    if not stats.running and not stats.waiting:
        break
    time.sleep(0.01)
else:
    raise SystemExit("still running")
assert llm.generate("x")[0].text
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_close_ends_every_thread_and_so_does_forgetting_it() -> None:
    def threads() -> set[str]:
        return {thread.name for thread in threading.enumerate() if thread.is_alive()}

    before = threading.active_count()
    llm = LLM("sim")
    llm.generate("x")
    assert threading.active_count() > before
    llm.close()
    llm.close()
    assert threading.active_count() == before
    forgotten = LLM("sim")
    del forgotten
    gc.collect()
    assert threading.active_count() == before, threads()


def test_the_simulation_needs_no_torch() -> None:
    code = "import sys; from freehold import LLM; LLM('sim').generate('x'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_a_real_checkpoint(tmp_path: Path) -> None:
    from freehold.model.tiny import make_tiny

    make_tiny(tmp_path / "nano", "nano")
    defaults = {"temperature": 0.7, "top_p": 0.9, "eos_token_id": 1}
    (tmp_path / "nano" / "generation_config.json").write_text(json.dumps(defaults))
    with LLM(tmp_path / "nano", max_model_len=1024, cache_bytes=1 << 23, max_num_seqs=4) as llm:
        assert llm.model_name == "nano"
        assert (llm._defaults().temperature, llm._defaults().top_p) == (0.7, 0.9)
        params = [SamplingParams(max_tokens=9, seed=seed, top_p=0.8) for seed in range(6)]
        together = llm.generate(["Once upon a time"] * 6, params)
        assert len({result.text for result in together}) > 1
        # A seed gives the same tokens alone; how many of them were drafted depends on what else ran.
        (alone,) = llm.generate("Once upon a time", params[5])
        assert replace(alone, usage=replace(alone.usage, draft_proposed=0, draft_accepted=0)) == replace(
            together[5], usage=replace(together[5].usage, cached_tokens=0, draft_proposed=0, draft_accepted=0)
        )
        schema = {
            "type": "object",
            "properties": {"a": {"enum": [1, 2]}},
            "required": ["a"],
            "additionalProperties": False,
        }
        shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        (answer,) = llm.chat(HELLO, response_format=shape, effort="none", max_tokens=600)
        assert json.loads(answer.content)["a"] in (1, 2)
    with pytest.raises(ConfigError, match="no-such"):
        LLM(tmp_path / "no-such")
    with pytest.raises(UnknownField, match="colour"):
        LLM(tmp_path / "nano", colour="red")
