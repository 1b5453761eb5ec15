"""Which engines run a model on which hardware, and how it can be spread over GPUs. Torch-free.

    support("sglang", gpu("h200"), load("glm-5.2-fp8"))     # status, cache formats, memory policy, source
    layouts(model, Cluster(gpu("h200"), 16), "vllm")        # every TP x PP x DP x EP that one replica may have

A layout is allowed when every matrix can be cut so, its collectives stay where they are fast, and no pipeline stage
begins where it would lack its indexer's selection. Whether it fits memory is `footprint`'s to say.

- TP cuts heads and the width of MLPs: it must divide the heads, leave whole FP8 blocks, and stay within one scale-up
  domain (two all-reduces a layer). TP without DP spreads experts over the same ranks, cut (EP 1) or whole (EP = ranks).
- DP with EP may cross domains: only experts' inputs and outputs travel, once a layer.
- PP crosses anything: one hidden state a token travels between stages.
- A stage whose first layer shares its indexer's selection needs that of the stage before, which vLLM 0.32 does not
  send, so stages begin at full layers. SGLang sends it (https://github.com/sgl-project/sglang/pull/28532), but sending
  nothing is as good there.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal, get_args

from freehold.model.cache_layout import IndexFormat, LatentFormat
from freehold.plan.types import CacheFormat, Cluster, Engine, Figure, Gpu, Layout, ModelSpec, Source

Status = Literal["runs", "patched", "none", "unknown"]
STATUSES: tuple[Status, ...] = get_args(Status)
LARGEST_REPLICA = 256
"""GPUs. Larger ones cost no less and fail as a whole; a larger cluster is planned as several."""
_BLOCK = 128  # rows and columns that share a scale in FP8, weights of a row in W4A16


@dataclass(frozen=True, slots=True)
class EnginePolicy:
    """How an engine divides a GPU's memory. overhead: bytes within its share that are neither weights nor cache."""

    key: Engine
    name: str
    version: str
    fraction: float
    fraction_source: str
    overhead: Figure
    page: int


@dataclass(frozen=True, slots=True)
class Support:
    """Whether an engine runs a model on a GPU. caches: latent formats, the preferred first (empty if it does not run).

    fraction: share of the GPU's memory that the engine is told to use. mtp, dp: whether drafts and DP-attention work.
    """

    engine: Engine
    status: Status
    caches: tuple[LatentFormat, ...]
    index: IndexFormat
    mtp: bool
    dp: bool
    fraction: float
    note: str
    source: Source | None

    @property
    def runs(self) -> bool:
        return self.status == "runs"

    @property
    def cache(self) -> CacheFormat:
        """The format to plan with; BF16 where no engine is known."""
        return CacheFormat(self.caches[0] if self.caches else "bf16", self.index)


@cache
def _table() -> Mapping[str, Any]:
    return tomllib.loads(resources.files("freehold.plan").joinpath("support.toml").read_text(encoding="utf-8"))


@cache
def engines() -> Mapping[Engine, EnginePolicy]:
    """The engines' memory policies."""
    made: dict[Engine, EnginePolicy] = {}
    for key, entry in _table()["engines"].items():
        low, value, high = entry["overhead"]
        overhead = Figure(value, low, high, "interpolated", entry["overhead_source"])
        made[key] = EnginePolicy(
            key, entry["name"], entry["version"], entry["fraction"], entry["fraction_source"], overhead, entry["page"]
        )
    return MappingProxyType(made)


def support(engine: Engine, gpu: Gpu, model: ModelSpec) -> Support:
    """What the table says of an engine with this model's weights on this GPU; "unknown" where it says nothing."""
    fraction = engines()[engine].fraction
    for rule in _table()["rules"]:
        named = rule["engine"] == engine and gpu.arch in rule["arch"] and model.dtype in rule["dtype"]
        if named and model.family in rule.get("family", [model.family]):
            return Support(
                engine,
                rule["status"],
                tuple(rule.get("cache", ())),
                rule.get("index", "fp8"),
                rule.get("mtp", False) and model.config.has_mtp,
                rule.get("dp", False),
                rule.get("fraction", fraction),
                rule.get("note", ""),
                Source(rule["where"], rule["date"]),
            )
    note = f"nothing is known of {model.dtype} weights of this model on {gpu.arch}"
    return Support(engine, "unknown", (), "fp8", False, False, fraction, note, None)


def layouts(model: ModelSpec, cluster: Cluster, engine: Engine, *, dcp: bool = False) -> Iterator[Layout]:
    """Every allowed layout of one replica on at most all GPUs of the cluster, small ones first.

    A replica that does not fill a node leaves room for others of its kind, so its GPUs divide a node's. dcp adds
    decode context parallelism, which no released engine has for sparse attention.
    """
    for gpus in replica_sizes(cluster):
        yield from layouts_of(model, cluster.gpu, gpus, engine, dcp=dcp)


def layouts_of(model: ModelSpec, gpu: Gpu, gpus: int, engine: Engine, *, dcp: bool = False) -> Iterator[Layout]:
    """Every allowed layout of one replica on exactly so many GPUs."""
    for tp in _divisors(gpus):
        if tp > gpu.domain or model.config.num_attention_heads % tp:
            continue
        for pp in _divisors(gpus // tp):
            cuts = stage_cuts(model, pp)
            if cuts is None:
                continue
            dp = gpus // tp // pp
            for ep in _expert_groups(tp, dp):
                for shards in _divisors(tp) if dcp else [1]:
                    layout = Layout(tp, dp, ep, pp, shards, cuts)
                    if refusal(model, gpu, layout, engine) is None:
                        yield layout


def refusal(model: ModelSpec, gpu: Gpu, layout: Layout, engine: Engine) -> str | None:
    """Why a layout is not allowed, in a few words; None if it is."""
    config, tp, moe_tp = model.config, layout.tp, layout.moe_tp
    if engine == "freehold" and layout.gpus > 1:
        return "the embedded engine runs in one process"
    if config.num_attention_heads % tp:
        return f"TP{tp} does not divide {config.num_attention_heads} heads"
    if tp > gpu.domain:
        return f"TP{tp} crosses the scale-up domain of {gpu.domain}"
    if layout.dp > 1 and layout.ep != layout.ranks:
        return "attention in DP groups is planned with whole experts on each rank (EP = TP x DP)"
    if config.n_routed_experts % layout.ep:
        return f"EP{layout.ep} does not divide {config.n_routed_experts} experts"
    if config.moe_intermediate_size % moe_tp or (
        model.dtype in ("fp8", "w4a16") and config.moe_intermediate_size // moe_tp % _BLOCK
    ):
        return f"experts cut {moe_tp} ways leave no whole blocks of {_BLOCK}"
    widths = (config.intermediate_size, config.num_attention_heads * config.qk_head_dim, _kv_rows(model))
    if model.dtype == "fp8" and any(width % tp or width // tp % _BLOCK for width in widths):
        return f"TP{tp} cuts FP8 blocks of {_BLOCK}"
    if layout.dcp > 1 and layout.pp > 1:
        return "decode context parallelism with pipeline stages is not planned"
    if any(config.indexer_types[cut] != "full" for cut in layout.cuts):
        return "a stage begins at a layer that shares the selection of the stage before"
    return None


@cache
def _weights_by_layer(model: ModelSpec) -> tuple[int, ...]:
    sizes = [0] * (model.config.num_hidden_layers + 1)
    for entry in model.stored:
        if entry.layer is not None:
            sizes[entry.layer] += entry.total
        elif entry.module == "embed_tokens":
            sizes[0] += entry.total
        else:
            sizes[model.config.num_hidden_layers] += entry.total
    return tuple(sizes)


@cache
def stage_cuts(model: ModelSpec, stages: int) -> tuple[int, ...] | None:
    """First layers of `stages` pipeline stages, all full indexer layers, so that the fullest stage is smallest.

    Embedding counts to the first layer, head and MTP layer to the last stage. None if there are too few full layers.
    """
    full, sizes = model.config.full_layers, _weights_by_layer(model)
    if stages == 1:
        return (0,)
    if stages > len(full):
        return None
    total = [0]
    for size in sizes:
        total.append(total[-1] + size)
    end = len(sizes)
    # best[i]: (bytes of the fullest stage, cuts) of what lies from full layer i on, in as many stages as so far.
    best: dict[int, tuple[int, tuple[int, ...]]] = {i: (total[end] - total[at], (at,)) for i, at in enumerate(full)}
    for _ in range(stages - 1):
        following, best = best, {}
        for i, start in enumerate(full):
            options = [
                (max(total[full[j]] - total[start], following[j][0]), (start, *following[j][1]))
                for j in range(i + 1, len(full))
                if j in following
            ]
            if options:
                best[i] = min(options)
    return best[0][1] if 0 in best else None


def pp_note(model: ModelSpec, stages: int) -> str:
    """What to say of the cuts of a pipeline, for people."""
    cuts = stage_cuts(model, stages)
    if cuts is None:
        full = len(model.config.full_layers)
        return f"{stages} stages need as many full indexer layers to begin at; the model has {full}"
    counts = ",".join(
        str(end - start) for start, end in zip(cuts, (*cuts[1:], model.config.num_hidden_layers), strict=True)
    )
    return f"stages of {counts} layers: each begins at a full indexer layer, because shared layers reuse its selection"


def _kv_rows(model: ModelSpec) -> int:
    config = model.config
    return config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)


def replica_sizes(cluster: Cluster) -> list[int]:
    """GPUs of one replica: parts of a node that divide it, whole nodes, or the whole cluster if it is not too large."""
    node, total = cluster.gpu.node, min(cluster.gpus, LARGEST_REPLICA)
    if cluster.gpu.domain > node:  # one fabric spans nodes: any power of two
        return [2**i for i in range(total.bit_length())]
    within = [size for size in _divisors(node) if size <= total]
    nodes = [node * count for count in range(2, total // node + 1)]
    return sorted({*within, *nodes, total})  # all of them too, if they are no whole nodes


def _expert_groups(tp: int, dp: int) -> list[int]:
    return [tp * dp] if dp > 1 else sorted({1, tp})


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
