"""`freehold chat`: talk to a model in the terminal, in this process or on a server."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.console import Console

from freehold.cli.draft_tokens import DraftTokens
from freehold.errors import FreeholdError, InvalidRequest

if TYPE_CHECKING:
    from freehold.background import BackgroundLoop
    from freehold.serve.offline import LLM

API_KEY_VARIABLE = "FREEHOLD_API_KEY"
HELP = """\
/effort off|high|max   how long the model thinks (no word: what its template does by default)
/system TEXT           the system message (no text: none); begins a new conversation
/clear                 begin a new conversation
/help                  this
Ctrl-C stops an answer, Ctrl-D (or /quit) leaves."""

# Control characters in a model's text could move the cursor or recolour the terminal: shown, not obeyed.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(128, 160), 65533)


def chat(
    target: Annotated[
        str | None, typer.Argument(help="A checkpoint directory, or the URL of an API.", show_default=False)
    ] = None,
    sim: Annotated[bool, typer.Option("--sim", help="Talk to canned text, without a model.")] = False,
    system: Annotated[str | None, typer.Option(help="System message.", show_default=False)] = None,
    effort: Annotated[
        str | None, typer.Option(help="Thinking: off, high, max, ...", show_default="the model's")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0: greedy.", show_default="the model's")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Of one answer.", min=1, show_default="what the context has left")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="With a URL: the model to ask for.", show_default="the first it serves")
    ] = None,
    draft_tokens: DraftTokens = None,
) -> None:
    """Chat with a model in the terminal."""
    if sim == (target is not None):
        raise InvalidRequest("give a checkpoint directory or the URL of an API, or --sim to try it without a model")
    if model is not None and (target is None or not _is_url(target)):
        raise InvalidRequest("--model is for a URL")
    if draft_tokens is not None and (target is None or _is_url(target)):
        raise InvalidRequest("--draft-tokens is for a checkpoint directory")
    settings = Settings(system, _effort(effort), temperature, max_tokens)
    with _backend(target or "sim", model, draft_tokens) as backend:
        _Terminal(backend, settings).run()


@dataclass(slots=True)
class Settings:
    """What the person may change between turns. effort: None is the template's default."""

    system: str | None = None
    effort: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None

    def fields(self) -> dict[str, Any]:
        """Of the chat API; only what was set."""
        given = {
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "reasoning_effort": self.effort,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer as it comes; the last one has usage (in the API's names), as far as it is known."""

    content: str = ""
    reasoning: str = ""
    usage: Mapping[str, int] | None = None
    finish_reason: str | None = None
    warnings: tuple[str, ...] = ()


class Backend(Protocol):
    """Where answers come from. keeps_reasoning: thinking may be sent back with the conversation."""

    name: str
    keeps_reasoning: bool

    def answer(self, messages: Sequence[Mapping[str, Any]], settings: Settings) -> Generator[Piece, None, None]:
        """Stream one answer. Closing the generator stops it."""
        ...


class Local:
    """A model in this process."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.name = llm.model_name
        self.keeps_reasoning = True

    def answer(self, messages: Sequence[Mapping[str, Any]], settings: Settings) -> Generator[Piece, None, None]:
        from freehold.serve.turn import ContentDelta, ReasoningDelta, TurnFinished

        stream = self._llm.stream_chat(messages, **settings.fields())
        yield Piece(warnings=stream.warnings)
        with closing(stream):
            for event in stream:
                match event:
                    case ContentDelta():
                        yield Piece(content=event.text)
                    case ReasoningDelta():
                        yield Piece(reasoning=event.text)
                    case TurnFinished():
                        usage = {
                            "prompt_tokens": event.usage.prompt_tokens,
                            "cached_tokens": event.usage.cached_tokens,
                            "completion_tokens": event.usage.completion_tokens,
                            "reasoning_tokens": event.reasoning_tokens,
                        }
                        yield Piece(usage=usage, finish_reason=event.reason)


class Remote:
    """An OpenAI-compatible API."""

    def __init__(self, url: str, loop: BackgroundLoop) -> None:
        from freehold.client import Client

        self._loop = loop
        self._client = Client(url, api_key=os.environ.get(API_KEY_VARIABLE))
        self.name = ""
        self.keeps_reasoning = False  # until it sends any: a server that does knows the field

    def choose(self, model: str | None) -> None:
        """Ask for this model from now on; None: the first that is served."""
        served = [model] if model is not None else self._loop.call(self._client.models())
        if not served:
            raise InvalidRequest(f"{self._client.base_url} serves no model; name one with --model")
        self.name = served[0]

    def close(self) -> None:
        self._loop.call(self._client.close())

    def answer(self, messages: Sequence[Mapping[str, Any]], settings: Settings) -> Generator[Piece, None, None]:
        body = {"model": self.name, "messages": list(messages), **settings.fields()}
        with self._loop.iterate(self._pieces(body)) as pieces:
            yield from pieces

    async def _pieces(self, body: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
        from freehold.client import usage_counts

        async with self._client.stream_chat(body) as stream:
            if warning := stream.headers.get("x-freehold-warning"):
                yield Piece(warnings=(warning,))
            async for chunk in stream:
                self.keeps_reasoning = self.keeps_reasoning or "reasoning_content" in chunk.delta
                usage = None if chunk.usage is None else usage_counts(chunk.usage)
                yield Piece(chunk.content, chunk.reasoning, usage, chunk.finish_reason)


def _is_url(target: str) -> bool:
    return target.startswith(("http://", "https://"))


@contextmanager
def _backend(target: str, model: str | None, draft_tokens: int | None) -> Iterator[Backend]:
    if _is_url(target):
        from freehold.background import BackgroundLoop

        with closing(BackgroundLoop()) as loop, closing(Remote(target, loop)) as remote:
            remote.choose(model)
            yield remote
    else:
        from freehold.serve.offline import LLM

        options: dict[str, Any] = {} if draft_tokens is None else {"num_draft_tokens": draft_tokens}
        with LLM(target, **options) as llm:
            yield Local(llm)


def _effort(word: str | None) -> str | None:
    """The API's value for what a person says."""
    return "none" if word == "off" else word


@dataclass(slots=True)
class _Answer:
    """One answer while it is written to the terminal."""

    write: Callable[[str, bool], None]
    content: str = ""
    reasoning: str = ""
    usage: Mapping[str, int] = field(default_factory=dict)
    finish_reason: str | None = None
    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float | None = None

    def add(self, piece: Piece) -> None:
        if piece.content or piece.reasoning:
            self.last = time.perf_counter()
            self.first = self.first or self.last
        if piece.reasoning:
            self.reasoning += piece.reasoning
            self.write(piece.reasoning, True)
        if piece.content:
            if self.reasoning and not self.content:
                self.write("\n\n", False)
            self.content += piece.content
            self.write(piece.content, False)
        self.usage = piece.usage or self.usage
        self.finish_reason = piece.finish_reason or self.finish_reason

    def summary(self) -> str:
        """Tokens, speed and latency in one line; what is not known is left out."""
        parts = []
        made = self.usage.get("completion_tokens")
        if made is not None:
            thinking = self.usage.get("reasoning_tokens", 0)
            parts.append(f"{made:,} tokens" + (f" ({thinking:,} thinking)" if thinking else ""))
        if self.first is not None and self.last is not None:
            if made is not None and made > 1 and self.last > self.first:
                parts.append(f"{(made - 1) / (self.last - self.first):.1f} tokens/s")
            parts.append(f"first after {self.first - self.started:.2f} s")
        if prompt := self.usage.get("prompt_tokens"):
            cached = self.usage.get("cached_tokens", 0)
            parts.append(f"prompt {prompt:,}" + (f" ({cached:,} cached)" if cached else ""))
        if self.finish_reason == "length":
            parts.append("cut off at the token limit")
        return " · ".join(parts)


class _Terminal:
    """The conversation, and the loop of reading a line and writing an answer."""

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self._backend = backend
        self._settings = settings
        self._messages: list[dict[str, Any]] = []
        self._out = Console(highlight=False, soft_wrap=True, emoji=False)
        self._is_interactive = sys.stdin.isatty() and self._out.is_terminal
        if self._is_interactive:
            with suppress(ImportError):
                import readline  # noqa: F401  gives input() editing and a history

    def run(self) -> None:
        if self._is_interactive:
            self._say(f"{self._backend.name}. /help lists the commands; Ctrl-D leaves.")
        while (line := self._read()) is not None:
            if not line:
                continue
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self._command(line)
                else:
                    self._turn(line)
            except FreeholdError as error:
                if not self._is_interactive:
                    raise
                self._say(f"error: {error.message}")

    def _read(self) -> str | None:
        """A line, None at the end of the input."""
        while True:
            try:
                return input("> " if self._is_interactive else "").strip()
            except EOFError:
                if self._is_interactive:
                    self._out.print()
                return None
            except UnicodeDecodeError as error:
                raise InvalidRequest(
                    f"the input is not all {error.encoding} text: byte 0x{error.object[error.start]:02x} is not; "
                    "convert it (for example with iconv), or set the locale to its encoding"
                ) from None
            except KeyboardInterrupt:
                self._say("\n(Ctrl-D leaves)")

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/clear":
                self._messages.clear()
                self._say("a new conversation")
            case "/system":
                self._settings.system = rest or None
                self._messages.clear()
                self._say("a new conversation, " + ("with that system message" if rest else "without a system message"))
            case "/effort":
                self._settings.effort = _effort(rest or None)
                self._say(f"effort: {rest or 'the default'}")
            case "/help":
                self._say(HELP)
            case _:
                self._say(f"there is no command {name}\n{HELP}")

    def _turn(self, text: str) -> None:
        """Ask, and write the answer as it comes. A stopped answer stays in the conversation as far as it got."""
        self._messages.append({"role": "user", "content": text})
        system = [] if self._settings.system is None else [{"role": "system", "content": self._settings.system}]
        answer = _Answer(self._write)
        stopped = False
        try:
            pieces = self._backend.answer([*system, *self._messages], self._settings)
            with closing(pieces):
                for piece in pieces:
                    for warning in piece.warnings:
                        self._say(f"note: {warning}")
                    answer.add(piece)
        except KeyboardInterrupt:
            stopped = True
        except FreeholdError:
            self._messages.pop()  # so that the same can be asked again
            if answer.content or answer.reasoning:
                self._out.print()
            raise
        self._remember(answer)
        self._out.print()
        summary = answer.summary()
        if stopped:
            self._say("(stopped)" + (f" {summary}" if summary else ""))
        elif self._is_interactive:
            self._say(summary)

    def _remember(self, answer: _Answer) -> None:
        message = {"role": "assistant", "content": answer.content}
        if answer.reasoning and self._backend.keeps_reasoning:
            message["reasoning_content"] = answer.reasoning
        self._messages.append(message)

    def _write(self, text: str, dim: bool) -> None:
        self._out.print(text.translate(_VISIBLE), end="", markup=False, style="dim" if dim else None)

    def _say(self, text: str) -> None:
        self._out.print(text.translate(_VISIBLE), style="dim", markup=False)
