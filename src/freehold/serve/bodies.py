"""From the engine's words to the wire's: usage, logprobs, prompt logprobs. For chat and completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from freehold import __version__
from freehold.serve.schema import (
    CompletionTokensDetails,
    PromptLogprob,
    PromptLogprobs,
    PromptTokensDetails,
    TokenLogprob,
    TopLogprob,
    UsageBody,
)
from freehold.types import TokenLogprobs, Usage

if TYPE_CHECKING:
    from freehold.model.tokenizer import Tokenizer
    from freehold.serve.turn import TextToken

FINGERPRINT = f"freehold-{__version__}"
LOWEST_LOGPROB = -9999.0  # JSON has no infinity; this is what OpenAI and vLLM send


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def usage_body(prompts: Iterable[Usage], completions: Iterable[tuple[Usage, int]]) -> UsageBody:
    """Sum up an answer. prompts: one usage per prompt, however many choices it has. completions: one usage and its
    reasoning tokens per choice."""
    prompt_tokens = cached = completion_tokens = reasoning = 0
    for usage in prompts:
        prompt_tokens += usage.prompt_tokens
        cached += usage.cached_tokens
    for usage, thought in completions:
        completion_tokens += usage.completion_tokens
        reasoning += thought
    return UsageBody(
        prompt_tokens,
        completion_tokens,
        prompt_tokens + completion_tokens,
        PromptTokensDetails(cached),
        CompletionTokensDetails(reasoning),
    )


def token_logprob(token: TextToken) -> TokenLogprob:
    """One generated token in the chat API's shape."""
    return TokenLogprob(
        token.text,
        finite(token.logprobs.logprob),
        list(token.bytes_),
        [TopLogprob(text, finite(logprob), list(raw)) for text, raw, logprob in token.top_text],
    )


def prompt_logprobs_body(entries: Sequence[TokenLogprobs | None], tokenizer: Tokenizer) -> PromptLogprobs:
    """vLLM's shape: per position a map from token id to its logprob, the prompt's own token first."""

    def candidate(token_id: int, logprob: float, rank: int) -> PromptLogprob:
        return PromptLogprob(finite(logprob), rank, tokenizer.token_bytes(token_id).decode("utf-8", "replace"))

    def position(entry: TokenLogprobs) -> dict[str, PromptLogprob]:
        found = {str(entry.token_id): candidate(entry.token_id, entry.logprob, entry.rank)}
        for rank, (token_id, logprob) in enumerate(entry.top, start=1):
            found.setdefault(str(token_id), candidate(token_id, logprob, rank))
        return found

    return [None if entry is None else position(entry) for entry in entries]
