"""LiteLLM's SDK as a client of a gateway, unchanged but for the base URL, in the environment of its own that
`benchmarks/gateway_vs_litellm.py` makes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from _gateway import KEY, Gateway, alias_table, key_table, upstream, upstream_table
from _peers import litellm_environment

CLIENT = """
import asyncio, json, sys
import litellm
litellm.suppress_debug_info = True
how = {"api_base": sys.argv[1] + "/v1", "api_key": sys.argv[2]}
said = [{"role": "user", "content": "hi"}]
whole = litellm.completion("openai/m", said, **how)
chunks = list(litellm.completion("openai/m", said, stream=True, stream_options={"include_usage": True}, **how))
async def later():
    return await litellm.acompletion("openai/m", said, **how)
embedded = litellm.embedding("openai/m", ["x"], **how)
refused = ""
try:
    litellm.completion("openai/m", said, **(how | {"api_key": "wrong"}))
except litellm.AuthenticationError as error:
    refused = type(error).__name__
print(json.dumps({
    "whole": whole.choices[0].message.content,
    "reasoning": getattr(whole.choices[0].message, "reasoning_content", None),
    "tokens": whole.usage.completion_tokens,
    "stream": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
    "stream_tokens": [chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None)][-1],
    "later": asyncio.run(later()).choices[0].message.content,
    "embedding": embedded.data[0]["embedding"],
    "refused": refused,
}))
"""


@pytest.mark.nightly  # its environment takes a minute or two to make
def test_litellms_sdk(tmp_path: Path) -> None:
    python = litellm_environment() / "python"
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    with upstream() as up:
        up.script("one", tokens=6, reasoning=2)
        speaks = 'speaks = ["chat", "embeddings"]'
        text = upstream_table("one", up.base("one"), more=speaks) + alias_table("m", "one") + key_table()
        with Gateway(tmp_path / "gateway", text) as gateway:
            command = [str(python), "-c", CLIENT, gateway.url, KEY]
            run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "whole": "w2 w3 w4 w5 ",
        "reasoning": "w0 w1 ",
        "tokens": 6,
        "stream": "w2 w3 w4 w5 ",
        "stream_tokens": 6,
        "later": "w2 w3 w4 w5 ",
        "embedding": [0.25, -0.5, 0.125],
        "refused": "AuthenticationError",
    }
