"""Lines that come again: the plainest text in which what was said before foretells what comes next. Torch-free.

A model that learns to go on with a line it has seen has the circuit that every task of copying needs (induction heads,
Olsson et al. 2022); here half of all tokens teach it, in a conversation only the few that an answer takes over.
"""

from __future__ import annotations

from random import Random

from freehold.train.data.example import Effort, Example
from freehold.train.data.words import Words


def make(rng: Random, words: Words, effort: Effort) -> Example:
    """One line of 4 to 24 made-up names, or names and numbers, from two to six times."""
    count = rng.randint(4, 24)
    names = words.several(rng, count)
    if rng.random() < 0.4:
        names = [name if rng.random() < 0.5 else words.code(rng, rng.randint(3, 4)) for name in names]
    times = min(max(2, 60 // count), 6)
    return Example("echo", text=rng.choice(("\n", " ", ". ", ", ")).join([" ".join(names)] * times))
