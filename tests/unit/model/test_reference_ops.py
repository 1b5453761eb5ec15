"""The reference operations against their definitions, written out plainly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from freehold.model.inputs import Span
from freehold.model.ops import reference
from freehold.model.ops.reference import ReferenceOps, stable_topk

OPS = ReferenceOps()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.integers(0, 1000))
def test_stable_topk_is_a_stable_sort(width: int, k: int, levels: int, seed: int) -> None:
    scores = torch.randint(0, levels, (5, width), generator=generator(seed)).float() - 1
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[:, : min(k, width)]
    assert torch.equal(stable_topk(scores, k).sort(-1).values, expected.sort(-1).values)


def test_stable_topk_takes_the_lowest_index_among_equals() -> None:
    assert sorted(stable_topk(torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]]), 3)[0].tolist()) == [0, 1, 2]


def table(blocks: int, seed: int) -> torch.Tensor:
    return torch.randperm(blocks + 3, generator=generator(seed))[:blocks]


def plain_selection(query: torch.Tensor, weight: torch.Tensor, keys: torch.Tensor, position: int, k: int) -> set[int]:
    """Positions chosen for one row, by the formula; keys are in order of position."""
    score = [float((weight * torch.relu(query.double() @ keys[s].double())).sum()) for s in range(position + 1)]
    return set(sorted(range(position + 1), key=lambda s: (-score[s], s))[:k])


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 30), (7, 1), (40, 1), (5, 20), (29, 3)])
def test_selection_is_the_formula(start: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_SCORE_BLOCK", 200)  # several blocks of rows
    block_size, topk, heads, dim = 4, 8, 3, 6
    end = start + length
    span = Span(0, length, start, table((end + 3) // 4, 1))
    keys_SD = torch.randn(200, dim, generator=generator(2))
    # Coarse queries make many scores equal, among them zeros.
    query = torch.randint(-1, 2, (length, heads, dim), generator=generator(3)).float()
    keys_SD = keys_SD.round()
    weight = torch.randint(-1, 3, (length, heads), generator=generator(4)).float()
    slots_RK = OPS.select(query, weight, keys_SD, (span,), block_size, topk)
    slots_P = span.slots_P(block_size)
    assert slots_RK.shape == (length, min(topk, end))
    for i in range(length):
        expected = {int(slots_P[s]) for s in plain_selection(query[i], weight[i], keys_SD[slots_P], start + i, topk)}
        chosen = [slot for slot in slots_RK[i].tolist() if slot >= 0]
        assert set(chosen) == expected
        assert len(chosen) == len(expected)


def test_selection_of_several_spans_is_that_of_each() -> None:
    keys_SD = torch.randn(400, 6, generator=generator(1))
    query, weight = torch.randn(12, 3, 6, generator=generator(2)), torch.randn(12, 3, generator=generator(3))
    spans = (Span(0, 1, 33, table(9, 4)), Span(1, 8, 2, table(3, 5)), Span(9, 3, 50, table(14, 6)))
    together = OPS.select(query, weight, keys_SD, spans, 4, 8)
    row = 0
    for span in spans:
        alone = OPS.select(query, weight, keys_SD, (span,), 4, 8)
        assert torch.equal(together[row : row + span.length, : alone.shape[1]].sort(-1).values, alone.sort(-1).values)
        row += span.length


def test_absorbed_sparse_attention_over_everything_is_expanded_causal_attention() -> None:
    heads, nope, rope, rank, value, length = 3, 6, 4, 10, 5, 17
    kv_b = torch.randn(heads * (nope + value), rank, generator=generator(1))
    latent_SL = torch.randn(80, rank + rope, generator=generator(2))
    query = torch.randn(length, heads, nope + rope, generator=generator(3))
    span = Span(0, length, 0, table(5, 4))
    dense = OPS.dense_attention(query, latent_SL, kv_b, span, 4, nope, 0.3)
    up_key, up_value = kv_b.view(heads, nope + value, rank).split((nope, value), dim=1)
    absorbed = torch.cat((torch.einsum("tna,nav->tnv", query[..., :nope], up_key), query[..., nope:]), dim=-1)
    slots = torch.full((length, length), -1)
    for i in range(length):
        slots[i, : i + 1] = span.slots_P(4)[: i + 1]
    latent_SL[(torch.arange(80)[:, None] != span.slots_P(4)).all(-1)] = float("nan")  # what is not theirs is not read
    mixed = OPS.sparse_attention(absorbed, latent_SL, slots, rank, 0.3)
    assert torch.allclose(torch.einsum("rnv,nov->rno", mixed, up_value), dense, atol=1e-5)


def test_rope_pairs_and_halves_are_the_same_rotation_permuted() -> None:
    x = torch.randn(7, 2, 8, generator=generator(1))
    angles = torch.randn(7, 4, generator=generator(2))
    pairs = OPS.rope(x, angles.cos(), angles.sin(), True)
    permuted = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
    halves = OPS.rope(permuted, angles.cos(), angles.sin(), False)
    assert torch.allclose(torch.cat((pairs[..., 0::2], pairs[..., 1::2]), dim=-1), halves)
    as_complex = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
    rotated = as_complex * torch.polar(torch.ones(7, 4), angles)[:, None]
    assert torch.allclose(pairs, torch.view_as_real(rotated).flatten(-2), atol=1e-6)


def test_router_chooses_by_biased_score_and_weighs_by_plain_score() -> None:
    x, weight = torch.randn(6, 8, generator=generator(1)), torch.randn(12, 8, generator=generator(2))
    bias = torch.randn(12, generator=generator(3))
    ids, weights = OPS.route(x, weight, bias, top_k=3, n_group=1, topk_group=1, normalise=True, scale=2.5)
    scores = (x @ weight.T).sigmoid()
    for row in range(6):
        assert set(ids[row].tolist()) == set((scores[row] + bias).topk(3).indices.tolist())
        chosen = scores[row][ids[row]]
        assert torch.allclose(weights[row], 2.5 * chosen / chosen.sum())


def test_router_ties_go_to_the_lowest_expert_and_groups_limit_the_choice() -> None:
    x, weight = torch.zeros(1, 8), torch.randn(8, 8, generator=generator(2))
    flat = torch.zeros(8)
    ids, _ = OPS.route(x, weight, flat, top_k=3, n_group=1, topk_group=1, normalise=False, scale=1.0)
    assert sorted(ids[0].tolist()) == [0, 1, 2]
    bias = torch.tensor([3.0, 0, 2, 2, 0, 0, 1, 1])  # groups of two: worth 3, 4, 0, 2 (plus 1 each for the scores)
    ids, _ = OPS.route(x, weight, bias, top_k=3, n_group=4, topk_group=2, normalise=False, scale=1.0)
    assert sorted(ids[0].tolist()) == [0, 2, 3]


def test_experts_sum_their_weighted_outputs() -> None:
    x = torch.randn(5, 8, generator=generator(1))
    gate_up, down = torch.randn(6, 8, 8, generator=generator(2)), torch.randn(6, 8, 4, generator=generator(3))
    ids = torch.tensor([[0, 5], [5, 0], [1, 2], [2, 1], [3, 5]])
    weights = torch.rand(5, 2, generator=generator(4))
    out = OPS.experts(x, ids, weights, gate_up, down)
    for row in range(5):
        expected = torch.zeros(8)
        for expert, weight in zip(ids[row], weights[row], strict=True):
            gate, up = (gate_up[expert] @ x[row]).chunk(2)
            expected += weight * (down[expert] @ (torch.nn.functional.silu(gate) * up))
        assert torch.allclose(out[row], expected, atol=1e-4)


def test_rms_norm_rounds_before_the_weight() -> None:
    x = torch.randn(3, 64, generator=generator(1)).bfloat16()
    weight = torch.randn(64, generator=generator(2)).bfloat16()
    x32 = x.float()
    normed = (x32 / (x32.square().mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16()
    assert torch.allclose(OPS.rms_norm(x, weight, 1e-5).float(), (weight * normed).float(), atol=2e-2)
    assert OPS.rms_norm(x, weight, 1e-5).dtype == torch.bfloat16
