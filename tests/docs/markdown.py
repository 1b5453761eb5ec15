"""Reads the documentation: code blocks with how they are tested, links, headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.source_checks import ROOT, tracked

RUNNABLE = ("bash", "sh", "python", "console")
# How a block is tested, said by a comment just before it:
#   <!-- test: server -->         run against a live server, whose address and model replace those in the block
#   <!-- test: here -->           run in a folder that has models/small
#   <!-- test: in turn -->        a page's blocks of this kind are run in one empty folder, from top to bottom
#   <!-- test: in turn, serves URL -->  one of these that goes on in the background, until URL/ready answers
#   <!-- test: make -->           every `make TARGET` in it is a target of the Makefile
#   <!-- test: no, REASON -->     not run
MODES = ("server", "here", "in turn", "make", "no")


@dataclass(frozen=True)
class Block:
    """A fenced code block. mode: one of MODES, or '' if nothing says how it is tested."""

    file: Path
    line: int
    language: str
    mode: str
    text: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def documents() -> list[Path]:
    return tracked("*.md")


def blocks(file: Path) -> Iterator[Block]:
    """The runnable blocks of a document."""
    pattern = re.compile(r"(?:<!-- test: ([^\n]*?) -->\n)?^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    text = file.read_text()
    for match in pattern.finditer(text):
        mode, language, code = match.groups(default="")
        if language in RUNNABLE:
            yield Block(file, text[: match.start(2)].count("\n") + 1, language, mode, code)


def all_blocks(mode: str | None = None) -> list[Block]:
    found = [block for file in documents() for block in blocks(file)]
    return [block for block in found if mode is None or block.mode.partition(",")[0] == mode]


def local_links(file: Path) -> Iterator[str]:
    """The targets of a document's relative links and images."""
    prose = re.sub(r"^```.*?^```$", "", file.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(file: Path) -> set[str]:
    """The anchors of a document's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(file: Path) -> list[str]:
    """The relative links that lead nowhere."""
    broken = []
    for target in local_links(file):
        path, _, anchor = target.partition("#")
        other = (file.parent / path).resolve() if path else file
        if not other.exists() or (anchor and other.suffix == ".md" and anchor not in anchors(other)):
            broken.append(target)
    return broken
