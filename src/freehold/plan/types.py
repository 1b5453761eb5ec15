"""Words the planner shares: figures with their basis, hardware, models, layouts, footprints, results. Torch-free.

Units are bytes, seconds, tokens, US dollars, watts and FLOP, unsuffixed; a name says otherwise where it must.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

from freehold.model.cache_layout import IndexFormat, LatentFormat, index_key_bytes, latent_bytes
from freehold.model.config import GlmConfig
from freehold.model.names import Part

Basis = Literal["exact", "measured", "interpolated", "roofline"]
BASES: tuple[Basis, ...] = get_args(Basis)
"""exact: counted. measured: somebody measured this very setup. interpolated: between or scaled from measurements.
roofline: arithmetic with calibrated efficiencies."""
Engine = Literal["vllm", "sglang", "freehold"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
WeightDtype = Literal["bf16", "fp8", "nvfp4", "w4a16", "w8a16"]
Family = Literal["glm_moe_dsa", "deepseek_v32"]
WEIGHT_DTYPES: tuple[WeightDtype, ...] = get_args(WeightDtype)
"""How a checkpoint stores its routed experts, which are nearly all of it; other parts may be stored otherwise."""
Module = Literal[
    "embed_tokens", "lm_head", "norm", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "indexer",
    "gate", "experts", "shared_experts", "mlp", "eh_proj"
]  # fmt: skip
ComputeDtype = Literal["bf16", "fp8", "fp4"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, the interval it is expected in (the same number three times when exact), and where it is from."""

    value: float
    low: float
    high: float
    basis: Basis
    source: str

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"{self.value} is outside its own interval {self.low} to {self.high}")

    @classmethod
    def exact(cls, value: float, source: str) -> Figure:
        return cls(value, value, value, "exact", source)

    def scaled(self, factor: float) -> Figure:
        """The figure times a positive number."""
        return Figure(self.value * factor, self.low * factor, self.high * factor, self.basis, self.source)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a table's figure is from: what was read (a URL or a document's name) and the date that it speaks for."""

    where: str
    date: str


# ── hardware ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Rent:
    """US dollars for a GPU and hour, as found on the market."""

    low: float
    typical: float
    high: float


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator (or one CPU server, kind "cpu", which counts as one).

    arch: "sm80", "sm90", "sm100", "sm103", "sm120", "sm121", "gfx942", "gfx950", "x86-64": what kernels are built for.
    memory: bytes that a process can use. bandwidth: bytes a second from memory. flops: dense FLOP a second by the type
        of the operands; a type that is absent has no matrix units there.
    link: bytes a second that one GPU can send to others within its scale-up domain (NVLink, Infinity Fabric; PCIe if
        there is neither), one direction. domain: GPUs in that domain. scale_out: the same between domains.
    node: GPUs in one machine with one operating system. power: watts of the GPU at full load.
    rent: None if no price was found. capex: US dollars to buy one GPU, None if unknown; `system`: its share of server
        and switches is in that price.
    owned: US dollars a GPU-hour that an analyst gives for owning one (capital, power, hosting), None if unknown.
    sources: field name -> where its figure is from.
    """

    key: str
    name: str
    kind: Literal["cuda", "rocm", "cpu"]
    arch: str
    memory: int
    bandwidth: float
    flops: Mapping[ComputeDtype, float] = field(hash=False)
    link: float
    domain: int
    scale_out: float
    node: int
    power: float
    rent: Rent | None = None
    capex: float | None = None
    system: bool = False
    owned: float | None = None
    notes: tuple[str, ...] = ()
    sources: Mapping[str, Source] = field(default_factory=lambda: MappingProxyType({}), hash=False)

    def peak(self, dtype: ComputeDtype) -> float:
        """FLOP/s for operands of `dtype`, computed in the next wider type where the hardware has no units for it."""
        order: tuple[ComputeDtype, ...] = ("fp4", "fp8", "bf16")
        return next(self.flops[wider] for wider in order[order.index(dtype) :] if wider in self.flops)


@dataclass(frozen=True, slots=True)
class Cluster:
    """`gpus` GPUs of one kind."""

    gpu: Gpu
    gpus: int

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpu.node)


# ── models ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Stored:
    """All tensors of one kind in one layer, weights and scales together.

    layer: None outside layers; the MTP layer is config.num_hidden_layers. module: what tells how engines cut it.
    parameters: elements of the unquantised tensors. bytes: by stored dtype, as safetensors spells it.
    """

    layer: int | None
    part: Part
    module: Module
    parameters: int
    bytes: Mapping[str, int] = field(hash=False)

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as stored: its architecture and exactly how many bytes each part of each layer takes.

    name: as given, "glm-5.2-fp8". repo: what engines are told to load. licence: None if nothing says.
    bundled: the configuration comes with Freehold; else it was read from `repo`, a directory.
    """

    name: str
    repo: str
    config: GlmConfig = field(hash=False)
    dtype: WeightDtype
    stored: tuple[Stored, ...] = field(hash=False)
    licence: str | None
    licence_source: str
    source: Source
    notes: tuple[str, ...] = ()
    bundled: bool = True
    family: Family = "glm_moe_dsa"

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data, the MTP layer included."""
        return sum(entry.total for entry in self.stored)

    @property
    def parameters(self) -> int:
        return sum(entry.parameters for entry in self.stored)

    @property
    def compute(self) -> ComputeDtype:
        """The operand type of the routed experts' products: weight-only formats are computed in bf16."""
        match self.dtype:
            case "fp8":
                return "fp8"
            case "nvfp4":
                return "fp4"
            case _:
                return "bf16"


# ── how it is laid out ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Layout:
    """How one replica is spread over tp * dp * pp GPUs.

    tp: ranks that share one attention (heads are cut). dp: attention groups that each serve their own sequences, in
    the same replica (SGLang's DP-attention, vLLM's data parallel with expert parallel); 1 means none.
    ep: groups that routed experts are dealt to, whole; within a group they are cut over tp * dp / ep ranks.
    pp: stages. cuts: the first layer of every stage, cuts[0] == 0.
    dcp: ranks of a TP group among which the cache of one sequence is dealt in decode; 1 means each holds all of it.
    """

    tp: int = 1
    dp: int = 1
    ep: int = 1
    pp: int = 1
    dcp: int = 1
    cuts: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        sizes = (self.tp, self.dp, self.ep, self.pp, self.dcp)
        if min(sizes) < 1 or self.ranks % self.ep or self.tp % self.dcp or len(self.cuts) != self.pp or self.cuts[0]:
            raise ValueError(f"{self} is no layout")

    @property
    def ranks(self) -> int:
        """GPUs of one stage."""
        return self.tp * self.dp

    @property
    def gpus(self) -> int:
        return self.ranks * self.pp

    @property
    def moe_tp(self) -> int:
        return self.ranks // self.ep

    def __str__(self) -> str:
        words = {"TP": self.tp, "DP": self.dp, "EP": self.ep, "PP": self.pp, "DCP": self.dcp}
        return "·".join(f"{name}{size}" for name, size in words.items() if size > 1 or name == "TP")


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """How an engine stores its caches. all_layers: index keys are allocated on every layer, not only on full ones."""

    latent: LatentFormat
    index: IndexFormat = "fp8"
    all_layers: bool = False

    def layer_bytes(self, config: GlmConfig, layer: int) -> tuple[int, int]:
        """Bytes that a token takes in `layer`: of latent, of index key."""
        owns = layer >= config.num_hidden_layers or config.indexer_types[layer] == "full" or self.all_layers
        return latent_bytes(config, self.latent), index_key_bytes(config, self.index) if owns else 0


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of the fullest rank of one replica.

    weights: bytes on it by part; the MTP layer's are under "mtp" (and absent if drafts are not used).
    cache_per_token: bytes that a token of a sequence takes on it: latents and index keys.
    overhead: bytes of everything else, an estimate. usable: bytes the engine may use. cache_room: what is left.
    cache_tokens: tokens that the caches of one attention group hold together; a replica has `layout.dp` groups.
    max_context: the longest sequence, at most the model's own limit.
    """

    layout: Layout
    cache: CacheFormat
    mtp: bool
    weights: Mapping[Part, int] = field(hash=False)
    latent_per_token: int
    index_per_token: int
    overhead: Figure
    usable: int
    cache_tokens: int
    max_context: int

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def cache_per_token(self) -> int:
        return self.latent_per_token + self.index_per_token

    @property
    def cache_room(self) -> int:
        return max(0, self.usable - self.weight_bytes - round(self.overhead.value))

    @property
    def fits(self) -> bool:
        return self.cache_tokens > 0

    def max_sequences(self, tokens: int) -> int:
        """Sequences of `tokens` tokens that a replica can hold at once."""
        return self.cache_tokens // tokens * self.layout.dp


# ── what comes of it ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of one quantity over requests, in seconds."""

    p50: Figure
    p90: Figure
    p99: Figure
    mean: Figure


@dataclass(frozen=True, slots=True)
class Measurement:
    """A run that somebody made of this very setup and load: its means, of basis "measured"; None where it does not say.

    A run includes the burst that it began with, which a prediction of a load in its stride does not.
    """

    run: str
    source: Source
    ttft: Figure | None
    tpot: Figure | None


@dataclass(frozen=True, slots=True)
class Slo:
    """What callers were promised, in seconds at `percentile` percent of the requests; None is not promised."""

    ttft: float | None = None
    tpot: float | None = None
    percentile: float = 90.0


@dataclass(frozen=True, slots=True)
class Speed:
    """One replica under one workload. Rates are tokens a second of the replica; `goodput`: requests a second that meet
    all SLOs. cached_rate: prompt tokens a second that the prefix cache answered, part of input_rate.
    concurrency: requests in flight, mean. starved: share of the time in which a request waited for cache.
    measured: a run of this setup and load, if one is known.
    """

    ttft: Percentiles
    tpot: Percentiles
    input_rate: Figure
    cached_rate: Figure
    output_rate: Figure
    request_rate: Figure
    goodput: Figure
    concurrency: float
    starved: float
    meets_slo: bool
    measured: Measurement | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """What a deployment costs at a workload: per hour, per million tokens of each kind, per task if tasks are known.

    per_mtok_output is the part of the bill that decoding has; per_mtok_whole is all of the bill over the output tokens,
    their prompts included, by which options are compared: how a bill is divided does not make it smaller.
    """

    per_hour: Figure
    per_mtok_input: Figure
    per_mtok_cached: Figure
    per_mtok_output: Figure
    per_mtok_whole: Figure
    per_task: Figure | None = None
