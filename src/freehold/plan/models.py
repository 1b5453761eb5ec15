"""Models to plan for: a checkpoint directory, read by its headers, or a published one by name. Torch-free.

    spec = load("glm-5.2-fp8")      # or a directory with config.json, and safetensors files if it has them
    spec.total_bytes                # 755,617,140,416

Sizes are counted, not estimated: from the headers where there are files, else from the architecture (`model/names`)
and the storage scheme. `models.toml` lists the published ones.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from freehold.errors import CheckpointError, ConfigError, InvalidRequest
from freehold.headers import INDEX_NAME, SINGLE_NAME, CheckpointIndex
from freehold.model.config import GlmConfig
from freehold.model.inspect import published_config
from freehold.model.names import Part, TensorSpec, tensor_specs
from freehold.model.storage_fp8 import scale_shape
from freehold.plan.deepseek import deepseek_config, deepseek_extras
from freehold.plan.types import Family, ModelSpec, Module, Source, Stored, WeightDtype

DEFAULT = "glm-5.2-fp8"
_MIT = "MIT"
_MODULES: tuple[tuple[str, Module, Part], ...] = (
    (r"self_attn\.q_a_proj", "q_a_proj", "attention"),
    (r"self_attn\.q_b_proj", "q_b_proj", "attention"),
    (r"self_attn\.kv_a_proj_with_mqa", "kv_a_proj_with_mqa", "attention"),
    (r"self_attn\.kv_b_proj", "kv_b_proj", "attention"),
    (r"self_attn\.o_proj", "o_proj", "attention"),
    (r"self_attn\.(k|v)_scale", "norm", "attention"),
    (r"self_attn\.indexer\.", "indexer", "indexer"),
    (r"mlp\.experts\.\d+\.(gate|up|down)_proj", "experts", "routed_expert"),
    (r"mlp\.experts\.(gate_up|down)_proj", "experts", "routed_expert"),
    (r"mlp\.shared_experts\.(gate|up|down)_proj", "shared_experts", "shared_expert"),
    (r"mlp\.gate\.", "gate", "router"),
    (r"mlp\.(gate|up|down)_proj", "mlp", "dense_mlp"),
    (r"eh_proj", "eh_proj", "mtp"),
    (r"embed_tokens", "embed_tokens", "embed"),
    (r"shared_head\.head|lm_head", "lm_head", "head"),
    (r"(enorm|hnorm|shared_head\.norm)\.", "norm", "mtp"),
    (r"((input|post_attention|q_a|kv_a)_layernorm|self_attn\.(q_a|kv_a)_layernorm|norm)\.", "norm", "norm"),
)
_PATTERNS = tuple((re.compile(pattern), module, part) for pattern, module, part in _MODULES)
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
Key = tuple[int | None, Module, Part]


@cache
def _table() -> Mapping[str, Any]:
    return tomllib.loads(resources.files("freehold.plan").joinpath("models.toml").read_text(encoding="utf-8"))


def bundled() -> tuple[str, ...]:
    """Names of the published models."""
    return tuple(_table()["models"])


def load(name: str | Path) -> ModelSpec:
    """A published model by its name, or a directory (or its config.json).

    Raises InvalidRequest for a name that is neither, ConfigError and CheckpointError for what cannot be planned for.
    """
    path = Path(name)
    if path.is_dir() or path.is_file():
        return _from_directory(path if path.is_dir() else path.parent)
    models, wanted = _table()["models"], str(name).lower()
    # A repository by its full name first: GLM-5.3's without a suffix is its FP8 build.
    key = next((key for key, entry in models.items() if entry.get("repo", "").lower() == wanted), wanted)
    key = key.removeprefix("zai-org/").removesuffix("-bf16")
    if key not in models:
        known = ", ".join(bundled())
        raise InvalidRequest(f"{name}: no such directory, and no published model; there are {known}", param="model")
    return _bundled(key)


@cache
def _bundled(name: str) -> ModelSpec:
    table = _table()
    entry = table["models"][name]
    source = Source(**table["sources"][entry["source"]])
    config = deepseek_config() if entry["config"] == "deepseek-v3.2" else published_config(entry["config"])
    stored = list(counted(config, entry["dtype"]))
    if entry["config"] == "deepseek-v3.2":
        stored += deepseek_extras(config)
    notes = (entry["note"],) if "note" in entry else ()
    repo = entry.get("repo", name)
    family: Family = "deepseek_v32" if entry["config"] == "deepseek-v3.2" else "glm_moe_dsa"
    licence_source = f"the model card of {repo}"
    return ModelSpec(
        name, repo, config, entry["dtype"], tuple(stored), _MIT, licence_source, source, notes, family=family
    )


def counted(config: GlmConfig, dtype: WeightDtype) -> Iterator[Stored]:
    """What a build of this architecture stores, by the scheme of `models.toml` that `dtype` names."""
    experts = config.n_routed_experts
    sizes: dict[Key, Counter[str]] = defaultdict(Counter)
    parameters: Counter[Key] = Counter()
    # Experts are alike: one of each layer is listed, and counted for all.
    for spec in tensor_specs(replace(config, n_routed_experts=1)):
        times = experts if spec.part in ("router", "routed_expert") else 1
        key = _classify(spec.name)
        parameters[key] += times * spec.size
        mtp = spec.layer == config.num_hidden_layers
        for stored_as, nbytes in _bytes(spec, dtype, mtp):
            sizes[key][stored_as] += times * nbytes
    yield from _assemble(sizes, parameters)


def _bytes(spec: TensorSpec, dtype: WeightDtype, mtp: bool) -> Iterator[tuple[str, int]]:
    size = spec.size
    if dtype == "fp8" and spec.quantizable:
        rows, columns = scale_shape(spec.shape)
        yield from (("F8_E4M3", size), ("F32", 4 * rows * columns))
    elif dtype in ("nvfp4", "w4a16") and spec.part == "routed_expert" and not mtp:
        rows, columns = spec.shape
        if dtype == "nvfp4":
            yield from (("U8", size // 2), ("F8_E4M3", rows * -(-columns // 16)), ("F32", 8))
        else:
            yield from (("I32", size // 2), ("BF16", 2 * rows * -(-columns // 128)), ("I64", 16))
    elif spec.dtype == "float32":
        yield "F32", 4 * size
    else:
        yield "BF16", 2 * size


def _assemble(sizes: Mapping[Key, Mapping[str, int]], parameters: Mapping[Key, int]) -> Iterator[Stored]:
    for key, by_dtype in sizes.items():
        layer, module, part = key
        yield Stored(layer, part, module, parameters.get(key, 0), MappingProxyType(dict(by_dtype)))


def _classify(name: str) -> Key:
    """Layer, module and part of a tensor by its published name, with any suffix that a storage scheme adds."""
    match = _LAYER.fullmatch(name)
    layer, rest = (int(match[1]), match[2]) if match else (None, name.removeprefix("model."))
    for pattern, module, part in _PATTERNS:
        if pattern.match(rest):
            return layer, module, part
    raise CheckpointError(f"tensor {name!r} belongs to no part of this architecture that is known; cannot plan for it")


# ── directories ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _from_directory(directory: Path) -> ModelSpec:
    config, notes = GlmConfig.from_file(directory), []
    if (directory / INDEX_NAME).is_file() or any(directory.glob("*.safetensors")):
        stored, dtype = _from_headers(config, CheckpointIndex.open(directory))
        if config.has_mtp and not any(entry.layer == config.num_hidden_layers for entry in stored):
            config = replace(config, num_nextn_predict_layers=0)
            notes.append("config.json declares an MTP layer, but the files hold none: no drafts")
        source = f"the safetensors headers in {directory}"
    else:
        dtype = _declared(config)
        stored = tuple(counted(config, dtype))
        source = f"{directory}/config.json, and the published storage scheme of {dtype}: there is no {SINGLE_NAME}"
        notes.append("no weights beside config.json: sizes are those of the published scheme")
    licence, licence_source = _licence(directory)
    return ModelSpec(
        directory.resolve().name,
        str(directory),
        config,
        dtype,
        tuple(stored),
        licence,
        licence_source,
        Source(source, "now"),
        tuple(notes),
        bundled=False,
    )


def _from_headers(config: GlmConfig, index: CheckpointIndex) -> tuple[tuple[Stored, ...], WeightDtype]:
    sizes: dict[Key, Counter[str]] = defaultdict(Counter)
    for tensor in index.tensors.values():
        sizes[_classify(tensor.name)][tensor.dtype] += tensor.nbytes
    expected = {(entry.layer, entry.module, entry.part): entry.parameters for entry in counted(config, "bf16")}
    mtp = config.num_hidden_layers
    has_mtp = any(layer == mtp for layer, _, _ in sizes)
    for layer, module, _ in expected.keys() - sizes.keys():
        if layer != mtp or has_mtp:
            where = "" if layer is None else f"layer {layer}: "
            raise CheckpointError(
                f"{index.directory}: {where}no tensor of {module!r} in the files; fetch what is missing"
            )
    for layer, module, _ in sizes.keys() - expected.keys():
        if layer is not None and layer > mtp:
            raise CheckpointError(f"{index.directory}: has tensors of layer {layer}, but config.json has {mtp} layers")
        if module == "indexer":
            raise CheckpointError(
                f"{index.directory}: layer {layer} has an indexer, but config.json says that it shares another's"
            )
    stored = tuple(_assemble(sizes, expected))
    return stored, _dtype_of_experts(config, stored)


def _dtype_of_experts(config: GlmConfig, stored: tuple[Stored, ...]) -> WeightDtype:
    """The storage of the matrices that weigh most: routed experts, or dense MLPs where there are none."""
    decoder = [entry for entry in stored if entry.layer is not None and entry.layer < config.num_hidden_layers]
    chosen = [entry for entry in decoder if entry.module == "experts"] or [e for e in decoder if e.module == "mlp"]
    by_dtype: Counter[str] = Counter()
    for entry in chosen:
        by_dtype.update(entry.bytes)
    most = by_dtype.most_common(1)[0][0]
    bits = 8 * by_dtype[most] / sum(entry.parameters for entry in chosen)
    if most in ("BF16", "F16", "F32"):
        return "bf16"
    if most == "F8_E4M3" and by_dtype["F32"]:
        return "fp8"
    if most == "U8" and by_dtype["F8_E4M3"]:
        return "nvfp4"
    if most == "I32":
        return "w4a16" if bits < 6 else "w8a16"
    raise ConfigError(
        f"routed experts are stored mostly as {most}, {bits:.1f} bits each: not a format that can be planned for "
        "(BF16, FP8 in blocks, NVFP4, INT4 or INT8 in groups)"
    )


def _declared(config: GlmConfig) -> WeightDtype:
    """The scheme that config.json's quantization_config names, for a directory without weights."""
    quantization = config.quantization
    if quantization is None:
        return "bf16"
    method = str(quantization.get("quant_method", "")).lower()
    text = json.dumps(quantization, default=str).lower()
    if method == "fp8":
        return "fp8"
    if method == "modelopt" and "nvfp4" in text:
        return "nvfp4"
    if method == "compressed-tensors" and re.search(r'"num_bits": 4\b', text):
        return "nvfp4" if "nvfp4" in text else "w4a16"
    raise ConfigError(
        f"config.json: quantization_config of {method or 'no method'!r} has no published size; point to a directory "
        "that also has the safetensors files (headers are enough to plan)"
    )


def _licence(directory: Path) -> tuple[str | None, str]:
    """The licence's name by the first lines of the checkpoint's LICENSE, if it has one."""
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "license"):
        file = directory / name
        if file.is_file():
            lines = (line.strip(" #\t") for line in file.read_text(encoding="utf-8", errors="replace").splitlines())
            first = next((line for line in lines if line), "empty")
            return (_MIT if first.lower().startswith("mit license") else first[:120]), str(file)
    return None, f"{directory} has no LICENSE file; read the model card"
