"""config.json is parsed strictly: every published config, each way to give a pattern, and every kind of mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from freehold.errors import ConfigError
from freehold.model.config import GlmConfig
from freehold.model.inspect import PUBLISHED, published_config, published_json
from freehold.model.sizes import SIZES, size_config

FULL_LAYERS = (0, 1, 2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62, 66, 70, 74)
MISSING = object()


def nano(**changes: Any) -> dict[str, Any]:
    raw = {**size_config("nano"), **changes}
    return {key: value for key, value in raw.items() if value is not MISSING}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_parse(name: str) -> None:
    config = published_config(name)
    assert config.eos_token_ids == (154820, 154827, 154829)
    assert (config.qk_head_dim, config.latent_dim, config.softmax_scale) == (256, 576, 0.0625)
    assert config.mlp_layer_types == ("dense",) * 3 + ("sparse",) * 75
    assert config.latent_norm_eps == config.rms_norm_eps == 1e-5
    assert config.has_mtp


def test_what_changed_between_versions() -> None:
    old, new = published_config("glm-5.1"), published_config("glm-5.2")
    assert (old.max_position_embeddings, new.max_position_embeddings) == (202_752, 1_048_576)
    assert (old.rope_theta, new.rope_theta) == (1e6, 8e6)
    assert (old.index_share_for_mtp_iteration, new.index_share_for_mtp_iteration) == (False, True)
    assert (old.full_layers, new.full_layers) == (tuple(range(78)), FULL_LAYERS)
    assert published_config("glm-5") == old
    assert published_config("glm-5.3") == new


def test_the_fp8_config_keeps_what_the_release_keeps() -> None:
    quantization = published_json("glm-5.2-fp8")["quantization_config"]
    assert len(set(quantization["modules_to_not_convert"])) == 541
    assert {**published_json("glm-5.2-fp8"), "quantization_config": None} == {
        **published_json("glm-5.2"),
        "quantization_config": None,
    }


def test_the_pattern_can_be_given_in_three_ways() -> None:
    by_types = GlmConfig.from_dict(nano(index_topk_freq=MISSING, index_skip_topk_offset=MISSING))
    by_freq = GlmConfig.from_dict(nano(indexer_types=MISSING))
    by_pattern = GlmConfig.from_dict(nano(indexer_types=None, index_topk_pattern="FFFSSSFS", index_topk_freq=None))
    assert by_types == by_freq == by_pattern
    assert by_types.full_layers == (0, 1, 2, 6)


UNSCHEDULED = {"index_topk_freq": None, "index_skip_topk_offset": None}


def test_a_pattern_need_not_be_a_schedule() -> None:
    pattern = "FSFSFSFS"
    types = ["full", "shared"] * 4
    by_pattern = GlmConfig.from_dict(nano(indexer_types=None, index_topk_pattern=pattern, **UNSCHEDULED))
    assert by_pattern == GlmConfig.from_dict(nano(indexer_types=types, index_topk_pattern=pattern, **UNSCHEDULED))
    assert by_pattern.full_layers == (0, 2, 4, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indexer_types": ["full"] * 8}, "index_topk_freq contradicts indexer_types: layer 3 is shared by the first"),
        ({"index_skip_topk_offset": 2}, "index_topk_freq contradicts indexer_types"),
        ({"index_topk_pattern": "FSFSFSFS"}, "index_topk_pattern contradicts indexer_types: layer 1"),
        ({"indexer_types": None, "index_topk_pattern": "FFFFFFFS"}, "index_topk_freq contradicts index_topk_pattern"),
        ({"mlp_layer_types": ["dense"] * 8}, "first_k_dense_replace = 3 contradicts mlp_layer_types, where layer 3"),
        ({"first_k_dense_replace": 2}, "first_k_dense_replace = 2 contradicts mlp_layer_types, where layer 2 is dense"),
    ],
)
def test_two_ways_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        GlmConfig.from_dict(nano(**changes))
    assert "\n" not in caught.value.message


def test_one_of_two_ways_is_enough() -> None:
    explicit = GlmConfig.from_dict(nano(first_k_dense_replace=MISSING, **UNSCHEDULED))
    assert explicit == GlmConfig.from_dict(nano(mlp_layer_types=None, indexer_types=None))
    more_than_there_are = GlmConfig.from_dict(nano(mlp_layer_types=["dense"] * 8, first_k_dense_replace=9))
    assert more_than_there_are.mlp_layer_types == ("dense",) * 8


def test_without_the_key_the_mtp_layer_does_not_share() -> None:
    config = GlmConfig.from_dict(nano(index_share_for_mtp_iteration=MISSING))
    assert config.has_mtp
    assert not config.index_share_for_mtp_iteration


def test_without_any_pattern_every_layer_is_full() -> None:
    config = GlmConfig.from_dict(nano(indexer_types=MISSING, index_topk_freq=MISSING, index_topk_pattern=MISSING))
    assert config.full_layers == tuple(range(8))
    assert GlmConfig.from_dict(nano(indexer_types=MISSING, index_topk_freq=1)) == config


def test_older_spellings() -> None:
    config = GlmConfig.from_dict(
        nano(rope_parameters=MISSING, rope_theta=8e6, dtype=MISSING, torch_dtype="torch.float32", eos_token_id=7,
             mlp_layer_types=MISSING)
    )  # fmt: skip
    assert (config.rope_theta, config.dtype, config.eos_token_ids) == (8e6, "float32", (7,))
    assert config.mlp_layer_types == ("dense",) * 3 + ("sparse",) * 5


def test_the_latent_norm_switch() -> None:
    config = GlmConfig.from_dict(nano(), latent_norm_eps=1e-6)
    assert (config.rms_norm_eps, config.latent_norm_eps) == (1e-5, 1e-6)


SEMANTIC = """vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads
    q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim index_n_heads index_head_dim index_topk
    n_routed_experts num_experts_per_tok n_shared_experts n_group topk_group max_position_embeddings rms_norm_eps
    rope_interleave indexer_rope_interleave attention_bias norm_topk_prob routed_scaling_factor eos_token_id
    hidden_act scoring_func topk_method""".split()


@pytest.mark.parametrize("key", SEMANTIC)
def test_a_missing_semantic_key_is_an_error_that_names_it(key: str) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' is missing"):
        GlmConfig.from_dict(nano(**{key: MISSING}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "glm5_next"}, "model_type"),
        ({"model_type": MISSING}, "model_type"),
        ({"sliding_window": 4096}, "unknown key 'sliding_window' = 4096"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": None}, "topk_method = None"),
        ({"num_hidden_layers": 10_001}, "num_hidden_layers = 10001 is more than 10000"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"moe_router_dtype": "bfloat16"}, "moe_router_dtype"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 4}}, "rope_type 'default'"),
        ({"rope_parameters": {"rope_type": "default"}}, "'rope_theta' is missing"),
        ({"rope_parameters": {"rope_theta": 8e6}}, "'rope_type' is missing"),
        ({"rope_parameters": {"rope_theta": 8e6, "partial_rotary_factor": 0.5}}, "rope_parameters"),
        ({"rope_parameters": 8e6}, "rope_parameters"),
        ({"rope_parameters": MISSING}, "'rope_theta' is missing"),
        ({"rope_theta": 1e4}, "contradicts rope_parameters"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer"),
        ({"hidden_size": 64.0}, "hidden_size must be a positive integer"),
        ({"index_topk": True}, "index_topk must be a positive integer"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"rope_interleave": 1}, "rope_interleave must be true or false"),
        ({"index_share_for_mtp_iteration": "yes"}, "index_share_for_mtp_iteration must be true or false"),
        ({"indexer_types": ["full"] * 7}, "indexer_types"),
        ({"indexer_types": ["shared"] + ["full"] * 7}, "layer 0 shares"),
        ({"indexer_types": ["full"] * 7 + ["half"]}, "indexer_types"),
        ({"indexer_types": 4}, "indexer_types"),
        ({"indexer_types": None, "index_topk_pattern": "FFFX" * 2}, "index_topk_pattern"),
        ({"indexer_types": None, "index_skip_topk_offset": MISSING}, "'index_skip_topk_offset' is missing"),
        ({"indexer_types": None, "index_skip_topk_offset": "3"}, "index_skip_topk_offset"),
        ({"indexer_types": None, "index_topk_freq": 0}, "index_topk_freq"),
        ({"mlp_layer_types": ["dense"] * 9}, "mlp_layer_types"),
        ({"mlp_layer_types": None, "first_k_dense_replace": -1}, "first_k_dense_replace"),
        ({"mlp_layer_types": None, "first_k_dense_replace": MISSING}, "'first_k_dense_replace' is missing"),
        ({"eos_token_id": []}, "eos_token_id"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"eos_token_id": 512}, "outside the vocabulary"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"qk_head_dim": 32}, "qk_head_dim"),
        ({"num_experts": 17}, "num_experts"),
        ({"qk_rope_head_dim": 31, "qk_head_dim": 63}, "qk_rope_head_dim must be even"),
        ({"index_head_dim": 16}, "at most index_head_dim"),
        ({"n_group": 3}, "n_group must divide"),
        ({"n_group": 2, "topk_group": 3}, "at least topk_group"),
        ({"n_group": 8, "topk_group": 1}, "num_experts_per_tok exceeds"),
        ({"num_nextn_predict_layers": 2}, "at most one MTP layer"),
        ({"num_nextn_predict_layers": "1"}, "at most one MTP layer"),
        ({"layer_types": ["linear_attention"] * 8}, "layer_types"),
        ({"dtype": 16}, "dtype"),
        ({"quantization_config": "fp8"}, "quantization_config"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_an_error_that_names_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        GlmConfig.from_dict(nano(**changes))
    assert "\n" not in caught.value.message


def test_reading_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        GlmConfig.from_file(tmp_path)
    file = tmp_path / "config.json"
    for text, message in (
        ("{", "not readable as JSON"),
        ("[]", "expected a JSON object"),
        ('{"vocab_size": ' + "[" * 100_000, "nested too deeply"),
        ('{"vocab_size": ' + "1" * 5_000 + "}", "not readable as JSON"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            GlmConfig.from_file(tmp_path)
    file.write_text(json.dumps(nano())[:-1] + ', "hidden_size": 128}')
    with pytest.raises(ConfigError, match="'hidden_size' is given twice"):
        GlmConfig.from_file(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not readable as JSON"):
        GlmConfig.from_file(file)
    file.write_text(json.dumps(nano()))
    assert GlmConfig.from_file(tmp_path) == GlmConfig.from_file(str(file)) == GlmConfig.from_dict(nano())


@pytest.mark.parametrize("size", SIZES)
def test_a_config_that_transformers_saved_parses_to_the_same(size: str, tmp_path: Path) -> None:
    import transformers

    transformers.GlmMoeDsaConfig(**size_config(size)).save_pretrained(tmp_path)
    assert GlmConfig.from_file(tmp_path) == GlmConfig.from_dict(size_config(size))
