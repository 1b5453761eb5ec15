"""Token ids to text, as they come: whole characters only, and nothing that may yet turn out to be a stop string.

What comes out are pieces in order: ordinary text, or one control token. Their texts concatenate to what decoding the
whole output at once would give, cut at the stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from freehold.model.tokenizer import GLM_SPECIAL_TOKENS, Tokenizer
from freehold.serve.turn import TextToken
from freehold.types import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Piece:
    """Some generated text.

    control: it is one control token (the text is the token's), not text that merely looks like one.
    starts: how many tokens begin here; tokens: those same tokens, if logprobs were asked for.
    """

    text: str
    control: bool = False
    starts: int = 0
    tokens: tuple[TextToken, ...] = ()


class Detokenizer:
    """Decodes one output incrementally.

    stop: strings that end the output. They are matched on the generated text as a whole: reasoning, content and the
        text of control tokens alike, across token borders. Of several matches the one that ends first counts, and of
        those the longest. The text up to the match comes out, or through it with include_stop.
    min_tokens: the text of that many first tokens is not searched.
    stopped: the stop string that matched, else None. After a match nothing more comes out.
    count: tokens taken, up to and with the one that completed a stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(s for s in stop if s)
        self._longest = max(map(len, self._stop), default=0)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._starts = 0  # tokens whose characters are not complete yet
        self._tokens: list[TextToken] = []
        self._held: list[Piece] = []  # decoded, and perhaps the beginning of a stop string
        self.stopped: str | None = None
        self.count = 0

    def feed(self, token_id: int, token: TextToken | None = None) -> list[Piece]:
        """Take one token (with its logprobs, if asked for); the pieces that are now certain."""
        if self.stopped is not None:
            return []
        self.count += 1
        if _is_control(self._tokenizer, token_id):
            self._complete("", end=True)  # a control token breaks off an unfinished character
            tokens = (token,) if token is not None else ()
            self._held.append(Piece(self._tokenizer.token_bytes(token_id).decode("utf-8"), True, 1, tokens))
        else:
            self._starts += 1
            if token is not None:
                self._tokens.append(token)
            self._complete(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return self._release()

    def feed_runs(self, token_ids: Sequence[int]) -> Iterator[Piece]:
        """As `feed`, of tokens without logprobs: what lies between control tokens comes as one piece if it can.

        Tokens are taken as pieces are asked for.
        """
        if self._stop:
            for token_id in token_ids:
                yield from self.feed(token_id)
            return
        run: list[bytes] = []
        for token_id in token_ids:
            if not _is_control(self._tokenizer, token_id):
                run.append(self._tokenizer.token_bytes(token_id))
                continue
            yield from self._decode(run)
            run.clear()
            yield from self.feed(token_id)
        yield from self._decode(run)

    def _decode(self, run: Sequence[bytes]) -> list[Piece]:
        """Take ordinary tokens together."""
        if not run:
            return []
        self.count += len(run)
        self._starts += len(run)
        self._complete(self._decoder.decode(b"".join(run)))
        return self._release()

    def finish(self) -> list[Piece]:
        """The output is over: the pieces still held. An unfinished character is U+FFFD."""
        if self.stopped is not None:
            return []
        self._complete("", end=True)
        found = self._release()
        return found if self.stopped is not None else found + self._take(self._held_length())

    def _complete(self, text: str, *, end: bool = False) -> None:
        """Hold newly decoded text, with the tokens that it took."""
        if end:
            text = self._decoder.decode(b"", final=True)
            self._decoder.reset()
        if text or (end and self._starts):
            self._held.append(Piece(text, False, self._starts, tuple(self._tokens)))
            self._starts, self._tokens = 0, []

    def _release(self) -> list[Piece]:
        if not self._stop or self.count <= self._min_tokens:
            found, self._held = self._held, []
            return found
        text = "".join(piece.text for piece in self._held)
        matches = [(at + len(s), at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if not matches:
            return self._take(len(text) - self._possible_prefix(text))
        end, start, self.stopped = min(matches)
        found = self._take(end if self._include_stop else start)
        self._held = []
        return found

    def _possible_prefix(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(s.startswith(tail) for s in self._stop):
                return length
        return 0

    def _held_length(self) -> int:
        return sum(len(piece.text) for piece in self._held)

    def _take(self, length: int) -> list[Piece]:
        """The first `length` characters of what is held. A control token is never divided: it stays."""
        taken: list[Piece] = []
        while self._held:
            piece = self._held[0]
            if len(piece.text) <= length:
                taken.append(self._held.pop(0))
                length -= len(piece.text)
                continue
            if length > 0 and not piece.control:
                taken.append(Piece(piece.text[:length], False, piece.starts, piece.tokens))
                self._held[0] = Piece(piece.text[length:])
            break
        return taken


def _is_control(tokenizer: Tokenizer, token_id: int) -> bool:
    """Whether a token structures the conversation. A word that someone added to the vocabulary does not."""
    if not tokenizer.is_special(token_id):
        return False
    if tokenizer.token_bytes(token_id).decode("utf-8") in GLM_SPECIAL_TOKENS:
        return True
    return bool(tokenizer.backend.get_added_tokens_decoder()[token_id].special)


def text_token(tokenizer: Tokenizer, logprobs: TokenLogprobs) -> TextToken:
    """A token's logprobs with the texts of the token and of its alternatives (U+FFFD for parts of characters)."""

    def named(token_id: int) -> tuple[str, bytes]:
        bytes_ = tokenizer.token_bytes(token_id)
        return bytes_.decode("utf-8", errors="replace"), bytes_

    text, bytes_ = named(logprobs.token_id)
    return TextToken(text, bytes_, logprobs, tuple((*named(id_), value) for id_, value in logprobs.top))
