"""The words engine and serve share: what is asked of a generation, and what comes back.

Torch-free and JSON-free. Everything here is frozen; a change is a new object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal


class FinishReason(StrEnum):
    """Why a generation ended. (`tool_calls` is a reading of the text, made in `serve`.)"""

    STOP = "stop"  # an end-of-sequence or stop token (or, decided in serve, a stop string)
    LENGTH = "length"  # max_tokens or the context length was reached
    ABORT = "abort"  # the caller went away, or the engine is shutting down
    ERROR = "error"  # the engine failed on this request; the chunk carries the error


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool that a guided generation may call: its name and the JSON schema of its arguments."""

    name: str
    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Guide:
    """A structure that the generated text must have (structured output).

    kind:
        `json_object`  any JSON object;
        `json_schema`  a JSON value that `schema` accepts;
        `tool_call`    one or more calls of `tools` in GLM's tool grammar.
    thinking: generation starts inside `<think>`; the structure begins after `</think>`.
    parallel: with `tool_call`, whether more than one call may be made.
    """

    kind: Literal["json_object", "json_schema", "tool_call"]
    schema: Mapping[str, Any] | None = None
    tools: tuple[ToolSpec, ...] = ()
    thinking: bool = False
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Ranges are checked where requests enter (`serve/schema`, `LLM`).

    Stop *strings* are not here: they are matched on text, by `serve/detokenize`.
    """

    max_tokens: int = 16
    min_tokens: int = 0  # end-of-sequence and stop tokens are masked before this many
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    frequency_penalty: float = 0.0  # per occurrence in the output, subtracted from the logit
    presence_penalty: float = 0.0  # once if present in the output
    repetition_penalty: float = 1.0  # divides/multiplies logits of tokens in prompt or output
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: off; 0: the sampled token only; k: and the k best
    prompt_logprobs: int | None = None  # as logprobs, for every prompt token but the first
    guide: Guide | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probability of one token, before temperature and penalties ("raw" logprobs).

    rank is 1 for the most likely token. top: (token id, logprob), most likely first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one generation. Reasoning tokens are part of completion tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens whose cache came from the prefix cache
    draft_proposed: int = 0  # speculative tokens proposed and accepted
    draft_accepted: int = 0


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """What one engine step produced for one request.

    token_ids has one token per step without speculation, up to k+1 with it, and is empty on a final
    chunk that only carries a finish reason (abort, error). logprobs aligns with token_ids.
    prompt_logprobs comes once, on the first chunk: one entry per prompt token, the first None.
    The last chunk of a request, and only it, has finish_reason set. usage is cumulative.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the token that ended it; it is also the last of token_ids
    usage: Usage = field(default_factory=Usage)
    error: Exception | None = None

    def then(self, later: TokenChunk) -> TokenChunk | None:
        """This chunk and the next of the same request as one; None if the next ended it by an error or an abort."""
        if later.error is not None or later.finish_reason is FinishReason.ABORT:
            return None
        logprobs = None if later.logprobs is None else (self.logprobs or ()) + later.logprobs
        return TokenChunk(
            later.request_id,
            self.token_ids + later.token_ids,
            self.logprobs if logprobs is None else logprobs,
            self.prompt_logprobs if later.prompt_logprobs is None else later.prompt_logprobs,
            later.finish_reason,
            later.stop_token_id,
            later.usage,
        )
