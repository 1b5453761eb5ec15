"""How long an engine step takes: bytes, FLOP, collectives and fixed costs, each over a efficiency. Torch-free.

    times = StepTimes(model, gpu, layout, "sglang", cache, drafts=0)
    work = times.decode(rows=32, seen=32 * 2048, context=32 * 8192)     # what the step has to do, by cause
    seconds = times.seconds(work, efficiencies)

A step's `Work` is a time by cause, as it would be at the hardware's peak; `Efficiencies` are a few physical factors:

    memory       weights and caches that a rank reads, over its bandwidth
    compute      products, over the peak of their operands' type
    links        what all-reduces, all-to-alls and pipeline hops move, over the link
    kernels      one after another in a replayed graph (decode): each takes a few microseconds, however small
    launches     the same kernels launched one by one (prefill)
    sequences    rows of block tables, sampling, streaming: something for each sequence in a step

A matrix takes the larger of its memory and its compute time, and so does attention; the parts add up, because they run
one after another. What decides the figures:

- R rows touch a share 1 - (1 - k/E)^(R^0.9) of the experts: evenly and independently it would be R, but trained routers
  are less even, and neighbouring tokens alike.
- Absorbed attention reads min(context, topk) latents a row, whole on every TP rank; the indexer is whole on every rank
  too, and full layers read all index keys. Shared layers have none of it.
- An FP8 matrix that is not an expert needs one kernel more, which quantises its input.
- With P stages, P groups of sequences are on their way; each passes all stages for one token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Literal, get_args

from freehold.plan.footprint import ways
from freehold.plan.types import CacheFormat, ComputeDtype, Engine, Gpu, Layout, ModelSpec, Module, Stored

Cause = Literal["memory", "compute", "links", "kernels", "launches", "sequences", "requests"]
CAUSES: tuple[Cause, ...] = get_args(Cause)
"""In the order of a `Work`. "requests": what passes outside steps until a request is queued."""
Work = tuple[float, ...]
Kind = Literal["dense", "experts", "head", "embedding"]
NOTHING: Work = (0.0,) * len(CAUSES)

# Kernels of a decoder layer of DeepSeek sparse attention as SGLang and vLLM launch them (mid 2026), counted in their
# model code: norms with fused all-reduce 2, fused q_a and kv_a 1, their norms 1, q_b 1, absorbing and returning 2,
# rotary 1, cache write 1, table 1, attention 2, o_proj 1, router and top-k 3, experts 4, shared expert 3, sums and
# all-reduces 4, activation 1, gaps 2; in a full layer for the indexer: two projections, weights, norm, rotary 2,
# Hadamard 2, quantisation 2, cache write, scores, top-k, scaling 2.
_LAYER_KERNELS = 30
_INDEXER_KERNELS = 14
# FP8 matrices outside the routed experts need one more each, for their inputs: of q_a and kv_a, q_b, o_proj and both of
# the shared expert; of both projections of an indexer.
_LAYER_QUANTISERS = 5
_INDEXER_QUANTISERS = 2
_EVENNESS = 0.9  # of how rows choose experts
_OUTSIDE_KERNELS = 8  # embedding, final norm, head, gathering logits, sampling
_DRAFT_KERNELS = _LAYER_KERNELS + _INDEXER_KERNELS + _OUTSIDE_KERNELS
_KINDS: Mapping[Module, Kind] = {"experts": "experts", "lm_head": "head", "embed_tokens": "embedding"}
_ACTIVATION_BYTES = 2  # of an element of a hidden state that travels
_FP8_BYTES = 1  # of an element that is sent to an expert; its result comes back in bf16


@dataclass(frozen=True, slots=True)
class Efficiencies:
    """The calibrated factors. memory, compute, links: share of the peak that is reached, above 0 and at most 1.

    kernels, launches: seconds a kernel, replayed and launched. sequences: seconds a sequence and step.
    requests: seconds a request outside steps (HTTP, tokenizer, queue between processes).
    """

    memory: float
    compute: float
    links: float
    kernels: float
    launches: float
    sequences: float
    requests: float

    def __post_init__(self) -> None:
        for name in ("memory", "compute", "links"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)} is no share of a peak")
        if min(self.kernels, self.launches, self.sequences, self.requests) < 0:
            raise ValueError(f"{self}: a time cannot be negative")

    @property
    def factors(self) -> tuple[float, ...]:
        """What each cause's amount is multiplied with, in the order of `CAUSES`."""
        return (
            1 / self.memory,
            1 / self.compute,
            1 / self.links,
            self.kernels,
            self.launches,
            self.sequences,
            self.requests,
        )

    @classmethod
    def from_factors(cls, factors: Sequence[float]) -> Efficiencies:
        shares = [1 / max(1.0, float(factor)) for factor in factors[:3]]
        return cls(*shares, *(max(0.0, float(factor)) for factor in factors[3:]))

    def as_dict(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start .. start+count-1 of one prompt."""

    start: int
    count: int


@dataclass(frozen=True, slots=True)
class _Matrices:
    """Of one rank: seconds to read them all, and seconds a row to multiply with them, both at the peak."""

    read: float
    row: float


@cache
def _kinds(model: ModelSpec, *, drafter: bool) -> Mapping[Kind, tuple[tuple[Module, bool, int, int], ...]]:
    """All matrices of the decoder, or of the MTP layer, by kind: module, multiplied in FP8, bytes, parameters."""
    found: dict[Kind, dict[tuple[Module, bool], tuple[int, int]]] = {}
    for entry in model.stored:
        if (entry.layer == model.config.num_hidden_layers) == drafter:
            kinds = found.setdefault(_KINDS.get(entry.module, "dense"), {})
            key = (entry.module, _fp8(entry))
            nbytes, parameters = kinds.get(key, (0, 0))
            kinds[key] = (nbytes + entry.total, parameters + entry.parameters)
    return {kind: tuple((*key, *sums) for key, sums in kinds.items()) for kind, kinds in found.items()}


def _fp8(entry: Stored) -> bool:
    """Multiplied in FP8: E4M3 beside U8 are the scales of FP4."""
    return "F8_E4M3" in entry.bytes and "U8" not in entry.bytes


class StepTimes:
    """What steps of one replica take. Aggregates are made once; a step is a few dozen operations."""

    def __init__(
        self, model: ModelSpec, gpu: Gpu, layout: Layout, engine: Engine, cache: CacheFormat, *, drafts: int = 0
    ) -> None:
        self.model, self.gpu, self.layout, self.engine, self.cache = model, gpu, layout, engine, cache
        self.drafts = drafts if model.config.has_mtp else 0
        config = model.config
        self.layers = config.num_hidden_layers
        self.full = len(config.full_layers)
        self.moe_layers = sum(kind == "sparse" for kind in config.mlp_layer_types)
        self.topk = config.index_topk
        self._dense, self._experts, self._head = (self._sum(kind) for kind in ("dense", "experts", "head"))
        self._drafter_dense, self._drafter_experts = (self._sum(kind, drafter=True) for kind in ("dense", "experts"))
        latent, index = (cache.layer_bytes(config, layer)[at] for at, layer in ((0, 0), (1, config.full_layers[0])))
        self._latent, self._index = latent, index
        heads = -(-config.num_attention_heads // layout.tp)
        width = 2 * config.kv_lora_rank + config.qk_rope_head_dim
        self._attend = 2.0 * heads * width / gpu.peak("bf16")  # seconds a row, key and layer
        self._score = 2.0 * config.index_n_heads * config.index_head_dim / gpu.peak("fp8")
        self._quantised = any(module == "o_proj" and fp8 for module, fp8, _, _ in _kinds(model, drafter=False)["dense"])

    # ── passes ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def decode(self, sequences: int, seen: float, context: float, factors: Sequence[float]) -> Work:
        """One decode step of all sequences, with their drafts if there are any.

        seen: sum over sequences of min(context, topk). context: sum of their contexts. factors: of `Efficiencies`,
        which decide what binds.
        """
        rows = sequences * (1 + self.drafts)
        groups = self.layout.pp * self.layout.dp  # that the sequences are dealt to
        share = 1 / groups
        bound = _Bounds(factors)
        mine = rows * share
        self._matrices(bound, rows / self.layout.pp, mine, self.layout.pp)
        self._attention(
            bound,
            keys=seen * (1 + self.drafts) * share,
            read=seen * share / self.layout.dcp,
            scored=context * (1 + self.drafts) * share,
            indexed=context * share,
        )
        kernels = float(self._kernels)
        if self.drafts:
            kernels += self._draft(bound, sequences, seen, context)
        links = self._links(rows)
        return (bound.memory, bound.compute, links, kernels, 0.0, sequences * share, 0.0)

    def prefill(self, chunks: Sequence[Chunk], factors: Sequence[float]) -> Work:
        """One pass over prompt chunks."""
        rows = sum(chunk.count for chunk in chunks)
        groups = min(self.layout.dp, len(chunks))  # a prompt is computed by one attention group
        share = 1 / (groups * self.layout.pp)
        seen = sum(_seen(chunk, self.topk) for chunk in chunks)
        context = sum(chunk.count * chunk.start + chunk.count * (chunk.count + 1) / 2 for chunk in chunks)
        ends = sum(chunk.start + chunk.count for chunk in chunks)
        bound = _Bounds(factors)
        self._matrices(bound, rows / self.layout.pp, rows * share, self.layout.pp)
        self._attention(bound, seen * share, ends * share, context * share, ends * share)
        kernels = self._kernels + bool(self.drafts) * _DRAFT_KERNELS  # the MTP layer reads prompts, too
        return (bound.memory, bound.compute, self._links(rows), 0.0, float(kernels), len(chunks) * share, 0.0)

    # ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _matrices(self, bound: _Bounds, rows: float, mine: float, stages: int) -> None:
        """rows: of the step in one stage. mine: of them, those of this rank's attention group."""
        bound.add(self._dense.read, self._dense.row * mine)
        bound.add(self._experts.read * self.coverage(rows), self._experts.row * rows)
        bound.add(self._head.read, 0.0)

    def _attention(self, bound: _Bounds, keys: float, read: float, scored: float, indexed: float) -> None:
        gpu = self.gpu
        bound.add(self.layers * read * self._latent / gpu.bandwidth, self.layers * keys * self._attend)
        bound.add(self.full * indexed * self._index / gpu.bandwidth, self.full * scored * self._score)

    def _draft(self, bound: _Bounds, sequences: int, seen: float, context: float) -> float:
        """`drafts` passes through the MTP layer and the head, one after another; returns their kernels."""
        times, share = self.drafts, 1 / (self.layout.pp * self.layout.dp)
        covered = self.coverage(sequences / self.layout.pp)
        bound.add(times * self._drafter_dense.read, times * self._drafter_dense.row * sequences * share)
        bound.add(times * self._drafter_experts.read * covered, 0.0)
        bound.add(times * self._head.read, 0.0)
        bound.add(times * (seen * self._latent + context * self._index) * share / self.gpu.bandwidth, 0.0)
        return float(times * _DRAFT_KERNELS)

    def _links(self, rows: int) -> float:
        """Seconds that activations travel, at the links' peak."""
        layout, hidden = self.layout, self.model.config.hidden_size
        mine = rows / layout.pp / layout.dp
        seconds = 0.0
        if layout.tp > 1:  # a ring passes everything twice, but what is one's own
            reduced = 2 * _ACTIVATION_BYTES * hidden * mine * (layout.tp - 1) / layout.tp
            seconds += 2 * self.layers * reduced / self._link(layout.tp)
        if layout.dp > 1:  # rows go to the ranks of their experts and come back
            away = (layout.ranks - 1) / layout.ranks
            sent = mine / layout.tp * self.model.config.num_experts_per_tok * hidden * away
            seconds += self.moe_layers * sent * (_FP8_BYTES + _ACTIVATION_BYTES) / self._link(layout.ranks)
        if layout.pp > 1:
            seconds += (layout.pp - 1) * mine * hidden * _ACTIVATION_BYTES / self._link(layout.gpus)
        return seconds

    def _link(self, ranks: int) -> float:
        return self.gpu.link if ranks <= self.gpu.domain else min(self.gpu.link, self.gpu.scale_out)

    def coverage(self, rows: float) -> float:
        """Share of a layer's routed experts that so many rows touch."""
        config = self.model.config
        return float(1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** (rows**_EVENNESS))

    @property
    def cache_bytes(self) -> int:
        """Bytes that a token takes in the caches of all layers."""
        return self.layers * self._latent + self.full * self._index

    @cached_property
    def _kernels(self) -> int:
        """Kernels of a pass through the whole model."""
        layer = _LAYER_KERNELS + self._quantised * _LAYER_QUANTISERS
        indexer = _INDEXER_KERNELS + self._quantised * _INDEXER_QUANTISERS
        return self.layers * layer + self.full * indexer + _OUTSIDE_KERNELS * self.layout.pp

    def _sum(self, kind: Kind, *, drafter: bool = False) -> _Matrices:
        """Matrices of one kind of all layers, as one rank has them."""
        read = row = 0.0
        config = self.model.config
        for module, fp8, nbytes, parameters in _kinds(self.model, drafter=drafter).get(kind, ()):
            cut = ways(module, self.layout, self.engine)
            used = config.num_experts_per_tok / config.n_routed_experts if module == "experts" else 1.0
            dtype: ComputeDtype = "fp8" if fp8 else self.model.compute if module == "experts" else "bf16"
            read += nbytes / cut / self.gpu.bandwidth
            row += 2.0 * parameters * used / cut / self.gpu.peak(dtype)
        return _Matrices(read, row)


class _Bounds:
    """Adds up parts, each under the cause that binds it."""

    __slots__ = ("_compute_factor", "_memory_factor", "compute", "memory")

    def __init__(self, factors: Sequence[float]) -> None:
        self._memory_factor, self._compute_factor = factors[0], factors[1]
        self.memory = self.compute = 0.0

    def add(self, memory: float, compute: float) -> None:
        if memory * self._memory_factor >= compute * self._compute_factor:
            self.memory += memory
        else:
            self.compute += compute


def _seen(chunk: Chunk, topk: int) -> float:
    """Sum over the chunk's rows of the keys that each attends to."""
    end = chunk.start + chunk.count
    few = min(end, topk)
    below = (few * (few + 1) - chunk.start * (chunk.start + 1)) / 2 if chunk.start < topk else 0.0
    return below + max(0, end - max(chunk.start, topk)) * topk


def add(first: Work, second: Work, times: float = 1.0) -> Work:
    return tuple(a + times * b for a, b in zip(first, second, strict=True))


def seconds(work: Work, factors: Sequence[float]) -> float:
    return sum(amount * factor for amount, factor in zip(work, factors, strict=True))
