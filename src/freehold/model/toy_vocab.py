"""The vocabulary of the toy tokenizer: byte-level BPE merges made by rule, without a corpus. Torch-free.

Random-weight checkpoints need a tokenizer in which every id below the control tokens is a real, reachable piece of
text, in which English is a few tokens a word, and which is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise, product

_DIGRAMS = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri ro ic "
    "ne ea ra ce li ch ll be ma si om ur"
).split()
_WORDS = (
    "the of and to in is that for it you with as on are be this was have not or at by from an we can your what which "
    "will if one they all has there their more when use time so do about other how some no than its were would who "
    "out up into only new our any these may first like then such could make very them over where been most also "
    "after think thought call tool name value answer question number write code function return list string object "
    "true false null error text model data file line word work know need get set find because should way right let "
    "me my he she his her him us people day year good long little see look come go take want give say said just even "
    "back well still here now down own through much before must same both under last never old great small large "
    "high low part point case fact result example problem system program world life hand place week home water room "
    "city weather user message token open close start end begin read key type class import def self print not none"
).split()
_SUFFIXES = "ing ed er s ly ion ation ment ness able ful less ive al ity ous est or ism ist".split()
_SYMBOLS = ("  ", "    ", "        ", "\n\n", *'": ", "} {" [" "] () ): == -> ... -- //'.split())
_ONSETS = "b c d f g h j k l m n p r s t v w br ch cl cr dr fl gr pl pr sh sl sp st str th tr".split()
_VOWELS = "a e i o u ea ai ou oo".split()
_CODAS = " n r s t l d m nd nt st ng ck ss ll".split(" ")


@lru_cache(maxsize=8)
def toy_merges(size: int) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """(pieces, merges): `size` pieces in id order, the first 256 the single bytes, and the merges that make the others.

    A piece is written with one character per byte, U+0000 to U+00FF. Every piece is reachable: encoding its text
    gives that one token (a merge never breaks an earlier piece, because each later merge ranks lower).
    """
    printable = range(0x21, 0x7F)  # first, so that id 0 is "!" as in GLM
    pieces = [chr(byte) for byte in (*printable, *(b for b in range(256) if b not in printable))]
    known = set(pieces)
    ranks: dict[tuple[str, str], int] = {}
    for candidate in _candidates():
        parts = _encode(list(candidate.encode("utf-8").decode("latin-1")), ranks)
        while len(parts) > 1 and len(pieces) < size:
            pair = (parts[0], parts[1])
            ranks[pair] = len(ranks)
            if (piece := pair[0] + pair[1]) not in known:  # another pair may already make it
                known.add(piece)
                pieces.append(piece)
            parts = _apply(parts, pair)
        if len(pieces) >= size:
            break
    return tuple(pieces[:size]), tuple(ranks)


def _candidates() -> Iterator[str]:
    """Texts worth one token, the most useful first; far more than any vocabulary asks for."""
    letters = "etaoinsrhldcumfpgwybvkxjqz"
    yield from _DIGRAMS
    yield from (" " + letter for letter in letters)
    yield from (" " + word for word in _WORDS[:40])
    yield from _SYMBOLS
    yield from _SUFFIXES
    yield from (" " + word for word in _WORDS[40:])
    yield from (" " + word.capitalize() for word in _WORDS)
    yield from (f"{tens}{units}" for tens, units in product("0123456789", repeat=2))
    yield from (first + second for first, second in product(letters, repeat=2))
    yield from (" " + word + suffix for suffix in _SUFFIXES[:4] for word in _WORDS[40:])
    syllables = [onset + vowel + coda for coda, vowel, onset in product(_CODAS, _VOWELS, _ONSETS)]
    yield from syllables
    yield from (" " + syllable for syllable in syllables)
    yield from (f"{number:03d}" for number in range(1000))
    yield from (" " + syllable + suffix for suffix in _SUFFIXES for syllable in syllables)
    yield from (first + second for first in syllables for second in syllables)


def _encode(parts: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: apply the best-ranked merge until none applies."""
    while len(parts) > 1:
        best = min(pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        parts = _apply(parts, best)
    return parts


def _apply(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each occurrence of the pair, from the left."""
    joined: list[str] = []
    i = 0
    while i < len(parts):
        if i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair:
            joined.append(parts[i] + parts[i + 1])
            i += 2
        else:
            joined.append(parts[i])
            i += 1
    return joined
