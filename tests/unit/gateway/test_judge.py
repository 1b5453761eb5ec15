"""The judge of pairs, over a real socket: blind, one pair a unit, within its budget, and deaf to what is no score."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from freehold.errors import ConfigError, FreeholdError
from freehold.gateway.call import Caller, Decision, Request, Target
from freehold.gateway.canary.judge import Judge, read_scores
from freehold.gateway.config import Settings
from freehold.ledger import Note
from tests.canarying import NAME, experiment, row, settings

DECISION = Decision((Target("here", "m", "old"),), NAME, "old", Target("here", "m", "new"))


def judging(**more: Any) -> Settings:
    return settings(experiment("quality", judge={"model": "chat", **more}))


def request(number: int = 1, **more: Any) -> Request:
    return Request(
        request_id=f"q{number}",
        at=0.0,
        endpoint="chat",
        caller=Caller("k"),
        alias="chat",
        body=b'{"messages": [{"role": "user", "content": "Name a colour."}]}',
        unit=f"u{number}",
        **more,
    )


class Model:
    """An endpoint that likes the answer "blue" and notes what it was asked. says: what it answers instead."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.says: str | None = None

    async def answer(self, asked: web.Request) -> web.Response:
        self.bodies.append(body := await asked.json())
        self.headers.append({name.lower(): value for name, value in asked.headers.items()})
        text = body["messages"][1]["content"]
        first = 9 if "<first>\nblue" in text else 4
        scores = {"first": {"quality": first}, "second": {"quality": 13 - first}}
        content = self.says if self.says is not None else f"Here: {msgspec.json.encode(scores).decode()}"
        return web.json_response({"choices": [{"message": {"content": content}}]})


@contextlib.asynccontextmanager
async def served(model: Model) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", model.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def offer(judge: Judge, number: int, *, shadow_first: bool = False) -> None:
    """Both halves: the control said blue, the canary red."""
    real, mirrored = row(2 * number, "old", 0.0), row(2 * number + 1, "new", 0.0, shadow_of=f"r{2 * number}")
    halves = [(replace_row(real, number), "blue"), (replace_row(mirrored, number), "red")]
    for half, answer in reversed(halves) if shadow_first else halves:
        judge.take(request(number), half, answer)


def replace_row(each: Any, number: int) -> Any:
    return msgspec.structs.replace(each, request_id=f"q{number}", unit=f"u{number}")


async def test_scores_go_to_the_right_rows_whichever_answer_it_saw_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model, notes = Model(), list[Note]()
    monkeypatch.setenv("JUDGE_KEY", "sk-judge")
    async with served(model) as url:
        judge = Judge(judging(key_env="JUDGE_KEY"), url, notes.append, lambda: 5.0)
        running = asyncio.ensure_future(judge.run())
        for number in range(12):
            offer(judge, number, shadow_first=number % 3 == 0)
        for _ in range(500):
            if len(notes) == 24:
                break
            await asyncio.sleep(0.01)
        running.cancel()
    values = {note.row_id: note.value for note in notes}
    assert values == {f"r{n}": (0.9 if n % 2 == 0 else 0.4) for n in range(24)}
    assert {note.name for note in notes} == {"judge.quality"}
    blue_first = sum("<first>\nblue" in body["messages"][1]["content"] for body in model.bodies)
    assert 0 < blue_first < 12  # which comes first is drawn
    assert model.headers[0]["authorization"] == "Bearer sk-judge"
    assert model.headers[0]["x-task"] == "judge"
    assert "Name a colour." in model.bodies[0]["messages"][1]["content"]


def test_it_wants_mirrored_calls_of_units_that_were_not_judged_until_the_budget_is_spent() -> None:
    at = [0.0]
    judge = Judge(judging(pairs_per_day=2), "http://127.0.0.1:1", lambda note: None, lambda: at[0])
    assert judge.wants(request(), DECISION)
    assert not judge.wants(request(), replace(DECISION, shadow=None))
    assert not judge.wants(request(), replace(DECISION, experiment="another"))
    offer(judge, 1)
    assert not judge.wants(request(1), DECISION)
    assert judge.wants(request(2), DECISION)
    offer(judge, 2)
    assert not judge.wants(request(3), DECISION)
    at[0] = 86_400.0
    assert judge.wants(request(3), DECISION)


def test_data_of_two_classes_is_not_shown_to_a_judge() -> None:
    """Its call can name one of them: a header must not widen where the data of a key may go."""
    judge = Judge(judging(), "http://127.0.0.1:1", lambda note: None, lambda: 0.0)
    of_key = replace(request().caller, data_class="secret")
    assert judge.wants(replace(request(), caller=of_key, data_class="secret"), DECISION)
    assert not judge.wants(replace(request(), caller=of_key, data_class="public"), DECISION)


def test_only_a_share_is_judged() -> None:
    judge = Judge(judging(share=0.25), "http://127.0.0.1:1", lambda note: None, lambda: 0.0)
    assert 180 < sum(judge.wants(request(n), DECISION) for n in range(1000)) < 320


async def test_an_answer_that_is_no_score_counts_for_nothing() -> None:
    model, notes = Model(), list[Note]()
    model.says = "The first one."
    async with served(model) as url:
        judge = Judge(judging(), url, notes.append, lambda: 0.0)
        offer(judge, 1)
        running = asyncio.ensure_future(judge.run())
        for _ in range(500):
            if judge.dropped:
                break
            await asyncio.sleep(0.01)
        running.cancel()
    assert judge.dropped == 1
    assert not notes


def test_failed_and_empty_answers_make_no_pair() -> None:
    judge = Judge(judging(), "http://127.0.0.1:1", lambda note: None, lambda: 0.0)
    judge.take(request(), row(1, "old", 0.0, request_id="q1"), "blue")
    judge.take(request(), row(2, "new", 0.0, request_id="q1", shadow_of="r1", error="cut"), "re")
    judge.take(request(), row(3, "new", 0.0, request_id="q1", shadow_of="r1"), "")
    assert judge._waiting.empty()


@pytest.mark.parametrize(
    "text",
    ["", "{}", '{"first": {"quality": 11}, "second": {"quality": 1}}', '{"first": {"quality": "x"}, "second": 1}'],
)
def test_scores_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(FreeholdError, match="judge"):
        read_scores(text, groundedness=False)


def test_groundedness_must_be_there_if_it_was_asked_for() -> None:
    text = '{"first": {"quality": 8, "groundedness": 9}, "second": {"quality": 7, "groundedness": 2}}'
    assert read_scores(text, groundedness=True) == {"quality": (0.8, 0.7), "groundedness": (0.9, 0.2)}
    with pytest.raises(FreeholdError):
        read_scores('{"first": {"quality": 8}, "second": {"quality": 7}}', groundedness=True)


def test_a_judge_without_its_key_is_a_mistake_in_the_settings(tmp_path: Path) -> None:
    for more in ({"key_env": "NO_SUCH_KEY"}, {"key_file": str(tmp_path / "none")}):
        with pytest.raises(ConfigError, match=f"experiments.{NAME}.judge"):
            Judge(judging(**more), "http://127.0.0.1:1", lambda note: None, lambda: 0.0)
    (tmp_path / "key").write_text("sk-from-file\n")
    judge = Judge(judging(key_file=str(tmp_path / "key")), "http://127.0.0.1:1", lambda note: None, lambda: 0.0)
    assert judge._keys == {NAME: "sk-from-file"}
