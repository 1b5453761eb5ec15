"""The documentation is whole and current: links lead somewhere, generated parts are up to date, blocks are tested."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from docs.generate import generated, replace_region
from docs.settings import section, settings_reference
from tests.docs.markdown import MODES, Block, all_blocks, broken_links, documents
from tests.source_checks import ROOT


def test_generated_parts_are_up_to_date() -> None:
    stale = [str(path.relative_to(ROOT)) for path, text in generated().items() if path.read_text() != text]
    assert not stale, f"run `make docs` and review: {stale}"


def test_a_region_is_replaced_and_a_missing_one_is_an_error() -> None:
    text = "a\n<!-- t -->\nold\n<!-- /t -->\nb"
    assert replace_region(text, "t", "new\n") == "a\n<!-- t -->\nnew\n<!-- /t -->\nb"
    with pytest.raises(ValueError, match="other"):
        replace_region(text, "other", "new")


def test_the_settings_reference_has_every_key_and_takes_none_without_words() -> None:
    text = settings_reference()
    for words in (
        "## `[upstreams.NAME.models.MODEL.prices]`",
        "| `flush_ms` | integer > 0, ≤ 200 | `100` |",
        "| `fallback` | list of names |",
        "| `url` | string |",
        "| `steps` | list of numbers ≥ 0, ≤ 1 | `0.05`, `0.25`, `0.5`, `1.0` |",
        "## `[[experiments.NAME.guardrails]]`",
    ):
        assert words in text

    class Told(BaseModel):
        """Something."""

        key: int = Field(1, description="What it does.")

    class Silent(BaseModel):
        """Something."""

        key: int = 1

    class Nameless(BaseModel):
        key: int = Field(1, description="What it does.")

    assert "| `key` | integer | `1` | What it does. |" in section("[told]", Told)
    with pytest.raises(ValueError, match=r"Silent\.key has no description"):
        section("[silent]", Silent)
    with pytest.raises(ValueError, match="Nameless has no docstring"):
        section("[nameless]", Nameless)


@pytest.mark.parametrize("document", documents(), ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    assert not broken_links(document)


def test_the_link_check_finds_a_broken_link(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title here\n[a](page.md#title-here) [b](#nowhere) [c](none.md) [d](https://example.org)\n")
    assert broken_links(page) == ["#nowhere", "none.md"]


def test_every_block_says_how_it_is_tested() -> None:
    silent = [str(block) for block in all_blocks() if block.mode.partition(",")[0] not in MODES]
    assert not silent, f"precede with <!-- test: {'|'.join(MODES)} -->: {silent}"
    unexplained = [str(block) for block in all_blocks("no") if not block.mode.partition(",")[2].strip()]
    assert not unexplained, f"<!-- test: no --> needs a reason: {unexplained}"


@pytest.mark.parametrize("block", all_blocks("make"), ids=str)
def test_make_targets_exist(block: Block) -> None:
    targets = re.findall(r"^make ([a-z]+)", block.text, re.MULTILINE)
    assert targets
    for target in targets:
        found = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr


def test_continuous_integration_runs_the_documented_test_command() -> None:
    commands = [
        line
        for line in (ROOT / ".ci" / "run").read_text().splitlines()
        if line and not line.startswith(("#", "set ", "cd ", "export "))
    ]
    assert commands == ["make test"]
    assert "make test" in (ROOT / "README.md").read_text()
