"""From the engine's words to the wire's: usage, logprobs, finish reasons. For chat and completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from freehold import __version__
from freehold.errors import Unavailable
from freehold.serve.schema import (
    CompletionTokensDetails,
    FinishReasonWord,
    PromptLogprob,
    PromptLogprobs,
    PromptTokensDetails,
    TokenLogprob,
    TopLogprob,
    UsageBody,
)
from freehold.serve.turn import SoFar, TextToken, TurnFinished
from freehold.types import Usage

FINGERPRINT = f"freehold-{__version__}"
LOWEST_LOGPROB = -9999.0  # JSON has no infinity; this is what OpenAI and vLLM send


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def usage_body(prompts: Iterable[Usage], completions: Iterable[tuple[Usage, int]]) -> UsageBody:
    """Sum up an answer. prompts: one usage per prompt, however many choices it has. completions: one usage and its
    reasoning tokens per choice."""
    prompt_tokens = cached = completion_tokens = reasoning = proposed = accepted = 0
    for usage in prompts:
        prompt_tokens += usage.prompt_tokens
        cached += usage.cached_tokens
    for usage, thought in completions:
        completion_tokens += usage.completion_tokens
        reasoning += thought
        proposed += usage.draft_proposed
        accepted += usage.draft_accepted
    return UsageBody(
        prompt_tokens,
        completion_tokens,
        prompt_tokens + completion_tokens,
        PromptTokensDetails(cached),
        CompletionTokensDetails(reasoning, accepted, proposed - accepted),
    )


def usage_so_far(choices: Sequence[SoFar]) -> UsageBody:
    """Of an answer to one prompt that is still being written."""
    return usage_body([choices[0].usage], [(each.usage, each.reasoning_tokens) for each in choices])


def token_logprob(token: TextToken) -> TokenLogprob:
    """One generated token in the chat API's shape."""
    return TokenLogprob(
        token.text,
        finite(token.logprobs.logprob),
        list(token.bytes_),
        [TopLogprob(text, finite(logprob), list(raw)) for text, raw, logprob in token.top_text],
    )


def prompt_logprobs_body(tokens: Sequence[TextToken | None], k: int | None = None) -> PromptLogprobs:
    """vLLM's shape: per position a map from token id to its logprob, the prompt's own token first.

    k: how many of the best to show besides it; all there are by default.
    """
    return [None if token is None else _candidates(token, k) for token in tokens]


def _candidates(token: TextToken, k: int | None) -> dict[str, PromptLogprob]:
    own = token.logprobs
    found = {str(own.token_id): PromptLogprob(finite(own.logprob), own.rank, token.text)}
    best = list(zip(own.top, token.top_text, strict=True))[:k]
    for rank, ((token_id, logprob), (text, _, _)) in enumerate(best, start=1):
        found.setdefault(str(token_id), PromptLogprob(finite(logprob), rank, text))
    return found


def finish_reason(finished: TurnFinished) -> FinishReasonWord:
    """Raises Unavailable for a turn that the server cut off: half an answer must not look like a whole one."""
    if finished.reason == "abort":
        raise Unavailable("the server stopped before the answer was complete; send it again", retry_after=1)
    return finished.reason
