"""Turns and completions as the endpoints use them: prepare (render, check, count), then run (a stream of events).

Everything about language is behind these two classes; everything about HTTP is in front of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from freehold.errors import ContextTooLong, InvalidRequest, MissingExtra
from freehold.model.chat.conversation import read_tools
from freehold.model.chat.template import ChatTemplate
from freehold.model.tokenizer import Tokenizer
from freehold.serve.reader import TextDelta, TextEvent, TextReader, TurnReader, error_of
from freehold.serve.turn import Event, PreparedTurn, Turn
from freehold.types import Guide, SamplingParams, TokenChunk, ToolSpec

if TYPE_CHECKING:
    from freehold.engine.async_engine import AsyncEngine
    from freehold.engine.guide import GuideCompiler

__all__ = ["MAX_TOKENS", "ChatService", "CompletionService", "TextDelta", "TextEvent"]

MAX_TOKENS = 131_072  # the most that one request may generate

E = TypeVar("E")
E_co = TypeVar("E_co", covariant=True)


class ChatService:
    """Chat turns on one engine. guides: compiles structures to grammars; None where that is not installed."""

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        guides: GuideCompiler | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.template = template.for_tokenizer(tokenizer)
        self.guides = guides

    @property
    def model_name(self) -> str:
        return self.engine.config.model_name

    def prepare(self, turn: Turn) -> PreparedTurn:
        """Render and check a turn. Computes only, so it may run in a thread.

        Raises InvalidRequest (UnknownField, ContextTooLong) naming the field, or MissingExtra.
        """
        if turn.tool_choice == "none":
            turn = replace(turn, tools=())
        elif isinstance(turn.tool_choice, tuple):
            turn = replace(turn, parallel_tool_calls=False)  # a named tool is called, once
        tools = read_tools(turn.tools)
        guide = _guide_of(turn, tools)
        rendered = self.template.render(
            turn.messages, turn.tools, effort=turn.effort, template_kwargs=turn.template_kwargs
        )
        if guide is not None:
            guide = replace(guide, thinking=rendered.thinking)
            _check_guide(guide, self.guides)
        check_bytes(self.engine, self.tokenizer, rendered.text, param="messages")
        prompt = rendered.encode(self.tokenizer)
        max_tokens = turn.params.max_tokens if turn.max_tokens_given else room(self.engine, len(prompt))
        params = replace(turn.params, guide=guide, max_tokens=max_tokens)
        return PreparedTurn(prompt, params, turn, rendered.thinking, rendered.warnings + _strict_warnings(turn))

    def run(self, prepared: PreparedTurn, *, request_id: str, seed_offset: int = 0) -> AsyncGenerator[Event, None]:
        """Generate. The request is submitted here and now, so refusals are raised here and not while streaming.

        seed_offset: which of several answers to the same turn this is. Closing the generator aborts the request.
        A failure of the engine is raised from the generator, after what was produced before it.
        """
        turn = prepared.turn
        reader = TurnReader(
            self.tokenizer,
            thinking=prepared.thinking,
            tools=read_tools(turn.tools),
            parallel=turn.parallel_tool_calls,
            stop=turn.stop,
            include_stop=turn.include_stop,
            min_tokens=prepared.params.min_tokens,
            running_usage=turn.running_usage,
        )
        params = _with_seed(prepared.params, seed_offset)
        source = self.engine.submit(
            request_id, prepared.prompt_token_ids, params, cache_salt=turn.cache_salt, adapter=turn.adapter
        )
        return EventGenerator(source, reader)


class CompletionService:
    """Text completions on one engine."""

    def __init__(self, engine: AsyncEngine, tokenizer: Tokenizer, guides: GuideCompiler | None = None) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.guides = guides

    def run(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        echo: bool = False,
        cache_salt: str | None = None,
        adapter: str | None = None,
        seed_offset: int = 0,
        running_usage: bool = False,
    ) -> AsyncGenerator[TextEvent, None]:
        """Complete a prompt. Submits here and now, as ChatService.run does.

        echo: the first event is a TextDelta of the prompt's text. With params.prompt_logprobs, that same first
        TextDelta (of no text, if it does not echo) carries them. The last event is TurnFinished, whose reason is never
        "tool_calls". Control tokens other than the thinking and tool tags are left out of generated text.
        running_usage: a TextDelta says what has been generated so far.
        """
        if params.guide is not None:
            _check_guide(params.guide, self.guides)
        reader = TextReader(
            self.tokenizer,
            echo=self.tokenizer.decode(prompt_ids) if echo else "",
            stop=stop,
            include_stop=include_stop,
            min_tokens=params.min_tokens,
            running_usage=running_usage,
        )
        params = _with_seed(params, seed_offset)
        source = self.engine.submit(request_id, prompt_ids, params, cache_salt=cache_salt, adapter=adapter)
        return EventGenerator(source, reader)


def check_bytes(engine: AsyncEngine, tokenizer: Tokenizer, text: str, *, param: str) -> None:
    """Refuse a prompt that is too long however it is tokenised, before the time is spent. Raises ContextTooLong."""
    num_bytes = len(text.encode("utf-8", "surrogatepass"))
    fewest, limit = tokenizer.fewest_tokens(num_bytes), engine.config.max_model_len
    if fewest > limit:
        raise ContextTooLong(
            f"the prompt has {num_bytes:,} bytes, which are at least {fewest:,} tokens, and the context length is "
            f"{limit:,}; shorten the prompt",
            param=param,
        )


def room(engine: AsyncEngine, num_prompt_tokens: int) -> int:
    """max_tokens of a request that leaves it open: what the context, or a smaller cache, has left; at most MAX_TOKENS.

    Raises ContextTooLong if the prompt alone fills the context. A prompt that the cache cannot hold gets 1, and the
    engine then says how much memory is missing.
    """
    config = engine.config
    left = config.max_model_len - num_prompt_tokens
    if left < 1:
        raise ContextTooLong(
            f"the prompt has {num_prompt_tokens:,} tokens and the context length is {config.max_model_len:,}, which "
            "leaves no room for an answer; shorten the prompt",
            param="messages",
        )
    cache_left = config.num_blocks * config.block_size - num_prompt_tokens
    return max(1, min(left, cache_left, MAX_TOKENS))


def _guide_of(turn: Turn, tools: Sequence[ToolSpec]) -> Guide | None:
    """The structure that the answer must have. Raises InvalidRequest for choices that contradict each other."""
    choice = turn.tool_choice
    structure = _structure(turn.response_format)
    if choice in ("none", "auto"):
        if structure is not None and tools:
            raise InvalidRequest(
                "response_format cannot be kept while the model may choose to call tools; send tool_choice 'none' or "
                "'required', or leave out tools or response_format",
                param="response_format",
            )
        return structure
    if not tools:
        raise InvalidRequest("tool_choice asks for a call, but tools is empty", param="tool_choice")
    if isinstance(choice, tuple):
        chosen = tuple(tool for tool in tools if tool.name == choice[1])
        if not chosen:
            raise InvalidRequest(f"tool_choice names {choice[1]!r}, which is not among tools", param="tool_choice")
        tools = chosen
    # A response_format applies to content, and an answer that consists of calls has none.
    return Guide("tool_call", tools=tuple(tools), parallel=turn.parallel_tool_calls)


def _structure(response_format: Mapping[str, Any] | None) -> Guide | None:
    if response_format is None:
        return None
    match response_format.get("type"):
        case "text":
            return None
        case "json_object":
            return Guide("json_object")
        case "json_schema":
            wrapper = response_format.get("json_schema")
            schema = wrapper.get("schema") if isinstance(wrapper, Mapping) else None
            if not isinstance(schema, Mapping):
                param = "response_format.json_schema.schema"
                raise InvalidRequest(f"{param}: a JSON schema object is required", param=param)
            return Guide("json_schema", schema=schema)
        case other:
            raise InvalidRequest(
                f"response_format.type: {other!r} is not one of text, json_object, json_schema",
                param="response_format.type",
            )


def _check_guide(guide: Guide, guides: GuideCompiler | None) -> None:
    if guides is None:
        param = "tool_choice" if guide.kind == "tool_call" else "response_format"
        raise MissingExtra(
            f"{param}: structured output needs llguidance, which is not installed: pip install 'freehold[engine]'",
            param=param,
        )
    guides.validate(guide)


def _strict_warnings(turn: Turn) -> tuple[str, ...]:
    if turn.tool_choice != "auto" or not any(tool["function"].get("strict") for tool in turn.tools):
        return ()
    return ("tools.function.strict is enforced only with tool_choice 'required' or a named tool",)


def _with_seed(params: SamplingParams, offset: int) -> SamplingParams:
    return params if params.seed is None or not offset else replace(params, seed=params.seed + offset)


class _Reader(Protocol[E_co]):
    @property
    def finished(self) -> bool: ...

    def read(self, chunk: TokenChunk) -> Sequence[E_co]: ...

    def end(self) -> Sequence[E_co]: ...


class EventGenerator(AsyncGenerator[E, None], Generic[E]):
    """The events that a reader makes of an engine's chunks.

    Closing it, or cancelling a task that waits on it, closes the engine's generator, which aborts the request; so does
    a reader that has finished before the engine. A class and not a generator function: a generator that was never
    started would not notice that it is closed.
    """

    def __init__(self, source: AsyncGenerator[TokenChunk, None], reader: _Reader[E]) -> None:
        self._source = source
        self._reader = reader
        self._ready: deque[E] = deque()
        self._error: Exception | None = None
        self._closed = False

    async def asend(self, value: None) -> E:
        while not self._ready:
            if self._error is not None:
                error, self._error, self._closed = self._error, None, True
                raise error
            if self._closed or self._reader.finished:
                raise StopAsyncIteration
            await self._read()
        return self._ready.popleft()

    async def _read(self) -> None:
        try:
            chunk = await anext(self._source, None)
        except BaseException:
            self._closed = True
            raise
        if chunk is None:
            self._ready.extend(self._reader.end())
            return
        self._ready.extend(self._reader.read(chunk))
        self._error = error_of(chunk)
        if self._reader.finished or self._error is not None:
            await self._source.aclose()  # before the last events are out: blocks are free even if nobody takes them

    async def athrow(self, typ: Any, val: BaseException | object = None, tb: TracebackType | None = None) -> E:
        await self.aclose()
        error = val if isinstance(val, BaseException) else typ if isinstance(typ, BaseException) else typ()
        raise error.with_traceback(tb)

    async def aclose(self) -> None:
        self._closed = True
        self._ready.clear()
        self._error = None
        await self._source.aclose()
