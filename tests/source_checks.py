"""Reads source text for the house rules that no linter knows. Used by `tests/unit/test_layout.py`."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 79

# Words of the places where this was written; they mean nothing to a reader. Spelt in two so that this file passes.
FORBIDDEN = re.compile("/wo" + r"rk/|\.\./sha" + "red|sub" + "agent|before-" + "stop|/tm" + "p/w/")
LEFT_OVER = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK|NotImplemented" + r"Error)\b")


def tracked(*patterns: str) -> list[Path]:
    """Files git knows or would add, by pathspec; without deleted ones."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [ROOT / name for name in sorted(set(names)) if (ROOT / name).is_file()]


def long_functions(source: str) -> Iterator[str]:
    """`name (lines)` of every function over the limit, decorators and docstring included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines = (node.end_lineno or first) - first + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{node.name} ({lines} lines)"


def unexplained_skips(source: str) -> Iterator[str]:
    """`line N` of every skip or expected failure that states no reason."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {id(call.func) for call in calls}
    for node in ast.walk(tree):
        bare = isinstance(node, ast.Attribute) and id(node) not in called
        if bare and re.fullmatch(r"pytest\.mark\.(skip|xfail)", ast.unparse(node)):
            yield f"line {node.lineno}"
    for call in calls:
        name = ast.unparse(call.func)
        if re.fullmatch(r"pytest\.(mark\.)?(skip|skipif|xfail|importorskip)", name):
            reasons = [keyword.value for keyword in call.keywords if keyword.arg == "reason"]
            if name in ("pytest.skip", "pytest.xfail"):
                reasons += call.args
            if not any(ast.unparse(reason).strip("'\"") for reason in reasons):
                yield f"line {call.lineno}"


def matches(pattern: re.Pattern[str], text: str) -> list[str]:
    """`line N: word` of every match."""
    lines = enumerate(text.splitlines(), 1)
    return [f"line {number}: {found[0]}" for number, line in lines for found in pattern.finditer(line)]
