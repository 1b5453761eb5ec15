"""The house rules that no linter knows: sizes, docstrings, the drawn layout, words that do not belong here."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.source_checks import (
    FORBIDDEN,
    LEFT_OVER,
    MAX_FILE_LINES,
    MAX_FUNCTION_LINES,
    ROOT,
    long_functions,
    matches,
    tracked,
    unexplained_skips,
)

PYTHON = tracked("*.py")
SOURCE = [file for file in PYTHON if file.is_relative_to(ROOT / "src")]


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def problems(found: dict[str, list[str]]) -> str:
    return "\n".join(f"{name}: {', '.join(items)}" for name, items in found.items() if items)


def test_files_are_short() -> None:
    lengths = {relative(file): len(file.read_text().splitlines()) for file in PYTHON}
    long = {name: [f"{lines} lines"] for name, lines in lengths.items() if lines > MAX_FILE_LINES}
    assert not problems(long), f"over {MAX_FILE_LINES} lines: split by purpose\n{problems(long)}"


def test_functions_are_short() -> None:
    long = problems({relative(file): list(long_functions(file.read_text())) for file in PYTHON})
    assert not long, f"over {MAX_FUNCTION_LINES} lines\n{long}"


def test_the_function_length_check_finds_a_long_function() -> None:
    body = "    x = 1\n" * MAX_FUNCTION_LINES
    assert list(long_functions(f"def f():\n{body}")) == [f"f ({MAX_FUNCTION_LINES + 1} lines)"]
    assert list(long_functions("class C:\n  @property\n  async def f(self):\n" + body)) == [
        f"f ({MAX_FUNCTION_LINES + 2} lines)"
    ]
    assert not list(long_functions("def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)))


def test_every_file_says_what_it_is_for() -> None:
    silent = [relative(file) for file in PYTHON if not ast.get_docstring(ast.parse(file.read_text()))]
    assert not silent, f"no docstring: {silent}"


def test_every_module_postpones_annotations() -> None:
    # An `__init__` with only a docstring has nothing to annotate.
    texts = {relative(file): file.read_text() for file in PYTHON}
    missing = [
        name
        for name, text in texts.items()
        if len(ast.parse(text).body) > 1 and "from __future__ import annotations" not in text
    ]
    assert not missing, f"no `from __future__ import annotations`: {missing}"


def test_every_folder_of_the_package_is_a_package() -> None:
    # setuptools leaves a folder without __init__.py out of the wheel.
    folders = {file.parent for file in SOURCE}
    missing = [relative(folder) for folder in folders if not (folder / "__init__.py").exists()]
    assert not missing


def test_unit_tests_mirror_the_package() -> None:
    packages = {folder.name for folder in (ROOT / "src" / "freehold").iterdir() if (folder / "__init__.py").exists()}
    folders = {file.parent.name for file in tracked("tests/unit/*/*.py") if file.parent.parent.name == "unit"}
    assert folders <= packages, f"tests/unit has folders that src/freehold has not: {folders - packages}"


def test_no_words_of_the_place_it_was_written_in() -> None:
    text_files = [file for file in tracked() if file.suffix not in (".png", ".gz") and file.parent.name != "results"]
    found = {relative(file): matches(FORBIDDEN, file.read_text(errors="replace")) for file in text_files}
    assert not problems(found), problems(found)


def test_nothing_is_left_undone_in_the_source() -> None:
    found = problems({relative(file): matches(LEFT_OVER, file.read_text()) for file in SOURCE})
    assert not found, found


def test_every_skip_has_a_reason() -> None:
    tests = [file for file in PYTHON if file.is_relative_to(ROOT / "tests")]
    found = problems({relative(file): list(unexplained_skips(file.read_text())) for file in tests})
    assert not found, found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("@pytest.mark.skip\ndef test(): ...", ["line 1"]),
        ("pytest.skip()", ["line 1"]),
        ("x = pytest.mark.xfail(raises=OSError)", ["line 1"]),
        ("pytest.importorskip('x', reason='')", ["line 1"]),
        ("pytest.skip('needs a GPU')", []),
        ("@pytest.mark.skipif(True, reason=f'needs {x}')\ndef test(): ...", []),
    ],
)
def test_the_skip_check_finds_a_skip_without_reason(source: str, found: list[str]) -> None:
    assert list(unexplained_skips(source)) == found


def test_extras_in_error_messages_exist() -> None:
    from freehold.cli.errors import EXTRA_OF

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for module, extra in EXTRA_OF.items():
        wanted = project["optional-dependencies"][extra]
        assert any(line.startswith(module) for line in wanted), f"extra {extra} does not bring {module}"


def third_party_imports(files: list[Path]) -> dict[str, str]:
    """Every imported module that is neither Python's nor ours, and a file that imports it."""
    own = {"freehold", "tests", "docs", *(file.stem for file in tracked("benchmarks/*.py"))}
    found: dict[str, str] = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for module in {name.partition(".")[0] for name in names} - own - sys.stdlib_module_names:
                found[module] = relative(file)
    return found


def undeclared(imports: dict[str, str], declared: list[str]) -> dict[str, str]:
    """The imports that no declared distribution brings; several may share a module, as they do `opentelemetry`."""
    names = {re.split(r"[<>=\s\[]", line)[0].lower() for line in declared}
    brought_by = importlib.metadata.packages_distributions()
    return {
        module: file
        for module, file in imports.items()
        if not names & {re.sub(r"[-_.]+", "-", each).lower() for each in brought_by.get(module, [module])}
    }


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = [line for name, lines in extras.items() if name != "dev" for line in lines]
    run = [*project["dependencies"], *optional]
    for files, declared in ((SOURCE, run), (PYTHON, [*run, *extras["dev"]])):
        missing = undeclared(third_party_imports(files), declared)
        assert not missing, f"imported, but not in pyproject.toml: {missing}"


def test_the_check_of_imports_finds_one_that_is_not_declared() -> None:
    imports = {"pydantic": "a.py", "no_such_module": "b.py"}
    assert undeclared(imports, ["pydantic>=2.9"]) == {"no_such_module": "b.py"}
    assert undeclared({"pydantic": "a.py"}, ["msgspec>=0.19"]) == {"pydantic": "a.py"}


def test_locks_hold_what_pyproject_asks_for_and_no_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for lock, asked in (("run", extras["engine"]), ("dev", extras["engine"] + extras["oracle"] + extras["dev"])):
        text = (ROOT / "requirements" / f"{lock}.txt").read_text()
        pinned = {line.split("==")[0] for line in text.splitlines() if "==" in line}
        for line in [*project["dependencies"], *asked]:
            name = line.split(">")[0].split("=")[0].lower()
            assert name in pinned or name == "torch", f"{name} is not in {lock}.txt: run `make lock`"
        assert "torch" not in pinned
        assert not [word for word in ("://", "--find-links", "--index-url", "file:/") if word in text]
