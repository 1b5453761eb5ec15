"""How a checkpoint stores its tensors: dtypes, quantisation, and what of it is missing or wrong. Torch-free.

`storage_fp8` and `storage_groups` have the two kinds of quantised checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from freehold.errors import CheckpointError, ConfigError
from freehold.headers import CheckpointIndex, TensorEntry
from freehold.model.config import GlmConfig
from freehold.model.names import SCALE_SUFFIX, TensorSpec, tensor_specs
from freehold.model.storage_fp8 import BLOCK, Fp8Scheme, fp8_scheme, scale_shape
from freehold.model.storage_groups import METHOD, PACKED, GroupScheme, group_problems, group_scheme
from freehold.model.stored import Problem, StoredTensor

_DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def quantization_scheme(quantization: Mapping[str, Any] | None) -> Fp8Scheme | GroupScheme | None:
    """Parse config.json's quantization_config; None if there is none. Raises ConfigError for an unsupported kind."""
    if quantization is None:
        return None
    method = quantization.get("quant_method", quantization.get("quant_algo"))
    if method == "fp8":
        return fp8_scheme(quantization)
    if method == METHOD:
        return group_scheme(quantization)
    raise ConfigError(
        f"quantization_config: quant_method {method!r} is not supported; use the BF16 build of the checkpoint, the FP8 "
        f"one (block-scaled E4M3), or int8 or int4 in groups ({METHOD})"
    )


def stored_tensors(config: GlmConfig) -> Iterator[StoredTensor]:
    """Every tensor of a checkpoint of this config as published: 59,585 for GLM-5.2, 118,629 for GLM-5.2-FP8."""
    scheme = quantization_scheme(config.quantization)
    model_dtype = dtype_name(config.dtype)
    for spec in tensor_specs(config):
        form = scheme.format_of(spec) if isinstance(scheme, GroupScheme) else None
        if form is not None:
            yield from form.stored(spec)
        elif isinstance(scheme, Fp8Scheme) and scheme.converts(spec):
            yield StoredTensor(spec.name, spec.shape, "F8_E4M3", spec)
            yield StoredTensor(spec.name + SCALE_SUFFIX, scale_shape(spec.shape), "F32", spec, is_scale=True)
        else:
            yield StoredTensor(spec.name, spec.shape, "F32" if spec.dtype == "float32" else model_dtype, spec)


def dtype_name(dtype: str) -> str:
    """safetensors' word for config.json's dtype. Raises ConfigError for a dtype that weights cannot have."""
    try:
        return _DTYPE_NAMES[dtype]
    except KeyError:
        known = ", ".join(_DTYPE_NAMES)
        raise ConfigError(f"config.json: dtype = {dtype!r} is not supported (only {known})") from None


def find_problems(config: GlmConfig, index: CheckpointIndex) -> Iterator[Problem]:
    """Compare a checkpoint's headers with the tensors its config calls for; nothing if every tensor has one use.

    An FP8 scale beside a weight decides that the weight is FP8; config.json must then declare that scheme.
    """
    scheme = quantization_scheme(config.quantization)
    used: set[str] = set()
    quantised = 0
    for spec in tensor_specs(config):
        form = scheme.format_of(spec) if isinstance(scheme, GroupScheme) else None
        if form is not None:
            yield from group_problems(form, spec, index, used)
            continue
        used.add(spec.name)
        entry = index.tensors.get(spec.name)
        scale = index.tensors.get(spec.name + SCALE_SUFFIX) if spec.name.endswith(".weight") else None
        if scale is not None:
            used.add(scale.name)
            quantised += 1
        if entry is None:
            packed = index.tensors.get(spec.name + PACKED)
            hint = "" if packed is None else f" ({packed.name!r} is there, but config.json does not declare it)"
            yield Problem("missing", spec.name, f"{index.directory}: tensor {spec.name!r} is missing{hint}")
        elif entry.shape != spec.shape:
            message = f"{entry.file}: tensor {spec.name!r} has shape {list(entry.shape)}, expected {list(spec.shape)}"
            yield Problem("shape", spec.name, message)
        else:
            yield from _dtype_problems(spec, entry, scale)
    for name, entry in index.tensors.items():
        if name not in used:
            message = f"{entry.file}: tensor {name!r} has no use in this model{_hint(name, config)}"
            yield Problem("unexpected", name, message)
    if quantised and not isinstance(scheme, Fp8Scheme):
        message = f"{index.directory}: has FP8 block scales, but config.json does not declare FP8"
        yield Problem("quantization", "", message)
    if isinstance(scheme, Fp8Scheme) and not quantised:
        message = f"{index.directory}: config.json declares FP8, but no tensor has a {SCALE_SUFFIX!r} scale"
        yield Problem("quantization", "", message)


def check(config: GlmConfig, index: CheckpointIndex) -> None:
    """Raise CheckpointError for the first problem, and say how many more there are."""
    problems = list(find_problems(config, index))
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise CheckpointError(problems[0].message + more)


def _dtype_problems(spec: TensorSpec, entry: TensorEntry, scale: TensorEntry | None) -> Iterator[Problem]:
    where = f"{entry.file}: tensor {spec.name!r}"
    if spec.dtype == "float32":
        if entry.dtype != "F32":
            message = f"{where} is {entry.dtype}; it must be F32 (rounding the correction bias changes the routing)"
            yield Problem("dtype", spec.name, message)
    elif entry.dtype == "F8_E4M3":
        if scale is None:
            name = spec.name + SCALE_SUFFIX
            yield Problem("missing", name, f"{where} is FP8, but {name!r} is missing")
        elif len(spec.shape) != 2:
            yield Problem("dtype", spec.name, f"{where} is FP8; only matrices can be")
        elif scale.dtype != "F32":
            yield Problem("dtype", scale.name, f"{scale.file}: tensor {scale.name!r} is {scale.dtype}; it must be F32")
        elif scale.shape != scale_shape(spec.shape):
            message = (
                f"{scale.file}: tensor {scale.name!r} has shape {list(scale.shape)}, "
                f"expected {list(scale_shape(spec.shape))} (one scale for each {BLOCK}x{BLOCK} block)"
            )
            yield Problem("shape", scale.name, message)
    elif entry.dtype not in _DTYPE_NAMES.values():
        yield Problem("dtype", spec.name, f"{where} is {entry.dtype}; expected BF16, F16, F32 or FP8 with block scales")
    elif scale is not None:
        yield Problem("dtype", scale.name, f"{where} is {entry.dtype}, but it has FP8 scales {scale.name!r}")


def _hint(name: str, config: GlmConfig) -> str:
    layer = f"model.layers.{config.num_hidden_layers}."
    if name.startswith(layer) and ("embed_tokens" in name or "shared_head.head" in name):
        return "; the MTP layer uses the model's own embedding and head, so delete the copy"
    if name.startswith(layer) and not config.has_mtp:
        return "; it is of an MTP layer, but num_nextn_predict_layers is 0"
    if ".self_attn.indexer." in name:
        return "; config.json says that this layer shares the indexer of another"
    return ""
