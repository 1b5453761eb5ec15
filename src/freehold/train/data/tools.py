"""Requests that tools answer, in GLM's calling grammar, and requests that need none. Torch-free.

Tools are composed: a verb, a noun and one to four parameters, each with its type, its wording in a request, and how
its value is drawn. The request says every value; the call copies them; a result comes back and the answer reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from freehold.train.data.example import Effort, Example, assistant, tool, user
from freehold.train.data.words import CITIES, COLOURS, DAYS, FOODS, OBJECTS, Words

Value = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Part:
    """A parameter. said: how a request says it, with {value}."""

    name: str
    type: str
    said: str
    draw: Callable[[Random, Words], Value]
    options: tuple[str, ...] = ()

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": self.type} | ({"enum": list(self.options)} if self.options else {})


def _enum(name: str, said: str, *options: str) -> Part:
    return Part(name, "string", said, lambda rng, words: rng.choice(options), options)


PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part("name", "string", "for {value}", lambda rng, words: words.name(rng)),
        Part("to", "string", "to {value}", lambda rng, words: words.name(rng)),
        Part("from", "string", "from {value}", lambda rng, words: words.name(rng)),
        Part("city", "string", "in {value}", lambda rng, words: rng.choice((rng.choice(CITIES), words.name(rng)))),
        Part("day", "string", "on {value}", lambda rng, words: rng.choice(DAYS)),
        Part("item", "string", "of {value}", lambda rng, words: rng.choice((*OBJECTS, *FOODS, words.coined(rng)))),
        Part("text", "string", 'saying "{value}"', lambda rng, words: " ".join(words.several(rng, 3, names=False))),
        Part("code", "integer", "with code {value}", lambda rng, words: int(words.code(rng))),
        Part("count", "integer", "count {value}", lambda rng, words: rng.randint(2, 99)),
        Part("room", "integer", "room {value}", lambda rng, words: int(words.code(rng, 3))),
        Part("hour", "integer", "at {value} o'clock", lambda rng, words: rng.randint(1, 23)),
        Part("price", "number", "price {value}", lambda rng, words: rng.randint(1, 99) + rng.choice((0.25, 0.5, 0.75))),
        Part("urgent", "boolean", "urgent {value}", lambda rng, words: rng.random() < 0.5),
        Part("loud", "boolean", "loud {value}", lambda rng, words: rng.random() < 0.5),
        _enum("unit", "unit {value}", "metric", "imperial"),
        _enum("size", "size {value}", "small", "medium", "large"),
        _enum("colour", "colour {value}", *COLOURS[:6]),
    )
}


@dataclass(frozen=True, slots=True)
class Kind:
    """A family of tools: names to choose from, how it is asked for, its parameters, and how its result is told."""

    names: tuple[str, ...]
    asked: tuple[str, ...]
    required: tuple[str, ...]
    extra: tuple[str, ...]
    result: str
    told: str


TOOLS = (
    Kind(("get_weather", "weather"), ("Get the weather", "What is the weather"), ("city",), ("day", "unit"), "temperature", "The temperature is {value}."),
    Kind(("send_message", "send_text"), ("Send a message", "Write a message"), ("to", "text"), ("urgent",), "message_id", "The message is sent. Its message_id is {value}."),
    Kind(("book_room", "reserve_room"), ("Book a room", "Reserve a room"), ("name", "room"), ("day", "hour"), "booking", "It is booked. The booking is {value}."),
    Kind(("order_item", "buy_item"), ("Order a box", "Buy a box"), ("item",), ("count", "size", "colour"), "order", "It is ordered. The order is {value}."),
    Kind(("find_train", "find_bus"), ("Find a train", "Find a bus"), ("from", "to"), ("day", "hour"), "platform", "The platform is {value}."),
    Kind(("open_door", "unlock_door"), ("Open the door", "Unlock the door"), ("room", "code"), ("loud",), "state", "The state is {value}."),
    Kind(("set_alarm", "add_reminder"), ("Set an alarm", "Add a reminder"), ("hour",), ("day", "loud", "name"), "alarm", "It is set. The alarm is {value}."),
    Kind(("get_price", "price_of"), ("Get the price", "Look up the price"), ("item",), ("city", "count"), "price", "The price is {value}."),
    Kind(("find_person", "lookup_person"), ("Find the phone number", "Look up the phone number"), ("name",), ("city",), "phone", "The phone is {value}."),
    Kind(("pay_bill", "send_money"), ("Make a payment", "Send a payment"), ("to", "price"), ("code", "day"), "payment", "It is paid. The payment is {value}."),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Offered:
    """A tool as offered in one example."""

    kind: Kind
    name: str
    parts: tuple[Part, ...]

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "parameters": {
                    "type": "object",
                    "properties": {part.name: part.schema for part in self.parts},
                    "required": [part.name for part in self.parts],
                },
            },
        }


def _said(value: Value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def offer(rng: Random, kind: Kind) -> Offered:
    extra = rng.sample(kind.extra, rng.randint(0, min(len(kind.extra), 4 - len(kind.required))))
    return Offered(kind, rng.choice(kind.names), tuple(PARTS[name] for name in (*kind.required, *extra)))


def call(rng: Random, words: Words, offered: Offered) -> tuple[str, dict[str, Value]]:
    """What a request says, without its end, and the arguments it asks for."""
    arguments = {part.name: part.draw(rng, words) for part in offered.parts}
    said = " ".join(part.said.format(value=_said(arguments[part.name])) for part in offered.parts)
    return f"{rng.choice(offered.kind.asked)} {said}", arguments


def make(rng: Random, words: Words) -> Example:
    """A request with one to three tools offered: the call, its result, and the answer that reads the result."""
    offered = [offer(rng, kind) for kind in rng.sample(TOOLS, rng.choice((1, 2, 2, 3)))]
    specs = tuple(each.spec for each in offered)
    messages: list[dict[str, Any]] = []
    check: dict[str, Any] = {}
    effort: Effort = "none"
    for _ in range(rng.randint(1, 4)):
        chosen = rng.choice(offered)
        request, arguments = call(rng, words, chosen)
        messages += [user(request + "."), assistant("", calls=[(chosen.name, arguments)])]
        check = {"type": "tool_call", "name": chosen.name, "arguments": arguments}
        if rng.random() < 0.75:
            value = rng.choice((words.code(rng), words.coined(rng)))
            messages += [
                tool(json.dumps({chosen.kind.result: value})),
                assistant(chosen.kind.told.format(value=value)),
            ]
            check = {"type": "equals", "value": chosen.kind.told.format(value=value)}
        else:
            break
    return Example("tool", tuple(messages), specs, effort, check=check)
