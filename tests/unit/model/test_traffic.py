"""Bytes and FLOPs of a step, against figures made by hand, the checkpoint's own sizes, and loops over rows."""

from __future__ import annotations

import pytest

from freehold.model.config import GlmConfig
from freehold.model.inspect import inspect
from freehold.model.names import tensor_specs
from freehold.model.sizes import size_config
from freehold.model.storage import scale_shape
from freehold.model.traffic import (
    Ceilings,
    Formats,
    Part,
    Share,
    Traffic,
    WeightFormat,
    bound_seconds,
    decode_step,
    experts_touched,
    matrix_bytes,
    prefill_steps,
    step_traffic,
    total,
    weight_formats,
)

BF16 = Formats(weight_formats("bf16"))


def config_of(size: str) -> GlmConfig:
    return GlmConfig.from_dict(size_config(size))


def tokens_per_second(size: str, scheme: WeightFormat, context: int, bandwidth: float) -> float:
    parts = step_traffic(config_of(size), Formats(weight_formats(scheme)), decode_step(context))
    return 1.0 / sum(bound_seconds(part, Ceilings(bandwidth, 4e11)) for part in parts.values())


def test_one_decoded_token_of_nano_by_hand() -> None:
    """nano: hidden 64, 8 layers (4 full, 3 dense), 4 heads, ranks 64 + 32, 16 experts of 32, 4 a token, topk 16."""
    parts = step_traffic(config_of("nano"), BF16, decode_step(100))
    full = [i for i in range(8) if max(i - 2, 0) % 4 == 0]
    assert len(full) == 4
    expected: dict[Part, tuple[int, int]] = {
        # wk 64→64, its norm, the key that is written; wq_b 64→256; weights_proj 64→4.
        "indexer.project": (4 * 2 * (64 * 64 + 2 * 64 + 64 + 64 * 256 + 64 * 4), 4 * 2 * 64 * (64 + 256 + 4)),
        "indexer.select": (4 * 100 * 64 * 2, 4 * 100 * 4 * 2 * 65),
        # q_a 64→64 and its norm, q_b 64→256, kv_a 64→96, o 128→64.
        "attention.project": (8 * 2 * (64 * 64 + 64 + 64 * 256 + 64 * 96 + 128 * 64), 8 * 2 * (320 * 64 + 224 * 64)),
        "attention.write": (8 * 2 * (64 + 96), 0),
        # 16 latents of 96; kv_b 64→4·(32 + 32), of which both halves are multiplied by.
        "attention.attend": (8 * 2 * (16 * 96 + 64 * 256), 8 * 2 * (4 * 16 * (96 + 64) + 64 * 256)),
        "router": (5 * (2 * 64 * 16 + 4 * 16), 5 * 2 * 64 * 16),
        "experts": (5 * 4 * 3 * 2 * 64 * 32, 5 * 4 * 3 * 2 * 64 * 32),
        "mlp": (2 * 3 * 64 * (3 * 128 + 5 * 32), 2 * 3 * 64 * (3 * 128 + 5 * 32)),
        "norms": (2 * 64 * 17, 0),
        "head": (2 * 64 * 512, 2 * 64 * 512),
        "other": (2 * 64, 0),
    }  # fmt: skip
    assert parts.keys() == expected.keys()
    for part, figures in expected.items():
        assert (parts[part].bytes, parts[part].flops) == pytest.approx(figures), part


@pytest.mark.parametrize(
    ("size", "scheme", "known"),
    [
        ("small", "bf16", {128: 458, 4096: 440, 16384: 404, 65536: 304}),
        ("medium", "bf16", {128: 50, 4096: 47, 16384: 45}),
    ],
)
def test_the_roofline_of_the_test_models_at_31_gb_a_second(
    size: str, scheme: WeightFormat, known: dict[int, int]
) -> None:
    for context, expected in known.items():
        assert tokens_per_second(size, scheme, context, 31e9) == pytest.approx(expected, abs=0.6)


def test_quantised_weights_read_less_but_never_less_than_their_bits() -> None:
    bf16, int8, int4, fp8 = (tokens_per_second("small", s, 128, 31e9) for s in ("bf16", "int8", "int4", "fp8"))  # type: ignore[arg-type]
    assert 1.7 * bf16 < int8 < 16 / 8.25 * bf16
    assert 2.5 * bf16 < int4 < 16 / 4.5 * bf16
    assert bf16 < fp8 < 2 * bf16


@pytest.mark.parametrize("size", ["nano", "small"])
def test_all_weights_are_read_once_when_every_expert_is_touched(size: str) -> None:
    """Against the names and shapes of a checkpoint: what is left over are the caches and the rows' embeddings."""
    config = config_of(size)
    rows = 100_000
    parts = step_traffic(config, BF16, [Share(1, 1)] * rows)
    weights = sum(
        spec.size * (4 if spec.dtype == "float32" else 2)
        for spec in tensor_specs(config)
        if spec.layer != config.num_hidden_layers and spec.part not in ("embed", "mtp")
    )
    layers, full = config.num_hidden_layers, len(config.full_layers)
    caches = rows * 2 * 2 * (layers * config.latent_dim + full * config.index_head_dim)  # read, and written
    assert total(parts.values()).bytes == pytest.approx(weights + caches + rows * 2 * config.hidden_size, rel=1e-9)


def test_active_parameters_of_glm_52() -> None:
    """A token's products: those of the matrices that `inspect` calls active, two operations a weight."""
    report = inspect("glm-5.2")
    parts = step_traffic(report.config, BF16, decode_step(1))
    config = report.config
    pairs = config.num_hidden_layers * config.num_attention_heads * (config.latent_dim + config.kv_lora_rank)
    scores = len(config.full_layers) * config.index_n_heads * (config.index_head_dim + 1)
    assert total(parts.values()).flops == pytest.approx(2 * (report.parameters.active + pairs + scores), rel=1e-9)


def test_expected_experts() -> None:
    assert experts_touched(32, 4, 1) == pytest.approx(4)
    assert experts_touched(4, 1, 2) == pytest.approx(1.75)  # the same one in a quarter of the cases
    assert experts_touched(256, 8, 10_000) == pytest.approx(256)


def test_a_batch_shares_weights_and_not_caches() -> None:
    config = config_of("small")
    one, four = (step_traffic(config, BF16, decode_step(5000, batch)) for batch in (1, 4))
    assert four["head"].bytes == one["head"].bytes
    assert four["head"].flops == 4 * one["head"].flops
    assert four["indexer.select"] == Traffic(4 * one["indexer.select"].bytes, 4 * one["indexer.select"].flops)
    assert one["experts"].bytes < four["experts"].bytes < 4 * one["experts"].bytes


@pytest.mark.parametrize("tokens", [1, 10, 16, 17, 100])
@pytest.mark.parametrize("budget", [7, 16, 64, 2048])
def test_prefill_counts_every_row(tokens: int, budget: int) -> None:
    """Pairs of rows and latents, and of rows and scored keys, by a loop over rows. nano has topk 16."""
    config = config_of("nano")
    steps = prefill_steps(tokens, budget)
    assert [step[0].rows for step in steps] == [min(budget, tokens - at) for at in range(0, tokens, budget)]
    assert [step[0].samples for step in steps] == [False] * (len(steps) - 1) + [True]
    latents = sum(min(row, 16) for row in range(1, tokens + 1))
    scored = 0
    for step in steps:
        last, rows = step[0].context, step[0].rows
        scored += sum(row for row in range(last - rows + 1, last + 1) if row > 16 or rows == 1)
    parts = [step_traffic(config, BF16, step) for step in steps]
    kv_b = 2 * 64 * 256 * tokens
    assert total(each["attention.attend"] for each in parts).flops == 8 * (2 * 4 * 160 * latents + kv_b)
    assert total(each["indexer.select"] for each in parts).flops == 4 * 2 * 4 * 65 * scored
    assert total(each["head"] for each in parts).flops == 2 * 64 * 512


def test_bytes_of_a_matrix() -> None:
    assert matrix_bytes(64, 128, "fp32") == 4 * 64 * 128
    assert matrix_bytes(64, 128, "bf16") == 2 * 64 * 128
    assert matrix_bytes(64, 128, "int8") == 64 * 128 * 8.25 / 8 == 64 * (128 + 2 * 2)
    assert matrix_bytes(64, 128, "int4") == 64 * 128 * 4.5 / 8 == 64 * (64 + 4 * 2)
    assert matrix_bytes(10, 96, "int8") == 2 * 10 * 96  # its rows are not whole groups of 64
    rows, columns = scale_shape((130, 300))
    assert matrix_bytes(130, 300, "fp8") == 130 * 300 + 4 * rows * columns


def test_what_stays_in_bf16() -> None:
    for scheme, head in (("int8", "int8"), ("int4", "int8"), ("fp8", "bf16")):
        formats = weight_formats(scheme)  # type: ignore[arg-type]
        assert formats["lm_head"] == head
        assert {name for name, stored in formats.items() if stored == "bf16"} - {"lm_head"} == {
            "embed_tokens", "router", "indexer.weights_proj"
        }  # fmt: skip


def test_a_bound_is_the_slower_of_memory_and_arithmetic() -> None:
    machine = Ceilings(10.0, 100.0)
    assert bound_seconds(Traffic(50, 100), machine) == 5
    assert bound_seconds(Traffic(50, 1000), machine) == 10


@pytest.mark.parametrize(("rows", "context"), [(0, 1), (3, 2)])
def test_a_share_that_cannot_be(rows: int, context: int) -> None:
    with pytest.raises(ValueError, match="rows"):
        Share(rows, context)
