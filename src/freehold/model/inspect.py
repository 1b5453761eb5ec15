"""What a checkpoint holds, exactly, from its config and headers only. Torch-free.

Works on a checkpoint directory, on a config.json (then sizes are what that config calls for), and by name on the
published configs that are bundled (`published/README.md` says how each was obtained).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from freehold.errors import ConfigError, NotFound
from freehold.headers import DTYPE_BITS, INDEX_NAME, CheckpointIndex
from freehold.model.cache_layout import (
    INDEX_FORMATS,
    LATENT_FORMATS,
    IndexFormat,
    LatentFormat,
    cache_bytes_per_token,
    index_key_bytes,
    latent_bytes,
)
from freehold.model.checkpoint_files import Progress, verify_manifest
from freehold.model.config import GlmConfig
from freehold.model.names import SCALE_SUFFIX, TensorSpec, tensor_specs
from freehold.model.storage import find_problems, quantization_scheme, stored_tensors
from freehold.model.storage_groups import GROUP_SUFFIXES, GroupFormat, GroupScheme

PUBLISHED = ("glm-5", "glm-5.1", "glm-5.2", "glm-5.2-fp8", "glm-5.3")
# Published chat templates, by SHA-256 or MD5 of the file.
_KNOWN_TEMPLATES = {
    "3740abcea51c45830cb3ca562084ad5fb2ef53589376f73332e9886f93ade41c": "GLM-5.3's",
    "42994f78b64752fe472149dd7e20410d": "GLM-5.2's",
}


@dataclass(frozen=True, slots=True)
class Layers:
    """Decoder layers by kind; the MTP layer is counted apart."""

    decoder: int
    full_indexer: int
    shared_indexer: int
    dense_mlp: int
    sparse_mlp: int
    mtp: int


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of weights.

    total: all weights, the MTP layer included, FP8 scales and correction biases not.
    correction_bias: fp32 values that steer routing, counted apart.
    mtp: the part of total that is the MTP layer.
    active: elements of the matrices that one token passes through, head included; the embedding lookup, norms and the
        MTP layer are not.
    """

    total: int
    correction_bias: int
    mtp: int
    active: int


@dataclass(frozen=True, slots=True)
class CacheRow:
    """Cache bytes with one pair of formats. *_mtp: with the MTP layer's too. max_context: of one full sequence."""

    latent: str
    index: str
    per_token: int
    per_token_mtp: int
    max_context: int
    max_context_mtp: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """Everything `freehold inspect` shows. Bytes are of tensor data; parts include their scales."""

    source: str
    kind: Literal["checkpoint", "config", "published"]
    config: GlmConfig
    layers: Layers
    parameters: Parameters
    tensors: int
    shards: int | None  # None without weights
    total_bytes: int
    bytes_by_dtype: Mapping[str, int]
    bytes_by_part: Mapping[str, int]  # the MTP layer is the part "mtp"
    bits_per_weight: float  # of all tensor data, by parameters.total
    quantization: str
    template: str
    latent_bytes: Mapping[str, int]  # per token and layer, by format
    index_key_bytes: Mapping[str, int]
    caches: tuple[CacheRow, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # worth knowing, and harmless
    verified_files: int | None = None  # None: not asked for

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; the config is shown by the fields it was parsed into."""
        raw = asdict(self)
        raw["config"]["quantization"] = None if self.config.quantization is None else self.quantization
        return raw


def inspect(source: str | Path, *, verify: bool = False, progress: Progress | None = None) -> Inspection:
    """Look at a directory, a config.json or a published name.

    Tensors that are missing, unexpected or mistyped are listed in `problems`; a directory that cannot be read at all
    raises CheckpointError. verify checks the SHA-256 manifest, which reads the weights. Raises ConfigError, NotFound.
    """
    path = Path(source)
    if path.is_dir():
        config = GlmConfig.from_file(path)
        if _has_weights(path):
            index = CheckpointIndex.open(path)
            files = verify_manifest(path, (shard.path for shard in index.shards), progress) if verify else None
            return _report(str(source), "checkpoint", config, index, path, files)
        return _report(str(source), "config", config, None, path, None)
    if path.is_file():
        return _report(str(source), "config", GlmConfig.from_file(path), None, None, None)
    name = str(source).lower()
    if name not in PUBLISHED:
        raise NotFound(f"{source}: no such file or directory, and not a published model ({', '.join(PUBLISHED)})")
    return _report(name, "published", published_config(name), None, None, None)


def published_config(name: str) -> GlmConfig:
    """The bundled config of a published model, by a name of `PUBLISHED`."""
    return GlmConfig.from_dict(published_json(name))


def published_json(name: str) -> dict[str, Any]:
    """The content of the bundled config.json of a published model. Raises NotFound for another name."""
    if name not in PUBLISHED:
        raise NotFound(f"{name}: not a published model; there are {', '.join(PUBLISHED)}")
    text = resources.files("freehold.model").joinpath("published", f"{name}.json").read_text(encoding="utf-8")
    value: dict[str, Any] = json.loads(text)
    return value


def _has_weights(path: Path) -> bool:
    """A directory with only a config is fine; one with weights that cannot be indexed is an error to report."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
    return any(file.name == INDEX_NAME or file.suffix in weights for file in path.iterdir())


def _report(
    source: str,
    kind: Literal["checkpoint", "config", "published"],
    config: GlmConfig,
    index: CheckpointIndex | None,
    directory: Path | None,
    verified: int | None,
) -> Inspection:
    parts = {spec.name: _part(spec, config) for spec in tensor_specs(config)}
    by_dtype: Counter[str] = Counter()
    by_part: Counter[str] = Counter()
    if index is not None:
        found = [(entry.name, entry.dtype, entry.nbytes) for entry in index.tensors.values()]
    else:
        found = [(t.name, t.dtype, _elements(t.shape) * DTYPE_BITS[t.dtype] // 8) for t in stored_tensors(config)]
    for name, dtype, nbytes in found:
        by_dtype[dtype] += nbytes
        by_part[parts.get(_owner(name), "unexpected")] += nbytes
    problems = [] if index is None else [problem.message for problem in find_problems(config, index)]
    notes = [] if index is None else [f"{file}: no index names it; nothing reads it" for file in index.unlisted]
    parameters = _parameters(config)
    return Inspection(
        source=source,
        kind=kind,
        config=config,
        layers=_layers(config),
        parameters=parameters,
        tensors=len(found),
        shards=None if index is None else len(index.shards),
        total_bytes=sum(by_dtype.values()),
        bytes_by_dtype=dict(sorted(by_dtype.items())),
        bytes_by_part=dict(by_part.most_common()),
        bits_per_weight=8 * sum(by_dtype.values()) / parameters.total,
        quantization=_quantization(config),
        template=_template(source, directory),
        latent_bytes={name: latent_bytes(config, name) for name in LATENT_FORMATS},
        index_key_bytes={name: index_key_bytes(config, name) for name in INDEX_FORMATS},
        caches=_caches(config),
        problems=tuple(problems),
        notes=tuple(notes),
        verified_files=verified,
    )


def _layers(config: GlmConfig) -> Layers:
    return Layers(
        decoder=config.num_hidden_layers,
        full_indexer=config.indexer_types.count("full"),
        shared_indexer=config.indexer_types.count("shared"),
        dense_mlp=config.mlp_layer_types.count("dense"),
        sparse_mlp=config.mlp_layer_types.count("sparse"),
        mtp=config.num_nextn_predict_layers,
    )


def _parameters(config: GlmConfig) -> Parameters:
    total = bias = mtp = active = 0
    for spec in tensor_specs(config):
        if spec.dtype == "float32":
            bias += spec.size
            continue
        total += spec.size
        if spec.layer == config.num_hidden_layers:
            mtp += spec.size
        elif len(spec.shape) == 2 and spec.part == "routed_expert":
            active += spec.size * config.num_experts_per_tok  # of n_routed_experts such tensors; divided below
        elif len(spec.shape) == 2 and spec.part != "embed":
            active += spec.size * config.n_routed_experts
    return Parameters(total, bias, mtp, active // config.n_routed_experts)


def _quantization(config: GlmConfig) -> str:
    scheme = quantization_scheme(config.quantization)
    if scheme is None:
        return "none"
    if not isinstance(scheme, GroupScheme):
        return "fp8 (E4M3, 128x128 block scales)"
    forms: Counter[GroupFormat] = Counter()
    kept = 0
    for spec in tensor_specs(config):
        form = scheme.format_of(spec)
        if form is not None:
            forms[form] += 1
        elif len(spec.shape) == 2:
            kept += 1
    counts = [f"{count:,} matrices {form}" for form, count in sorted(forms.items(), key=lambda item: item[0].bits)]
    return ", ".join((*counts, f"{kept:,} as they were"))


def _owner(name: str) -> str:
    """The published tensor that a stored one belongs to."""
    for suffix in (SCALE_SUFFIX, *GROUP_SUFFIXES):
        if name.endswith(f".weight{suffix}"):
            return name.removesuffix(suffix)
    return name


def _part(spec: TensorSpec, config: GlmConfig) -> str:
    return "mtp" if spec.layer == config.num_hidden_layers else spec.part


def _elements(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def _caches(config: GlmConfig) -> tuple[CacheRow, ...]:
    """Every pair that Freehold's engine can have, then those that only GPU engines have."""
    pairs: tuple[tuple[LatentFormat, IndexFormat], ...] = (
        ("fp32", "fp32"),
        ("fp32", "fp8"),
        ("bf16", "bf16"),
        ("bf16", "fp8"),
        ("fp8_ds_mla", "fp32"),
        ("fp8_ds_mla", "bf16"),
        ("fp8_ds_mla", "fp8"),
        ("fp8", "fp8"),
        ("nvfp4_ds_mla", "fp8"),
    )
    rows = []
    for latent, index in pairs:
        without = cache_bytes_per_token(config, latent, index)
        with_mtp = cache_bytes_per_token(config, latent, index, mtp=True)
        length = config.max_position_embeddings
        rows.append(CacheRow(latent, index, without, with_mtp, without * length, with_mtp * length))
    return tuple(rows)


def _template(source: str, directory: Path | None) -> str:
    if directory is None:
        return f"built-in, profile {'glm-5.3' if source == 'glm-5.3' else 'glm-5.2'}"
    file = directory / "chat_template.jinja"
    if file.is_file():
        data = file.read_bytes()
        digests = (hashlib.sha256(data).hexdigest(), hashlib.md5(data, usedforsecurity=False).hexdigest())
        known = next((name for digest, name in _KNOWN_TEMPLATES.items() if digest in digests), "not a published one")
        return f"{file.name} ({len(data):,} bytes, {known})"
    settings = directory / "tokenizer_config.json"
    try:
        inside = settings.is_file() and "chat_template" in json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{settings}: not readable as JSON: {error}") from None
    return "in tokenizer_config.json" if inside else "built-in, profile glm-5.2 (the checkpoint has none)"
