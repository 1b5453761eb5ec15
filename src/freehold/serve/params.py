"""From request fields to sampling parameters: defaults, and the rules between fields. For chat and completions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from freehold.errors import InvalidRequest
from freehold.types import SamplingParams

if TYPE_CHECKING:
    from freehold.serve.schema import SamplingRequest
    from freehold.serve.state import ServerState


def sampling_params(
    request: SamplingRequest, state: ServerState, *, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    """What the engine is asked for. Raises InvalidRequest for what no range in the schema can say."""
    defaults = state.sampling
    vocab_size = state.engine.config.vocab_size
    check_token_ids("logit_bias", request.logit_bias or (), vocab_size)
    check_token_ids("stop_token_ids", request.stop_token_ids or (), vocab_size)
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens ({min_tokens}) is more than max_tokens ({max_tokens})", param="min_tokens")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=defaults.temperature if request.temperature is None else request.temperature,
        top_p=defaults.top_p if request.top_p is None else request.top_p,
        top_k=max(0, defaults.top_k if request.top_k is None else request.top_k),
        min_p=defaults.min_p if request.min_p is None else request.min_p,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        repetition_penalty=defaults.repetition_penalty
        if request.repetition_penalty is None
        else request.repetition_penalty,
        logit_bias=request.logit_bias or {},
        seed=request.seed,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs,
    )


def check_stream_options(request: SamplingRequest) -> None:
    """Raises InvalidRequest for options that only make sense in a stream, or not in one."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest("prompt_logprobs is not available with stream: true", param="prompt_logprobs")


def check_token_ids(param: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raises InvalidRequest if any id is not in the vocabulary."""
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{param}: token id {token_id} is not in the vocabulary (0 to {vocab_size - 1})", param=param
            )


def wants_running_usage(request: SamplingRequest) -> bool:
    """Whether every chunk has the usage so far, as vLLM and SGLang have it: only together with the last one."""
    return wants_usage(request) and bool(request.stream_options and request.stream_options.continuous_usage_stats)


def wants_usage(request: SamplingRequest) -> bool:
    """Whether a stream ends with a usage chunk."""
    return request.stream_options is not None and bool(request.stream_options.include_usage)
