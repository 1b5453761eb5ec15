"""Memory of a layout: weights and caches exactly, the rest as an estimate with its source. Torch-free.

    footprint(load("glm-5.2-fp8"), gpu("h200"), Layout(tp=8), "sglang").max_context

What each rank holds, as vLLM 0.32 and SGLang 0.5.23 do it:

- cut over the TP ranks of an attention group: q_b_proj, kv_b_proj, o_proj, embedding and head by rows of the
  vocabulary; dense MLPs and shared experts by width (shared experts whole on every rank where DP goes with EP).
- cut over all ranks of a stage: routed experts.
- whole on every rank: q_a_proj, kv_a_proj_with_mqa, the indexer, router, norms, the MTP layer's joint.
- latent and index-key caches: whole on every TP rank, since latent attention has one key head; DP groups hold different
  sequences, and decode context parallelism (DCP) deals the tokens of a sequence to ranks.

The latent cache of a layer takes what `model/cache_layout` says; index keys exist on full layers only, and on all
layers in engines that allocate so (`CacheFormat.all_layers`; SGLang before July 2026).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import cache as remember
from types import MappingProxyType

from freehold.errors import InsufficientMemory
from freehold.model.names import Part
from freehold.plan.layouts import LARGEST_REPLICA, engines, layouts_of, replica_sizes, support
from freehold.plan.models import bundled, load
from freehold.plan.types import CacheFormat, Cluster, Engine, Figure, Footprint, Gpu, Layout, ModelSpec, Module, Stored

_OVER_TP: frozenset[Module] = frozenset({"q_b_proj", "kv_b_proj", "o_proj", "embed_tokens", "lm_head", "mlp"})
_ABSORBED_BYTES = 2  # of an element of kv_b_proj in the BF16 copy that absorbed attention multiplies with


def footprint(
    model: ModelSpec,
    gpu: Gpu,
    layout: Layout,
    engine: Engine,
    *,
    cache: CacheFormat | None = None,
    mtp: bool = False,
    fraction: float | None = None,
) -> Footprint:
    """Memory of one replica's fullest rank, and how many tokens its caches hold.

    cache: the engine's preferred format on this GPU if None. mtp: the MTP layer is loaded and its caches are kept.
    fraction: share of the GPU's memory for the engine, its usual one if None.
    A layout that does not fit has `fits` False and cache_tokens 0; nothing is raised.
    """
    policy, known = engines()[engine], support(engine, gpu, model)
    cache = known.cache if cache is None else cache
    # The embedded engine loads and caches the MTP layer of a model that has one, whether drafts are asked for or not.
    mtp = (mtp or engine == "freehold") and model.config.has_mtp
    usable = int(gpu.memory * (known.fraction if fraction is None else fraction))
    stages = [_stage(model, layout, engine, cache, mtp, stage) for stage in range(layout.pp)]
    made = [_footprint(model, layout, policy.page, policy.overhead, cache, mtp, usable, *stage) for stage in stages]
    # Every stage caches every sequence: the one with room for fewest tokens decides.
    return min(made, key=lambda one: (one.cache_tokens, one.cache_room))


def rank_weights(model: ModelSpec, layout: Layout, engine: Engine, *, mtp: bool, stage: int = 0) -> Mapping[Part, int]:
    """Bytes of weights on a rank of a pipeline stage, by part; the MTP layer is the part "mtp"."""
    return _stage(model, layout, engine, CacheFormat("bf16"), mtp, stage)[0]


def fewest_gpus(model: ModelSpec, gpu: Gpu, engine: Engine, *, mtp: bool = False, context: int = 1) -> int | None:
    """The fewest GPUs of this kind on which a layout has room for weights and a sequence of `context` tokens.

    None if not even the largest replica has.
    """
    for gpus in replica_sizes(Cluster(gpu, LARGEST_REPLICA)):
        for layout in layouts_of(model, gpu, gpus, engine):
            if model.total_bytes > layout.gpus * gpu.memory:
                continue
            if footprint(model, gpu, layout, engine, mtp=mtp).cache_tokens >= context:
                return gpus
    return None


def refuse(model: ModelSpec, cluster: Cluster, engine: Engine, *, context: int = 1) -> InsufficientMemory:
    """The error for a model that fits in no layout: what it needs, and what would fit instead."""
    gpu = cluster.gpu
    fewest = fewest_gpus(model, gpu, engine, context=context)
    needs = f"at least {fewest} of them" if fewest else f"more than {LARGEST_REPLICA} of them"
    others = [name for name in _smaller(model) if _fits_here(load(name), cluster, engine, context)]
    with_context = "" if context == 1 else f" with room for a sequence of {context:,} tokens"
    instead = f"; {' and '.join(others)} would fit" if others else ""
    if not support(engine, gpu, model).runs:
        instead += f". {engines()[engine].name} is not known to run it on {gpu.name} at all"
    return InsufficientMemory(
        f"{model.name} has {_gb(model.total_bytes)} of weights and does not fit on {cluster.gpus} x {gpu.name} "
        f"({_gb(gpu.memory * cluster.gpus)} in all){with_context}: it needs {needs}{instead}",
        param="hardware",
    )


def _smaller(model: ModelSpec) -> list[str]:
    """Published builds of the same model in fewer bytes."""
    stem = re.sub(r"-(fp8|nvfp4|w4a16)$", "", model.name)
    same = [name for name in bundled() if re.sub(r"-(fp8|nvfp4|w4a16)$", "", name) == stem]
    return [name for name in same if load(name).total_bytes < model.total_bytes]


def _fits_here(model: ModelSpec, cluster: Cluster, engine: Engine, context: int) -> bool:
    fewest = fewest_gpus(model, cluster.gpu, engine, context=context)
    return support(engine, cluster.gpu, model).runs and fewest is not None and fewest <= cluster.gpus


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.1f} GB"


@remember
def _sums(model: ModelSpec) -> Mapping[tuple[Part, Module], tuple[tuple[int, int], ...]]:
    """By part and module: bytes and parameters of the layers before each layer, the MTP layer and beyond included."""
    count = model.config.num_hidden_layers + 1
    sizes: dict[tuple[Part, Module], list[tuple[int, int]]] = {}
    for entry in model.stored:
        if entry.layer is not None:
            here = sizes.setdefault((entry.part, entry.module), [(0, 0)] * count)
            nbytes, parameters = here[entry.layer]
            here[entry.layer] = (nbytes + entry.total, parameters + entry.parameters)
    summed: dict[tuple[Part, Module], tuple[tuple[int, int], ...]] = {}
    for key, layers in sizes.items():
        totals = [(0, 0)]
        for nbytes, parameters in layers:
            totals.append((totals[-1][0] + nbytes, totals[-1][1] + parameters))
        summed[key] = tuple(totals)
    return MappingProxyType(summed)


def _stage(
    model: ModelSpec, layout: Layout, engine: Engine, cache: CacheFormat, mtp: bool, stage: int
) -> tuple[Mapping[Part, int], int, int, int]:
    """Of a rank: weights by part; latent and index-key bytes a token; bytes of absorbed copies of kv_b_proj."""
    config, layers = model.config, model.config.num_hidden_layers
    first, last = layout.cuts[stage], stage == layout.pp - 1
    end = layers if last else layout.cuts[stage + 1]
    weights: Counter[Part] = Counter()
    absorbed = 0
    for (part, module), totals in _sums(model).items():
        spans = [(part, first, end)] + ([("mtp", layers, layers + 1)] if mtp and last else [])
        for counted_as, start, stop in spans:
            (before, none_yet), (after, all_of_them) = totals[start], totals[stop]
            cut = ways(module, layout, engine)
            weights[counted_as] += -(-(after - before) // cut)
            if module == "kv_b_proj":
                absorbed += -(-(all_of_them - none_yet) * _ABSORBED_BYTES // cut)
    for entry in model.stored:
        if entry.layer is None and _outside_layers(entry, stage == 0, last, mtp):
            weights[entry.part] += -(-entry.total // ways(entry.module, layout, engine))
    held = [*range(first, end), *([layers] if mtp and last else [])]
    latent, index = (sum(sizes) for sizes in zip(*(cache.layer_bytes(config, layer) for layer in held), strict=True))
    return MappingProxyType({part: size for part, size in weights.items() if size}), latent, index, absorbed


def _outside_layers(entry: Stored, first: bool, last: bool, mtp: bool) -> bool:
    if entry.module == "embed_tokens":
        return first or (last and mtp)  # the MTP layer embeds what it drafts from
    return last


def ways(module: Module, layout: Layout, engine: Engine) -> int:
    """Over how many ranks a module's matrices are cut."""
    if module == "experts":
        return layout.ranks
    if module == "shared_experts":
        return layout.tp if layout.dp == 1 else 1
    if module == "lm_head" and engine == "sglang":
        return layout.ranks
    return layout.tp if module in _OVER_TP else 1


def _footprint(
    model: ModelSpec,
    layout: Layout,
    page: int,
    overhead: Figure,
    cache: CacheFormat,
    mtp: bool,
    usable: int,
    weights: Mapping[Part, int],
    latent: int,
    index: int,
    absorbed: int,
) -> Footprint:
    extra = 0 if model.family == "glm_moe_dsa" and model.dtype == "bf16" else absorbed
    everything = Figure(
        overhead.value + extra,
        overhead.low,
        overhead.high + extra,
        overhead.basis,
        overhead.source + ("" if not extra else f"; {_gb(extra)} is the BF16 copy of kv_b_proj that is absorbed"),
    )
    room = max(0, usable - sum(weights.values()) - round(everything.value))
    # DCP deals latents to the ranks of a group; index keys stay whole, since each rank scores all of them.
    per_token = latent / layout.dcp + index
    tokens = int(room / per_token) // page * page if per_token else 0
    return Footprint(
        layout=layout,
        cache=cache,
        mtp=mtp,
        weights=weights,
        latent_per_token=-(-latent // layout.dcp),
        index_per_token=index,
        overhead=everything,
        usable=usable,
        cache_tokens=tokens,
        max_context=min(tokens, model.config.max_position_embeddings),
    )
