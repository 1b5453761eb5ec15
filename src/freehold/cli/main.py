"""`freehold`: the entry point, and the table of commands.

To add a command:

1.  Write `cli/NAME.py` with one public function named as the command (`-` becomes `_`), annotated for typer:

        def inspect(
            directory: Annotated[Path, typer.Argument(help="A checkpoint directory.", show_default=False)],
            json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
        ) -> None:
            \"\"\"Show what a checkpoint holds, from its headers only.\"\"\"

    It parses, builds a frozen config, calls one function and prints the result. Import torch and anything that
    imports torch inside the function, so that `freehold NAME --help` works without it. Raise `FreeholdError`s and let
    other exceptions go: `cli/errors.py` turns them into one line and an exit code. A missing torch, safetensors or
    llguidance needs no code either: its `ModuleNotFoundError` becomes the line that installs the extra.
2.  Add a line to `COMMANDS`. Its summary is the first line of the function's docstring (a test compares them).
    A group of commands, as `train`, is such a function, which does nothing, in a module with a table `SUBCOMMANDS`:
    name → (module, summary), each with a function of that name. With `RUNS_ALONE = True` its own function does run
    where no sub-command is named, as `plan`; with `DEFAULT = "run"` that sub-command does, as `gateway`.
3.  `make docs`: writes the new options to `tests/golden/cli.txt` and `docs/reference/cli.md`, for review.

Only the command that was asked for is imported: the others stand in the help by their summaries. That keeps
`freehold --help` fast and free of torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer

from freehold import __version__
from freehold.cli.errors import run

COMMANDS: Mapping[str, str] = {
    "serve": "Serve a checkpoint behind an OpenAI-compatible API.",
    "gateway": "One address in front of every engine and API: keys, limits, a row per call, a guarded canary.",
    "chat": "Chat with a model in the terminal.",
    "tiny": "Make a small checkpoint with random weights.",
    "inspect": "Show what a checkpoint holds, from its headers only.",
    "quantize": "Write an int8, int4 or FP8 copy of a checkpoint, and measure it.",
    "debug": "Name the first layer whose output differs from transformers'.",
    "train": "Train a small model, or fine-tune one on your own chats.",
    "plan": "Size a deployment: memory, speed, cost, and how to launch it.",
    "bench": "Measure where time goes, or what 8-bit caches cost in quality.",
}

FIRST_STEPS = """\
Freehold runs GLM-5.2-class open-weight models on hardware you own.

  freehold serve --sim                       the whole API from canned text: no weights, no torch
  freehold tiny models/small --size small    make a small checkpoint (random weights: its text is noise)
  freehold inspect models/small              what is in it
  freehold serve models/small                serve it on http://127.0.0.1:8000/v1
  freehold chat models/small                 or talk to it here

`freehold --help` lists the commands, `freehold COMMAND --help` a command's options.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (`freehold.errors` has the table). Never raises."""
    args = list(sys.argv[1:] if argv is None else argv)
    return run(lambda: _dispatch(args), debug="--debug" in _global_options(args))


def build_app(load: Iterable[str]) -> typer.Typer:
    """The typer application: commands in `load` ("tiny", or "train tiny" in a group) with their options, the others by
    their summaries only.

    Raises ImportError if a command in `load` needs a package that is not installed.
    """
    app = _typer("freehold")
    app.callback(invoke_without_command=True)(_root)
    wanted = set(load)
    for name, summary in COMMANDS.items():
        inside = [words for words in wanted if words.split()[0] == name]
        if inside and (table := subcommands(name)):
            app.add_typer(_group(name, table, wanted), name=name, short_help=summary)
        else:
            app.command(name, short_help=summary)(load_command(name) if inside else _unloaded)
    return app


def load_command(words: str) -> Callable[..., Any]:
    """Import a command's function: `cli/NAME.py` has one of the same name; of a group, the module its table names."""
    name, _, within = words.partition(" ")
    module = subcommands(name)[within][0] if within else f"freehold.cli.{_attribute(name)}"
    function: Callable[..., Any] = getattr(importlib.import_module(module), _attribute(within or name))
    return function


def subcommands(name: str) -> Mapping[str, tuple[str, str]]:
    """The table of a group; empty for a command that is none."""
    table: Mapping[str, tuple[str, str]] = getattr(
        importlib.import_module(f"freehold.cli.{_attribute(name)}"), "SUBCOMMANDS", {}
    )
    return table


def every_command() -> list[str]:
    """The words of all commands, each group followed by its own."""
    return [words for name in COMMANDS for words in (name, *(f"{name} {within}" for within in subcommands(name)))]


def _typer(name: str) -> typer.Typer:
    return typer.Typer(
        name=name,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _group(name: str, table: Mapping[str, tuple[str, str]], wanted: set[str]) -> typer.Typer:
    group = _typer(name)
    alone = getattr(importlib.import_module(f"freehold.cli.{_attribute(name)}"), "RUNS_ALONE", False)
    group.callback(invoke_without_command=alone, no_args_is_help=not alone)(load_command(name))
    for within, (_, summary) in table.items():
        words = f"{name} {within}"
        group.command(within, short_help=summary)(load_command(words) if words in wanted else _unloaded)
    return group


def _attribute(name: str) -> str:
    return name.replace("-", "_")


def _dispatch(args: list[str]) -> None:
    args = _with_default(args)
    words = args[len(_global_options(args)) :]
    asked = words[:1]
    if asked and asked[0] in COMMANDS and words[1:] and words[1] in subcommands(asked[0]):
        asked = [" ".join(words[:2])]
    build_app(load=asked)(args, prog_name="freehold")


def _with_default(args: list[str]) -> list[str]:
    """The sub-command put in that a group runs by default: `gateway FILE` is `gateway run FILE`."""
    at = len(_global_options(args)) + 1
    if args[at - 1 : at] and args[at - 1] in COMMANDS and args[at:] and args[at] not in ("-h", "--help"):
        default = getattr(importlib.import_module(f"freehold.cli.{_attribute(args[at - 1])}"), "DEFAULT", None)
        if default is not None and args[at] not in subcommands(args[at - 1]):
            return [*args[:at], default, *args[at:]]
    return args


def _global_options(args: Sequence[str]) -> list[str]:
    """The options before the command. None of them takes a value."""
    options: list[str] = []
    for arg in args:
        if not arg.startswith("-"):
            break
        options.append(arg)
    return options


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (also: FREEHOLD_DEBUG=1).")] = False,
) -> None:
    """Run GLM-5.2-class open-weight models on hardware you own."""
    if version:
        typer.echo(f"freehold {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(FIRST_STEPS, nl=False)


def _unloaded() -> None:
    """Stands for a command that this run did not ask for."""
    raise AssertionError("the command asked for is always loaded")  # _dispatch loads it by its name


if __name__ == "__main__":
    sys.exit(main())
