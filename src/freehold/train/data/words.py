"""The words that examples are made of, and which of them belong to the test split. Torch-free.

Names, made-up words and codes are spelled from syllables and digits. A hash of the spelling decides the split: one in
`SHARE` is shown only by the test split, so that a test asks for words that training never contained, while their
syllables and digits (the pieces a tokenizer sees) are common to both. Plain English words are shared.
"""

from __future__ import annotations

import zlib
from random import Random
from typing import Literal

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
SHARE = 8  # one spelling in so many belongs to the test split

_ONSETS = "b d f g h k l m n p r s t v".split()
_VOWELS = "a e i o u".split()
_CODAS = ("n", "r", "l")
SYLLABLES = tuple(onset + vowel + coda for onset in _ONSETS for vowel in _VOWELS for coda in _CODAS)


def split_of(spelling: str) -> Split:
    """The split that may show this made-up word or code; upper and lower case belong together."""
    return "test" if zlib.crc32(f"freehold {spelling.lower()}".encode()) % SHARE == 0 else "train"


class Words:
    """Draws words of one split. Stateless: the generator of random numbers is the caller's.

    short: made-up words have one syllable, for training a tokenizer whose pieces of such words are their syllables.
    """

    def __init__(self, split: Split, *, short: bool = False) -> None:
        self.split = split
        self.short = short

    def coined(self, rng: Random, syllables: int = 0) -> str:
        """A made-up lower-case word of so many syllables; 0 for two or, sometimes, three."""
        if self.short:
            return rng.choice(SYLLABLES)
        count = syllables or (2 if rng.random() < 0.8 else 3)
        while True:
            word = "".join(rng.choices(SYLLABLES, k=count))
            if split_of(word) == self.split and word not in ENGLISH:
                return word

    def name(self, rng: Random) -> str:
        """A made-up proper name."""
        return self.coined(rng).capitalize()

    def code(self, rng: Random, digits: int = 4) -> str:
        """A number of so many digits (3 or more), the first of them not 0."""
        while True:
            code = str(rng.randrange(10 ** (digits - 1), 10**digits))
            if split_of(code) == self.split:
                return code

    def several(self, rng: Random, count: int, *, names: bool = True) -> list[str]:
        """So many different names, or lower-case words."""
        found: dict[str, None] = {}
        while len(found) < count:
            word = self.coined(rng)
            if self.short and count > len(SYLLABLES) // 4:  # more than there are: still no piece of two syllables
                word += " " + self.coined(rng)
            found[word.capitalize() if names else word] = None
        return list(found)


COLOURS = "red blue green white black yellow brown grey pink purple orange golden silver".split()
ANIMALS = (
    "fox bear hare owl cat dog mouse goat horse sheep duck goose wolf frog crow deer hen pig cow lamb mole otter "
    "badger sparrow beetle turtle"
).split()
PEOPLE = (
    "girl boy woman man baker farmer sailor teacher miller doctor painter gardener king queen cook shepherd "
    "weaver potter singer hunter clerk guard"
).split()
TRAITS = (
    "small old young brave shy clever kind quiet tired hungry proud lonely happy careful lazy curious gentle "
    "merry honest stubborn cheerful patient"
).split()
PLACES = (
    "forest village garden river hill market castle cave harbour mill farm valley lake tower bridge meadow island "
    "school kitchen barn library workshop station orchard"
).split()
OBJECTS = (
    "key lamp book ring cup map coat bell drum box rope hat boat basket spoon mirror knife flute ball blanket "
    "letter stone coin candle ladder bucket kite wheel clock chair"
).split()
FOODS = "bread soup cheese apple honey cake pear plum nut fish rice milk berry carrot egg onion pie tea".split()
WEATHER = "rain snow wind sun fog frost storm cloud".split()
CITIES = "Paris London Rome Berlin Madrid Oslo Vienna Lisbon Dublin Prague Athens Cairo Tokyo Delhi Lima Seoul".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
ENGLISH = frozenset(
    word.lower()
    for words in (COLOURS, ANIMALS, PEOPLE, TRAITS, PLACES, OBJECTS, FOODS, WEATHER, CITIES, DAYS, MONTHS)
    for word in words
)
