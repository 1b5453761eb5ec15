"""Settings and requests of a gateway, for tests of where calls go."""

from __future__ import annotations

import json
from typing import Any

from freehold.gateway.call import Caller, Endpoint, Request
from freehold.gateway.config import Settings, parse

SECRET = bytes(range(32))

TOML = """
[upstreams.house]
url = "http://10.0.0.5:8000/v1"
engine = "vllm"
region = "eu-west-1"
speaks = ["chat", "completions", "embeddings"]
data_classes = ["personal", "secret"]
[upstreams.house.models."glm-5.2"]
licence = "MIT"
prices = { input = 0.5, cached_input = 0.1, output = 2.0 }
[upstreams.house.models."glm-5.2-int4"]
licence = "MIT"
prices = { input = 0.25, output = 1.0 }

[upstreams.small]
url = "http://127.0.0.1:8001/v1"
engine = "llamacpp"
region = "eu-central-1"
data_classes = ["personal"]
[upstreams.small.models.tiny]
prices = { input = 0.05, output = 0.1 }

[upstreams.cloud]
url = "https://api.example.com/v1"
provider = "example"
region = "us"
speaks = ["messages"]
data_classes = ["personal"]
note = "Keeps prompts for 30 days."
[upstreams.cloud.models.big]
prices = { input = 3.0, output = 15.0 }

[data_classes.personal]
regions = ["eu"]

[models.assistant]
arms = [{ name = "only", upstream = "house", model = "glm-5.2" }]
fallback = ["api", "cheap"]
[models.api]
arms = [{ name = "only", upstream = "cloud", model = "big" }]
[models.cheap]
arms = [{ name = "only", upstream = "small", model = "tiny", effort = "none" }]
"""

EXPERIMENT = """
[models.split]
arms = [
  { name = "now", upstream = "house", model = "glm-5.2" },
  { name = "next", upstream = "house", model = "glm-5.2-int4" },
]
fallback = ["cheap"]
[experiments.int4]
alias = "split"
control = "now"
canary = "next"
shadow = 0.5
guardrails = [{ metric = "error", margin = 0.01 }]
"""


def settings(more: str = "", base: str = TOML) -> Settings:
    return parse(base + more)


def chat(text: str = "Hello", **fields: Any) -> bytes:
    return json.dumps({"model": "assistant", "messages": [{"role": "user", "content": text}], **fields}).encode()


def request(
    alias: str = "assistant",
    unit: str = "unit",
    *,
    endpoint: Endpoint = "chat",
    caller: Caller | None = None,
    body: bytes | None = None,
    at: float = 1000.0,
    **facts: Any,
) -> Request:
    return Request(
        request_id=facts.pop("request_id", "r"),
        at=at,
        endpoint=endpoint,
        caller=caller or Caller("key"),
        alias=alias,
        body=chat() if body is None else body,
        unit=unit,
        **facts,
    )
