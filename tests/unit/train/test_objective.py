"""The losses of training, against the engine's own code and against their formulas; and that they can be learned."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from freehold.errors import InvalidRequest
from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inputs import single_sequence
from freehold.model.ops.reference import ReferenceOps
from freehold.model.sizes import size_config
from freehold.train.batches import Batch
from freehold.train.initial import initialise
from freehold.train.objective import Objective, TrainingModel
from freehold.train.optim import Optim, Optimiser

LENGTH = 50  # several times index_topk


def model(**changes: object) -> Glm:
    made = Glm(GlmConfig.from_dict({**size_config("nano"), **changes}), dtype=torch.float32)
    initialise(made, 0)
    return made


def batch(sequences: int = 2, *, documents: bool = False) -> Batch:
    ids = torch.randint(0, 400, (sequences, LENGTH), generator=torch.Generator().manual_seed(1))
    number = (torch.arange(LENGTH) // 20).expand(sequences, LENGTH) if documents else torch.zeros_like(ids)
    positions = torch.arange(LENGTH) % 20 if documents else torch.arange(LENGTH)
    return Batch(ids, torch.ones(ids.shape), number.contiguous(), positions.expand(sequences, LENGTH).contiguous())


def inference_loss(made: Glm, ids: list[int]) -> float:
    """-log p of the tokens after the first, by the engine's path over its paged cache."""
    training, made.ops = made.ops, ReferenceOps()
    with torch.no_grad():
        hidden = made(single_sequence(ids), PagedCache(made.config, 1, 64, torch.float32))
        logprobs = made.logits(hidden).log_softmax(-1)
    made.ops = training
    return -float(logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum())


@pytest.mark.parametrize("documents", [False, True])
def test_the_language_loss_is_that_of_the_engine(documents: bool) -> None:
    made, one = model(), batch(documents=documents)
    found = TrainingModel(made, Objective(indexer="sparse")).losses(one).parts["language"]
    cuts = [0, 20, 40, LENGTH] if documents else [0, LENGTH]
    texts = [row[a:b] for row in one.ids_BT.tolist() for a, b in pairwise(cuts)]
    expected = sum(inference_loss(made, ids) for ids in texts) / sum(len(ids) - 1 for ids in texts)
    assert found == pytest.approx(expected, rel=1e-5)


def test_drafts_are_those_of_the_engine() -> None:
    """Each row's chain of drafts, as the engine would make it if that row were the last verified."""
    made, one = model(), batch(1)
    training = TrainingModel(made, Objective(indexer="sparse", mtp_drafts=3))
    whole = training._pass(one)
    training.ops.begin(whole.allowed_BTS)
    with torch.no_grad():
        hidden = made(whole.inputs, whole.cache)
        part = whole.part(LENGTH, 1, one.ids_BT.roll(-1, dims=1).flatten())
        states = training._drafts(part, one, hidden)
        made.ops = ReferenceOps()
        ids = one.ids_BT[0].tolist()
        for last in (5, 30, 45):
            cache = PagedCache(made.config, 1, 64, torch.float32)
            target = made(single_sequence(ids[: last + 1]), cache)
            extended = made.extend_mtp(target, single_sequence(ids[1 : last + 2]), cache)
            state, selection = extended.hidden_TH[-1:], extended.selection_NK
            torch.testing.assert_close(states[0][last], state[0], rtol=1e-4, atol=1e-4)
            for j in (1, 2):
                token, position = torch.tensor([ids[last + j + 1]]), torch.tensor([last + j])
                state = made.draft_mtp(state, token, position, selection, cache)
                torch.testing.assert_close(states[j][last], state[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_total_variation_of_a_perfect_draft_is_nothing_and_of_a_sure_wrong_one_everything() -> None:
    made, one = model(), batch(2)
    training = TrainingModel(made, Objective(mtp_drafts=2, mtp_loss="total-variation"))
    hidden = torch.randn(2 * LENGTH, made.config.hidden_size, generator=torch.Generator().manual_seed(2)) * 3000
    ahead = [hidden.view(2, LENGTH, -1).roll(-j - 1, dims=1).flatten(0, 1) for j in range(2)]
    assert float(training._variation(ahead, one, hidden)) == pytest.approx(0.0, abs=1e-6)
    assert float(training._variation([-state for state in ahead], one, hidden)) > 0.9
    half = float(training._variation([ahead[0], -ahead[1]], one, hidden))  # the first of two drafts is right
    assert half == pytest.approx(0.5, abs=0.06)


def test_the_indexers_loss_is_the_divergence_from_attention_and_moves_only_them() -> None:
    made, one = model(), batch()
    training = TrainingModel(made, Objective(mtp_weight=0.0, indexer="warm-up"))
    training.ops.begin(one.allowed())
    whole = training._pass(one)
    made(whole.inputs, whole.cache)
    first = training.ops.take_foretold()[0]
    assert first.layers == 1
    log_q = first.scores_BTS.masked_fill(~one.allowed(), float("-inf")).log_softmax(-1)
    target = first.attended_BTS / first.attended_BTS.sum(-1, keepdim=True)
    rows = [torch.nn.functional.kl_div(log_q[b, t, : t + 1], target[b, t, : t + 1], reduction="sum")
            for b in range(2) for t in range(LENGTH)]  # fmt: skip
    assert float(first.divergence(torch.ones(2, LENGTH)).detach()) == pytest.approx(
        float(torch.stack(rows).mean().detach()), rel=1e-4
    )
    training.losses(one).total.backward()  # type: ignore[no-untyped-call]
    moved = {name for name, parameter in made.named_parameters() if parameter.grad is not None}
    assert moved
    assert all(".indexer." in name for name in moved)


def test_a_shared_layers_attention_counts_for_the_indexer_it_uses() -> None:
    made = model()
    training = TrainingModel(made, Objective(mtp_weight=0.0, indexer="sparse"))
    whole = training._pass(batch())
    training.ops.begin(whole.allowed_BTS)
    made(whole.inputs, whole.cache)
    kinds = made.config.indexer_types
    starts = [i for i, kind in enumerate(kinds) if kind == "full"]
    sizes = [end - start for start, end in zip(starts, [*starts[1:], len(kinds)], strict=True)]
    assert [foretold.layers for foretold in training.ops.take_foretold()] == sizes
    assert max(sizes) > 1


def test_one_batch_can_be_learned_by_heart_with_every_loss() -> None:
    made, one = model(), batch(2, documents=True)
    training = TrainingModel(made, Objective(indexer="sparse", mtp_drafts=2))
    optimiser = Optimiser(training.parameters(), Optim(lr=5e-3, decay=0.0))
    first = last = None
    for _ in range(60):
        optimiser.zero_grad()
        losses = training.losses(one)
        losses.total.backward()  # type: ignore[no-untyped-call]
        optimiser.clip()
        optimiser.step()
        training.balance()
        first, last = first or losses.parts, losses.parts
    assert first is not None
    assert last is not None
    assert last["language"] < 0.1 * first["language"]
    assert last["mtp"] < 0.5 * first["mtp"]
    assert last["indexer"] < 0.7 * first["indexer"]


def test_balance_moves_biases_towards_even_loads() -> None:
    made = model()
    training = TrainingModel(made, Objective(balance_rate=0.01))
    router = made.decoder_layers[-1].mlp.gate  # type: ignore[union-attr]
    training.losses(batch())
    load = training.ops.loads[id(router.e_score_correction_bias)].rows_E.clone()
    training.balance()
    bias = router.e_score_correction_bias
    assert bias[load.argmax()] == pytest.approx(-0.01)
    assert bias[load.argmin()] == pytest.approx(0.01)
    assert not training.ops.loads


def test_a_replica_shares_parameters_and_gives_the_same_losses() -> None:
    made, one = model(), batch()
    training = TrainingModel(made, Objective(indexer="sparse"))
    twin = training.replica()
    assert twin.losses(one).parts == training.losses(one).parts
    mine, other = dict(training.parameters()), dict(twin.parameters())
    assert mine.keys() == other.keys()
    assert all(mine[name] is other[name] for name in mine)


def test_half_is_near() -> None:
    made, one = model(), batch()
    exact = TrainingModel(made, Objective(indexer="sparse")).losses(one).parts
    near = TrainingModel(made, replace(Objective(indexer="sparse"), half=True)).losses(one).parts
    assert near["language"] == pytest.approx(exact["language"], rel=0.01)


def test_an_objective_the_model_cannot_have() -> None:
    with pytest.raises(InvalidRequest, match="no MTP layer"):
        TrainingModel(model(num_nextn_predict_layers=0), Objective())
