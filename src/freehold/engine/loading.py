"""From a checkpoint directory to a running engine: config, weights, cache size, tokenizer, sampler.

This is the one place where the engine's settings meet the machine: threads, memory, the choice of operations.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from freehold.engine.draft_policy import DraftPolicy
from freehold.engine.engine import Engine, EngineConfig
from freehold.engine.guide import GuideCompiler
from freehold.engine.runner import ModelRunner, Served
from freehold.engine.sampler import Sampler
from freehold.errors import ConfigError, InsufficientMemory, InvalidRequest
from freehold.headers import CheckpointIndex
from freehold.model.adapted import adapt
from freehold.model.adapters import Adapter, read_adapter
from freehold.model.cache import IndexCache, LatentCache, PagedCache, cache_bytes_per_token
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.ops.choose import OpsChoice, load_ops
from freehold.model.ops.fused import FusedLayers, FusedMtp, fits
from freehold.model.ops.native import DEFAULT_THREADS, SMALL_ROWS, NativeOps
from freehold.model.packing import Quantize, forms, pack_model, quantized_otherwise
from freehold.model.paged import finish, page_experts
from freehold.model.tokenizer import Tokenizer
from freehold.model.weights import load_weights

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) while weights load."""

logger = logging.getLogger(__name__)
DEFAULT_DRAFTS = 3
"""Most draft tokens of a request and step, where nothing else is asked for."""

MOST_DRAFTS = SMALL_ROWS - 1
"""More would never be verified: they and the last token of a lone request are as many rows as a small step has."""

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an operator may set; None means "what the checkpoint or the machine says".

    cache_bytes: memory for the latent and index-key caches; default half of what is available once weights are loaded
    (pages are only committed as they are first used). threads: compute threads; default what torch finds.
    expert_bytes: memory for routed experts, which then stay on disk, packed, and are read as they are used; default:
    all are held. expert_dir: where their file is, default `.freehold` in the checkpoint's directory.
    index_cache: "fp8" stores the indexer's keys in 8 bits, half of bf16; near-equal scores may then change places.
    latent_cache: "fp8" stores latents in 8 bits and rope keys in bf16, 57% of bf16 for GLM-5.2; values are then rounded
    to 4 significant bits.
    lora: (name, directory) of adapters that requests may choose by name, each merged into a copy of what it changes.
    num_draft_tokens: the most tokens that the MTP layer drafts for a request and step; 0 turns drafting off. Default
    DEFAULT_DRAFTS where the checkpoint has such a layer and drafts cannot change a token: with the native kernels, and
    in fp32.
    """

    model_name: str | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_queue: int = 256
    cache_bytes: int | None = None
    block_size: int = 64
    enable_prefix_cache: bool = True
    threads: int | None = None
    verify: bool = False
    ops: OpsChoice = "auto"
    index_cache: IndexCache = "auto"
    latent_cache: LatentCache = "auto"
    quantize: Quantize | None = None
    expert_bytes: int | None = None
    expert_dir: Path | None = None
    num_draft_tokens: int | None = None
    lora: tuple[tuple[str, Path], ...] = ()


def build_engine(
    directory: str | Path,
    options: EngineOptions | None = None,
    progress: Progress | None = None,
    mark: Callable[[str], None] = lambda part: None,
) -> tuple[Engine, Tokenizer]:
    """Load `directory` and return an engine that is ready to step, and its tokenizer.

    mark: called with the name of each part of the work when it ends.
    Raises ConfigError, CheckpointError or InsufficientMemory with one line that names the cause.
    """
    options = options or EngineOptions()
    directory = Path(directory)
    config = GlmConfig.from_file(directory)
    mark("config")
    tokenizer = Tokenizer.from_dir(directory)
    mark("tokenizer")
    adapters = _read_adapters(config, _model_name(directory, options), options)
    model = load_model(directory, config, options, progress)
    mark("weights: mapped, packed")
    try:
        adapted = _adapt(directory, model, adapters) if adapters else {}
    except BaseException:
        if model.pager is not None:
            model.pager.close()
        raise
    if adapters:
        mark("adapters: merged")
    engine_config = _engine_config(config, directory, options, model)
    cache = PagedCache(
        config,
        engine_config.num_blocks,
        options.block_size,
        model.dtype,
        index_cache=options.index_cache,
        latent_cache=options.latent_cache,
    )
    guides = GuideCompiler(tokenizer, config.eos_token_ids)
    sampler = Sampler(config.vocab_size, config.eos_token_ids, guides)

    def drafts() -> DraftPolicy | None:
        return DraftPolicy(engine_config.num_draft_tokens) if engine_config.num_draft_tokens else None

    served = {name: Served(own, drafts()) for name, own in adapted.items()}
    engine = Engine(engine_config, ModelRunner(model, cache, sampler, drafts(), served))
    mark("cache, sampler, scheduler")
    return engine, tokenizer


def load_model(directory: Path, config: GlmConfig, options: EngineOptions, progress: Progress | None = None) -> Glm:
    """The model with its weights, in evaluation mode and without gradients."""
    name = config.dtype if options.dtype == "auto" else options.dtype
    if name == "float16":
        name = "bfloat16"  # the engine computes in bf16 or fp32; fp16 files are converted
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is not supported (bfloat16 or float32)")
    if options.quantize is not None and quantized_otherwise(config, options.quantize):
        raise InvalidRequest(
            f"{directory}: is quantised already; load it as it is, or quantise the checkpoint that it was made of",
            param="quantize",
        )
    dtype = _DTYPES[name]
    ops = load_ops(dtype, options.ops, options.threads)
    native = isinstance(ops, NativeOps)
    # Beside the kernels, what is left to torch is small, and its threads spin for a while after each operation: on the
    # very cores that the kernels' threads need next. While weights are packed they wait for one another instead.
    torch.set_num_threads(1 if native else options.threads or DEFAULT_THREADS)
    packed = (native and dtype is torch.bfloat16) or options.quantize is not None
    paged = options.expert_bytes is not None
    if paged and not packed:
        raise ConfigError("--expert-memory needs weights that the native kernels take (bfloat16), or --quantize")
    # Without memory first: what is packed gets another kind of it.
    model = Glm(config, dtype=dtype, device="meta", ops=ops).requires_grad_(False).eval()
    if packed:
        pack_model(model, forms(config, options.quantize), paged=paged)
    _give_memory(model)
    if options.expert_bytes is None:
        load_weights(model, directory, progress=progress, verify=options.verify)
    else:
        _load_paged(model, directory, options, options.expert_bytes, progress)
    if isinstance(ops, NativeOps):
        ops.pager = model.pager
    _fuse(model)
    return model


def _fuse(model: Glm) -> None:
    """Let steps of few rows run all layers at once, where the kernels can."""
    ops, config = model.ops, model.config
    if isinstance(ops, NativeOps):
        if fits(config, layers := model.decoder_layers):
            model.run_few = FusedLayers(ops, config, layers)
        if model.mtp is not None and fits(config, [model.mtp]):
            model.mtp_few = FusedMtp(ops, config, model.mtp)


def _read_adapters(config: GlmConfig, model_name: str, options: EngineOptions) -> dict[str, Adapter]:
    """By name. Raises what `read_adapter` raises, and InvalidRequest for names that cannot be told apart."""
    found: dict[str, Adapter] = {}
    for name, path in options.lora:
        if not name.strip() or name in found or name == model_name:
            raise InvalidRequest(f"--lora {name}={path}: each adapter needs a name of its own", param="lora")
        found[name] = read_adapter(path, config)
    return found


def _adapt(directory: Path, model: Glm, adapters: Mapping[str, Adapter]) -> dict[str, Glm]:
    """The model with each adapter. directory: the checkpoint that it was loaded from."""
    index = CheckpointIndex.open(directory)
    found: dict[str, Glm] = {}
    for name, adapter in adapters.items():
        found[name], num_bytes = adapt(model, index, adapter)
        _fuse(found[name])
        what = f"rank {adapter.rank}, {len(adapter.factors)} matrices"
        logger.info("adapter %s: %s, %s bytes beside the model", name, what, f"{num_bytes:,}")
    return found


def _give_memory(model: Glm) -> None:
    """What is still without gets memory, uninitialised. (`Module.to_empty` first imports modules of 30 MB.)"""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                setattr(module, name, torch.nn.Parameter(empty, requires_grad=False))


def _load_paged(model: Glm, directory: Path, options: EngineOptions, budget: int, progress: Progress | None) -> None:
    """Load the weights, those of routed experts into their file if they are not there."""
    pager = page_experts(model, directory, options.expert_dir, budget, options.quantize or "stored")
    try:
        if not pager.file.complete:
            logger.info("packing routed experts, once, into %s (%.1f GB)", pager.file.path, pager.file.num_bytes / 1e9)
        load_weights(model, directory, progress=progress, verify=options.verify)
        finish(pager, verify=options.verify, progress=progress)
    except BaseException:
        pager.close()
        raise
    model.pager = pager


def available_memory() -> int:
    """Bytes this process may still take: what Linux calls available, within the cgroup's limit."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, max(0, int(text) - int(used.read_text())))
    return available


def _engine_config(config: GlmConfig, directory: Path, options: EngineOptions, model: Glm) -> EngineConfig:
    per_token = cache_bytes_per_token(config, model.dtype, options.index_cache, options.latent_cache)
    reserved = 0 if model.pager is None else model.pager.untouched_bytes
    max_model_len = options.max_model_len or config.max_position_embeddings
    if max_model_len > config.max_position_embeddings:
        raise InvalidRequest(
            f"--max-model-len {max_model_len} exceeds the model's {config.max_position_embeddings} positions",
            param="max_model_len",
        )
    drafts = _num_drafts(config, options, model)
    per_block = per_token * options.block_size
    available = max(0, available_memory() - reserved)
    budget = options.cache_bytes if options.cache_bytes is not None else available // 2
    useful = options.max_num_seqs * -(-max_model_len // options.block_size)
    num_blocks = min(budget // per_block, useful)
    if num_blocks * per_block > available:
        raise InsufficientMemory(
            f"the cache would take {num_blocks * per_block:,} bytes, and {available:,} are available; "
            "give it less with --cache-bytes"
        )
    if num_blocks < 1:
        raise InsufficientMemory(
            f"the cache has {budget:,} bytes, and one block of {options.block_size} tokens needs {per_block:,}; "
            "give it more with --cache-bytes"
        )
    return EngineConfig(
        model_name=_model_name(directory, options),
        max_model_len=max_model_len,
        block_size=options.block_size,
        num_blocks=num_blocks,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_queue=options.max_queue,
        enable_prefix_cache=options.enable_prefix_cache,
        eos_token_ids=config.eos_token_ids,
        vocab_size=config.vocab_size,
        cache_bytes_per_token=per_token,
        num_draft_tokens=drafts,
        adapters=tuple(name for name, _ in options.lora),
    )


def _model_name(directory: Path, options: EngineOptions) -> str:
    return options.model_name or directory.resolve().name


def _num_drafts(config: GlmConfig, options: EngineOptions, model: Glm) -> int:
    """How many tokens to draft at most; by default no more than the token budget has room for.

    And by default none where a row of a small step may come out otherwise in company, so that drafts could change a
    token: in bf16 without all of the native kernels.
    """
    asked = options.num_draft_tokens
    if asked is None:
        is_exact = model.run_few is not None or model.dtype is torch.float32
        return min(DEFAULT_DRAFTS, options.max_num_batched_tokens - 1) if config.has_mtp and is_exact else 0
    if not 0 <= asked <= MOST_DRAFTS:
        raise InvalidRequest(f"--draft-tokens {asked}: must be 0 to {MOST_DRAFTS}", param="num_draft_tokens")
    if asked and not config.has_mtp:
        raise InvalidRequest(
            f"--draft-tokens {asked}: this checkpoint has no MTP layer to draft with", param="num_draft_tokens"
        )
    return asked
