"""Random weights that behave: activations keep their size, attention is peaked, routing is spread. Torch-free for BF16.

Linear weights are N(0, g/sqrt(fan_in)) with g = 1; 2.5 for q_b_proj (flat attention would hide a wrong selection), and
o_proj and down_proj divided by sqrt(2 * layers) so that the residual stream does not grow. A tensor's values depend on
the seed and its name only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from freehold.model.config import GlmConfig
from freehold.model.names import TensorSpec
from freehold.model.storage_fp8 import BLOCK
from freehold.model.stored import StoredTensor

_CHUNK = 1 << 18  # elements made at a time; they fit in a core's cache
_CORRECTION_OFFSET = 6.9  # published correction biases sit at a large offset with a tiny spread


class RandomTensors:
    """Makes the stored bytes of random tensors, piece by piece, in the order of `stored_tensors`."""

    def __init__(self, config: GlmConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._scales: tuple[str, bytes] = ("", b"")  # of the FP8 weight made last

    def pieces(self, tensor: StoredTensor) -> Iterator[bytes]:
        """The tensor's bytes as they go into a file. A scale must follow its weight."""
        if tensor.is_scale:
            name, scales = self._scales
            if name != tensor.spec.name:
                raise ValueError(f"{tensor.name} does not follow its weight")
            yield scales
        elif tensor.dtype == "F8_E4M3":
            yield from self._fp8_pieces(tensor.spec)
        else:
            for values in self.values(tensor.spec, _CHUNK):
                yield encode(values, tensor.dtype)

    def values(self, spec: TensorSpec, chunk: int) -> Iterator[NDArray[np.float32]]:
        """The tensor's values before rounding, flat, `chunk` at a time (the last may be shorter)."""
        mean, deviation = distribution(spec, self._config)
        digest = hashlib.blake2b(f"{self._seed}:{spec.name}".encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))
        for start in range(0, spec.size, chunk):
            values = generator.standard_normal(min(chunk, spec.size - start), dtype=np.float32)
            values *= np.float32(deviation)
            if mean:
                values += np.float32(mean)
            yield values

    def _fp8_pieces(self, spec: TensorSpec) -> Iterator[bytes]:
        """One row of blocks at a time; what is quantised is the BF16 weight, as in the published checkpoints."""
        import torch  # BF16 checkpoints do without it

        from freehold.model.quant import quantize_blocks

        columns = spec.shape[1]
        scales: list[bytes] = []
        for values in self.values(spec, BLOCK * columns):
            band = torch.from_numpy(values).view(-1, columns).to(torch.bfloat16)
            quantized, scale = quantize_blocks(band)
            scales.append(scale.numpy().tobytes())
            yield quantized.view(torch.uint8).numpy().tobytes()
        self._scales = (spec.name, b"".join(scales))


def distribution(spec: TensorSpec, config: GlmConfig) -> tuple[float, float]:
    """(mean, standard deviation) of a tensor's random values."""
    name = spec.name
    if name.endswith("e_score_correction_bias"):
        return _CORRECTION_OFFSET, 0.05
    if name.endswith(".bias"):
        return 0.0, 0.1
    if len(spec.shape) == 1:
        return 1.0, 0.1  # norms
    if spec.part == "embed":
        return 0.0, 1.0
    gain = 1.0
    if spec.part == "head":
        gain = 2.0
    elif name.endswith("q_b_proj.weight"):
        gain = 2.5
    elif name.endswith(("o_proj.weight", "down_proj.weight")):
        gain = 1.0 / math.sqrt(2 * config.num_hidden_layers)
    return 0.0, gain / math.sqrt(spec.shape[1])


def encode(values: NDArray[np.float32], dtype: str) -> bytes:
    """Little-endian bytes of the values in a safetensors dtype: F32, F16 or BF16 (round to nearest even)."""
    if dtype == "F32":
        return values.tobytes()
    if dtype == "F16":
        return values.astype(np.float16).tobytes()
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16).tobytes()
