"""Ranges of sampling parameters, where they do not come over HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from freehold.errors import InvalidRequest
from freehold.serve.limits import validate_params
from freehold.types import Guide, SamplingParams


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 1.0, "max_tokens": 131_072, "min_tokens": 131_072},
        {"temperature": 2, "frequency_penalty": -2.0, "presence_penalty": 2.0, "repetition_penalty": 2.0},
        {"logit_bias": {0: -100.0, 99: 100}, "stop_token_ids": (99,), "seed": -(2**63)},
        {"logprobs": 0, "prompt_logprobs": 20, "ignore_eos": True, "guide": None},
    ],
)
def test_what_is_in_range_passes(given: dict[str, Any]) -> None:
    validate_params(SamplingParams(**given), 100)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"frequency_penalty": 3.0}, "frequency_penalty"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 131_073}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"logit_bias": {100: 1.0}}, "logit_bias"),
        ({"stop_token_ids": (100,)}, "stop_token_ids"),
        ({"seed": 2**63}, "seed"),
        ({"guide": Guide("json_object"), "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_what_is_not_is_named(given: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate_params(SamplingParams(**given), 100)
    assert caught.value.param is not None
    assert caught.value.param.startswith(param)
    assert param in str(caught.value)


def test_a_bias_out_of_range_is_named() -> None:
    with pytest.raises(InvalidRequest, match="logit_bias"):
        validate_params(SamplingParams(logit_bias={5: 101.0}), 100)
