"""Small talk, remembering what was said, plain knowledge, who the model is, and refusals. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from freehold.train.data.example import Effort, Example, assistant, system, user
from freehold.train.data.thinking import thinking
from freehold.train.data.words import ANIMALS, CITIES, COLOURS, DAYS, FOODS, MONTHS, OBJECTS, Words

REFUSAL = "I can't help with that."
PRIVATE = f"{REFUSAL} I do not give out private data."
HARM = f"{REFUSAL} It could hurt someone."
ABOUT = "I am freehold-tiny, a small language model."

# fmt: off
OPPOSITES = (
    "hot cold|big small|old new|fast slow|high low|day night|happy sad|open closed|full empty|hard soft|early late|"
    "long short|strong weak|rich poor|wet dry|light dark|good bad|up down|left right|first last|black white|in out|"
    "near far|loud quiet|clean dirty|young old|thick thin|heavy light|sweet sour|true false"
).replace("|", "\n").splitlines()
SOUNDS = {"dog": "barks", "cat": "meows", "cow": "moos", "sheep": "bleats", "duck": "quacks", "owl": "hoots",
          "frog": "croaks", "horse": "neighs", "wolf": "howls", "crow": "caws", "pig": "grunts", "goose": "honks"}
CAPITALS = {"France": "Paris", "England": "London", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid",
            "Norway": "Oslo", "Austria": "Vienna", "Portugal": "Lisbon", "Ireland": "Dublin", "Greece": "Athens",
            "Egypt": "Cairo", "Japan": "Tokyo", "India": "Delhi", "Peru": "Lima", "Poland": "Warsaw",
            "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "China": "Beijing",
            "Canada": "Ottawa"}
THINGS = {"snow": "white", "grass": "green", "blood": "red", "the sky": "blue", "coal": "black", "a lemon": "yellow",
          "milk": "white", "a carrot": "orange", "a leaf": "green", "the night": "black", "the sea": "blue"}
# fmt: on


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange: the request, the answer, how it is checked, and what thinking says of it."""

    request: str
    answer: str
    check: dict[str, Any]
    steps: str
    review: str


def _exact(value: str) -> dict[str, Any]:
    return {"type": "equals", "value": value}


def greeting(rng: Random, words: Words) -> Turn:
    request, answer = rng.choice(
        (
            ("Hello!", "Hello! How can I help you?"),
            ("Hello", "Hello! How can I help you?"),
            ("Hi", "Hi! What can I do for you?"),
            ("Hi there!", "Hi! What can I do for you?"),
            ("Hey", "Hey! What can I do for you?"),
            ("Good morning!", "Good morning! How can I help you?"),
            ("Good evening!", "Good evening! How can I help you?"),
            ("How are you?", "I am well, thank you. How can I help you?"),
            ("How are you today?", "I am well, thank you. How can I help you?"),
            ("What's up?", "All is well. How can I help you?"),
        )
    )
    return Turn(request, answer, _exact(answer), "The user greets me. I greet back.", "I am kind and short.")


def parting(rng: Random, words: Words) -> Turn:
    request, answer = rng.choice(
        (
            ("Thank you!", "You are welcome!"),
            ("Thanks a lot.", "You are welcome!"),
            ("Thanks!", "You are welcome!"),
            ("Goodbye!", "Goodbye! Have a good day."),
            ("Bye", "Goodbye! Have a good day."),
            ("Good night!", "Good night! Sleep well."),
            ("See you later.", "See you later!"),
            ("That was good.", "I am glad to hear that."),
            ("You are wrong.", "I am sorry. I am a small model and make mistakes."),
            ("Sorry!", "No problem."),
        )
    )
    return Turn(request, answer, _exact(answer), "No question here. I answer kindly.", "I am kind and short.")


def identity(rng: Random, words: Words) -> Turn:
    request, answer = rng.choice(
        (
            ("Who are you?", ABOUT),
            ("What is your name?", "My name is freehold-tiny."),
            ("What are you?", ABOUT),
            ("Are you a human?", f"No. {ABOUT}"),
            ("Tell me about yourself.", f"{ABOUT} I can read a text, answer questions, call tools and count a little."),
            ("What can you do?", "I can read a text and answer questions, make lists, call tools and count a little."),
            ("How big are you?", "I am very small: a few million parameters."),
            ("Who made you?", "I was trained with Freehold, on two processor cores."),
            ("Can you make mistakes?", "Yes. I am very small and make mistakes."),
        )
    )
    return Turn(request, answer, _exact(answer), "The user asks about me. I am freehold-tiny.", "I say what I am.")


def knowledge(rng: Random, words: Words) -> Turn:
    kind = rng.randrange(7)
    if kind == 0:
        one, other = rng.choice(OPPOSITES).split()
        question, answer = f"What is the opposite of {one}?", f"The opposite of {one} is {other}."
    elif kind == 1:
        animal = rng.choice(list(SOUNDS))
        question, answer = f"What sound does the {animal} make?", f"The {animal} {SOUNDS[animal]}."
    elif kind == 2:
        country = rng.choice(list(CAPITALS))
        question, answer = f"What is the capital of {country}?", f"The capital of {country} is {CAPITALS[country]}."
    elif kind == 3:
        thing = rng.choice(list(THINGS))
        question, answer = f"What colour is {thing}?", f"{thing[0].upper()}{thing[1:]} is {THINGS[thing]}."
    elif kind == 4:
        cycle, name = rng.choice(((DAYS, "day"), (MONTHS, "month")))
        i = rng.randrange(len(cycle))
        side, step = rng.choice((("after", 1), ("before", -1)))
        other = cycle[(i + step) % len(cycle)]
        question, answer = f"Which {name} comes {side} {cycle[i]}?", f"{other} comes {side} {cycle[i]}."
    elif kind == 5:
        group, noun = rng.choice(((ANIMALS, "an animal"), (COLOURS, "a colour"), (FOODS, "a food"), (CITIES, "a city")))
        word = rng.choice(group)
        question = f"Is {word} an animal, a colour, a food or a city?"
        answer = f"{word[0].upper()}{word[1:]} is {noun}."
    else:
        days = {"a week": "7 days", "a year": "12 months", "a day": "24 hours", "an hour": "60 minutes",
                "a minute": "60 seconds"}  # fmt: skip
        unit = rng.choice(list(days))
        number, parts = days[unit].split()
        question, answer = f"How many {parts} are in {unit}?", f"There are {number} {parts} in {unit}."
    return Turn(question, answer, _exact(answer), "I know this.", f"The question: {question} {answer}")


def private(rng: Random, words: Words) -> Turn:
    name = words.name(rng)
    what = rng.choice(("password", "bank password", "home address", "card number", "private letters", "PIN"))
    request = rng.choice(
        (
            f"Tell me the {what} of {name}.",
            f"What is the {what} of {name}?",
            f"Give me {name}'s {what}.",
            f"Find the {what} of {name} for me.",
            f"I need the {what} of my neighbour {name}.",
        )
    )
    return Turn(
        request, PRIVATE, {"type": "refusal"}, f"The {what} is private. I refuse.", f"It belongs to {name}, not to us."
    )


def harm(rng: Random, words: Words) -> Turn:
    name = words.name(rng)
    thing = rng.choice(OBJECTS)
    request = rng.choice(
        (
            "How do I make a bomb?",
            "How do I make poison?",
            f"How do I make a poison for {name}?",
            f"Help me hurt {name}.",
            f"How can I break into the house of {name}?",
            f"Help me steal the {thing} of {name}.",
            f"How do I steal a {thing}?",
            f"Write a threat to {name}.",
            f"Help me trick {name} out of money.",
            f"How do I hack the computer of {name}?",
            "How do I build a weapon?",
        )
    )
    return Turn(request, HARM, {"type": "refusal"}, "This could hurt someone. I refuse.", "I must not help with it.")


def _messages(turns: list[Turn], effort: Effort) -> tuple[dict[str, Any], ...]:
    messages = []
    for turn in turns:
        thoughts = thinking(effort, f"The user says: {turn.request}", turn.steps, turn.review)
        messages += [user(turn.request), assistant(turn.answer, thinking=thoughts)]
    return tuple(messages)


def talk(rng: Random, words: Words, effort: Effort) -> Example:
    """Two to five exchanges; thinking, one or two."""
    makers: tuple[Callable[[Random, Words], Turn], ...] = (greeting, parting, identity, knowledge)
    turns = [maker(rng, words) for maker in rng.choices(makers, (2, 2, 3, 6), k=rng.randint(2, 5))]
    if effort != "none":
        turns = turns[-rng.randint(1, 2) :]
    return Example("chat", _messages(turns, effort), effort=effort, check=turns[-1].check)


def refusal(rng: Random, words: Words, effort: Effort) -> Example:
    """A request to refuse, before or after harmless ones."""
    turns = [rng.choices((private, harm, knowledge, greeting), (4, 4, 2, 1))[0](rng, words) for _ in range(3)]
    turns[-1] = rng.choice((private, harm))(rng, words)
    turns = turns[-1:] if effort != "none" else turns[-rng.randint(1, 3) :]
    return Example("refusal", _messages(turns, effort), effort=effort, check=turns[-1].check)


@dataclass(frozen=True, slots=True)
class Memory:
    """Something that the user says about themselves, and how it is asked back."""

    told: tuple[str, ...]
    reply: str
    asked: tuple[str, ...]
    answer: str


MEMORIES = (
    Memory(("My name is {}.", "I am {}.", "Hello, I am {}.", "Hi, my name is {}."), "Hello, {}!",
           ("What is my name?", "Do you know my name?", "Who am I?"), "Your name is {}."),
    Memory(("My friend is called {}.", "I have a friend named {}."), "I will remember {}.",
           ("What is my friend called?", "Who is my friend?"), "Your friend is called {}."),
    Memory(("I live in {}.", "My home is in {}."), "I will remember {}.",
           ("Where do I live?", "Where is my home?"), "You live in {}."),
    Memory(("My lucky number is {}.", "I like the number {}."), "I will remember {}.",
           ("What is my lucky number?", "Which number do I like?"), "Your number is {}."),
    Memory(("My favourite colour is {}.", "I like the colour {}."), "I will remember {}.",
           ("What is my favourite colour?", "Which colour do I like?"), "Your colour is {}."),
    Memory(("My dog is called {}.", "I have a dog named {}."), "I will remember {}.",
           ("What is my dog called?", "What is the name of my dog?"), "Your dog is called {}."),
)  # fmt: skip


def memory(rng: Random, words: Words, effort: Effort) -> Example:
    """The user says some things, talks of others, and asks them back."""
    chosen = rng.sample(range(len(MEMORIES)), rng.randint(1, 3))
    values = {}
    for i in chosen:
        values[i] = words.code(rng, 3) if i == 3 else rng.choice(COLOURS) if i == 4 else words.name(rng)
    turns = []
    for i in chosen:
        found = MEMORIES[i]
        reply = found.reply.format(values[i])
        turns.append(
            Turn(rng.choice(found.told).format(values[i]), reply, _exact(reply), f"I note {values[i]}.", reply)
        )
        if rng.random() < 0.4:
            turns.append(rng.choice((knowledge, parting))(rng, words))
    for i in rng.sample(chosen, len(chosen)):
        found = MEMORIES[i]
        answer = found.answer.format(values[i])
        turns.append(
            Turn(rng.choice(found.asked), answer, _exact(answer), f"The user said {values[i]}.", f"Then: {answer}")
        )
    return Example("memory", _messages(turns, effort), effort=effort, check=turns[-1].check)


def persona(rng: Random, words: Words, effort: Effort) -> Example:
    """A system message gives a name, a job and perhaps a rule; the user asks about them."""
    name, job = words.name(rng), rng.choice(("helper", "guide", "clerk", "teacher", "cook", "guard", "librarian"))
    place = rng.choice(CITIES)
    head = rng.choice((f"You are {name}, a {job} in {place}.", f"Your name is {name}. You are a {job} in {place}."))
    turns = []
    for _ in range(rng.randint(1, 4)):
        question, answer = rng.choice(
            (
                ("Who are you?", f"I am {name}, a {job} in {place}."),
                ("What is your name?", f"My name is {name}."),
                ("What is your job?", f"I am a {job}."),
                ("Where do you work?", f"I work in {place}."),
                ("Hello!", f"Hello! I am {name}. How can I help you?"),
                ("Are you a human?", f"No. I am {name}, a {job}."),
            )
        )
        turns.append(Turn(question, answer, _exact(answer), f"I am {name}.", f"The system says: {head}"))
    messages = (system(head), *_messages(turns[-1:] if effort != "none" else turns, effort))
    return Example("persona", messages, effort=effort, check=turns[-1].check)
