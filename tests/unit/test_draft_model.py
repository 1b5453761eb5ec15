"""The draft model and what benchmarks/speculation.py measures with it: right where it should be, and able to fail."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from _draft_language import Songs, token_ids
from _draft_model import draft_config, draft_tensors, write_draft_model
from _drafting import Counting, Drafting, interleaved
from _pairs import median_at_most
from speculation import DEPTH, LOST, song_prompts

from freehold.engine.loading import EngineOptions, build_engine
from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inputs import single_sequence
from tests.faults.drafts import DRAFT_FAULTS, Fault

WIDER = {
    "hidden_size": 200,
    "intermediate_size": 80,
    "moe_intermediate_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "q_lora_rank": 128,
    "kv_lora_rank": 104,
    "index_n_heads": 8,
    "vocab_size": 640,
}
_TOKENS = 48


def load(raw: dict[str, object]) -> tuple[Glm, PagedCache]:
    config = GlmConfig.from_dict(raw)
    model = Glm(config, dtype=torch.float32).requires_grad_(False).eval()
    places = model.checkpoint_tensors()
    for spec, values in draft_tensors(raw):
        places.pop(spec.name).copy_(torch.from_numpy(values))
    assert not places
    return model, PagedCache(config, 6, 64, torch.float32)


def song(seed: int, singings: float = 2.5) -> list[int]:
    return list(song_prompts(1, seed, singings)[0])


@torch.inference_mode()
def test_the_target_continues_songs_and_needs_its_indexer() -> None:
    model, cache = load(draft_config("core"))
    tokens, period = song(3), Songs().period
    assert len(tokens) > 3 * model.config.index_topk

    def right() -> float:
        predicted = model.logits(model(single_sequence(tokens), cache)).argmax(-1)[period:-1]
        return float((predicted == torch.tensor(tokens[period + 1 :])).float().mean())

    assert right() > 0.97
    model.layers[2].self_attn.indexer.weights_proj.weight.neg_()  # the least fitting entries, for layer 3 too
    assert right() < 0.5


@torch.inference_mode()
def test_neighbouring_tokens_take_different_experts() -> None:
    """Else verifying drafts would read fewer weights than it does for other models."""
    model, cache = load(draft_config("core"))
    chosen: list[torch.Tensor] = []
    for layer in model.layers[3:]:
        layer.mlp.gate.register_forward_hook(lambda _module, _args, output: chosen.append(output[0]))
    model(single_sequence(song(6)), cache)
    independent = 32 * (1 - (28 / 32) ** 4)
    for ids_TX in chosen:
        distinct = [len(ids_TX[row : row + 4].unique()) for row in range(100, 200)]
        assert sum(distinct) / len(distinct) > 0.7 * independent


@torch.inference_mode()
def test_a_wider_model_computes_the_same() -> None:
    core, wide = load(draft_config("core")), load(draft_config("core") | WIDER)
    tokens = song(4, 1.5)
    states = []
    for model, cache in (core, wide):
        hidden = model(single_sequence(tokens[:-1]), cache)
        extended = model.extend_mtp(hidden, single_sequence(tokens[1:]), cache)
        drafted = model.draft_mtp(
            extended.hidden_TH[-1:], torch.tensor([40]), torch.tensor([len(tokens) - 1]), extended.selection_NK, cache
        )
        states.append(model.logits(torch.cat((hidden, extended.hidden_TH, drafted)))[:, :300])
    torch.testing.assert_close(states[1], states[0], atol=2e-3, rtol=2e-3)


def test_names_and_words_are_single_characters_of_the_tokenizer(tmp_path: Path) -> None:
    engine, tokenizer = build_engine(write_draft_model(tmp_path), EngineOptions(verify=True, cache_bytes=1 << 24))
    engine.close()
    assert tokenizer.decode(token_ids("Aq0")) == "Aq0"
    for row in Songs().draw(2, 100, seed=0):
        assert np.array_equal(row[90:], row[:10])


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Drafting:
    return Drafting.load(write_draft_model(tmp_path_factory.mktemp("draft")), most=DEPTH, threads=1)


def accepted(drafting: Drafting, fault: Fault | None = None) -> tuple[Counting, list[tuple[int, ...]]]:
    counting = Counting(DEPTH)
    engine = drafting.engine(counting, DEPTH)
    undo = fault(engine.runner) if fault is not None else None
    tokens = [t for prompt in song_prompts(2, seed=1) for t in drafting.run(engine, [prompt], _TOKENS).tokens]
    if undo is not None:
        undo()
    return counting, tokens


@pytest.mark.parametrize("name", DRAFT_FAULTS)
def test_running_the_layer_wrongly_costs_acceptance_and_no_token(drafting: Drafting, name: str) -> None:
    right, tokens = accepted(drafting)
    assert right.by_position[2] >= 0.9
    wrong, wrong_tokens = accepted(drafting, DRAFT_FAULTS[name])
    assert right.length - wrong.length >= LOST
    assert wrong_tokens == tokens
    assert tokens == [t for p in song_prompts(2, seed=1) for t in drafting.run(drafting.fixed(0), [p], _TOKENS).tokens]
    assert accepted(drafting)[0].by_position == right.by_position  # the fault is gone


def test_a_rate_counts_only_steps_in_which_all_decode(drafting: Drafting) -> None:
    run = drafting.run(drafting.fixed(0), song_prompts(2, seed=5), 8)
    assert [len(tokens) for tokens in run.tokens] == [8, 8]
    assert run.counted == 14  # the first tokens come with the prompts
    assert run.seconds > 0


def test_rounds_take_turns_in_who_is_first() -> None:
    order: list[int] = []
    samples = interleaved([lambda: order.append(0) or 1.0, lambda: order.append(1) or 2.0], 3)
    assert samples == [[1.0] * 3, [2.0] * 3]
    assert order == [0, 1, 1, 0, 0, 1]


def test_the_bound_of_a_median_is_the_order_statistic_of_the_binomial() -> None:
    assert median_at_most(range(1, 21)) == 15
    assert median_at_most([5, 4, 3, 2, 1]) == 5
    with pytest.raises(ValueError, match="4 samples"):
        median_at_most([1, 2, 3, 4])


def test_the_bound_of_a_median_holds_as_often_as_it_says() -> None:
    draw = random.Random(0)
    true_median = 2**0.5  # of 2^(2u), skewed
    wrong = 0
    for _ in range(4000):
        samples = [2 ** draw.random() for _ in range(20)]
        wrong += median_at_most(samples) < true_median
        assert median_at_most(samples) >= median(samples)
    assert 0.01 < wrong / 4000 < 0.05  # 2.07 % for 20 samples
