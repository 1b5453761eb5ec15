"""The measurement of a trained model, where it could be wrong without anybody seeing it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import _tiny_kept
import numpy as np
import pytest
import torch
from _bigram import fit
from _tiny_kept import Retrained, kept
from _tiny_losses import PARTS, SPARSE, Losses, bigram_losses, digest, held_out_documents, model_losses
from _tiny_retrieval import prompt_tokens, retrieval_of_length
from _tiny_tasks import CALLS, calls_of, checked, open_model, solve
from _tiny_thinking import Row, thinking_kinds
from _tiny_variants import with_config

from freehold import LLM
from freehold.engine.loading import EngineOptions, load_model
from freehold.model.cache import PagedCache
from freehold.model.chat.template import ChatTemplate
from freehold.model.config import GlmConfig
from freehold.model.inputs import single_sequence
from freehold.model.sizes import size_config
from freehold.model.tiny import write_random_checkpoint
from freehold.serve.answers import ChatResult, ToolCall
from freehold.types import Usage

TOPK = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(
        size_config("nano"), tmp_path_factory.mktemp("tiny") / "nano", dtype="float32"
    ).directory


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with open_model(checkpoint, threads=1) as opened:
        yield opened


def test_losses_are_those_of_the_model(llm: LLM, checkpoint: Path) -> None:
    document = min(held_out_documents(llm.tokenizer, 8), key=lambda each: len(each.ids))
    found = model_losses(llm, [document], TOPK)
    config = GlmConfig.from_file(checkpoint)
    model = load_model(checkpoint, config, EngineOptions(ops="reference"))
    ids = torch.tensor(document.ids)
    with torch.inference_mode():
        hidden = model(single_sequence(document.ids), PagedCache(config, -(-len(ids) // 64), 64, torch.float32))
        losses = -model.logits(hidden).log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0].double().numpy()
    trained = np.array(document.trained[1:])
    for part, mask in zip(PARTS, (slice(None), trained, slice(TOPK, None)), strict=True):
        assert found.sums[part][0] == pytest.approx(losses[mask].sum(), rel=1e-4)
        assert found.tokens[part][0] == len(losses[mask])
    assert 0 < found.tokens[PARTS[1]][0] < found.tokens[PARTS[0]][0]


def test_a_bigram_is_measured_on_the_same_tokens(llm: LLM) -> None:
    documents = held_out_documents(llm.tokenizer, 3)
    found, other = (
        model_losses(llm, documents, TOPK),
        bigram_losses(fit(512, [d.ids for d in documents]), documents, TOPK),
    )
    for part in PARTS:
        assert (found.tokens[part] == other.tokens[part]).all()
    assert other.sums[PARTS[0]].sum() < found.sums[PARTS[0]].sum()  # it has seen them, the model is random


def test_other_held_out_tokens_are_seen(llm: LLM) -> None:
    documents = held_out_documents(llm.tokenizer, 3)
    other = [replace(documents[0], ids=[*documents[0].ids[:-1], 7]), *documents[1:]]
    assert digest(documents) == digest(held_out_documents(llm.tokenizer, 3))
    assert len({digest(documents), digest(other), digest(documents[:2])}) == 3


def test_kept_figures_come_back_and_refuse_other_documents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_tiny_kept, "RESULTS", tmp_path)
    losses = Losses({p: np.array([1.5, 2.25]) for p in PARTS}, {p: np.array([3, 4]) for p in PARTS})
    Retrained("dense", 1000, 60.0, "abc", losses, {"tool": [0.5, 0.4, 0.6]}, {"commit": "x"}).save()
    assert kept("every-layer") is None
    found = kept("dense")
    assert found is not None
    assert found.losses.sums[SPARSE].tolist() == [1.5, 2.25]
    assert found.summary()["tokens"] == 1000
    found.check_same("abc")
    with pytest.raises(ValueError, match="other held-out documents"):
        found.check_same("abd")


@pytest.mark.parametrize("length", [700, 1500])
def test_retrieval_prompts_have_the_length(llm: LLM, length: int) -> None:
    template = ChatTemplate.builtin()
    for example in retrieval_of_length(llm.tokenizer, length, 3):
        assert length <= prompt_tokens(example, llm.tokenizer, template) <= length + 32
        assert example.check is not None
        assert example.check["key"] in example.prompt[0]["content"]


def test_only_tool_calls_are_counted_as_such() -> None:
    assert {example.check["type"] for example in checked("tool", 20, checks=CALLS) if example.check} <= set(CALLS)
    with pytest.raises(ValueError, match="0 of"):
        checked("text", 3)


def test_a_random_model_gets_nothing_right(llm: LLM) -> None:
    answered = solve(llm, checked("tool", 4, checks=CALLS), max_tokens=4)
    assert not any(each.right for each in answered)
    assert all(each.verdict.why for each in answered)


def test_arguments_that_are_no_json_are_kept_wrong() -> None:
    result = ChatResult("", "", (ToolCall("1", "f", '{"a": 1}'), ToolCall("2", "g", "{")), "tool_calls", Usage())
    assert calls_of(result) == [("f", {"a": 1}), ("g", {"not JSON": "{"})]


@pytest.mark.parametrize(("tokens", "right"), [((5, 9, 20), True), ((5, 9, 9), False), ((9, 5, 20), False)])
def test_thinking_must_get_longer(tokens: tuple[int, int, int], right: bool) -> None:
    assert Row("x", dict(zip(("none", "high", "max"), tokens, strict=True)), {}, {}).in_order is right


def test_every_kind_of_task_but_plain_text_thinks() -> None:
    assert {"arithmetic", "format", "tool", "retrieval"} <= set(thinking_kinds())
    assert "text" not in thinking_kinds()


def test_a_variant_is_answered_by_the_engine_as_its_config_says(checkpoint: Path, tmp_path: Path) -> None:
    dense = with_config(checkpoint, tmp_path / "dense", index_topk=4096)
    with open_model(dense, threads=1) as other, open_model(checkpoint, threads=1) as base:
        documents = held_out_documents(base.tokenizer, 2)
        assert model_losses(other, documents, TOPK).sums[SPARSE] != pytest.approx(
            model_losses(base, documents, TOPK).sums[SPARSE], rel=1e-6
        )
