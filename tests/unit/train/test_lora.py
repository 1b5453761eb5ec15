"""LoRA in place: what it changes and what it leaves, where gradients go, and the files it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from freehold.errors import InvalidRequest
from freehold.model.adapters import CONFIG_NAME, read_adapter
from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inputs import single_sequence
from freehold.model.names import tensor_specs
from freehold.model.sizes import size_config
from freehold.model.tiny import write_random_checkpoint
from freehold.model.weights import load_weights
from freehold.train.lora import TARGETS, Lora, LoraSettings, Target, adapter_bytes, peft_targets
from freehold.train.merge import merge_adapter

TOKENS = list(range(40, 80))  # index_topk is 16: most rows are sparse


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nano") / "source"
    # In fp32, so that a merged checkpoint rounds nothing.
    write_random_checkpoint(size_config("nano"), directory, 5, dtype="float32")
    return directory


def load(directory: Path) -> Glm:
    model = Glm(GlmConfig.from_file(directory), dtype=torch.float32)
    load_weights(model, directory)
    return model


def logits(model: Glm) -> Tensor:
    """Of the model and of its MTP layer."""
    cache = PagedCache(model.config, 1, 64, model.dtype)
    with torch.no_grad():
        hidden_TH = model(single_sequence(TOKENS), cache)
        drafts = model.extend_mtp(hidden_TH, single_sequence([*TOKENS[1:], 3]), cache)
        return torch.cat((model.logits(hidden_TH), model.logits(drafts.hidden_TH)))


def fill(lora: Lora) -> None:
    """Random factors, so that the adapter changes something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in lora.named_parameters():
            parameter.normal_(std=0.05, generator=generator)


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_changes_the_output_and_a_merged_checkpoint_computes_the_same(
    nano: Path, tmp_path: Path, target: Target
) -> None:
    model = load(nano)
    plain = logits(model)
    lora = Lora(model, LoraSettings(rank=4, targets=(target,)))
    assert torch.equal(logits(model), plain)  # B is zero at first
    fill(lora)
    adapted = logits(model)
    assert (adapted - plain).abs().max() > 0.1
    lora.save(tmp_path / "adapter")
    merge_adapter(nano, tmp_path / "adapter", tmp_path / "merged")
    merged = logits(load(tmp_path / "merged"))
    assert torch.allclose(merged, adapted, rtol=1e-3, atol=1e-4)
    lora.detach()
    assert torch.equal(logits(model), plain)


def test_gradients_go_to_the_factors_of_every_matrix_and_to_nothing_else(nano: Path) -> None:
    model = load(nano)
    lora = Lora(model, LoraSettings(rank=2, targets=TARGETS))
    fill(lora)
    cache = PagedCache(model.config, 1, 64, model.dtype)
    with lora.once():
        hidden_TH = model(single_sequence(TOKENS), cache)
        model.logits(hidden_TH).square().mean().backward()
    trained = {id(parameter) for _, parameter in lora.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in trained)
    for name, parameter in lora.named_parameters():
        if not name.startswith(f"model.layers.{model.config.num_hidden_layers}."):  # the MTP layer did not run
            assert parameter.grad is not None, name


def test_weights_made_once_a_pass_give_the_same_gradients(nano: Path) -> None:
    found = []
    for once in (False, True):
        model = load(nano)
        lora = Lora(model, LoraSettings(rank=2))
        fill(lora)
        cache = PagedCache(model.config, 1, 64, model.dtype)
        with lora.once() if once else torch.enable_grad():
            loss = model.logits(model(single_sequence(TOKENS), cache)).square().mean()
        loss.backward()
        found.append({name: parameter.grad for name, parameter in lora.named_parameters()})
    for name, grad in found[0].items():
        other = found[1][name]
        assert (grad is None) == (other is None)
        if grad is not None and other is not None:
            assert torch.allclose(grad, other, rtol=1e-4, atol=1e-7), name


def test_the_number_of_weights_is_what_memory_was_reckoned_for(nano: Path) -> None:
    for targets in (("attention",), ("shared_expert", "routed_expert"), TARGETS):
        settings = LoraSettings(rank=3, targets=targets)  # type: ignore[arg-type]
        lora = Lora(load(nano), settings)
        assert 4 * lora.num_parameters == adapter_bytes(GlmConfig.from_file(nano), settings)


def test_every_matrix_of_the_targets_has_factors_of_its_published_name(nano: Path, tmp_path: Path) -> None:
    config = GlmConfig.from_file(nano)
    lora = Lora(load(nano), LoraSettings(rank=2, targets=("attention", "routed_expert")))
    wanted = {spec.name for spec in tensor_specs(config) if spec.part in ("attention", "routed_expert")}
    assert lora.factors().keys() == wanted
    assert any(name.startswith(f"model.layers.{config.num_hidden_layers}.") for name in wanted)
    lora.save(tmp_path / "adapter", base="models/nano")
    raw = json.loads((tmp_path / "adapter" / CONFIG_NAME).read_text())
    assert (raw["peft_type"], raw["r"], raw["lora_alpha"]) == ("LORA", 2, 4.0)
    assert raw["base_model_name_or_path"] == "models/nano"
    assert read_adapter(tmp_path / "adapter", config).factors.keys() == wanted


def test_peft_is_told_of_the_matrices_that_change() -> None:
    config = GlmConfig.from_dict(size_config("nano"))
    modules, parameters = peft_targets(("attention", "shared_expert"), config)
    assert modules == [
        f"self_attn.{name}" for name in ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj")
    ]
    assert parameters == [f"shared_experts.{name}_proj.weight" for name in ("down", "gate", "up")]
    assert peft_targets(("routed_expert",), config) == (["down_proj", "gate_proj", "up_proj"], [])


def test_the_seed_decides_the_first_factors(nano: Path) -> None:
    first, same, other = (
        dict(Lora(load(nano), LoraSettings(rank=2), seed=seed).named_parameters()) for seed in (0, 0, 100)
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"targets": ()}, "none given"),
        ({"targets": ("head",)}, "'head'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        LoraSettings(**settings)  # type: ignore[arg-type]
