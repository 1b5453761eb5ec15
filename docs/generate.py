"""Writes everything in the documents that is generated from the code: `make docs`. A test compares it with the files.

Each entry of `PAGES` makes one whole file, each of `REGIONS` the text between `<!-- NAME -->` and `<!-- /NAME -->`
in a file that is otherwise written by hand.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from typer.testing import CliRunner

from freehold import errors
from freehold.cli.main import build_app, every_command
from freehold.model.chat import effort
from freehold.serve.fields import FIELDS
from freehold.train.card import card, newest_results

ROOT = Path(__file__).resolve().parent.parent
TRAINED = ROOT / "models" / "freehold-tiny"
PACKAGE = ROOT / "src" / "freehold"
ENDPOINTS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
    "tokenize": "/tokenize",
    "detokenize": "/detokenize",
}
NOTE = "<!-- Made by `make docs` from {source}; do not edit. -->\n\n"


def generated() -> dict[Path, str]:
    """Every file that has generated text, with the content it should have."""
    pages, regions = dict(PAGES), dict(REGIONS)
    if TRAINED.is_dir():
        pages[f"{TRAINED.relative_to(ROOT)}/README.md"] = trained_card
        regions["README.md", "transcript"] = trained_transcript
    files = {ROOT / path: make() for path, make in pages.items()}
    for (path, name), make in regions.items():
        file = ROOT / path
        text = files.get(file) or file.read_text()
        files[file] = replace_region(text, name, make())
    return files


def replace_region(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of region `name` replaced. Raises ValueError without markers."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"expected one region <!-- {name} --> … <!-- /{name} -->")
    return pattern.sub(lambda match: match[1] + content + match[2], text)


# ---- command line


def cli_surface() -> str:
    """One line for every command, argument and option, with its type and default: what must not change unnoticed.

    Read from the help, which is typer's public face; the texts are left out, they may change freely.
    """
    lines: list[str] = []
    for words, text in help_pages(width=200):
        lines.append(" ".join(["freehold", *words]))
        lines += [" ".join(["freehold", *words, entry]) for entry in surface_lines(text)]
    return "\n".join(lines) + "\n"


def surface_lines(text: str) -> Iterator[str]:
    """The entries of the sections Arguments and Options of a help page, without their explanations."""
    in_section = False
    entries: list[str] = []
    for line in text.splitlines():
        if line and not line.startswith(" "):
            in_section = line in ("Arguments:", "Options:")
        elif in_section and re.match(r"  \S", line):
            entries.append(line)
        elif in_section and line:
            entries[-1] += "  " + line.strip()  # a long name has its explanation on the next lines
    for entry in entries:
        name, _, explanation = entry.strip().partition("  ")
        facts = re.findall(r"\[(?:default: |required|[\d.x]+[<>]).*?\](?=\s|$)", explanation)
        if name != "-h, --help":
            yield " ".join([name, *facts])


def help_pages(width: int) -> Iterator[tuple[list[str], str]]:
    """The words of each command, and its help."""
    runner, app = CliRunner(), build_app(load=every_command())
    for words in ([], *(command.split() for command in every_command())):
        result = runner.invoke(
            app, [*words, "--help"], prog_name="freehold", terminal_width=width, max_content_width=width
        )
        if result.exit_code != 0:
            raise RuntimeError(f"freehold {' '.join(words)} --help failed: {result.output}{result.exception}")
        yield words, result.output


def cli_reference() -> str:
    """The help of every command, as a page."""
    parts = [NOTE.format(source="the command line's own help") + "# Command line\n"]
    for words, text in help_pages(width=100):
        parts.append(f"## {' '.join(['freehold', *words])}\n\n```text\n{text.strip()}\n```\n")
    return "\n".join(parts)


# ---- errors


def error_table() -> str:
    """Every error class: HTTP status, exit code, `error.type` and `error.code`."""
    rows = ["| error | HTTP status | exit code | `error.type` | `error.code` |", "|---|---|---|---|---|"]
    for cls, depth in error_tree(errors.FreeholdError, 0):
        indent = "&nbsp;&nbsp;" * depth
        rows.append(f"| {indent}`{cls.__name__}` | {cls.status} | {cls.exit_code} | `{cls.type}` | `{cls.code}` |")
    return "\n".join(rows) + "\n"


def error_tree(cls: type[errors.FreeholdError], depth: int) -> Iterator[tuple[type[errors.FreeholdError], int]]:
    yield cls, depth
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from error_tree(child, depth + 1)


# ---- API


def fields_tables() -> str:
    """A table per endpoint of `serve/fields.py`: the fields that are known but not acted on."""
    parts = []
    for endpoint, rules in FIELDS.items():
        rows = [f"## {ENDPOINTS[endpoint]}\n", "| field | what happens | why | changes nothing |", "|---|---|---|---|"]
        for path, rule in sorted(rules.items()):
            harmless = ", ".join(f"`{json.dumps(value)}`" for value in rule.harmless)
            rows.append(f"| `{path}` | {rule.action} | {rule.why} | {harmless} |")
        parts.append("\n".join(rows) + "\n")
    return "\n" + "\n".join(parts) + "\n"


# ---- the gateway


def gateway_reference() -> str:
    """Every table and key of its settings."""
    from docs.settings import settings_reference

    return NOTE.format(source="the classes in `src/freehold/gateway/config.py`") + settings_reference()


# ---- the trained model


def trained_card() -> str:
    """Its model card, from the newest results of `benchmarks/tiny_model.py`."""
    return card(TRAINED, newest_results(ROOT / "benchmarks" / "results"))


def trained_transcript() -> str:
    """What it answers."""
    from docs.transcript import transcript  # it imports torch, which is not needed for the rest

    return transcript(TRAINED)


# ---- layout


def layout_tree() -> str:
    """The tree of the package: every file with the first sentence of its docstring."""
    return "```text\n" + "\n".join(["src/freehold/", *tree_lines(PACKAGE, 1)]) + "\n```\n"


def tree_lines(folder: Path, depth: int) -> list[str]:
    """A folder's files, then its folders, in order of name."""
    lines: list[str] = []
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(("__pycache__", "."))]
    for entry in sorted(entries, key=lambda entry: entry.is_dir()):
        if entry.is_dir() and any(entry.rglob("*.*")):
            about = summary(entry / "__init__.py") if (entry / "__init__.py").exists() else ""
            lines.append(tree_line(f"{entry.name}/", about, depth))
            lines += tree_lines(entry, depth + 1)
        elif entry.suffix == ".py" and entry.name != "__init__.py":
            lines.append(tree_line(entry.name, summary(entry), depth))
        elif entry.is_file() and entry.suffix not in (".py", ".pyc", ".so") and entry.name != "py.typed":
            lines.append(tree_line(entry.name, "", depth))
    return lines


def tree_line(name: str, about: str, depth: int) -> str:
    return f"{'  ' * depth + name:<28} {about}".rstrip()


def summary(file: Path) -> str:
    """The first sentence of a module's docstring, on one line, without its full stop."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    first = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[a-z)`\"])\.\s", first)[0].rstrip(".:")


PAGES: Mapping[str, Callable[[], str]] = {
    "tests/golden/cli.txt": cli_surface,
    "docs/reference/cli.md": cli_reference,
    "docs/reference/gateway.md": gateway_reference,
}
REGIONS: Mapping[tuple[str, str], Callable[[], str]] = {
    ("ARCHITECTURE.md", "tree"): layout_tree,
    ("docs/reference/errors.md", "errors"): error_table,
    ("docs/reference/fields.md", "fields"): fields_tables,
    ("docs/how-to/control-thinking.md", "effort"): effort.as_markdown,
}


def main() -> int:
    sys.path.insert(0, str(ROOT))  # for its neighbours
    for path, content in generated().items():
        if not path.exists() or path.read_text() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
