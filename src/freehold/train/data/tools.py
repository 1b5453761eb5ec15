"""Requests that tools answer, in GLM's calling grammar, and requests that need none. Torch-free.

Tools are composed: a verb, a noun and one to four parameters, each with its type, its wording in a request, and how
its value is drawn. The request says every value; the call copies them; a result comes back and the answer reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from freehold.train.data.chats import greeting, knowledge, parting
from freehold.train.data.example import Effort, Example, assistant, tool, user
from freehold.train.data.thinking import thinking
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


def _kind(line: str) -> Kind:
    """name,name / request,request / required / extra / result: answer."""
    names, asked, required, extra, end = (part.strip() for part in line.split("/"))
    result, _, told = end.partition(":")
    split = [tuple(part.split(",")) if part else () for part in (names, asked, required, extra)]
    return Kind(split[0], split[1], split[2], split[3], result, told.strip())


TOOLS = tuple(
    _kind(line)
    for line in """
get_weather,weather,look_weather / Get the weather,What is the weather / city / day,unit / \
temperature: The temperature is {value}.
send_message,send_text,write_message / Send a message,Write a message / to,text / urgent / \
receipt: The message is sent. The receipt is {value}.
book_room,reserve_room / Book a room,Reserve a room / name,room / day,hour / \
booking: It is booked. The booking is {value}.
order_item,buy_item / Order a box,Buy a box / item / count,size,colour / order: It is ordered. The order is {value}.
find_train,search_trains / Find a train,Look for a train / from,to / day,hour / platform: The platform is {value}.
find_flight,search_flights / Find a flight,Look for a flight / from,to / day / flight: The flight is {value}.
open_door,unlock_door / Open the door,Unlock the door / room,code / loud / state: The state is {value}.
set_alarm,add_alarm / Set an alarm,Add an alarm / hour / day,loud,name / alarm: It is set. The alarm is {value}.
get_price,price_of / Get the price,Look up the price / item / city,count / price: The price is {value}.
find_person,lookup_person / Find the desk,Look up the desk / name / city / desk: The desk is {value}.
pay_bill,send_money / Make a payment,Send a payment / to,price / code,day / \
payment: It is paid. The payment is {value}.
play_music,play_song / Play a song,Play some music / name / loud,count / song: The song is {value}.
paint_wall,paint_room / Paint a wall,Paint the wall / colour,room / size / paint: It is done. The paint is {value}.
create_ticket,open_ticket / Create a ticket,Open a ticket / text / urgent,name / ticket: The ticket is {value}.
translate,translate_text / Translate a text,Make a translation / text / to / result: The result is {value}.
""".strip().splitlines()
)


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


def coined(rng: Random, words: Words) -> Offered:
    """A tool that nobody has seen: its name and its parameters' names are made up; the request uses them."""
    name = "_".join(words.several(rng, rng.randint(1, 2), names=False))
    parts = []
    for parameter in words.several(rng, rng.randint(1, 3), names=False):
        like = rng.choice([PARTS[each] for each in ("name", "item", "code", "count", "price", "urgent", "size")])
        parts.append(replace(like, name=parameter, said=parameter + " {value}"))
    asked = (f"Call {name} with", f"Use {name} with", f"Run {name} with")
    kind = Kind((name,), asked, (), (), "result", "The result is {value}.")
    return Offered(kind, name, tuple(parts))


def _offers(rng: Random, words: Words) -> list[Offered]:
    """One to three tools of different names."""
    known = rng.sample(TOOLS, rng.choice((1, 2, 2, 3)))
    found = [coined(rng, words) if rng.random() < 0.25 else offer(rng, kind) for kind in known]
    return list({each.name: each for each in found}.values())


def make(rng: Random, words: Words, effort: Effort) -> Example:
    """Requests with one to three tools offered: calls, sometimes two at once, results, answers that read them.

    Some requests need no tool. Thinking, only one request is made.
    """
    offered = _offers(rng, words)
    specs = tuple(each.spec for each in offered)
    turns = []
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.1:
            turns.append(_plain(rng, words, effort))
        else:
            count = 2 if len(offered) > 1 and rng.random() < 0.15 else 1
            turns.append(_request(rng, words, effort, rng.sample(offered, count)))
    finished = rng.random() < 0.7
    messages: list[Mapping[str, Any]] = []
    for turn in turns if effort == "none" else turns[-1:]:
        messages += turn.messages
    check = turns[-1].check
    if not finished and turns[-1].call:
        messages = messages[: -turns[-1].after]
        check = turns[-1].call
    return Example("tool", tuple(messages), specs, effort, check=check)


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request up to its answer. after: how many messages follow the call. call: what makes the call right."""

    messages: tuple[Mapping[str, Any], ...]
    check: Mapping[str, Any]
    after: int = 0
    call: Mapping[str, Any] | None = None


def _plain(rng: Random, words: Words, effort: Effort) -> Exchange:
    turn = rng.choice((greeting, parting, knowledge))(rng, words)
    thoughts = thinking(effort, f"The user says: {turn.request}", f"No tool. {turn.steps}", turn.review)
    return Exchange((user(turn.request), assistant(turn.answer, thinking=thoughts)), turn.check)


def _request(rng: Random, words: Words, effort: Effort, chosen: list[Offered]) -> Exchange:
    asked = [call(rng, words, each) for each in chosen]
    request = asked[0][0] + "".join(f". And also: {said}" for said, _ in asked[1:]) + "."
    calls = [(each.name, arguments) for each, (_, arguments) in zip(chosen, asked, strict=True)]
    told = ["; ".join(f"{key} {_said(value)}" for key, value in arguments.items()) for _, arguments in calls]
    names = " and ".join(name for name, _ in calls)
    thoughts = thinking(effort, f"The user says: {request}", f"I call {names}.", ". ".join(told) + ".")
    results = [rng.choice((words.code(rng), words.coined(rng))) for _ in chosen]
    answer = " ".join(each.kind.told.format(value=value) for each, value in zip(chosen, results, strict=True))
    read = ". ".join(f"{each.kind.result} {value}" for each, value in zip(chosen, results, strict=True)) + "."
    after = thinking(effort, "The result is here.", read, f"I say: {answer}")
    listed = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return Exchange(
        (
            user(request),
            assistant("", thinking=thoughts, calls=calls),
            *(tool(json.dumps({each.kind.result: results[i]}), i) for i, each in enumerate(chosen)),
            assistant(answer, thinking=after),
        ),
        {"type": "equals", "value": answer},
        len(chosen) + 1,
        {"type": "tool_call", **listed[0]} if len(listed) == 1 else {"type": "tool_calls", "calls": listed},
    )
