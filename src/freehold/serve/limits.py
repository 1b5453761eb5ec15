"""The ranges of sampling parameters, for callers that do not come over HTTP.

The numbers themselves stand in one place, the annotations of `schema.SamplingRequest`: there they are checked while a
request is decoded, and shown in `/openapi.json`. Here a `SamplingParams` is checked against the same ones.
"""

from __future__ import annotations

import dataclasses

from freehold.errors import InvalidRequest
from freehold.serve.params import check_token_ids
from freehold.serve.schema import MaxTokens, SamplingRequest, TopLogprobs
from freehold.serve.wire import decode
from freehold.types import SamplingParams


class _Parameters(SamplingRequest, kw_only=True):
    max_tokens: MaxTokens
    logprobs: TopLogprobs | None = None


def validate_params(params: SamplingParams, vocab_size: int) -> None:
    """Raises InvalidRequest naming the first parameter that is out of its range or contradicts another one."""
    given = {field.name: getattr(params, field.name) for field in dataclasses.fields(params) if field.name != "guide"}
    decode({**given, "logit_bias": dict(params.logit_bias)}, _Parameters, "completions")
    check_token_ids("logit_bias", params.logit_bias, vocab_size)
    check_token_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    if params.min_tokens > params.max_tokens:
        raise InvalidRequest(
            f"min_tokens ({params.min_tokens}) is more than max_tokens ({params.max_tokens})", param="min_tokens"
        )
    if params.guide is not None and params.ignore_eos:
        raise InvalidRequest("ignore_eos cannot be kept with structured output, which has an end", param="ignore_eos")
