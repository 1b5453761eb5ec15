"""`freehold serve`: from options to a running server, over a checkpoint or over the simulated engine."""

from __future__ import annotations

import logging
import math
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freehold.cli.cache_as import IndexCacheOption, LatentCacheOption, Stored
from freehold.cli.draft_tokens import DraftTokens
from freehold.cli.quantize_as import QuantizeAs
from freehold.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from freehold.cli.timings import StartClock
    from freehold.engine.engine import Engine
    from freehold.engine.sim import Fault
    from freehold.model.chat.template import ChatTemplate
    from freehold.model.tokenizer import Tokenizer


class Dtype(StrEnum):
    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Profile(StrEnum):
    AUTO = "auto"
    GLM_5_2 = "glm-5.2"
    GLM_5_3 = "glm-5.3"


ModelNames = Annotated[
    list[str] | None,
    typer.Option(help="Name of the model in the API; repeat it for aliases.", show_default="the directory's"),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(help="API keys, one a line. The variable FREEHOLD_API_KEY has one more.", show_default=False),
]
ProfileOption = Annotated[
    Profile, typer.Option(help="Chat template: auto is the checkpoint's own, the others are built in.")
]
MaxModelLen = Annotated[int | None, typer.Option(help="Context length in tokens.", min=2, show_default="the model's")]
CacheBytes = Annotated[
    str | None, typer.Option(help="Memory for the cache, such as 4GiB.", show_default="half of what is free")
]
SaltPerKey = Annotated[bool, typer.Option("--salt-per-key", help="Do not share the prefix cache between API keys.")]
Verify = Annotated[bool, typer.Option("--verify", help="Check SHA256SUMS before loading; reads every byte once more.")]
Timings = Annotated[bool, typer.Option("--timings", help="Print how long each part of the start took.")]
DrainTimeout = Annotated[float, typer.Option(help="Seconds that running requests have to finish after SIGTERM.", min=0)]
Sim = Annotated[bool, typer.Option("--sim", help="Serve canned text without a model, to test clients with.")]
PrefillMs = Annotated[float, typer.Option(help="--sim: milliseconds for each 1,000 prompt tokens.", min=0)]
Faults = Annotated[
    list[str] | None,
    typer.Option(
        help="--sim: 'KIND [after=TOKENS] [seconds=S] [every=REQUESTS]'; KIND is error, crash, stall or slow.",
        show_default=False,
    ),
]

ExpertMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory for routed experts, such as 24GB; the rest stays on disk, in a file made at the first start.",
        show_default="all are held",
    ),
]
ExpertDir = Annotated[
    Path | None,
    typer.Option(help="--expert-memory: where that file is.", show_default=".freehold in the checkpoint's"),
]

Lora = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=DIRECTORY of an adapter (PEFT's files) that requests choose by model name; repeat it for more. "
        "With --sim: NAME.",
        show_default=False,
    ),
]

_FOR_MODEL = (
    "--cache-bytes, --expert-memory, --threads, --dtype, --index-cache, --latent-cache, --draft-tokens, --quantize "
    "and --verify"
)


def serve(
    directory: Annotated[Path | None, typer.Argument(help="A checkpoint directory.", show_default=False)] = None,
    host: Annotated[str, typer.Option(help="Address to serve on; any but loopback needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free port.", min=0, max=65535)] = 8000,
    served_model_name: ModelNames = None,
    api_key_file: ApiKeyFile = None,
    salt_per_key: SaltPerKey = False,
    profile: ProfileOption = Profile.AUTO,
    max_model_len: MaxModelLen = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once.", min=1)] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Most tokens computed in one step.", min=1)] = 2048,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; one more is refused (429).", min=0)] = 256,
    cache_bytes: CacheBytes = None,
    index_cache: IndexCacheOption = Stored.AUTO,
    latent_cache: LatentCacheOption = Stored.AUTO,
    draft_tokens: DraftTokens = None,
    lora: Lora = None,
    expert_memory: ExpertMemory = None,
    expert_dir: ExpertDir = None,
    verify: Verify = False,
    dtype: Annotated[Dtype, typer.Option(help="What to compute in.")] = Dtype.AUTO,
    quantize: QuantizeAs = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads.", min=1, show_default="one a core")] = None,
    drain_timeout: DrainTimeout = 30.0,
    timings: Timings = False,
    sim: Sim = False,
    sim_prefill_ms: PrefillMs = 0.0,
    sim_itl_ms: Annotated[float, typer.Option(help="--sim: milliseconds a step.", min=0)] = 0.0,
    sim_drafts: Annotated[int, typer.Option(help="--sim: speculative tokens a step.", min=0, max=16)] = 0,
    sim_fault: Faults = None,
) -> None:
    """Serve a checkpoint behind an OpenAI-compatible API."""
    from freehold.cli.timings import StartClock

    (clock := StartClock()).mark("interpreter, command line")
    from freehold.serve import server
    from freehold.serve.state import SamplingDefaults

    clock.mark("imports: server")
    as_computed = dtype is Dtype.AUTO and index_cache is latent_cache is Stored.AUTO
    of_model = (verify, quantize, not as_computed, cache_bytes, expert_memory, threads, draft_tokens is not None)
    _check(directory, sim, of_sim=(sim_prefill_ms, sim_itl_ms, sim_drafts, sim_fault), of_model=of_model)
    if expert_dir is not None and expert_memory is None:
        raise InvalidRequest("--expert-dir needs --expert-memory")
    _log()
    keys = server.read_api_keys(api_key_file)
    if salt_per_key and not keys:
        raise InvalidRequest(f"--salt-per-key needs API keys: set {server.API_KEY_VARIABLE} or give --api-key-file")
    names = _names(served_model_name)
    given: dict[str, Any] = {"max_num_seqs": max_num_seqs, "max_queue": max_queue}
    given |= {"max_num_batched_tokens": max_num_batched_tokens, "max_model_len": max_model_len}
    given |= {"model_name": names[0] if names else None, "lora": parse_lora(lora or [], names, sim)}
    limits: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    sock, loopback = server.open_socket(host, port, has_keys=bool(keys))
    with sock:
        if directory is None:
            engine, tokenizer = _sim_engine(limits, sim_prefill_ms, sim_itl_ms, sim_drafts, sim_fault or [])
        else:
            limits |= {"dtype": dtype.value, "threads": threads, "verify": verify, "num_draft_tokens": draft_tokens}
            limits |= {"index_cache": index_cache.value, "latent_cache": latent_cache.value}
            limits |= {"quantize": quantize and quantize.value, "cache_bytes": parse_bytes(cache_bytes)}
            limits |= {"expert_bytes": parse_bytes(expert_memory, "expert-memory"), "expert_dir": expert_dir}
            engine, tokenizer = _load(directory, limits, clock)
        state = server.build_state(
            engine,
            tokenizer,
            _template(directory, profile),
            model_names=names,
            sampling=SamplingDefaults() if directory is None else SamplingDefaults.from_dir(directory),
            api_keys=keys,
            salt_per_key=salt_per_key,
            loopback=loopback,
        )
        clock.mark("server")
        server.serve(state, sock, drain_timeout=drain_timeout, notice=_notice(clock if timings else None))


def _check(directory: Path | None, sim: bool, *, of_sim: Iterable[object], of_model: Iterable[object]) -> None:
    """Refuse options of the simulator without it, and those of a model with it."""
    if sim == (directory is not None):
        raise InvalidRequest("give a checkpoint directory, or --sim to serve canned text without one")
    if not sim and any(of_sim):
        raise InvalidRequest("--sim-… options need --sim")
    if sim and any(of_model):
        raise InvalidRequest(f"{_FOR_MODEL} are for a model; --sim has none")


def _log() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("freehold.model.pager", "freehold.engine.loading"):
        logging.getLogger(name).setLevel(logging.INFO)  # what is read from disk, and made on it


def _names(given: list[str] | None) -> tuple[str, ...]:
    names = tuple(given or ())
    if not all(name.strip() for name in names):
        raise InvalidRequest("--served-model-name is empty; give a name, or leave the option out")
    return names


def _template(directory: Path | None, profile: Profile) -> ChatTemplate:
    from freehold.model.chat.template import ChatTemplate

    if profile is not Profile.AUTO:
        return ChatTemplate.builtin(profile.value)
    return ChatTemplate.builtin() if directory is None else ChatTemplate.from_dir(directory)


def _load(directory: Path, options: dict[str, Any], clock: StartClock) -> tuple[Engine, Tokenizer]:
    from freehold.cli.progress import byte_progress
    from freehold.engine.loading import EngineOptions, build_engine  # imports torch

    clock.mark("imports: torch, engine")
    with byte_progress(f"loading {directory.name}") as progress:
        return build_engine(directory, EngineOptions(**options), progress, clock.mark)


def _notice(clock: StartClock | None) -> Callable[[str], None]:
    """Prints what the server has to say; its first words end the start, which a clock then tells of."""

    def say(line: str) -> None:
        nonlocal clock
        if clock is not None:
            clock.mark("first generation")
            print("\n".join(clock.lines()), flush=True)
            clock = None
        print(line, flush=True)

    return say


def _sim_engine(
    limits: dict[str, Any], prefill_ms: float, itl_ms: float, drafts: int, faults: list[str]
) -> tuple[Engine, Tokenizer]:
    from freehold.engine.sim import SimConfig, build_sim_engine

    config = SimConfig(
        seconds_per_step=itl_ms / 1000,
        seconds_per_prefill_token=prefill_ms / 1e6,
        num_draft_tokens=drafts,
        faults=tuple(parse_fault(text) for text in faults),
    )
    adapters = tuple(name for name, _ in limits.pop("lora"))
    return build_sim_engine(config, adapters=adapters, **limits)


_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}


def parse_bytes(text: str | None, option: str = "cache-bytes") -> int | None:
    """`4GiB`, `500MB`, `1.5TiB`, or a number of bytes. Raises InvalidRequest."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = {name.lower(): size for name, size in _UNITS.items()}.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise InvalidRequest(f"--{option} {text!r}: give bytes, such as 4GiB or 500MB", param=option.replace("-", "_"))
    return int(float(match[1]) * unit)


def parse_lora(given: list[str], model_names: Iterable[str], sim: bool) -> tuple[tuple[str, Path], ...]:
    """(name, directory) of each adapter, with --sim of no meaning but the name. Raises InvalidRequest."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        name = name.strip()
        if not name or bool(equals) == sim or bool(path) == sim:
            wanted = "NAME: --sim has no weights to change" if sim else "NAME=DIRECTORY"
            raise InvalidRequest(f"--lora {text!r}: give {wanted}", param="lora")
        if name in found or name in model_names:
            raise InvalidRequest(f"--lora {text!r}: {name} is another's name; each needs its own", param="lora")
        found[name] = Path(path)
    return tuple(found.items())


def parse_fault(text: str) -> Fault:
    """`error after=3 every=10`, as `--sim-fault` takes it. Raises InvalidRequest."""
    from freehold.engine.sim import Fault

    kind, *options = text.split() or [""]
    values: dict[str, float] = {}
    try:
        for option in options:
            name, _, value = option.partition("=")
            values[name] = float(value) if name == "seconds" else int(value)
        known = kind in ("error", "crash", "stall", "slow") and values.keys() <= {"after", "seconds", "every"}
        in_range = values.get("every", 1) >= 1 and all(0 <= value < math.inf for value in values.values())
    except ValueError:
        known = in_range = False
    if not (known and in_range):
        raise InvalidRequest(
            f"--sim-fault {text!r}: must be error, crash, stall or slow, with after=, seconds= or every= a number",
            param="sim_fault",
        )
    return Fault(kind, **values)  # type: ignore[arg-type]
