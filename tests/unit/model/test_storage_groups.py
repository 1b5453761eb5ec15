"""quantization_config of compressed-tensors: what is written, what is read, and what is refused in one line."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from freehold.errors import ConfigError
from freehold.model.config import GlmConfig
from freehold.model.inspect import published_config
from freehold.model.names import TensorSpec, tensor_specs
from freehold.model.sizes import size_config
from freehold.model.storage import quantization_scheme
from freehold.model.storage_groups import GroupFormat, GroupScheme, group_quantization, group_scheme

NANO = GlmConfig.from_dict(size_config("nano"))
SPECS = {spec.name: spec for spec in tensor_specs(NANO)}
O_PROJ = SPECS["model.layers.4.self_attn.o_proj.weight"]
EXPERT = SPECS["model.layers.4.mlp.experts.3.gate_proj.weight"]
ROUTER = SPECS["model.layers.4.mlp.gate.weight"]
HEAD = SPECS["lm_head.weight"]
EMBED = SPECS["model.embed_tokens.weight"]


def weights(**changes: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | changes


def quantization(*groups: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A config as other writers make it, with one group for all matrices unless others are given."""
    groups = groups or ({"targets": ["Linear"], "weights": weights()},)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": [],
    } | changes


def form_of(raw: dict[str, Any], spec: TensorSpec) -> GroupFormat | None:
    scheme = quantization_scheme(raw)
    assert isinstance(scheme, GroupScheme)
    return scheme.format_of(spec)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_written_for_glm_52(bits: Any) -> None:
    config = published_config("glm-5.2")
    scheme = group_scheme(group_quantization(config, bits))
    found: Counter[tuple[str, str]] = Counter()
    for spec in tensor_specs(config):
        form = scheme.format_of(spec)
        if len(spec.shape) == 2:
            last = spec.name.removesuffix(".weight").rpartition(".")[2]
            layer = "mtp" if spec.layer == config.num_hidden_layers else spec.part
            found[(f"{layer} {last}" if form is None else layer, str(form))] += 1
        else:
            assert form is None
    most = f"int{bits} in groups of {64 if bits == 8 else 32}"
    eight = "int8 in groups of 64"
    assert found == {
        ("attention", most): 78 * 4,
        ("indexer", eight): 21 * 2,
        ("dense_mlp", most): 9,
        ("shared_expert", most): 75 * 3,
        ("routed_expert", most): 75 * 256 * 3,
        ("head", eight): 1,
        ("mtp", eight): 4 + 2 + 3 + 256 * 3,
        ("attention kv_b_proj", "None"): 78,
        ("indexer weights_proj", "None"): 21,
        ("router gate", "None"): 75,
        ("embed embed_tokens", "None"): 1,
        ("mtp kv_b_proj", "None"): 1,
        ("mtp weights_proj", "None"): 1,
        ("mtp gate", "None"): 1,
        ("mtp eh_proj", "None"): 1,
    }


def test_rows_that_are_not_whole_groups_are_kept() -> None:
    config = GlmConfig.from_dict(size_config("nano") | {"q_lora_rank": 72, "moe_intermediate_size": 40})
    scheme = group_scheme(group_quantization(config, 4))
    forms = {spec.name: scheme.format_of(spec) for spec in tensor_specs(config)}
    assert forms["model.layers.4.self_attn.q_b_proj.weight"] is None  # 72 columns
    assert forms["model.layers.4.self_attn.q_a_proj.weight"] == GroupFormat(4, 32)
    assert forms["model.layers.6.self_attn.indexer.wk.weight"] == GroupFormat(8, 64)
    assert forms["model.layers.4.mlp.experts.0.down_proj.weight"] is None  # 40 columns
    assert forms["model.layers.4.mlp.experts.0.up_proj.weight"] == GroupFormat(4, 32)
    assert forms["model.layers.8.mlp.experts.0.up_proj.weight"] == GroupFormat(8, 64)  # the MTP layer


def test_what_is_stored_of_a_matrix() -> None:
    stored = [(tensor.name, tensor.dtype, tensor.shape) for tensor in GroupFormat(4, 32).stored(O_PROJ)]
    assert stored == [
        (O_PROJ.name + "_packed", "I32", (64, 16)),
        (O_PROJ.name + "_scale", "BF16", (64, 4)),
        (O_PROJ.name + "_shape", "I64", (2,)),
    ]


def test_a_class_is_every_matrix_but_embedding_and_router() -> None:
    raw = quantization()
    assert form_of(raw, O_PROJ) == form_of(raw, HEAD) == form_of(raw, EXPERT) == GroupFormat(8, 32)
    assert form_of(raw, ROUTER) is None
    assert form_of(raw, EMBED) is None
    assert form_of(raw, SPECS["model.norm.weight"]) is None


def test_a_name_goes_before_a_class_and_ignore_before_both() -> None:
    experts = {"targets": [r"re:.*\.experts\.\d+\..*"], "weights": weights(num_bits=4)}
    raw = quantization({"targets": ["Linear"], "weights": weights()}, experts)
    assert form_of(raw, EXPERT) == GroupFormat(4, 32)
    assert form_of(raw, O_PROJ) == GroupFormat(8, 32)
    for ignored in (r"re:.*mlp.*", EXPERT.name.removesuffix(".weight")):
        assert form_of(raw | {"ignore": [ignored]}, EXPERT) is None
    # A pattern matches from the start, not anywhere; a name is a whole name.
    assert form_of(raw | {"ignore": ["re:mlp", "model.layers.4.mlp"]}, EXPERT) == GroupFormat(4, 32)
    only = quantization({"targets": ["lm_head"], "weights": weights()})
    assert form_of(only, HEAD) == GroupFormat(8, 32)
    assert form_of(only, O_PROJ) is None


def test_a_module_in_two_groups_or_that_does_not_fit_is_refused() -> None:
    first = {"targets": ["re:.*o_proj"], "weights": weights()}
    second = {"targets": [O_PROJ.name.removesuffix(".weight")], "weights": weights(num_bits=4)}
    with pytest.raises(ConfigError, match=r"'model\.layers\.4\.self_attn\.o_proj' is in two config_groups that differ"):
        form_of(quantization(first, second), O_PROJ)
    assert form_of(quantization(first, second | {"weights": weights()}), O_PROJ) == GroupFormat(8, 32)
    wide = quantization({"targets": ["Linear"], "weights": weights(group_size=256)})
    with pytest.raises(ConfigError, match=r"\[64, 128\] cannot be int8 in groups of 256; name it in ignore"):
        form_of(wide, O_PROJ)


def test_what_changes_nothing_is_accepted() -> None:
    inert = weights(
        dynamic=False, actorder="weight", block_structure=None, observer="mse", observer_kwargs={"norm": 2.4},
        scale_dtype=None, zp_dtype="torch.int8",
    )  # fmt: skip
    group = {"targets": ["Linear"], "weights": inert, "input_activations": None, "output_activations": None}
    raw = quantization(
        group | {"format": "pack-quantized"}, format="mixed-precision", quantization_status="compressed",
        version="0.15.0", global_compression_ratio=2.3, kv_cache_scheme=None, sparsity_config={}, transform_config={},
    )  # fmt: skip
    assert form_of(raw, O_PROJ) == GroupFormat(8, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "int-quantized"}, "format = 'int-quantized' is not supported"),
        ({"format": None}, "format = None is not supported"),
        ({"quantization_status": "frozen"}, "quantization_status = 'frozen'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme = "),
        ({"sparsity_config": {"format": "sparse-24"}}, "sparsity_config = "),
        ({"transform_config": {"config_groups": {}}}, "transform_config = "),
        ({"codebook": 1}, "unknown key 'codebook'"),
        ({"config_groups": {}}, "at least one group"),
        ({"config_groups": {"W8A16": ["Linear"]}}, "names of presets are not supported"),
        ({"ignore": "lm_head"}, "ignore must be a list"),
        ({"ignore": ["Linear"]}, "'Linear' is neither a module's name nor 're:' and a pattern$"),
        ({"ignore": ["re:("]}, r"'re:\(' is not a regular expression"),
        ({"format": "mixed-precision"}, "group_0: format is missing"),
    ],
)
def test_another_config_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        quantization_scheme(quantization(**changes))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": None}, "targets must be a list"),
        ({"targets": ["Conv2d"]}, "'Conv2d' is neither"),
        ({"format": "nvfp4-pack-quantized"}, "format = 'nvfp4-pack-quantized'"),
        ({"input_activations": {"num_bits": 8}}, "input_activations is set; only weight-only"),
        ({"output_activations": {"num_bits": 8}}, "output_activations is set"),
        ({"weights": None}, "weights must be an object"),
        ({"rotation": 1}, "unknown key 'rotation'"),
    ],
)
def test_another_group_is_refused(changes: dict[str, Any], message: str) -> None:
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights()}
    with pytest.raises(ConfigError, match=message):
        quantization_scheme(quantization(group | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bits": 3}, "num_bits = 3; only 4 and 8"),
        ({"num_bits": None}, "num_bits = None"),
        ({"type": "float"}, "type = 'float'"),
        ({"symmetric": False}, "symmetric = False"),
        ({"symmetric": 1}, "symmetric = 1"),
        ({"strategy": "channel", "group_size": -1}, "strategy = 'channel'"),
        ({"group_size": None}, "group_size = None"),
        ({"group_size": 3}, "group_size = 3"),
        ({"group_size": True}, "group_size = True"),
        ({"actorder": "group"}, "actorder = 'group'"),
        ({"dynamic": True}, "dynamic = True"),
        ({"block_structure": [128, 128]}, "block_structure = "),
        ({"scale_dtype": "torch.float8_e4m3fn"}, "scale_dtype = "),
        ({"zero_points": 1}, "unknown key 'zero_points'"),
    ],
)
def test_other_weights_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantization_scheme(quantization({"targets": ["Linear"], "weights": weights(**changes)}))
