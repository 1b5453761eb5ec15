"""A language whose next token is certain, but only from far back in the text: songs.

A song is a few stanzas, sung over and over in one order. A stanza is a name (A to P) and its words (a to z and 0 to 5).
Every song draws its own names and words, so nothing can be known by heart; and a word stands in several stanzas of a
song, so the last token alone does not say what follows: name and word together do, by where they stood before.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np

from freehold.model.toy_vocab import toy_merges

NAMES = "ABCDEFGHIJKLMNOP"
WORDS = string.ascii_lowercase + "012345"


def token_ids(text: str) -> list[int]:
    """Ids of single characters in the toy tokenizer, whose first 256 tokens are the single bytes."""
    pieces, _ = toy_merges(256)
    return [pieces.index(character) for character in text]


@dataclass(frozen=True)
class Songs:
    """Draws songs. stanzas: names in a song; words: of a stanza, after its name."""

    stanzas: int = 9
    words: int = 9

    @property
    def period(self) -> int:
        """Tokens from one singing of a song to the next."""
        return self.stanzas * (self.words + 1)

    def draw(self, count: int, length: int, seed: int) -> np.ndarray:
        """[count, length] token ids, int64; each row is a song from its beginning, repeated."""
        generator = np.random.default_rng(seed)
        names, words = np.array(token_ids(NAMES)), np.array(token_ids(WORDS))
        rows = []
        for _ in range(count):
            order = generator.permutation(names)[: self.stanzas]
            song = [t for name in order for t in (name, *generator.permutation(words)[: self.words])]
            rows.append(np.resize(song, length))
        return np.stack(rows).astype(np.int64)
