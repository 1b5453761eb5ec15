"""Rows to fill ledgers with."""

from __future__ import annotations

import time
from typing import Any

from freehold.gateway.identity import new_id
from freehold.ledger import Row

NOON = (time.time() // 86_400 - 1) * 86_400 + 43_200  # yesterday: it has passed, and its calls may still run
FULL = {
    "attempt": 1,
    "team": "search",
    "unit": "u1",
    "conversation": "c1",
    "user": "p1",
    "model_id": "glm-5.2-fp8",
    "upstream": "local",
    "replica": "http://10.0.0.1:8000/v1",
    "engine": "vllm 0.32",
    "weights": "sha256:aa",
    "prompt_name": "summarise",
    "prompt_version": "7",
    "task": "summary",
    "effort": "high",
    "route": "long",
    "would": "cheap",
    "streamed": True,
    "data_class": "internal",
    "experiment": "glm",
    "arm": "canary",
    "served_arm": "control",
    "shadow_of": "r0",
    "warm_up": True,
    "status": 200,
    "error": "cut",
    "finish_reason": "length",
    "input_tokens": 10,
    "cached_tokens": 4,
    "output_tokens": 20,
    "reasoning_tokens": 5,
    "undelivered_tokens": 3,
    "counted": "upstream",
    "cost": 123,
    "ttft": 0.25,
    "itl_p50": 0.01,
    "itl_p99": 0.02,
    "tpot": 0.012,
    "duration": 1.5,
}


def row(**changes: Any) -> Row:
    """A row of key `k`; every field that is not given has its default."""
    fields = {"row_id": new_id(), "request_id": "r", "at": NOON, "endpoint": "chat", "key_id": "k", "alias": "glm"}
    return Row(**{**fields, **changes})


def full_row(**changes: Any) -> Row:
    """A row none of whose fields has its default."""
    return row(**{**FULL, **changes})
