"""`LLM`: generation from Python without a server, by the same path as over HTTP.

    from freehold import LLM

    with LLM("models/small") as llm:
        print(llm.generate("Once upon a time")[0].text)
        print(llm.chat([{"role": "user", "content": "Hello"}], effort="high")[0].content)
        for event in llm.stream_chat([{"role": "user", "content": "And then?"}]):
            ...

Requests pass the same checks, services and engine as those of `freehold serve`; only JSON and sockets are missing. All
of it runs on a private event loop, so an `LLM` also works in notebooks and may be used from several threads.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import itertools
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from freehold.background import BackgroundLoop, LoopIterator
from freehold.errors import FreeholdError, InvalidRequest, UnknownField
from freehold.serve.answers import ChatResult, ChatWriter, Completion, CompletionWriter
from freehold.serve.progress import loading_progress, request_progress
from freehold.serve.turn import Event, PreparedTurn
from freehold.types import SamplingParams

if TYPE_CHECKING:
    from freehold.engine.async_engine import AsyncEngine
    from freehold.engine.engine import Engine
    from freehold.engine.sim import SimConfig
    from freehold.model.chat.template import ChatTemplate
    from freehold.model.tokenizer import Tokenizer
    from freehold.serve.state import SamplingDefaults, ServerState

T = TypeVar("T", Completion, ChatResult)
J = TypeVar("J")
Message = Mapping[str, Any]
OnError = Literal["raise", "return"]

_SIM_OPTIONS = frozenset(
    ("model_name", "max_model_len", "block_size", "max_num_seqs", "max_num_batched_tokens", "max_queue",
     "enable_prefix_cache", "adapters")
)  # fmt: skip
_SAMPLING_FIELDS = frozenset(field.name for field in dataclasses.fields(SamplingParams)) | {
    "max_completion_tokens", "top_logprobs",
}  # fmt: skip
_HTTP_FIELDS = frozenset(("model", "n", "stream", "stream_options"))  # of the chat API, and without a meaning here
_DEFAULT_MAX_TOKENS = 16  # of `generate`, as of /v1/completions


class LLM:
    """A model in this process.

    model: a checkpoint directory, or "sim" for the simulated engine, which needs no torch and says canned things.
    profile: the built-in chat template to use where the checkpoint has none. sim: how "sim" behaves.
    progress: bars on stderr while weights load and while many prompts run; only ever on a terminal.
    lora: directories of adapters by name, for `adapter` of a call. options: fields of `engine.loading.EngineOptions`,
    such as max_model_len, dtype, cache_bytes and threads.

    Sampling parameters that are not given come from the checkpoint's generation_config.json, as on a server.
    Raises ConfigError, CheckpointError, InsufficientMemory or MissingExtra with one line that says what to do.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        profile: str = "glm-5.2",
        sim: SimConfig | None = None,
        progress: bool = True,
        lora: Mapping[str, str | Path] | None = None,
        **options: Any,
    ) -> None:
        self._progress = progress
        if lora is not None:
            options["lora"] = tuple((name, Path(directory)) for name, directory in lora.items())
        self._state = _open(model, profile, sim, options, progress)
        self._ids = itertools.count()
        self._loop = BackgroundLoop("freehold-llm")
        self._finalizer = weakref.finalize(self, _shut_down, self._loop, self._state.engine)
        config = self._state.engine.config
        self._width = config.max_num_seqs + config.max_queue  # what the engine takes before it refuses
        self._slots = asyncio.Semaphore(self._width)
        try:
            self._loop.call(_start(self._state.engine))
        except BaseException:
            self.close()
            raise

    @property
    def model_name(self) -> str:
        return self._state.model_name

    @property
    def tokenizer(self) -> Tokenizer:
        return self._state.chat.tokenizer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Abort what runs, end the engine and give its memory back; idempotent. Also done when Python ends."""
        self._finalizer()

    # ── text ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stop: str | Sequence[str] = (),
        adapter: str | None = None,
        on_error: OnError = "raise",
    ) -> list[Completion]:
        """Continue texts; results are in the order of the prompts, whatever order they finish in.

        prompts: a text, a list of texts, a list of token ids, or several of those. params: for all, or one for each
        (default: the checkpoint's, and 16 tokens). stop: strings to stop before. adapter: the name of the one to use.
        on_error: what a failure of one prompt while it runs does: "raise" ends all, "return" puts it in that result's
        `error`.

        All prompts are checked before any runs: InvalidRequest, NotFound (no such adapter), ContextTooLong or
        InsufficientMemory come at once.
        """
        prompt_ids = self._prompt_ids(prompts)
        if isinstance(params, SamplingParams) or params is None:
            every = [params or self._defaults()] * len(prompt_ids)
        else:
            every = list(params)
        if len(every) != len(prompt_ids):
            raise InvalidRequest(f"there are {len(prompt_ids)} prompts and {len(every)} params", param="params")
        stops = _strings(stop)
        for ids, own in zip(prompt_ids, every, strict=True):
            self._check(ids, own, adapter)
        jobs = list(zip(prompt_ids, every, strict=True))

        async def complete(job: tuple[tuple[int, ...], SamplingParams]) -> Completion:
            source = self._state.completion.run(
                job[0], job[1], request_id=self._request_id(), stop=stops, adapter=adapter
            )
            writer = CompletionWriter()
            async with aclosing(source):
                async for event in source:
                    writer.add(event)
            return writer.result()

        return self._map("generating", complete, jobs, Completion.failed, on_error)

    # ── chat ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        on_error: OnError = "raise",
        **fields: Any,
    ) -> list[ChatResult]:
        """Answer a conversation, or each of a list of them; results are in their order.

        messages and fields: as in the chat API (`tools`, `response_format`, `temperature`, `max_tokens`, ...); `effort`
        is short for `reasoning_effort`. What is not given is as on a server: the checkpoint's sampling, and as many
        tokens as fit. params: all sampling parameters at once instead, max_tokens included. adapter: the name of the
        one to use.

        Raises as `generate`. What is not honoured, such as an effort the template does not know, is in `warnings`.
        """
        single = not messages or isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if single else list(messages)
        turns = [self._prepare(conversation, params, fields, adapter) for conversation in conversations]

        async def answer(prepared: PreparedTurn) -> ChatResult:
            source = self._state.chat.run(prepared, request_id=self._request_id())
            writer = ChatWriter(prepared.warnings)
            async with aclosing(source):
                async for event in source:
                    writer.add(event)
            return writer.result()

        return self._map("answering", answer, turns, ChatResult.failed, on_error)

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        **fields: Any,
    ) -> ChatStream:
        """The events of one answer as they come: ReasoningDelta, ContentDelta, ToolCallStart, ..., TurnFinished.

        Arguments as of `chat`; what is wrong with them is raised here. Close the iterator, or leave its `with` block,
        to stop the answer.
        """
        prepared = self._prepare(messages, params, fields, adapter)
        return ChatStream(self._loop, self._stream(prepared), prepared)

    async def _stream(self, prepared: PreparedTurn) -> AsyncGenerator[Event, None]:
        async with self._slots:
            source = self._state.chat.run(prepared, request_id=self._request_id())
            async with aclosing(source):
                async for event in source:
                    yield event

    # ── what both share ───────────────────────────────────────────────────────────────────────────────────────────────

    def _defaults(self) -> SamplingParams:
        from freehold.serve.params import sampling_params
        from freehold.serve.schema import SamplingRequest

        return sampling_params(SamplingRequest(), self._state, max_tokens=_DEFAULT_MAX_TOKENS, logprobs=None)

    def _prompt_ids(self, prompts: Any) -> list[tuple[int, ...]]:
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        found = [tuple(self.tokenizer.encode(given) if isinstance(given, str) else given) for given in prompts]
        if not all(isinstance(token, int) for prompt in found for token in prompt):
            raise InvalidRequest("a prompt must be a text or a list of token ids", param="prompts")
        return found

    def _prepare(
        self, messages: Any, params: SamplingParams | None, fields: Mapping[str, Any], adapter: str | None
    ) -> PreparedTurn:
        """Through the same decoding as a request's body, so that the same is accepted and the same refused."""
        from freehold.serve.chat_turn import to_turn
        from freehold.serve.schema import ChatRequest
        from freehold.serve.wire import decode

        given = {("reasoning_effort" if name == "effort" else name): value for name, value in fields.items()}
        twice = [] if params is None else [name for name in given if name in _SAMPLING_FIELDS]
        if twice:
            raise InvalidRequest(f"{twice[0]}: give it in params or by itself, not both", param=twice[0])
        for name in given.keys() & _HTTP_FIELDS:
            raise UnknownField(f"{name} is for requests over HTTP only", param=name)
        decoded = decode(copy.deepcopy({"messages": list(messages), **given}), ChatRequest, "chat")
        turn = dataclasses.replace(to_turn(decoded.value, self._state), adapter=adapter)
        if params is not None:
            turn = dataclasses.replace(turn, params=params, max_tokens_given=True)
        prepared = self._state.chat.prepare(turn)
        prepared = dataclasses.replace(prepared, warnings=decoded.warnings + prepared.warnings)
        self._check(prepared.prompt_token_ids, prepared.params, adapter)
        return prepared

    def _check(self, prompt_token_ids: Sequence[int], params: SamplingParams, adapter: str | None) -> None:
        from freehold.serve.limits import validate_params

        engine = self._state.engine.engine
        validate_params(params, engine.config.vocab_size)
        if params.guide is not None and (guides := self._state.completion.guides) is not None:
            guides.validate(params.guide)
        engine.check_prompt(prompt_token_ids)
        engine.check_adapter(adapter)
        engine.check(len(prompt_token_ids), params)

    def _request_id(self) -> str:
        return f"llm-{next(self._ids)}"

    def _map(
        self,
        description: str,
        work: Callable[[J], Awaitable[T]],
        jobs: Sequence[J],
        failed: Callable[[FreeholdError], T],
        on_error: OnError,
    ) -> list[T]:
        """Run all jobs, as many at a time as the engine takes, and return their results in order."""
        results: dict[int, T] = {}
        waiting = enumerate(jobs)
        with request_progress(description, len(jobs), enabled=self._progress) as advance:

            async def worker() -> None:
                for index, job in waiting:
                    async with self._slots:
                        try:
                            results[index] = await work(job)
                        except FreeholdError as error:
                            if on_error == "raise":
                                raise
                            results[index] = failed(error)
                    advance(results[index])

            self._loop.call(_together([worker() for _ in range(min(self._width, len(jobs)))]))
        return [results[index] for index in range(len(jobs))]


class ChatStream(LoopIterator[Event]):
    """The events of one answer. warnings: what was not honoured; prompt_token_ids: the rendered conversation."""

    def __init__(self, loop: BackgroundLoop, source: AsyncGenerator[Event, None], prepared: PreparedTurn) -> None:
        super().__init__(loop, source)
        self.warnings = prepared.warnings
        self.prompt_token_ids = prepared.prompt_token_ids


async def _start(engine: AsyncEngine) -> None:
    await engine.start()
    await engine.warm_up()


async def _together(workers: Sequence[Any]) -> None:
    """Wait for all; the first failure cancels the others, which aborts their requests."""
    tasks = [asyncio.ensure_future(worker) for worker in workers]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _shut_down(loop: BackgroundLoop, engine: AsyncEngine) -> None:
    # When Python is ending, no thread may be started any more, not even to wait for the engine's: it has ended by then.
    with suppress(RuntimeError):
        loop.call(engine.close())
    loop.close()


def _open(
    model: str | Path, profile: str, sim: SimConfig | None, options: Mapping[str, Any], progress: bool
) -> ServerState:
    """The services that a server would have."""
    from freehold.model.chat.template import ChatTemplate
    from freehold.model.config import GlmConfig
    from freehold.serve.state import SamplingDefaults

    engine: Engine
    if model == "sim":
        from freehold.engine.sim import build_sim_engine

        _check_names(options, _SIM_OPTIONS, 'LLM("sim")')
        engine, tokenizer = build_sim_engine(sim, **options)
        return _services(engine, tokenizer, ChatTemplate.builtin(profile), SamplingDefaults())
    if sim is not None:
        raise InvalidRequest('sim is for LLM("sim") only', param="sim")
    directory = Path(model)
    GlmConfig.from_file(directory)  # what is no checkpoint is found out before torch is imported
    template, sampling = ChatTemplate.from_dir(directory, profile=profile), SamplingDefaults.from_dir(directory)
    from freehold.engine.loading import EngineOptions, build_engine

    _check_names(options, {field.name for field in dataclasses.fields(EngineOptions)}, "LLM()")
    with loading_progress(enabled=progress) as advance:
        engine, tokenizer = build_engine(directory, EngineOptions(**options), advance)
    return _services(engine, tokenizer, template, sampling)


def _services(engine: Engine, tokenizer: Tokenizer, template: ChatTemplate, sampling: SamplingDefaults) -> ServerState:
    from freehold.engine.async_engine import AsyncEngine
    from freehold.engine.guide import GuideCompiler
    from freehold.serve.service import ChatService, CompletionService
    from freehold.serve.state import ServerState

    async_engine = AsyncEngine(engine)
    guides = GuideCompiler(tokenizer, engine.config.eos_token_ids)
    return ServerState(
        chat=ChatService(async_engine, tokenizer, template, guides),
        completion=CompletionService(async_engine, tokenizer, guides),
        model_names=(engine.config.model_name,),
        sampling=sampling,
    )


def _check_names(given: Mapping[str, Any], known: Any, what: str) -> None:
    for name in given:
        if name not in known:
            raise UnknownField(f"{what} has no option {name!r}; it has {', '.join(sorted(known))}", param=name)


def _strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) and text for text in strings):
        raise InvalidRequest("stop strings must not be empty", param="stop")
    return strings
