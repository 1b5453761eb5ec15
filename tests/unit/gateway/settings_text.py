"""The settings of a small gateway, for tests that need some."""

from __future__ import annotations

from freehold.gateway.config import Settings, parse

SETTINGS = """
[upstreams.local]
url = "http://127.0.0.1:1/v1"
[upstreams.local.models.m]

[models.glm]
max_output_tokens = 100
[[models.glm.arms]]
name = "main"
upstream = "local"
model = "m"

[teams.search]
budget_per_day = 0.5
"""


def settings(more: str = "") -> Settings:
    return parse(SETTINGS + more)
