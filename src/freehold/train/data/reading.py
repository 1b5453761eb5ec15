"""Questions about a story, and descriptions of given things. Torch-free."""

from __future__ import annotations

from random import Random

from freehold.train.data.example import Effort, Example, assistant, user
from freehold.train.data.stories import Plot, article, plot, tell
from freehold.train.data.thinking import thinking
from freehold.train.data.words import Words


def questions(p: Plot) -> list[tuple[str, str, str]]:
    """What can be asked of every story of a plot: question, answer, and the words in the story that say so."""
    h, f = p.hero, p.friend
    return [
        (f"Who is {h.name}?", f"{h.name} is {article(h.trait)} {h.kind}.", f"{h.name} {h.trait} {h.kind}"),
        (f"What kind of animal or person is {f.name}?", f"{f.name} is {article(f.kind)}.", f"{f.name} {f.kind}"),
        (f"Where does {f.name} live?", f"{f.name} lives in the {p.away}.", f"{f.name} {p.away}"),
        (f"What does {h.name} have?", f"{h.name} has {article(p.colour)} {p.thing}.", f"{h.name} {p.colour} {p.thing}"),
        (f"What colour is the {p.thing}?", f"The {p.thing} is {p.colour}.", f"{p.colour} {p.thing}"),
        (f"Who had the {p.colour} {p.thing} first?", f"{h.name} had the {p.colour} {p.thing} first.", h.name),
        (f"Who lives in the {p.away}?", f"{f.name} lives in the {p.away}.", f"{f.name} {p.away}"),
    ]


def make(rng: Random, words: Words, effort: Effort) -> Example:
    """A story and questions about it."""
    p = plot(rng, words)
    asked = rng.sample(questions(p), rng.randint(2, 5))
    if effort != "none":
        asked = asked[-1:]
    story = tell(rng, p)
    messages = []
    for i, (question, answer, said) in enumerate(asked):
        thoughts = thinking(effort, f"The question: {question}", f"The story says: {said}.", f"It fits: {answer}")
        messages += [user(f"{story}\n\n{question}" if i == 0 else question), assistant(answer, thinking=thoughts)]
    return Example("reading", tuple(messages), effort=effort, check={"type": "equals", "value": asked[-1][1]})


def description(rng: Random, words: Words, effort: Effort) -> Example:
    """A description of a thing, a place or someone, made of what the request says."""
    p = plot(rng, words)
    h = p.hero
    if rng.random() < 0.5:
        subject = f"{article(p.colour)} {p.thing} in the {p.home}"
        answer = " ".join(
            (
                rng.choice((f"In the {p.home} is {article(p.colour)} {p.thing}.", f"The {p.thing} is {p.colour}.")),
                rng.choice((f"The {p.thing} belongs to someone.", f"The {p.colour} {p.thing} is old and good.")),
                rng.choice((f"It has been in the {p.home} for years.", f"Nobody in the {p.home} knows who made it.")),
            )
        )
        values = [p.thing, p.colour, p.home]
    else:
        subject = f"{h.name}, {article(h.trait)} {h.kind} from the {p.home}"
        answer = " ".join(
            (
                f"{h.name} is {article(h.trait)} {h.kind}.",
                rng.choice((f"{h.They} lives in the {p.home}.", f"{h.They} comes from the {p.home}.")),
                rng.choice((f"{h.name} likes {p.food}.", f"{h.name} does not like the {p.weather}.")),
            )
        )
        values = [h.name, h.kind, h.trait, p.home]
    request = rng.choice((f"Describe {subject}.", f"Write a description of {subject}.", f"Describe {subject} to me."))
    thoughts = thinking(
        effort, f"I describe {subject}.", f"I say: {', '.join(values)}.", f"I need {len(values)}: {', '.join(values)}."
    )
    return Example(
        "description",
        (user(request), assistant(answer, thinking=thoughts)),
        effort=effort,
        check={"type": "contains", "values": values},
    )
