"""The FP8 builds' quantization_config: E4M3 with one fp32 scale for each 128x128 block. Torch-free.

`GLM-5.2-FP8` stores most matrices as FP8 E4M3 with `X.weight_scale_inv` of shape [ceil(out/128), ceil(in/128)] beside
`X.weight`; the last block of a row or column may be smaller, and attention heads straddle blocks. A weight is its FP8
value times the scale of its block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from freehold.errors import ConfigError
from freehold.model.config import GlmConfig
from freehold.model.names import TensorSpec, tensor_specs
from freehold.model.stored import module_of

BLOCK = 128  # rows and columns that share an FP8 scale
_FP8_KEYS = {"quant_method", "fmt", "activation_scheme", "weight_block_size", "modules_to_not_convert"}


@dataclass(frozen=True, slots=True)
class Fp8Scheme:
    """An fp8 quantization_config of the one kind that is supported: E4M3, 128x128 blocks, dynamic activations.

    Activations are not quantised here: weights are dequantised exactly, and products use the model's dtype.
    """

    modules_to_not_convert: frozenset[str]

    def converts(self, spec: TensorSpec) -> bool:
        """Whether a checkpoint written with this scheme stores the tensor as FP8."""
        return spec.quantizable and module_of(spec.name) not in self.modules_to_not_convert


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the block scales of a matrix; the last blocks may be ragged."""
    return tuple(-(-size // BLOCK) for size in shape)


def fp8_scheme(quantization: Mapping[str, Any]) -> Fp8Scheme:
    """Parse a quantization_config of quant_method "fp8". Raises ConfigError for any other kind of FP8."""
    unknown = sorted(set(quantization) - _FP8_KEYS)
    if unknown:
        raise ConfigError(f"quantization_config: unknown key {unknown[0]!r}; refusing to guess what it changes")
    wanted = {"fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    for key, value in wanted.items():
        if quantization.get(key) != value:
            raise ConfigError(f"quantization_config: {key} = {quantization.get(key)!r}; only {value!r} is supported")
    modules = quantization.get("modules_to_not_convert") or ()
    if isinstance(modules, str) or not all(isinstance(module, str) for module in modules):
        raise ConfigError("quantization_config: modules_to_not_convert must be a list of module names")
    return Fp8Scheme(frozenset(modules))


def fp8_quantization(config: GlmConfig) -> dict[str, Any]:
    """The quantization_config with which a checkpoint of this model stores every matrix that GLM-5.2-FP8 does."""
    keep = [module_of(spec.name) for spec in tensor_specs(config) if not spec.quantizable]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": keep,
    }
