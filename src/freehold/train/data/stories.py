"""Short stories whose later sentences depend on what was said before. Torch-free.

A story draws a cast, a thing that is wanted and where it is, and unfolds: someone loses it, others who were asked say
where they saw it, it is found or traded. Names, colours and places come back, so that a reader who remembers the
beginning can predict the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from freehold.train.data.example import Effort, Example, assistant, user
from freehold.train.data.thinking import thinking
from freehold.train.data.words import ANIMALS, COLOURS, FOODS, OBJECTS, PEOPLE, PLACES, TRAITS, WEATHER, Words

Pronoun = Literal["he", "she", "it"]
_OBJECT = {"he": "him", "she": "her", "it": "it"}
_OWN = {"he": "his", "she": "her", "it": "its"}
_SHE = frozenset("girl woman queen".split())
_HE = frozenset("boy man king".split())


@dataclass(frozen=True, slots=True)
class Character:
    name: str
    kind: str
    trait: str
    pronoun: Pronoun

    @property
    def them(self) -> str:
        return _OBJECT[self.pronoun]

    @property
    def their(self) -> str:
        return _OWN[self.pronoun]

    @property
    def They(self) -> str:
        return self.pronoun.capitalize()


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def character(rng: Random, name: str) -> Character:
    kind = rng.choice(PEOPLE if rng.random() < 0.5 else ANIMALS)
    if kind in ANIMALS:
        pronoun: Pronoun = "it"
    else:
        pronoun = "she" if kind in _SHE else "he" if kind in _HE else rng.choice(("he", "she"))
    return Character(name, kind, rng.choice(TRAITS), pronoun)


@dataclass(frozen=True, slots=True)
class Plot:
    """What a story is about: the hero, the friend, the thing and its colour, home, another place, food, weather."""

    hero: Character
    friend: Character
    thing: str
    colour: str
    home: str
    away: str
    food: str
    weather: str


def plot(rng: Random, words: Words) -> Plot:
    first, second = words.several(rng, 2)
    home, away = rng.sample(PLACES, 2)
    return Plot(
        character(rng, first),
        character(rng, second),
        rng.choice(OBJECTS),
        rng.choice(COLOURS),
        home,
        away,
        rng.choice(FOODS),
        rng.choice(WEATHER),
    )


def tell(rng: Random, p: Plot) -> str:
    """The story of a plot, 6 to 14 sentences."""
    parts = [_opening(rng, p), _wish(rng, p)]
    parts.append(rng.choice((_lost, _trade, _gift, _journey))(rng, p))
    parts.append(_ending(rng, p))
    return " ".join(parts)


def _opening(rng: Random, p: Plot) -> str:
    h = p.hero
    first = rng.choice(
        (
            f"Once there was {article(h.trait)} {h.kind} named {h.name}.",
            f"{h.name} was {article(h.trait)} {h.kind}.",
            f"In the {p.home} lived {article(h.trait)} {h.kind} called {h.name}.",
            f"Long ago {article(h.trait)} {h.kind} called {h.name} lived near the {p.home}.",
        )
    )
    second = rng.choice(
        (
            f"{h.name} lived in the {p.home} and liked {p.food}.",
            f"Every day {h.name} walked to the {p.home} to look for {p.food}.",
            f"{h.They} lived by the {p.home}, where the {p.weather} came often.",
            f"The {h.kind} liked {p.food} more than anything.",
        )
    )
    return f"{first} {second}"


def _wish(rng: Random, p: Plot) -> str:
    h, f = p.hero, p.friend
    own = rng.choice(
        (
            f"{h.name} had {article(p.colour)} {p.thing} and took it everywhere.",
            f"In {h.their} bag {h.name} kept {article(p.colour)} {p.thing}.",
            f"The best thing {h.name} had was {article(p.colour)} {p.thing}.",
        )
    )
    friend = rng.choice(
        (
            f"{h.their.capitalize()} friend was {f.name}, {article(f.trait)} {f.kind} from the {p.away}.",
            f"{article(f.trait).capitalize()} {f.kind} named {f.name} lived in the {p.away}.",
            f"In the {p.away} lived {f.name}, {article(f.trait)} {f.kind}.",
        )
    )
    return f"{own} {friend}"


def _lost(rng: Random, p: Plot) -> str:
    h, f = p.hero, p.friend
    lose = rng.choice(
        (
            f"One day the {p.colour} {p.thing} was gone.",
            f"One morning, in the {p.weather}, {h.name} lost the {p.colour} {p.thing}.",
            f"When the {p.weather} came, {h.name} could not find the {p.colour} {p.thing}.",
        )
    )
    ask = rng.choice(
        (
            f'"Have you seen my {p.thing}?" {h.name} asked {f.name}.',
            f"So {h.name} went to the {p.away} and asked {f.name} for help.",
            f'{h.name} ran to {f.name}. "My {p.colour} {p.thing} is lost!" said the {h.kind}.',
        )
    )
    find = rng.choice(
        (
            f'"Yes," said {f.name}, "it is in the {p.away}."',
            f'"I saw {article(p.colour)} {p.thing} in the {p.away}," said {f.name}.',
            f"{f.name} the {f.kind} looked all over the {p.away} and found the {p.thing}.",
        )
    )
    back = rng.choice(
        (
            f"They went to the {p.away} and there was the {p.colour} {p.thing}.",
            f"{h.name} thanked {f.name} and took the {p.thing} home to the {p.home}.",
        )
    )
    return f"{lose} {ask} {find} {back}"


def _trade(rng: Random, p: Plot) -> str:
    h, f = p.hero, p.friend
    want = rng.choice(
        (
            f"{f.name} wanted the {p.colour} {p.thing} very much.",
            f'"I would like your {p.thing}," said {f.name}.',
        )
    )
    offer = rng.choice(
        (
            f'"Give me the {p.thing} and you shall have all my {p.food}," said the {f.kind}.',
            f"{f.name} had much {p.food} and offered it for the {p.thing}.",
        )
    )
    deal = rng.choice(
        (
            f"{h.name} thought about the {p.food} and gave {f.name} the {p.colour} {p.thing}.",
            f"So {h.name} took the {p.food} and {f.name} took the {p.colour} {p.thing}.",
        )
    )
    return f"{want} {offer} {deal} Now {f.name} had the {p.thing} and {h.name} had the {p.food}."


def _gift(rng: Random, p: Plot) -> str:
    h, f = p.hero, p.friend
    sad = rng.choice(
        (
            f"One day {f.name} was sad because of the {p.weather}.",
            f"{f.name} had no {p.food} and was sad.",
        )
    )
    give = rng.choice(
        (
            f"{h.name} went to the {p.away} and gave {f.name} the {p.colour} {p.thing}.",
            f'"Take my {p.colour} {p.thing}," said {h.name} to {f.name}.',
        )
    )
    thanks = rng.choice(
        (
            f'"Thank you, {h.name}," said {f.name}. "You are {article(h.trait)} {h.kind}."',
            f"{f.name} the {f.kind} was not sad any more and thanked {h.name}.",
        )
    )
    return f"{sad} {give} {thanks}"


def _journey(rng: Random, p: Plot) -> str:
    h, f = p.hero, p.friend
    leave = rng.choice(
        (
            f"One day {h.name} left the {p.home} and went to the {p.away}.",
            f"The {h.kind} wanted to see the {p.away}, so {h.pronoun} left the {p.home}.",
        )
    )
    meet = rng.choice(
        (
            f"On the way {h.pronoun} met {f.name}, and they shared some {p.food}.",
            f"In the {p.weather} {h.pronoun} met {f.name} the {f.kind}.",
        )
    )
    talk = rng.choice(
        (
            f'"Where are you going?" asked {f.name}. "To the {p.away}," said {h.name}.',
            f'"What is in your bag?" asked {f.name}. "{article(p.colour).capitalize()} {p.thing}," said {h.name}.',
        )
    )
    return f"{leave} {meet} {talk} Together they went to the {p.away}, the {h.kind} and the {f.kind}."


def _ending(rng: Random, p: Plot) -> str:
    h, f = p.hero, p.friend
    return rng.choice(
        (
            f"From that day {h.name} and {f.name} were friends.",
            f"That night {h.name} slept well in the {p.home}.",
            f"And {h.name} the {h.kind} was never {rng.choice(('lonely', 'sad', 'hungry'))} again.",
            f"Then {h.name} went home to the {p.home} and ate {p.food}.",
            f"{f.name} went back to the {p.away}, and {h.name} went back to the {p.home}.",
        )
    )


def make(rng: Random, words: Words, effort: Effort) -> Example:
    """A story asked for in a chat that names who and what it is to be about."""
    p = plot(rng, words)
    about = f"{article(p.hero.trait)} {p.hero.kind} named {p.hero.name}"
    request, values = rng.choice(
        (
            (f"Tell me a story about {about}.", [p.hero.name]),
            (f"Write a short story about {about}.", [p.hero.name]),
            (f"Please tell me a story about {about} and {article(p.colour)} {p.thing}.", [p.hero.name, p.thing]),
            (f"Write a story about {about} who lives in the {p.home}.", [p.hero.name, p.home]),
            (f"Tell me a story about {article(p.hero.kind)}.", [p.hero.kind]),
            ("Tell me a story.", []),
        )
    )
    plan = f"Hero: {p.hero.name}, {p.hero.kind}. Friend: {p.friend.name}, {p.friend.kind}."
    more = f"The {p.hero.kind} has {article(p.colour)} {p.thing}. Places: {p.home}, {p.away}. Food: {p.food}."
    thoughts = thinking(effort, request, plan, more)
    check = {"type": "contains", "values": values}
    return Example("story", (user(request), assistant(tell(rng, p), thinking=thoughts)), effort=effort, check=check)


def plain(rng: Random, words: Words, effort: Effort) -> Example:
    """Stories as plain text, several in a row."""
    return Example("text", text="\n\n".join(tell(rng, plot(rng, words)) for _ in range(rng.randint(1, 4))))
