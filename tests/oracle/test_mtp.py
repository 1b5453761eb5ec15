"""The MTP layer and its draft steps against `plain_mtp`, on `transformers`' hidden states where it can make them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from freehold.model.cache import PagedCache
from freehold.model.glm import Glm
from freehold.model.inputs import ForwardInput, Span, single_sequence
from freehold.model.oracle import TRANSFORMERS_LATENT_EPS, load_oracle, load_ours, stable_selection
from freehold.model.sizes import size_config
from freehold.model.tiny import write_random_checkpoint
from tests.oracle.plain_mtp import PlainMtp

LENGTH, STEPS = 50, 4  # index_topk of nano is 16
TOKENS = torch.randint(0, 448, (LENGTH + 1,), generator=torch.Generator().manual_seed(5))
DRAFTS = torch.randint(0, 448, (STEPS,), generator=torch.Generator().manual_seed(6))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nano")
    write_random_checkpoint(size_config("nano") | {"dtype": "float32"}, directory, seed=2, dtype="float32")
    return directory


@pytest.fixture(scope="module")
def hidden_PH(checkpoint: Path) -> Tensor:
    """Of the target, after its last norm, as `transformers` computes it."""
    with torch.inference_mode(), stable_selection():
        return load_oracle(checkpoint).model(TOKENS[None, :LENGTH]).last_hidden_state[0]


def plain(checkpoint: Path) -> PlainMtp:
    config = json.loads((checkpoint / "config.json").read_text())
    return PlainMtp(config, load_file(checkpoint / "model.safetensors"), TRANSFORMERS_LATENT_EPS)


def expected_chain(checkpoint: Path, hidden_PH: Tensor) -> tuple[Tensor, list[Tensor]]:
    oracle = plain(checkpoint)
    extended = oracle.extend(hidden_PH, TOKENS[1:])
    states = [extended[-1]]
    for step, token in enumerate(DRAFTS.tolist()):
        states.append(oracle.draft(states[-1], token, LENGTH + step))
    return extended, states[1:]


def our_chain(model: Glm, hidden_PH: Tensor, chunks: list[int], block_size: int = 8) -> tuple[Tensor, list[Tensor]]:
    """The same in chunks of these lengths, with blocks in an odd order."""
    cache = PagedCache(model.config, 12, block_size, torch.float32)
    table = [5, 2, 9, 0, 7, 1, 8, 3]
    states, start, last = [], 0, None
    for length in chunks:
        inputs = single_sequence(TOKENS[1:].tolist()[start : start + length], start=start, block_size=block_size,
                                 table=table)  # fmt: skip
        last = model.extend_mtp(hidden_PH[start : start + length], inputs, cache)
        states.append(last.hidden_TH)
        start += length
    assert last is not None
    # As bits: what was never written may be NaN.
    before = [tensor.view(torch.int32).clone() for tensor in cache.latent]
    drafted, state = [], last.hidden_TH[-1:]
    for step, token in enumerate(DRAFTS.tolist()):
        at = torch.tensor([LENGTH + step])
        state = model.draft_mtp(state, torch.tensor([token]), at, last.selection_NK, cache)
        drafted.append(state[0])
    layer = model.config.num_hidden_layers
    assert torch.equal(cache.latent[layer].view(torch.int32), before[layer]), "a draft step wrote to the cache"
    return torch.cat(states), drafted


@pytest.mark.parametrize("chunks", [[50], [1] * 50, [10, 6, 4, 30], [16, 1, 1, 32], [49, 1]], ids=str)
def test_extending_and_drafting_are_the_formulas(checkpoint: Path, hidden_PH: Tensor, chunks: list[int]) -> None:
    with torch.inference_mode():
        expected, expected_drafts = expected_chain(checkpoint, hidden_PH)
        found, drafts = our_chain(load_ours(checkpoint), hidden_PH, chunks)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(drafts), torch.stack(expected_drafts), rtol=1e-4, atol=1e-4)


def test_a_short_sequence_whose_drafts_see_everything(checkpoint: Path, hidden_PH: Tensor) -> None:
    with torch.inference_mode():
        oracle, model = plain(checkpoint), load_ours(checkpoint)
        expected = oracle.extend(hidden_PH[:9], TOKENS[1:10])
        cache = PagedCache(model.config, 4, 8, torch.float32)
        found = model.extend_mtp(hidden_PH[:9], single_sequence(TOKENS[1:10].tolist(), block_size=8), cache)
        at = torch.tensor([9])
        draft = model.draft_mtp(found.hidden_TH[-1:], TOKENS[10:11], at, found.selection_NK, cache)
        torch.testing.assert_close(found.hidden_TH, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(draft[0], oracle.draft(expected[-1], int(TOKENS[10]), 9), rtol=1e-4, atol=1e-4)


def test_without_what_came_before_the_layer_sees_the_rest(checkpoint: Path, hidden_PH: Tensor) -> None:
    """A span that begins later in the sequence: attention over a shorter past, at the same positions."""
    with torch.inference_mode():
        model, first = load_ours(checkpoint), 16
        whole = PagedCache(model.config, 12, 8, torch.float32)
        model.extend_mtp(hidden_PH, single_sequence(TOKENS[1:].tolist(), block_size=8), whole)
        later = PagedCache(model.config, 12, 8, torch.float32)
        for tensor in later.latent:
            tensor.fill_(torch.nan)  # what is before the span is never read
        inputs = single_sequence(TOKENS[1 + first :].tolist(), start=first, block_size=8)
        span = inputs.spans[0]
        rest = Span(0, span.length, 0, span.table_B[first // 8 :])
        inputs = ForwardInput(inputs.token_ids_T, inputs.positions_T, inputs.slots_T, (rest,), 8)
        found = model.extend_mtp(hidden_PH[first:], inputs, later)
        assert bool(found.hidden_TH.isfinite().all())
        layer = model.config.num_hidden_layers
        # The entries depend on the row alone, positions included; what the rows see differs.
        assert torch.allclose(later.latent[layer][inputs.slots_T], whole.latent[layer][inputs.slots_T], atol=1e-6)
        assert min(found.selection_NK[0].tolist()) >= first


def test_a_wrong_layer_is_seen(checkpoint: Path, hidden_PH: Tensor) -> None:
    """The comparison catches each of the mistakes that deployments have made with this layer."""
    with torch.inference_mode():
        expected, expected_drafts = expected_chain(checkpoint, hidden_PH)
        swapped = load_ours(checkpoint)
        assert swapped.mtp is not None
        hidden = swapped.config.hidden_size
        weight = swapped.mtp.input.eh_proj.weight
        weight.data = torch.cat((weight[:, hidden:], weight[:, :hidden]), -1)
        found, _ = our_chain(swapped, hidden_PH, [50])
        assert not torch.allclose(found, expected, atol=1e-2)

        before_norm = load_ours(checkpoint)
        assert before_norm.mtp is not None
        before_norm.mtp.leave = lambda ops, z_TH: z_TH  # type: ignore[method-assign]
        _, drafts = our_chain(before_norm, hidden_PH, [50])
        assert not torch.allclose(torch.stack(drafts), torch.stack(expected_drafts), atol=1e-2)

        _, drafts = our_chain(load_ours(checkpoint), hidden_PH.roll(1, 0), [50])
        assert not torch.allclose(torch.stack(drafts), torch.stack(expected_drafts), atol=1e-2)
