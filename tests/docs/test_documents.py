"""The documentation is whole and current: links lead somewhere, generated parts are up to date, blocks are tested."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from docs.generate import generated, replace_region
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
