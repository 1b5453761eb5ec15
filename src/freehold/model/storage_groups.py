"""The quantization_config of `compressed-tensors`, for the one kind of it that is supported. Torch-free.

Supported is weight-only "pack-quantized": symmetric integers of 4 or 8 bits with a scale for each group of a row. Such
a matrix X.weight [O, I] is three tensors on disk: X.weight_packed int32 [O, I * bits / 32], X.weight_scale bf16
[O, I / group] and X.weight_shape int64 [2], which is O and I again.

`config_groups` says which modules are stored how. A target is a module's name, "re:" and a regular expression that
matches from the name's start, or a class: "Linear" is every matrix but the embedding and the router. A name goes before
a class, and `ignore` before both. Engines differ in which of two groups they take, so a module in two is refused.

Source: the library `compressed-tensors` (`QuantizationConfig`, `QuantizationScheme`, `QuantizationArgs`, helpers of
`pack_quantized`) and vLLM's `compressed_tensors/utils.py`, as of November 2026.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from freehold.errors import ConfigError
from freehold.headers import CheckpointIndex
from freehold.model.config import GlmConfig
from freehold.model.names import TensorSpec, tensor_specs
from freehold.model.stored import Problem, StoredTensor, module_of

METHOD = "compressed-tensors"
PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"  # beside `X.weight`
GROUP_SUFFIXES = (PACKED, SCALE, SHAPE)
GROUP_SIZE: Mapping[int, int] = {8: 64, 4: 32}  # what `group_quantization` writes: 8.25 and 4.5 bits a weight
_WHERE = "quantization_config"
_FORMAT = "pack-quantized"
_KEYS = {
    "quant_method", "format", "config_groups", "ignore", "quantization_status", "global_compression_ratio", "version",
    "kv_cache_scheme", "sparsity_config", "transform_config",
}  # fmt: skip
_GROUP_KEYS = {"targets", "weights", "format", "input_activations", "output_activations"}
# What weights must be, with what an absent key means in compressed-tensors.
_WEIGHTS: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
    "type": ("int", ("int",)),
    "symmetric": (True, (True,)),
    "strategy": ("group", ("group",)),  # absent: follows from group_size
    "dynamic": (False, (False,)),
    "actorder": (None, (None, False, "weight", "static")),  # of these, none changes how weights are stored
    "block_structure": (None, (None,)),
    "scale_dtype": (None, (None, "torch.bfloat16")),
}
_WEIGHTS_INERT = {"observer", "observer_kwargs", "zp_dtype"}  # how scales were found; of zero points, which are absent


@dataclass(frozen=True, slots=True)
class GroupFormat:
    """How one matrix is stored: `bits` a code, a scale for each `group` weights of a row."""

    bits: int
    group: int

    def __str__(self) -> str:
        return f"int{self.bits} in groups of {self.group}"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can be stored so: a matrix whose rows are whole groups and whole words."""
        return len(shape) == 2 and shape[1] % self.group == 0 and shape[1] * self.bits % 32 == 0

    def stored(self, spec: TensorSpec) -> tuple[StoredTensor, StoredTensor, StoredTensor]:
        """The three tensors of a matrix."""
        rows, columns = spec.shape
        packed = (rows, columns * self.bits // 32)
        return (
            StoredTensor(spec.name + PACKED, packed, "I32", spec),
            StoredTensor(spec.name + SCALE, (rows, columns // self.group), "BF16", spec, is_scale=True),
            StoredTensor(spec.name + SHAPE, (2,), "I64", spec, is_scale=True),
        )


@dataclass(frozen=True, slots=True)
class GroupScheme:
    """A parsed quantization_config. targets: in the order of the config's groups."""

    targets: tuple[tuple[str, GroupFormat], ...]
    ignored_names: frozenset[str]
    ignored_patterns: tuple[str, ...]

    def format_of(self, spec: TensorSpec) -> GroupFormat | None:
        """How a tensor is stored; None if as it is. Raises ConfigError if two groups claim it, or if it cannot be."""
        module = module_of(spec.name)
        if len(spec.shape) != 2 or module in self.ignored_names:
            return None
        if any(_matches(module, pattern) for pattern in self.ignored_patterns):
            return None
        found = {form for target, form in self.targets if _matches(module, target)}
        if not found and spec.part not in ("embed", "router"):
            found = {form for target, form in self.targets if target == "Linear"}
        if len(found) > 1:
            raise ConfigError(f"{_WHERE}: {module!r} is in two config_groups that differ; name it in one")
        form = next(iter(found), None)
        if form is not None and not form.fits(spec.shape):
            raise ConfigError(f"{_WHERE}: {module!r} {list(spec.shape)} cannot be {form}; name it in ignore")
        return form


def group_scheme(quantization: Mapping[str, Any]) -> GroupScheme:
    """Parse a quantization_config of `compressed-tensors`. Raises ConfigError for whatever is not supported."""
    _check_keys(quantization, _KEYS, _WHERE)
    _only(quantization, "format", (_FORMAT, "mixed-precision"), _WHERE)
    _only(quantization, "quantization_status", ("compressed",), _WHERE, default="compressed")
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        _only(quantization, key, (None, {}), _WHERE)
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError(f"{_WHERE}: config_groups must be an object with at least one group")
    targets: list[tuple[str, GroupFormat]] = []
    for name, group in groups.items():
        where = f"{_WHERE}: {name}"
        if not isinstance(group, Mapping):
            raise ConfigError(f"{where} must be an object; names of presets are not supported")
        _check_keys(group, _GROUP_KEYS, where)
        _only(group, "format", (None, _FORMAT), where)
        if (group.get("format") or quantization["format"]) != _FORMAT:
            raise ConfigError(f"{where}: format is missing, and the config's is 'mixed-precision'")
        for key in ("input_activations", "output_activations"):
            if group.get(key) is not None:
                raise ConfigError(f"{where}: {key} is set; only weight-only quantisation is supported")
        form = _format(group.get("weights"), where)
        targets.extend((target, form) for target in _patterns(group.get("targets"), f"{where}: targets"))
    ignore = _patterns(quantization.get("ignore") or [], f"{_WHERE}: ignore", classes=())
    patterns = tuple(target for target in ignore if target.startswith("re:"))
    return GroupScheme(tuple(targets), frozenset(ignore).difference(patterns), patterns)


def group_problems(form: GroupFormat, spec: TensorSpec, index: CheckpointIndex, used: set[str]) -> Iterable[Problem]:
    """What is wrong with the three tensors of a matrix, by their headers; adds the names it looked at to `used`."""
    for wanted in form.stored(spec):
        used.add(wanted.name)
        entry = index.tensors.get(wanted.name)
        if entry is None:
            plain = index.tensors.get(spec.name)
            hint = f" ({spec.name!r} is there: config.json must list it in ignore)" if plain is not None else ""
            yield Problem("missing", wanted.name, f"{index.directory}: tensor {wanted.name!r} is missing{hint}")
        elif entry.shape != wanted.shape:
            message = (
                f"{entry.file}: tensor {wanted.name!r} has shape {list(entry.shape)}, expected {list(wanted.shape)} "
                f"({form})"
            )
            yield Problem("shape", wanted.name, message)
        elif entry.dtype != wanted.dtype:
            message = f"{entry.file}: tensor {wanted.name!r} is {entry.dtype}; it must be {wanted.dtype}"
            yield Problem("dtype", wanted.name, message)


def group_quantization(config: GlmConfig, bits: Literal[4, 8]) -> dict[str, Any]:
    """The quantization_config that `freehold quantize` writes.

    8 bits: the matrices of attention and indexer, all MLPs and the head. Kept as they are: embedding, norms, router and
    the indexer's weights_proj (small, and they steer), kv_b_proj (absorbed attention takes it apart by head and
    transposes it) and the MTP layer's eh_proj. 4 bits: the attention and MLPs of the decoder layers, nearly all of the
    weights; head, indexer and MTP layer are 8 bits. A matrix whose rows are not whole groups is kept.
    """
    ignore = []
    for spec in tensor_specs(config):
        width = _width(config, spec, bits)
        fits = width is not None and GroupFormat(width, GROUP_SIZE[width]).fits(spec.shape)
        if len(spec.shape) == 2 and spec.part != "embed" and not fits:
            ignore.append(module_of(spec.name))
    groups = {"group_0": _group("Linear", GroupFormat(8, GROUP_SIZE[8]))}
    if bits == 4:
        mtp = rf"(?!{config.num_hidden_layers}\.)" if config.has_mtp else ""
        most = rf"re:model\.layers\.{mtp}\d+\.(mlp|self_attn(?!\.indexer))\."
        groups["group_1"] = _group(most, GroupFormat(4, GROUP_SIZE[4]))
    return {
        "quant_method": METHOD,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _width(config: GlmConfig, spec: TensorSpec, bits: int) -> int | None:
    """Bits of a matrix; None for a tensor that is kept."""
    if spec.part != "head" and (not spec.quantizable or spec.name.endswith("kv_b_proj.weight")):
        return None
    return 8 if spec.part in ("head", "indexer") or spec.layer == config.num_hidden_layers else bits


def _group(target: str, form: GroupFormat) -> dict[str, Any]:
    weights = {
        "num_bits": form.bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": form.group,
        "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip
    return {"targets": [target], "weights": weights, "input_activations": None, "output_activations": None}


def _format(weights: Any, where: str) -> GroupFormat:
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{where}: weights must be an object, found {weights!r}")
    where = f"{where}: weights"
    _check_keys(weights, set(_WEIGHTS) | _WEIGHTS_INERT | {"num_bits", "group_size"}, where)
    for key, (default, allowed) in _WEIGHTS.items():
        _only(weights, key, allowed, where, default=default)
    bits, group = weights.get("num_bits"), weights.get("group_size")
    if bits not in (4, 8) or isinstance(bits, bool):
        raise ConfigError(f"{where}: num_bits = {bits!r}; only 4 and 8 are supported")
    if isinstance(group, bool) or not isinstance(group, int) or group < 1 or group * bits % 32:
        raise ConfigError(f"{where}: group_size = {group!r}; it must be a number of weights that fills int32 words")
    return GroupFormat(bits, group)


def _patterns(value: Any, where: str, classes: tuple[str, ...] = ("Linear",)) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(target, str) for target in value):
        raise ConfigError(f"{where} must be a list of module names")
    for target in value:
        if target.startswith("re:"):
            try:
                re.compile(target[3:])
            except re.error as error:
                raise ConfigError(f"{where}: {target!r} is not a regular expression: {error}") from None
        elif "." not in target and target not in ("lm_head", *classes):
            known = " nor ".join(("a module's name", "'re:' and a pattern", *map(repr, classes)))
            raise ConfigError(f"{where}: {target!r} is neither {known}")
    return tuple(value)


def _matches(module: str, target: str) -> bool:
    return re.match(target[3:], module) is not None if target.startswith("re:") else target == module


def _check_keys(value: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(value) - known)
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; refusing to guess what it changes")


def _only(value: Mapping[str, Any], key: str, allowed: tuple[Any, ...], where: str, *, default: Any = None) -> None:
    """Refuse a value that is not allowed; null means what an absent key does."""
    found = default if value.get(key) is None else value[key]
    # 1 == True in Python; a number where a truth value belongs is not what the format says.
    if not any(found == one and isinstance(found, bool) == isinstance(one, bool) for one in allowed):
        wanted = " or ".join(map(repr, allowed))
        raise ConfigError(f"{where}: {key} = {found!r} is not supported (only {wanted})")
