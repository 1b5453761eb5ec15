"""What freehold-tiny answers, for the README: each question is put to the shipped checkpoint, greedily.

In fp32 by the plain operations, so that every machine prints the same.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freehold import LLM
from freehold.serve.answers import ChatResult

MAX_TOKENS = 400
WIDTH = 100


@dataclass(frozen=True)
class Question:
    """A chat: what is said in turn, the model answering after each."""

    asked: Sequence[str]
    effort: str = "none"
    tools: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    result: str = ""  # of the tool that the first answer calls


# Names and numbers that training never shows.
_CODES = "The code of Tanlor is 9642. The code of Kirkal is 5351. The code of Runfan is 8343."
_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "day": {"type": "string"}},
            "required": ["city", "day"],
        },
    },
}
QUESTIONS = (
    Question(
        (
            f"{_CODES}\n\nWhat is the code of Kirkal?",
            "And the code of Runfan?",
        )
    ),
    Question(("What is 47 + 38?",), effort="high"),
    Question(("Write these as a numbered list: fankil, verkel, lulpol",)),
    Question(("Get the weather in Sorgon on Monday.",), tools=(_WEATHER,), result=json.dumps({"temperature": "3483"})),
)


def transcript(checkpoint: Path) -> str:
    """A fenced block with every question and answer."""
    with LLM(checkpoint, dtype="float32", ops="reference", num_draft_tokens=0, progress=False,
             max_model_len=1024, cache_bytes=1 << 26) as llm:  # fmt: skip
        chats = ["\n".join(_chat(llm, question)) for question in QUESTIONS]
    return "```text\n" + "\n\n".join(chats) + "\n```\n"


def _chat(llm: LLM, question: Question) -> Iterator[str]:
    messages: list[Mapping[str, Any]] = []
    options: dict[str, Any] = {"tools": list(question.tools)} if question.tools else {}
    for said in question.asked:
        messages.append({"role": "user", "content": said})
        yield from _shown("> ", said)
        answer = _ask(llm, messages, question, options)
        messages.append(answer.message)
        yield from _answer(answer)
    if question.result and answer.tool_calls:
        messages.append({"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": question.result})
        yield from _shown("= ", question.result)
        yield from _answer(_ask(llm, messages, question, options))


def _ask(llm: LLM, messages: Sequence[Mapping[str, Any]], question: Question, options: Mapping[str, Any]) -> ChatResult:
    return llm.chat(messages, temperature=0.0, max_tokens=MAX_TOKENS, effort=question.effort, **options)[0]


def _answer(answer: ChatResult) -> Iterator[str]:
    if answer.reasoning:
        yield from _shown("(thinks) ", answer.reasoning.strip())
    if answer.content:
        yield from _shown("", answer.content)
    for call in answer.tool_calls:
        yield from _shown("(calls) ", f"{call.name} {call.arguments}")


def _shown(mark: str, text: str) -> Iterator[str]:
    for line in text.splitlines():
        yield from textwrap.wrap(mark + line, WIDTH, subsequent_indent=" " * len(mark)) or [""]
