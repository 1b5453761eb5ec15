"""What one engine step must read and compute, part by part: the roofline's side of the arithmetic. Torch-free.

    step = decode_step(context=4096, batch=8)
    traffic = step_traffic(config, Formats(weight_formats("int8")), step)
    seconds = sum(bound_seconds(part, ceilings) for part in traffic.values())

Counted is what no implementation of these parts can leave out: each weight that a step uses, once; what it reads of the
caches and what it appends to them; the multiplications. Not counted are activations, which stay in a core's cache in
decode, and tables of a few kilobytes. So a bound is a least time, reached only by perfect code.

What decides the figures:

- Routed experts: rows choose independently and evenly, so T rows touch E · (1 - (1 - X/E)^T) experts. Trained routers
  are less even and touch fewer; neighbouring tokens even fewer.
- Attention is in absorbed form (`model/mla.py`): a row reads min(context, index_topk) latents in each layer. Rows of
  one sequence share what they read, so a sequence is counted once, for the row that sees most.
- A full layer reads the index keys of the whole context, once a sequence. Several rows of which all lie within
  index_topk need no scores; a single row makes them always, as `mla.Plan` has it.
- The MTP layer is no part of a plain step.

Bounds are per part and add up, because parts run one after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from freehold.model.cache_layout import IndexFormat, LatentFormat, index_key_bytes, latent_bytes
from freehold.model.config import GlmConfig
from freehold.model.storage_fp8 import BLOCK
from freehold.model.storage_groups import GROUP_SIZE

Part = Literal[
    "indexer.project",
    "indexer.select",
    "attention.project",
    "attention.write",
    "attention.attend",
    "router",
    "experts",
    "mlp",
    "norms",
    "head",
    "sampling",
    "scheduler",
    "tokenizer",
    "other",
]
PARTS: tuple[Part, ...] = get_args(Part)
"""Where a step's time goes, in the order of a layer. "mlp": dense layers and shared experts. "scheduler": and building
the batch. "other": embedding, rotary tables, and whatever belongs to no part."""

WeightFormat = Literal["fp32", "bf16", "int8", "int4", "fp8"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
Matrix = Literal[
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "o_proj",
    "indexer.wq_b",
    "indexer.wk",
    "indexer.weights_proj",
    "router",
    "routed",
    "shared",
    "dense",
    "embed_tokens",
    "lm_head",
]
MATRICES: tuple[Matrix, ...] = get_args(Matrix)
"""Every kind of matrix that a step reads. "routed", "shared", "dense": the three of an MLP."""

_NEVER_QUANTISED: frozenset[Matrix] = frozenset({"embed_tokens", "router", "indexer.weights_proj"})


@dataclass(frozen=True, slots=True)
class Formats:
    """How weights and caches are stored."""

    weights: Mapping[Matrix, WeightFormat]
    latent: LatentFormat = "bf16"
    index: IndexFormat = "bf16"


@dataclass(frozen=True, slots=True)
class Share:
    """One sequence's part of a step: `rows` tokens, the last of which sees `context` positions, itself included.

    samples: the last row's logits are computed.
    """

    rows: int
    context: int
    samples: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= self.context:
            raise ValueError(f"{self.rows} rows that end at position {self.context}: rows must be 1 to context")


@dataclass(frozen=True, slots=True)
class Traffic:
    """bytes: read or written in memory. flops: additions and multiplications, two a product."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a machine can do: bytes read a second from memory, and FLOPs a second of a large matrix product."""

    bytes_per_second: float
    flops_per_second: float


def weight_formats(scheme: WeightFormat) -> dict[Matrix, WeightFormat]:
    """The format of every matrix when the model is stored or loaded as `scheme`.

    Quantised models keep the embedding, the router and the indexer's head weights in bf16. int4 keeps the head, the
    indexer and kv_b_proj in int8, fp8 keeps the head in bf16.
    """
    formats: dict[Matrix, WeightFormat] = dict.fromkeys(MATRICES, scheme)
    if scheme in ("int8", "int4", "fp8"):
        formats |= dict.fromkeys(_NEVER_QUANTISED, "bf16")
    if scheme == "int4":
        formats |= dict.fromkeys(("lm_head", "indexer.wq_b", "indexer.wk", "kv_b_proj"), "int8")
    if scheme == "fp8":
        formats["lm_head"] = "bf16"
    return formats


def matrix_bytes(outputs: int, inputs: int, format: WeightFormat) -> float:
    """Bytes of a matrix [outputs, inputs] with its scales. One that groups do not fit stays in bf16."""
    size = outputs * inputs
    match format:
        case "fp32":
            return 4 * size
        case "fp8":
            return size + 4 * -(-outputs // BLOCK) * -(-inputs // BLOCK)
        case "int8" | "int4" if inputs % (group := GROUP_SIZE[bits := 8 if format == "int8" else 4]) == 0:
            return size * (bits + 16 / group) / 8  # a bf16 scale for each group
        case _:
            return 2 * size


def experts_touched(experts: int, chosen: int, rows: int) -> float:
    """How many of `experts` are expected to be used when each of `rows` rows chooses `chosen` of them evenly."""
    return float(experts * (1.0 - (1.0 - chosen / experts) ** rows))


def decode_step(context: int, batch: int = 1) -> tuple[Share, ...]:
    """One token for each of `batch` sequences that see `context` positions."""
    return (Share(1, context),) * batch


def prefill_steps(tokens: int, budget: int) -> list[tuple[Share, ...]]:
    """A prompt's chunks of up to `budget` tokens; only the last samples."""
    ends = [*range(budget, tokens, budget), tokens]
    starts = [0, *ends[:-1]]
    return [(Share(end - start, end, end == tokens),) for start, end in zip(starts, ends, strict=True)]


def bound_seconds(traffic: Traffic, ceilings: Ceilings) -> float:
    """The least time: the longer of moving the bytes and doing the arithmetic."""
    return max(traffic.bytes / ceilings.bytes_per_second, traffic.flops / ceilings.flops_per_second)


def total(traffic: Iterable[Traffic]) -> Traffic:
    """The sum of several parts or steps."""
    return sum(traffic, Traffic())


def step_traffic(config: GlmConfig, formats: Formats, step: Sequence[Share]) -> dict[Part, Traffic]:
    """Bytes and FLOPs of each part in one step. Parts that only handle integers and text are not in it."""
    rows, sampled = sum(share.rows for share in step), sum(share.samples for share in step)
    layers, full = config.num_hidden_layers, len(config.full_layers)
    sparse = sum(kind == "sparse" for kind in config.mlp_layer_types)
    hidden, scalar = config.hidden_size, 4 if formats.weights["embed_tokens"] == "fp32" else 2

    def product(name: Matrix, outputs: int, inputs: int, times: int = rows) -> Traffic:
        return Traffic(matrix_bytes(outputs, inputs, formats.weights[name]), 2.0 * outputs * inputs * times)

    def mlp(name: Matrix, width: int, times: int = rows) -> Traffic:
        return total((*(product(name, width, hidden, times),) * 2, product(name, hidden, width, times)))

    touched = experts_touched(config.n_routed_experts, config.num_experts_per_tok, rows)
    expert = mlp("routed", config.moe_intermediate_size)
    routed = Traffic(touched * expert.bytes, config.num_experts_per_tok * expert.flops)
    correction = Traffic(4 * config.n_routed_experts)
    norms = Traffic(scalar * hidden * (2 * layers + 1))
    return {
        **_scaled(_indexer(config, formats, step, scalar), full),
        **_scaled(_attention(config, formats, step, scalar), layers),
        "router": _times(product("router", config.n_routed_experts, hidden) + correction, sparse),
        "experts": _times(routed, sparse),
        "mlp": _times(mlp("dense", config.intermediate_size), layers - sparse)
        + _times(mlp("shared", config.moe_intermediate_size * config.n_shared_experts), sparse),
        "norms": norms,
        "head": product("lm_head", config.vocab_size, hidden, sampled) if sampled else Traffic(),
        "other": Traffic(rows * scalar * hidden),
    }


def _indexer(config: GlmConfig, formats: Formats, step: Sequence[Share], scalar: int) -> dict[Part, Traffic]:
    """Of one full layer."""
    heads, dim, hidden, topk = config.index_n_heads, config.index_head_dim, config.hidden_size, config.index_topk
    rows, key = sum(share.rows for share in step), index_key_bytes(config, formats.index)
    selecting, keys, scores = 0, 0, 0
    for share in step:
        chosen = share.rows if share.rows == 1 else min(share.rows, max(share.context - topk, 0))
        if chosen:
            selecting += chosen
            keys += share.context
            scores += _arithmetic(share.context - chosen + 1, share.context)

    def product(name: Matrix, outputs: int, inputs: int, times: int) -> Traffic:
        return Traffic(matrix_bytes(outputs, inputs, formats.weights[name]), 2.0 * outputs * inputs * times)

    project = product("indexer.wk", dim, hidden, rows) + Traffic(2 * scalar * dim + rows * key)
    if selecting:
        project += product("indexer.wq_b", heads * dim, config.q_lora_rank, selecting)
        project += product("indexer.weights_proj", heads, hidden, selecting)
    return {"indexer.project": project, "indexer.select": Traffic(keys * key, 2.0 * heads * (dim + 1) * scores)}


def _attention(config: GlmConfig, formats: Formats, step: Sequence[Share], scalar: int) -> dict[Part, Traffic]:
    """Of one layer."""
    heads, hidden, rank, topk = config.num_attention_heads, config.hidden_size, config.kv_lora_rank, config.index_topk
    rows, latent = sum(share.rows for share in step), latent_bytes(config, formats.latent)

    def product(name: Matrix, outputs: int, inputs: int) -> Traffic:
        return Traffic(matrix_bytes(outputs, inputs, formats.weights[name]), 2.0 * outputs * inputs * rows)

    read = sum(min(share.context, topk) for share in step)
    pairs = 0  # of a row and a latent it attends to
    for share in step:
        first, last = share.context - share.rows + 1, share.context
        within = max(min(last, topk) - first + 1, 0)  # rows that see no more than topk
        pairs += _arithmetic(first, first + within - 1) + (share.rows - within) * topk
    project = total(
        (
            product("q_a_proj", config.q_lora_rank, hidden),
            product("q_b_proj", heads * config.qk_head_dim, config.q_lora_rank),
            product("kv_a_proj_with_mqa", config.latent_dim, hidden),
            product("o_proj", hidden, heads * config.v_head_dim),
            Traffic(scalar * config.q_lora_rank),
        )
    )
    attend = Traffic(read * latent, 2.0 * heads * (config.latent_dim + rank) * pairs)
    attend += product("kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), rank)
    return {
        "attention.project": project,
        "attention.write": Traffic(scalar * rank + rows * latent),
        "attention.attend": attend,
    }


def _arithmetic(first: int, last: int) -> int:
    """first + (first + 1) + … + last; 0 if there is none."""
    return (first + last) * (last - first + 1) // 2 if last >= first else 0


def _times(traffic: Traffic, count: int) -> Traffic:
    return Traffic(traffic.bytes * count, traffic.flops * count)


def _scaled(parts: Mapping[Part, Traffic], count: int) -> dict[Part, Traffic]:
    return {part: _times(traffic, count) for part, traffic in parts.items()}
