"""Adapters: the factors that PEFT writes, merged as LoRA says, and one line for whatever is not done or not right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from freehold.errors import CheckpointError, ConfigError, FreeholdError
from freehold.headers import CheckpointIndex
from freehold.model import adapters
from freehold.model.adapters import factor_name, merged_tensor, module_names, read_adapter
from freehold.model.config import GlmConfig
from freehold.model.tiny import make_tiny
from freehold.model.weights import read_tensor
from tests.adapting import ATTENTION, EVERYTHING, factors_of, matrices, write_adapter

Q_A = "model.layers.4.self_attn.q_a_proj.weight"
A, B = (f"base_model.model.model.layers.4.self_attn.q_a_proj.lora_{factor}.weight" for factor in "AB")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "nano"
    make_tiny(directory, "nano", seed=3)
    return directory


@pytest.fixture(scope="module")
def config(base: Path) -> GlmConfig:
    return GlmConfig.from_file(base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_factors_are_read_under_published_names(
    tmp_path: Path, base: Path, config: GlmConfig, dtype: torch.dtype
) -> None:
    path = write_adapter(tmp_path / "a", base, EVERYTHING, rank=3, alpha=6.0, dtype=dtype)
    adapter = read_adapter(path, config)
    on_disk = safetensors.torch.load_file(path / "adapter_model.safetensors")
    assert adapter.factors.keys() == matrices(config, EVERYTHING).keys()
    assert any(name.startswith("model.layers.8.") for name in adapter.factors)  # the MTP layer
    for name, (a_rI, b_Or) in adapter.factors.items():
        assert torch.equal(a_rI, on_disk[factor_name(name, "A")].float())
        assert torch.equal(b_Or, on_disk[factor_name(name, "B")].float())
        assert a_rI.dtype is b_Or.dtype is torch.float32
    assert (adapter.rank, adapter.scale) == (3, 2.0)
    assert adapter.num_parameters == sum(tensor.numel() for tensor in on_disk.values())


def test_the_scale_is_alpha_over_r_or_over_its_root(tmp_path: Path, base: Path, config: GlmConfig) -> None:
    plain = write_adapter(tmp_path / "plain", base, rank=4, alpha=6)
    rooted = write_adapter(tmp_path / "rooted", base, rank=4, alpha=6, use_rslora=True)
    assert read_adapter(plain, config).scale == 1.5
    assert read_adapter(rooted, config).scale == 3.0


def test_merging_is_a_sum_in_fp32_rounded_once(
    tmp_path: Path, base: Path, config: GlmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "a", base), config)
    index = CheckpointIndex.open(base)
    before, (a_rI, b_Or) = read_tensor(index, Q_A), adapter.factors[Q_A]
    merged = merged_tensor(index, adapter, Q_A)
    exact = (before.double() + adapter.scale * (b_Or.double() @ a_rI.double())).to(torch.bfloat16)
    twice = (before + (adapter.scale * b_Or @ a_rI).to(torch.bfloat16)).to(torch.bfloat16)
    assert merged.dtype is torch.bfloat16
    assert (merged != exact).sum() <= 2  # where fp32 and fp64 lie on two sides of a tie
    assert (merged != twice).sum() > 100  # so this would see a second rounding
    assert (merged != before).sum() > 2000
    weight = torch.randn(50, 64)
    kept = weight.clone()
    monkeypatch.setattr(adapters, "_BAND", 7 * 64)  # bands that do not divide the rows
    narrow = adapters.Adapter(tmp_path, 4, 2.0, {"w": (torch.randn(4, 64), torch.randn(50, 4))})
    expected = weight + 2.0 * narrow.factors["w"][1] @ narrow.factors["w"][0]
    assert torch.allclose(narrow.merge("w", weight), expected, atol=1e-5)
    assert torch.equal(weight, kept)  # an fp32 weight is not written to


def test_names_that_peft_knows() -> None:
    assert factor_name(Q_A, "A") == A
    assert module_names([Q_A, "model.layers.0.self_attn.q_a_proj.weight", "lm_head.weight"]) == ["lm_head", "q_a_proj"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
        ({"bias": "lora_only"}, "bias 'lora_only' is not supported"),
        ({"use_dora": True}, "use_dora = true is not supported"),
        ({"lora_bias": True}, "lora_bias = true is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = true is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = .* is not supported"),
        ({"rank_pattern": {"q_a_proj": 8}}, "rank_pattern = .* is not supported"),
        ({"alpha_pattern": {"q_a_proj": 8}}, "alpha_pattern = .* is not supported"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices = .* is not supported"),
        ({"layer_replication": [[0, 4]]}, "layer_replication = .* is not supported"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens = .* is not supported"),
        ({"use_qalora": True}, "use_qalora = true is not supported"),
        ({"something_new": 0.5}, "something_new = 0.5 is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' is not known to leave the base"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights 'OLoRA' is not known to leave the base"),
        ({"init_lora_weights": "of next year"}, "init_lora_weights 'of next year' is not known to leave the base"),
        ({"r": 0}, "r = 0 must be a whole number"),
        ({"r": True}, "r = True must be a whole number"),
        ({"r": 4.0}, "r = 4.0 must be a whole number"),
        ({"lora_alpha": None}, "lora_alpha = None must be a number"),
        ({"lora_alpha": float("inf")}, "lora_alpha = inf must be a number"),
        ({"lora_alpha": 10**400}, "lora_alpha = 1.* must be a number"),
        ({"use_rslora": "yes"}, "use_rslora = 'yes' must be true or false"),
    ],
)
def test_what_is_not_honoured_is_refused(
    tmp_path: Path, base: Path, config: GlmConfig, change: dict[str, Any], message: str
) -> None:
    path = write_adapter(tmp_path / "a", base, **change)
    with pytest.raises(ConfigError, match=f"adapter_config.json: {message}"):
        read_adapter(path, config)


def without(name: str) -> dict[str, Any]:
    return {name: None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(B), f"{Q_A!r} has no lora_B"),
        (without(A), f"{Q_A!r} has no lora_A"),
        ({A: torch.ones(5, 64)}, r"shape \[5, 64\], expected \[4, 64\] for .*q_a_proj.weight' \[64, 64\] and r = 4"),
        ({B: torch.ones(4, 64)}, r"shape \[4, 64\], expected \[64, 4\]"),
        ({B: torch.full((64, 4), float("nan"))}, "holds other than finite numbers"),
        ({B: torch.ones(64, 4, dtype=torch.int32)}, "holds other than finite numbers"),
        ({B: torch.ones(64, 4, dtype=torch.bool)}, "is BOOL, which is not read here"),
        ({A.replace("layers.4", "layers.9"): torch.ones(4, 64)}, "for no matrix of this model"),
        ({A.replace("q_a_proj", "q_proj"): torch.ones(4, 64)}, "for no matrix of this model"),
        ({A.replace("q_a_proj", "q_a_layernorm"): torch.ones(4, 64)}, "for no matrix of this model"),
        ({A.replace("self_attn.q_a_proj", "mlp.experts"): torch.ones(64, 64)}, "of routed experts, give each its own"),
        ({"base_model.model.model.embed_tokens.lora_A.weight": torch.ones(4, 64)}, "for no matrix of this model"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 512)}, "is no factor of LoRA"),
        ({A.replace("lora_A", "lora_magnitude_vector"): torch.ones(64)}, "is no factor of LoRA"),
        ({A.removeprefix("base_model.model."): torch.ones(4, 64)}, "is no factor of LoRA"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, base: Path, config: GlmConfig, change: dict[str, Any], message: str
) -> None:
    found = factors_of(config, ATTENTION, seed=0, rank=4, size=0.1) | change
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
    path = write_adapter(tmp_path / "a", base, tensors={})
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_adapter(path, config)


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path, base: Path, config: GlmConfig) -> None:
    def refused(message: str, path: Path) -> None:
        with pytest.raises(FreeholdError, match=message) as caught:
            read_adapter(path, config)
        assert "\n" not in str(caught.value)

    refused("adapter_config.json: no such file", tmp_path)
    path = write_adapter(tmp_path / "a", base)
    weights = path / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-5])
    refused("truncated", path)
    safetensors.torch.save_file({}, weights)
    refused("has no tensors", path)
    weights.rename(path / "adapter_model.bin")
    refused("adapter_model.safetensors: no such file; .*pickled ones are not loaded", path)
    (path / "adapter_config.json").write_text("{")
    refused("adapter_config.json: cannot be read", path)
    (path / "adapter_config.json").write_text(json.dumps([1]))
    refused("expected a JSON object", path)
