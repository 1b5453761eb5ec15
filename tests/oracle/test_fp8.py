"""An FP8 checkpoint must be the BF16 checkpoint that its blocks dequantise to: bit for bit, and token for token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inputs import single_sequence
from freehold.model.sizes import size_config
from freehold.model.tiny import write_random_checkpoint
from freehold.model.weights import load_weights

# 200 and 136 rows or columns end in ragged blocks; 56 rows a head put heads across block borders.
RAGGED = {
    "hidden_size": 200, "q_lora_rank": 136, "kv_lora_rank": 136, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16,
    "qk_head_dim": 40, "v_head_dim": 32, "moe_intermediate_size": 136, "intermediate_size": 264, "head_dim": 24,
}  # fmt: skip


def dequantised(directory: Path, out: Path) -> dict[str, torch.Tensor]:
    """The BF16 checkpoint, by the definition in float64, with another library's reader and writer."""
    stored: dict[str, torch.Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        stored |= load_file(shard)
    weights = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        scale = stored.get(name + "_scale_inv")
        if scale is not None:
            full = scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
            exact = tensor.to(torch.float64) * full[: tensor.shape[0], : tensor.shape[1]]
            tensor = nearest_bf16(exact)
        weights[name] = tensor
    out.mkdir()
    save_file(weights, out / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return weights


def nearest_bf16(exact: torch.Tensor) -> torch.Tensor:
    """Nearest bf16 of float64 values, ties to even, in one rounding: by comparing both neighbours."""
    low = exact.float().view(torch.int32) & -65536  # towards zero
    down = low.view(torch.float32).double()
    up = (low + 65536).view(torch.float32).double()
    below, above = (exact - down).abs(), (up - exact).abs()
    odd = (low >> 16) & 1
    take_up = (above < below) | ((above == below) & (odd == 1))
    return torch.where(take_up, up, down).to(torch.bfloat16)


def load(directory: Path) -> Glm:
    model = Glm(GlmConfig.from_file(directory), dtype=torch.bfloat16).requires_grad_(False)
    load_weights(model, directory)
    return model


def greedy(model: Glm, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.inference_mode():
        cache = PagedCache(model.config, 4, 64, model.dtype)
        hidden = model(single_sequence(tokens), cache)
        for _ in range(count):
            tokens.append(int(model.logits(hidden[-1:]).argmax()))
            hidden = model(single_sequence(tokens[-1:], start=len(tokens) - 1), cache)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("sizes", [{}, RAGGED], ids=["nano", "ragged"])
def test_fp8_is_its_dequantised_bf16_checkpoint(sizes: dict[str, int], tmp_path: Path) -> None:
    write_random_checkpoint(size_config("nano") | sizes, tmp_path / "fp8", seed=2, fp8=True)
    expected = dequantised(tmp_path / "fp8", tmp_path / "bf16")
    fp8, bf16 = load(tmp_path / "fp8"), load(tmp_path / "bf16")
    assert sum(name.endswith("q_b_proj.weight") for name in expected) == 9
    for name, tensor in fp8.checkpoint_tensors().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    prompt = torch.randint(0, 448, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    assert greedy(fp8, prompt, 60) == greedy(bf16, prompt, 60)
