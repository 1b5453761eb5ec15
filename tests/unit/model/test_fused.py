"""All layers as one native call: bit for bit what the layers compute one by one, and when it steps aside."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from freehold.engine.loading import EngineOptions, load_model
from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inputs import ForwardInput, Span, single_sequence
from freehold.model.mla import Plan
from freehold.model.ops.fused import MOST_ROWS, FusedLayers, fits
from freehold.model.ops.native import SMALL_ROWS, NativeOps
from freehold.model.packed import KINDS, Kind
from freehold.model.packing import forms, pack_model
from freehold.model.sizes import size_config
from freehold.model.tiny import write_random_checkpoint
from freehold.model.weights import load_weights
from tests.native_cases import ALL_ISAS, SUPPORTED, generator, native, needs_native, normal

pytestmark = needs_native

CONFIGS: dict[str, dict[str, Any]] = {
    "nano": size_config("nano"),
    # Every size another, ragged FP8 groups, rotary halves, unnormalised routing, and a selection of several chunks of
    # attention.
    "odd": size_config("nano") | {
        "vocab_size": 333, "hidden_size": 192, "intermediate_size": 224, "moe_intermediate_size": 64,
        "num_attention_heads": 5, "num_key_value_heads": 5, "q_lora_rank": 128, "kv_lora_rank": 96,
        "qk_nope_head_dim": 40, "qk_rope_head_dim": 12, "qk_head_dim": 52, "v_head_dim": 32, "index_n_heads": 3,
        "index_head_dim": 26, "index_topk": 90, "n_routed_experts": 12, "num_experts_per_tok": 5,
        "n_shared_experts": 2, "rope_interleave": False, "indexer_rope_interleave": False, "norm_topk_prob": False,
        "routed_scaling_factor": 1.7, "pad_token_id": 3, "eos_token_id": [3],
    },
    # One of the two rotary layouts each, and an epsilon that counts.
    "mixed rope": size_config("nano") | {"rope_interleave": False, "rms_norm_eps": 0.05},
}  # fmt: skip
BLOCK, BLOCKS = 16, 400


@pytest.fixture(scope="module", autouse=True)
def directories(tmp_path_factory: pytest.TempPathFactory) -> None:
    for name, config in CONFIGS.items():
        path = tmp_path_factory.mktemp("models") / name.replace(" ", "-")
        write_random_checkpoint(config, path, seed=3)
        DIRECTORIES[name] = path


DIRECTORIES: dict[str, Path] = {}


@cache
def model_of(name: str, kind: Kind) -> Glm:
    config = GlmConfig.from_file(DIRECTORIES[name])
    model = Glm(config).requires_grad_(False).eval()
    pack_model(model, forms(config, None if kind == "bf16" else kind))
    load_weights(model, DIRECTORIES[name])
    return model


def batch(spans: list[tuple[int, int]], vocabulary: int, seed: int = 0) -> ForwardInput:
    """(length, start) of each sequence; their blocks lie in any order."""
    g = generator(seed)
    free = torch.randperm(BLOCKS, generator=g)
    made, positions, slots = [], [], []
    row = used = 0
    for length, start in spans:
        count = -(-(start + length) // BLOCK)
        table = free[used : used + count]
        used += count
        made.append(Span(row, length, start, table))
        at = torch.arange(start, start + length)
        positions.append(at)
        slots.append(table[at // BLOCK] * BLOCK + at % BLOCK)
        row += length
    assert used <= BLOCKS
    tokens = torch.randint(0, vocabulary, (row,), generator=g)
    return ForwardInput(tokens, torch.cat(positions), torch.cat(slots), tuple(made), BLOCK)


def filled_cache(config: GlmConfig, dtype: torch.dtype = torch.bfloat16) -> PagedCache:
    held, g = PagedCache(config, BLOCKS, BLOCK, dtype), generator(9)
    for tensor in (*held.latent, *held.index):
        if tensor is not None:
            tensor.copy_(normal(g, *tensor.shape))
    return held


def both(model: Glm, ops: NativeOps, inputs: ForwardInput) -> tuple[Tensor, Tensor]:
    """Hidden states by one call and layer by layer. Their caches are compared here."""
    model.ops = ops
    found, caches = [], []
    for run_few in (FusedLayers(ops, model.config, model.decoder_layers), None):
        model.run_few = run_few
        caches.append(filled_cache(model.config))
        with torch.inference_mode():
            found.append(model(inputs, caches[-1]))
    model.run_few = None
    tensors = [[t for t in (*held.latent, *held.index) if t is not None] for held in caches]
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))
    assert bool(found[1].isfinite().all())
    return found[0], found[1]


# Of each sequence (rows, first position). index_topk is 16 in nano and 90 in the odd model.
BATCHES: dict[str, list[tuple[int, int]]] = {
    "first token": [(1, 0)],
    "one below topk": [(1, 15)],
    "one at topk": [(1, 16)],
    "one far above": [(1, 300)],
    "prompt of 16": [(16, 0)],
    "chunk past topk": [(16, 83)],
    "chunk far above": [(9, 200)],
    "speculation": [(4, 33), (4, 7), (4, 150)],
    "more than reduce in one order": [(1, 31 * i % 140) for i in range(20)] + [(16, 100), (3, 400)],
    "mixed": [(1, 40), (3, 5), (1, 0), (4, 88), (2, 200), (1, 100), (4, 13)],
}


@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("isa", ALL_ISAS)
def test_one_call_is_the_layers_one_by_one(isa: str, name: str, kind: Kind, case: str) -> None:
    model = model_of(name, kind)
    fused, layered = both(model, native(isa), batch(BATCHES[case], model.config.vocab_size))
    assert torch.equal(fused, layered)


@pytest.mark.parametrize("rows", [*range(1, SMALL_ROWS + 2), 40, 64])
@pytest.mark.parametrize("name", CONFIGS)
def test_any_number_of_sequences(name: str, rows: int) -> None:
    model = model_of(name, "int4")
    spans = [(1, (37 * i + 5) % 150) for i in range(rows)]
    for threads in (1, 2, 3):
        fused, layered = both(model, native(SUPPORTED[0], threads), batch(spans, model.config.vocab_size, rows))
        assert torch.equal(fused, layered), f"{threads} threads"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", ALL_ISAS)
def test_a_row_does_not_depend_on_the_others_of_its_call(isa: str, kind: Kind) -> None:
    model = model_of("odd", kind)
    inputs, ops = batch(BATCHES["mixed"], model.config.vocab_size), native(isa)
    model.ops, model.run_few = ops, FusedLayers(ops, model.config, model.decoder_layers)
    with torch.inference_mode():
        together = model(inputs, filled_cache(model.config))
        for span in inputs.spans:
            rows = slice(span.row, span.row + span.length)
            one = ForwardInput(
                inputs.token_ids_T[rows], inputs.positions_T[rows], inputs.slots_T[rows],
                (Span(0, span.length, span.start, span.table_B),), BLOCK,
            )  # fmt: skip
            assert torch.equal(model(one, filled_cache(model.config)), together[rows])
    model.run_few = None


def test_a_step_is_one_call_and_its_time_is_counted_by_part() -> None:
    model, ops = model_of("nano", "bf16"), NativeOps(1)
    fused = FusedLayers(ops, model.config, model.decoder_layers)
    assert ops.profile_parts() == {}
    inputs = batch([(1, 40)], 448)
    rope = model.rope.tables(inputs.positions_T)
    hidden = normal(generator(1), 1, 64)
    with torch.inference_mode():
        assert fused(hidden, inputs, rope, filled_cache(model.config)) is hidden
    assert all(seconds > 0 for seconds in ops.profile_parts().values())
    assert ops.profile_parts() == {}


def test_layers_from_the_middle_and_the_mtp_layer() -> None:
    """`first` says which caches are theirs."""
    model, ops = model_of("nano", "int8"), native(SUPPORTED[0])
    assert model.mtp is not None
    inputs = batch(BATCHES["speculation"], 448)
    rope = model.rope.tables(inputs.positions_T)
    for first, layers in ((2, model.decoder_layers[2:]), (8, [model.mtp])):
        hidden, caches = normal(generator(2), inputs.num_rows, 64), [filled_cache(model.config) for _ in range(2)]
        with torch.inference_mode():
            expected, slots = hidden.clone(), None
            for i, layer in enumerate(layers, first):
                latent, keys = caches[0].latent[i], caches[0].index[i]
                plan = Plan.of(inputs, model.config.index_topk)
                expected, slots = layer(ops, expected, inputs, plan, rope, latent, keys, slots)
            found = FusedLayers(ops, model.config, layers, first)(hidden, inputs, rope, caches[1])
        assert found is not None
        assert torch.equal(found, expected)
        assert all(torch.equal(a, b) for a, b in zip(caches[0].latent, caches[1].latent, strict=True))


def test_a_cache_of_another_engine_is_not_mixed_up() -> None:
    model, ops = model_of("nano", "bf16"), native(SUPPORTED[0])
    fused = FusedLayers(ops, model.config, model.decoder_layers)
    inputs, hidden = batch([(2, 30)], 448), normal(generator(3), 2, 64)
    rope = model.rope.tables(inputs.positions_T)
    first, second = filled_cache(model.config), filled_cache(model.config)
    with torch.inference_mode():
        for tensor in second.latent:
            tensor.mul_(-1)
        outs = [fused(hidden.clone(), inputs, rope, each) for each in (first, second, first)]
        again = fused(hidden.clone(), inputs, rope, filled_cache(model.config))
    assert outs[0] is not None
    assert outs[1] is not None
    assert not torch.equal(outs[0], outs[1])
    assert again is not None
    assert torch.equal(outs[0], again)


def test_other_steps_are_left_to_the_layers() -> None:
    model, ops = model_of("nano", "bf16"), native(SUPPORTED[0])
    fused = FusedLayers(ops, model.config, model.decoder_layers)
    chunk, few = batch([(SMALL_ROWS + 1, 3)], 448), batch([(2, 3)], 448)
    many = batch([(SMALL_ROWS, 3)] * (MOST_ROWS // SMALL_ROWS) + [(1, 3)], 448)
    with torch.inference_mode():
        for inputs, dtype in ((chunk, torch.bfloat16), (many, torch.bfloat16), (few, torch.float32)):
            hidden = normal(generator(4), inputs.num_rows, 64)
            before = hidden.clone()
            rope = model.rope.tables(inputs.positions_T)
            assert fused(hidden, inputs, rope, filled_cache(model.config, dtype)) is None
            assert torch.equal(hidden, before)
    for inputs in (chunk, many):
        one_call, layered = both(model, ops, inputs)
        assert torch.equal(one_call, layered)


@pytest.mark.parametrize(
    "changes", [{"attention_bias": True}, {"n_group": 4, "topk_group": 2}], ids=["attention_bias", "n_group"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_rare_models_run_layer_by_layer(changes: dict[str, Any], kind: Kind, tmp_path: Path) -> None:
    """And what they give is near what the plain operations give, on a prompt and a step after it."""
    write_random_checkpoint(size_config("nano") | changes, tmp_path, seed=4)
    config = GlmConfig.from_file(tmp_path)
    quantize = None if kind == "bf16" else kind
    tokens = torch.randint(0, 448, (14,), generator=generator(5)).tolist()
    found = []
    for options in (EngineOptions(threads=2, quantize=quantize), EngineOptions(ops="reference", quantize=quantize)):
        model, held = load_model(tmp_path, config, options), PagedCache(config, 2, 16, torch.bfloat16)
        assert model.run_few is None
        assert not fits(config, model.decoder_layers)
        with torch.inference_mode():
            model(single_sequence(tokens[:-1], block_size=16), held)
            found.append(model.logits(model(single_sequence(tokens[-1:], start=13, block_size=16), held)).double())
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.15


def test_fits_asks_for_all_that_a_layer_has() -> None:
    config = GlmConfig.from_dict(size_config("nano"))
    plain = Glm(config)
    assert not fits(config, plain.decoder_layers)
    model = model_of("nano", "bf16")
    assert fits(config, model.decoder_layers)
    assert not fits(GlmConfig.from_dict(size_config("nano") | {"attention_bias": True}), model.decoder_layers)
    assert not fits(GlmConfig.from_dict(size_config("nano") | {"n_group": 4, "topk_group": 2}), model.decoder_layers)
    shared = model.decoder_layers[3:]  # layer 3 attends to what layer 2 selects
    assert not fits(config, shared)
    for layers in (plain.decoder_layers, shared):
        with pytest.raises(ValueError, match="cannot run as one native call"):
            FusedLayers(native(SUPPORTED[0]), config, layers)


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "fp8"])
def test_a_loaded_model_has_it(quantize: Any) -> None:
    config = GlmConfig.from_file(DIRECTORIES["nano"])
    assert isinstance(load_model(DIRECTORIES["nano"], config, EngineOptions(quantize=quantize)).run_few, FusedLayers)
    for options in (EngineOptions(ops="reference", quantize=quantize), EngineOptions(dtype="float32")):
        assert load_model(DIRECTORIES["nano"], config, options).run_few is None
