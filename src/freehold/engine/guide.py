"""Structured output: compiles a `Guide` to a token mask that llguidance computes before each sample. Torch-free.

llguidance is imported when the first guide is compiled: an engine that serves no structured output does not need it.
`engine/grammar.py` writes the grammars.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from freehold.engine.grammar import grammar_of
from freehold.errors import EngineError, InvalidRequest, MissingExtra
from freehold.model.tokenizer import Tokenizer
from freehold.types import Guide

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_CACHED_GRAMMARS = 128
_LONGEST_CAUSE = 300
_LONGEST_SCHEMA = 1 << 20  # characters
_LEXER_FUEL = 200_000  # bounds the time to compile at about a second; a hundred tools of ten arguments take half of it


class GuideState:
    """Where one generation stands in its structure. Used from one thread.

    After the structure is complete only end-of-sequence tokens are allowed; they never are before.
    """

    def __init__(self, matcher: LLMatcher, end_token_ids: Sequence[int], vocab_size: int) -> None:
        self._matcher = matcher
        self._end_token_ids = frozenset(end_token_ids)
        self._vocab_size = vocab_size
        self._has_ended = False

    @property
    def is_finished(self) -> bool:
        """Nothing but an end-of-sequence token can follow."""
        return self._has_ended or bool(self._matcher.is_stopped())

    def fill_mask(self) -> NDArray[np.uint8]:
        """Which tokens may come next: ceil(V / 8) bytes, bit t % 8 (lowest first) of byte t // 8 for token t.

        Ids without a token are never allowed. Raises EngineError if the structure cannot be continued.
        """
        size = -(-self._vocab_size // 8)
        if self._has_ended:
            return _mask_of(self._end_token_ids, size)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)[:size]
        if self._matcher.is_error():
            raise EngineError(f"structured output cannot continue: {_cause(self._matcher.get_error())}")
        return bits

    def accept(self, token_id: int) -> None:
        """Take note of the chosen token. Raises EngineError if the structure does not allow it."""
        if self._has_ended and token_id in self._end_token_ids:
            return
        # The matcher stops by itself where nothing can follow, and then takes no end token any more.
        if token_id in self._end_token_ids and self._matcher.is_accepting():
            self._has_ended = True
        elif self._has_ended or not self._matcher.consume_token(token_id):
            cause = _cause(self._matcher.get_error())
            raise EngineError(f"token {token_id} is not allowed by the requested structure{cause and ': '}{cause}")


class GuideCompiler:
    """Compiles guides for one tokenizer. Safe to use from several threads; compiled grammars are kept."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = tuple(eos_token_ids)
        self._lock = threading.Lock()
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()
        self._ll_tokenizer: LLTokenizer | None = None

    def validate(self, guide: Guide) -> None:
        """Check that a guide can be followed, before any token is computed, and keep what was compiled.

        Raises InvalidRequest with the cause if not, MissingExtra if llguidance is not installed. Milliseconds, but up
        to a second for enormous schemas, and for the first guide with a vocabulary of 154,880.
        """
        self._prototype(guide)

    def compile(self, guide: Guide) -> GuideState:
        """A fresh state for one generation. Raises as `validate`."""
        matcher = self._prototype(guide)
        return GuideState(matcher.deep_copy(), self._eos_token_ids, self._tokenizer.vocab_size)

    def _prototype(self, guide: Guide) -> LLMatcher:
        """The matcher at its start, from the cache or new; never advanced."""
        try:
            tools = [(tool.name, tool.schema) for tool in guide.tools]
            key = json.dumps((guide.kind, guide.schema, tools, guide.thinking, guide.parallel), ensure_ascii=False)
            key.encode("utf-8")  # half a character is JSON, but no text
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"the schema is not JSON: {error}", param=_param(guide)) from None
        if len(key) > _LONGEST_SCHEMA:
            raise InvalidRequest(f"the schema is longer than {_LONGEST_SCHEMA:,} characters", param=_param(guide))
        with self._lock:
            if key in self._matchers:
                self._matchers.move_to_end(key)
                return self._matchers[key]
        self._tokens()  # first of all: it says so if llguidance is missing
        grammar = grammar_of(guide, self._tokenizer.special_id)
        for part in grammar.to_try:
            self._matcher(part, guide)
        matcher = self._matcher(grammar.lark, guide)
        with self._lock:
            self._matchers[key] = matcher
            if len(self._matchers) > _CACHED_GRAMMARS:
                self._matchers.popitem(last=False)
        return matcher

    def _matcher(self, lark: str, guide: Guide) -> LLMatcher:
        tokens = self._tokens()
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(initial_lexer_fuel=_LEXER_FUEL)
        matcher = LLMatcher(tokens, LLMatcher.grammar_from_lark(lark), log_level=0, limits=limits)
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        problem = matcher.get_error() or "; ".join(matcher.get_grammar_warnings())
        if problem or not any(mask):
            cause = _cause(problem) or "no output satisfies it"
            raise InvalidRequest(f"this schema cannot be enforced: {cause}", param=_param(guide))
        return matcher

    def _tokens(self) -> LLTokenizer:
        with self._lock:
            if self._ll_tokenizer is None:
                self._ll_tokenizer = _ll_tokenizer(self._tokenizer, self._eos_token_ids)
            return self._ll_tokenizer


class _Vocabulary:
    """A tokenizer in the shape that llguidance asks for. All control tokens are special: text never matches them,
    even where tokenizer.json does not mark them so."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> None:
        ids = range(tokenizer.vocab_size)
        self.eos_token_id = eos_token_ids[0]
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(i) for i in ids]
        self.special_token_ids = [i for i in ids if tokenizer.is_special(i)]
        self._encode = tokenizer.encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8"), special=False)


def _ll_tokenizer(tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> LLTokenizer:
    try:
        import llguidance
    except ModuleNotFoundError:
        raise MissingExtra("structured output needs llguidance: pip install 'freehold[engine]'") from None
    wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, eos_token_ids))
    return llguidance.LLTokenizer(wrapper, eos_token=list(eos_token_ids))


def _mask_of(token_ids: frozenset[int], size: int) -> NDArray[np.uint8]:
    mask = np.zeros(size, dtype=np.uint8)
    for token_id in token_ids:
        mask[token_id // 8] |= 1 << (token_id % 8)
    return mask


def _cause(message: Any) -> str:
    """One line of an llguidance message, without the excerpt, the state and the backtrace that it appends."""
    line = " ".join(re.split(r"<state>|<backtrace>|\bpanic:|\n *\d+ \| ", str(message))[0].split())
    if line.startswith("NoExtension"):  # its word for a grammar at an end that is not an end
        return "no output satisfies it"
    return line if len(line) <= _LONGEST_CAUSE else f"{line[:_LONGEST_CAUSE]}…"


def _param(guide: Guide) -> str:
    return "tools" if guide.kind == "tool_call" else "response_format"
