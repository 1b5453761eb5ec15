"""`config.json` of a GLM-5 family checkpoint (`glm_moe_dsa`), parsed strictly into a frozen `GlmConfig`.

Every key is either used, checked to have the one value we honour, or known to carry no meaning for the forward
pass; anything else is a `ConfigError` that names it. Semantic fields have no defaults. Torch-free.

Source: the published configs of zai-org/GLM-5 … GLM-5.3 and `transformers` 5.23 `GlmMoeDsaConfig`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from freehold.errors import ConfigError

IndexerType = Literal["full", "shared"]
MlpType = Literal["dense", "sparse"]
Kind = TypeVar("Kind", bound=str)

_INTS = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
    "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim index_n_heads index_head_dim index_topk "
    "n_routed_experts num_experts_per_tok n_shared_experts n_group topk_group max_position_embeddings "
).split()

_FULL: IndexerType = "full"
_MAX_LAYERS = 10_000  # far beyond any real model; a typo must not allocate per-layer tables until memory ends

# Keys that decide what the forward pass computes, with the one value we honour. Every published config has them.
_FIXED_REQUIRED: dict[str, str] = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}

# Keys whose only honoured value is this one: another value is refused, absence is fine.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("glm_moe_dsa",),
    "tie_word_embeddings": (False,),
    "mlp_bias": (False,),
    "moe_router_dtype": ("float32", "fp32", None),
    "moe_layer_freq": (1,),
    "ep_size": (1,),
    "pretraining_tp": (1,),
    "attention_dropout": (0, 0.0),
    "rope_scaling": (None,),
}

# Keys without meaning for a forward pass (head_dim is misleading in published configs and unused).
_INERT = frozenset(
    "architectures dtype torch_dtype bos_token_id pad_token_id use_cache initializer_range transformers_version "
    "head_dim output_router_logits _name_or_path quantization_config index_topk_freq index_skip_topk_offset "
    "index_topk_pattern num_nextn_predict_layers router_aux_loss_coef output_attentions output_hidden_states "
    "return_dict id2label label2id problem_type chunk_size_feed_forward is_encoder_decoder".split()
)


@dataclass(frozen=True, slots=True)
class GlmConfig:
    """The architecture. Field names are those of config.json; sizes are in elements.

    indexer_types[i]: "full" (layer i owns an indexer and an index-key cache) or "shared" (it reuses the selection
        of the nearest full layer below).
    latent_norm_eps: eps of q_a_layernorm and kv_a_layernorm. It follows rms_norm_eps; `transformers` uses 1e-6
        there, and `from_dict(..., latent_norm_eps=1e-6)` reproduces that for oracle tests.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    n_group: int
    topk_group: int
    max_position_embeddings: int
    rms_norm_eps: float
    latent_norm_eps: float
    rope_theta: float
    rope_interleave: bool
    indexer_rope_interleave: bool
    attention_bias: bool
    norm_topk_prob: bool
    routed_scaling_factor: float
    indexer_types: tuple[IndexerType, ...]
    mlp_layer_types: tuple[MlpType, ...]
    eos_token_ids: tuple[int, ...]
    num_nextn_predict_layers: int
    index_share_for_mtp_iteration: bool
    dtype: str
    quantization: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Elements cached per token and layer: the normed latent, then the roped shared key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        return float(self.qk_head_dim**-0.5)

    @property
    def full_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.indexer_types) if kind == "full")

    @property
    def has_mtp(self) -> bool:
        return self.num_nextn_predict_layers > 0

    @classmethod
    def from_file(cls, path: str | Path, *, latent_norm_eps: float | None = None) -> GlmConfig:
        """Read `config.json` (or a directory that has one)."""
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; a checkpoint directory has a config.json") from None
        except RecursionError:
            raise ConfigError(f"{path}: nested too deeply to read; a config.json has two or three levels") from None
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, not JSON, or a number of too many digits
            raise ConfigError(f"{path}: not readable as JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: expected a JSON object")
        return cls.from_dict(raw, latent_norm_eps=latent_norm_eps)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, latent_norm_eps: float | None = None) -> GlmConfig:
        """Parse and check a config; raises ConfigError naming the key."""
        if raw.get("model_type") != "glm_moe_dsa":
            raise ConfigError(f"model_type: expected 'glm_moe_dsa', found {raw.get('model_type')!r}")
        _check_keys(raw)
        values: dict[str, Any] = {key: _integer(raw, key) for key in _INTS}
        layers = values["num_hidden_layers"]
        if layers > _MAX_LAYERS:
            raise ConfigError(
                f"config.json: num_hidden_layers = {layers} is more than {_MAX_LAYERS}; correct the number"
            )
        eps, share = _number(raw, "rms_norm_eps"), "index_share_for_mtp_iteration"
        config = cls(
            **values,
            rms_norm_eps=eps,
            latent_norm_eps=eps if latent_norm_eps is None else latent_norm_eps,
            rope_theta=_rope_theta(raw),
            rope_interleave=_boolean(raw, "rope_interleave"),
            indexer_rope_interleave=_boolean(raw, "indexer_rope_interleave"),
            attention_bias=_boolean(raw, "attention_bias"),
            norm_topk_prob=_boolean(raw, "norm_topk_prob"),
            routed_scaling_factor=_number(raw, "routed_scaling_factor"),
            indexer_types=_indexer_types(raw, layers),
            mlp_layer_types=_mlp_types(raw, layers),
            eos_token_ids=_token_ids(raw, "eos_token_id"),
            num_nextn_predict_layers=_mtp_layers(raw),
            # Absent means False: the published GLM-5 and 5.1 have an MTP layer but not the key, and do not share.
            index_share_for_mtp_iteration=_boolean({share: False, **raw}, share),
            dtype=_dtype(raw),
            quantization=_quantization(raw),
        )
        _check_sizes(config, raw)
        return config


def _check_keys(raw: Mapping[str, Any]) -> None:
    used = set(_INTS) | {
        "rms_norm_eps", "rope_parameters", "rope_theta", "rope_interleave", "indexer_rope_interleave",
        "attention_bias", "norm_topk_prob", "routed_scaling_factor", "indexer_types", "mlp_layer_types",
        "first_k_dense_replace", "eos_token_id", "index_share_for_mtp_iteration", "num_key_value_heads",
        "qk_head_dim", "num_experts", "layer_types",
    }  # fmt: skip
    unknown = sorted(set(raw) - used - set(_FIXED) - set(_FIXED_REQUIRED) - _INERT)
    if unknown:
        raise ConfigError(
            f"config.json: unknown key {unknown[0]!r} = {raw[unknown[0]]!r}"
            + (f" (and {len(unknown) - 1} more: {', '.join(unknown[1:])})" if len(unknown) > 1 else "")
            + "; this version does not know what it changes, so it refuses to guess"
        )
    for key, value in _FIXED_REQUIRED.items():
        if _require(raw, key) != value:
            raise ConfigError(f"config.json: {key} = {raw[key]!r} is not supported (only {value!r})")
    for key, allowed in _FIXED.items():
        if key in raw and raw[key] not in allowed:
            raise ConfigError(f"config.json: {key} = {raw[key]!r} is not supported (only {allowed[0]!r})")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ConfigError(f"config.json: {twice!r} is given twice")
    return dict(pairs)


def _require(raw: Mapping[str, Any], key: str) -> Any:
    if key not in raw:
        raise ConfigError(f"config.json: {key!r} is missing, and it has no safe default")
    return raw[key]


def _integer(raw: Mapping[str, Any], key: str) -> int:
    value = _require(raw, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json: {key} must be a positive integer, found {value!r}")
    return value


def _number(raw: Mapping[str, Any], key: str) -> float:
    value = _require(raw, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"config.json: {key} must be a positive number, found {value!r}")
    return float(value)


def _boolean(raw: Mapping[str, Any], key: str) -> bool:
    value = _require(raw, key)
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} must be true or false, found {value!r}")
    return value


def _rope_theta(raw: Mapping[str, Any]) -> float:
    parameters = raw.get("rope_parameters")
    if parameters is None:
        return _number(raw, "rope_theta")  # the pre-v5 spelling
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"config.json: rope_parameters must be an object, found {parameters!r}")
    plain = {"rope_type": "default", "partial_rotary_factor": 1.0}
    if any(parameters[key] != plain.get(key) for key in parameters if key != "rope_theta"):
        raise ConfigError(f"config.json: rope_parameters = {parameters!r}: only rope_type 'default' is supported")
    _require(parameters, "rope_type")
    theta = _number(parameters, "rope_theta")
    if raw.get("rope_theta", theta) != theta:
        raise ConfigError(f"config.json: rope_theta = {raw['rope_theta']!r} contradicts rope_parameters ({theta!r})")
    return theta


def _indexer_types(raw: Mapping[str, Any], layers: int) -> tuple[IndexerType, ...]:
    """indexer_types, else index_topk_pattern ("F"/"S"), else freq and offset, else (GLM-5, 5.1) all full.

    Where more than one is given they must agree: engines differ in which they read.
    """
    found: dict[str, tuple[IndexerType, ...]] = {}
    for key in ("indexer_types", "index_topk_pattern"):
        types = raw.get(key)
        if key == "index_topk_pattern" and isinstance(types, str):
            types = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in types]
        if types is not None:
            found[key] = _layer_kinds(key, types, layers, ("full", "shared"))
    if raw.get("index_topk_freq") is not None:
        found["index_topk_freq"] = _every_nth_full(raw, layers)
    if not found:
        found["indexer_types"] = tuple(_FULL for _ in range(layers))
    key, chosen = next(iter(found.items()))
    if chosen[0] != "full":
        raise ConfigError(f"config.json: {key}: layer 0 shares an indexer, but no layer below it has one")
    for other, types in found.items():
        if types != chosen:
            at = next(i for i in range(layers) if types[i] != chosen[i])
            raise ConfigError(
                f"config.json: {other} contradicts {key}: layer {at} is {types[at]} by the first and {chosen[at]} by "
                "the second; correct one, or remove it"
            )
    return chosen


def _every_nth_full(raw: Mapping[str, Any], layers: int) -> tuple[IndexerType, ...]:
    """The pattern of index_topk_freq and index_skip_topk_offset."""
    freq = _integer(raw, "index_topk_freq")
    offset = _require(raw, "index_skip_topk_offset") if freq > 1 else 0
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise ConfigError(f"config.json: index_skip_topk_offset must be an integer, found {offset!r}")
    types: list[IndexerType] = ["full" if max(i - offset + 1, 0) % freq == 0 else "shared" for i in range(layers)]
    return tuple(types)


def _mlp_types(raw: Mapping[str, Any], layers: int) -> tuple[MlpType, ...]:
    """mlp_layer_types, else the first first_k_dense_replace layers dense and the others sparse; both must agree."""
    kinds: tuple[MlpType, ...] | None = None
    if raw.get("mlp_layer_types") is not None:
        kinds = _layer_kinds("mlp_layer_types", raw["mlp_layer_types"], layers, ("dense", "sparse"))
        if raw.get("first_k_dense_replace") is None:
            return kinds
    dense = _require(raw, "first_k_dense_replace")
    if isinstance(dense, bool) or not isinstance(dense, int) or dense < 0:
        raise ConfigError(f"config.json: first_k_dense_replace must be a count of layers, found {dense!r}")
    counted: tuple[MlpType, ...] = tuple("dense" if i < dense else "sparse" for i in range(layers))
    if kinds is not None and kinds != counted:
        at = next(i for i in range(layers) if kinds[i] != counted[i])
        raise ConfigError(
            f"config.json: first_k_dense_replace = {dense} contradicts mlp_layer_types, where layer {at} is "
            f"{kinds[at]}; correct one, or remove it"
        )
    return counted


def _layer_kinds(key: str, kinds: Any, layers: int, allowed: tuple[Kind, Kind]) -> tuple[Kind, ...]:
    if not isinstance(kinds, list | tuple) or len(kinds) != layers or any(kind not in allowed for kind in kinds):
        raise ConfigError(f"config.json: {key} = {kinds!r} does not name {layers} layers {allowed[0]} or {allowed[1]}")
    return tuple(kinds)


def _mtp_layers(raw: Mapping[str, Any]) -> int:
    value = raw.get("num_nextn_predict_layers") or 0
    if isinstance(value, bool) or value not in (0, 1):
        raise ConfigError(f"config.json: num_nextn_predict_layers = {value!r}: at most one MTP layer is supported")
    return int(value)


def _dtype(raw: Mapping[str, Any]) -> str:
    """`dtype`, or `torch_dtype` as it was called before transformers 5; what loads without it is bfloat16."""
    value = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    if not isinstance(value, str):
        raise ConfigError(f"config.json: dtype must be a name, found {value!r}")
    return value.removeprefix("torch.")


def _quantization(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    value = raw.get("quantization_config")
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"config.json: quantization_config must be an object, found {value!r}")
    return value


def _token_ids(raw: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = _require(raw, key)
    ids = value if isinstance(value, list) else [value]
    if not ids or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ConfigError(f"config.json: {key} must be a token id or a list of them, found {value!r}")
    return tuple(ids)


def _check_sizes(config: GlmConfig, raw: Mapping[str, Any]) -> None:
    def refuse(message: str) -> None:
        raise ConfigError(f"config.json: {message}")

    if raw.get("num_key_value_heads", config.num_attention_heads) != config.num_attention_heads:
        refuse("num_key_value_heads must equal num_attention_heads (latent attention has no grouped heads)")
    if raw.get("qk_head_dim", config.qk_head_dim) != config.qk_head_dim:
        refuse(f"qk_head_dim = {raw['qk_head_dim']!r} contradicts qk_nope_head_dim + qk_rope_head_dim")
    if raw.get("num_experts", config.n_routed_experts) != config.n_routed_experts:
        refuse(f"num_experts = {raw['num_experts']!r} contradicts n_routed_experts = {config.n_routed_experts}")
    if config.qk_rope_head_dim % 2 or config.index_head_dim < config.qk_rope_head_dim:
        refuse("qk_rope_head_dim must be even and at most index_head_dim")
    if config.n_routed_experts % config.n_group or config.topk_group > config.n_group:
        refuse("n_group must divide n_routed_experts and be at least topk_group")
    if config.num_experts_per_tok > config.topk_group * (config.n_routed_experts // config.n_group):
        refuse("num_experts_per_tok exceeds the experts in topk_group groups")
    if any(not 0 <= token_id < config.vocab_size for token_id in config.eos_token_ids):
        refuse(f"eos_token_id = {raw['eos_token_id']!r} is outside the vocabulary of {config.vocab_size}")
    known = {"deepseek_sparse_attention", "indexed_attention"}
    if any(kind not in known for kind in raw.get("layer_types") or ()):
        refuse(f"layer_types: only {sorted(known)} are supported")
