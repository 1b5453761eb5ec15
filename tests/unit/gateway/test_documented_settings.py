"""The settings that the how-to pages show are settings that a gateway takes, and its tables are those of the code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from freehold.errors import ConfigError
from freehold.gateway.config import Settings, When, parse
from tests.routing import TOML
from tests.source_checks import ROOT

PAGE = ROOT / "docs" / "how-to" / "route-by-policy-and-task.md"
# What the page's blocks take for granted.
AROUND = """
[upstreams.house.models."big-context"]
[models.small]
arms = [{ name = "only", upstream = "small", model = "tiny" }]
[models.long-context]
arms = [{ name = "only", upstream = "house", model = "big-context" }]
"""


def toml_blocks(page: Path) -> list[str]:
    return re.findall(r"^```toml\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """base with the tables of more laid over it."""
    both = {name: merged(base[name], value) for name, value in more.items() if isinstance(value, dict) and name in base}
    return base | more | both


@pytest.mark.parametrize("number", range(len(toml_blocks(PAGE))))
def test_every_block_of_settings_is_valid(number: int) -> None:
    block = toml_blocks(PAGE)[number].replace("…", "0" * 64)
    Settings.model_validate(merged(tomllib.loads(TOML + AROUND), tomllib.loads(block)))


HOW_TO = ROOT / "docs" / "how-to"
# What the blocks of other pages take for granted; the README's has everything.
ROLL_OUT = """
[upstreams.api]
url = "https://api.example.com/v1"
models.big-model = {}
[upstreams.ours]
url = "http://127.0.0.1:8000/v1"
models."glm-5.2" = {}
[models.big-model]
arms = [{ name = "only", upstream = "api", model = "big-model" }]
"""


@pytest.mark.parametrize(
    ("page", "around"),
    [
        (ROOT / "README.md", ""),
        (HOW_TO / "run-a-gateway.md", TOML),
        (HOW_TO / "keys-budgets-and-the-ledger.md", TOML),
        (HOW_TO / "roll-out-a-model.md", ROLL_OUT),
    ],
    ids=lambda each: each.name if isinstance(each, Path) else "",
)
def test_the_settings_of_other_pages_are_valid(page: Path, around: str) -> None:
    blocks = toml_blocks(page)
    assert blocks
    for block in blocks:
        Settings.model_validate(merged(tomllib.loads(around), tomllib.loads(block)))


def test_the_check_finds_a_block_that_is_not() -> None:
    assert len(toml_blocks(PAGE)) >= 5
    wrong = tomllib.loads("[[routes]]\nname = 'x'\nwhen = { modell = ['a'] }\nto = 'small'\n")
    with pytest.raises(ValueError, match="modell"):
        Settings.model_validate(merged(tomllib.loads(TOML + AROUND), wrong))


def test_every_condition_is_documented() -> None:
    table = PAGE.read_text().partition("| condition |")[2].partition("A rule's target")[0]
    assert set(re.findall(r"`([a-z_]+)`", table)) >= set(When.model_fields)


@pytest.mark.parametrize("text", ["a = " + "[" * 5000 + "]" * 5000, "a = " + "9" * 5000])
def test_what_no_parser_can_read_is_a_wrong_file(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)
