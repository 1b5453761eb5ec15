"""Measuring chats through the engine: the loss is the model's own. (`test_finetune` has what counts as right.)"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from freehold.engine.loading import EngineOptions
from freehold.errors import FreeholdError
from freehold.model.cache import PagedCache
from freehold.model.chat.template import ChatTemplate
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inputs import single_sequence
from freehold.model.tiny import make_tiny
from freehold.model.tokenizer import Tokenizer
from freehold.model.weights import load_weights
from freehold.train.data.example import Example, assistant, encode, user
from freehold.train.measure import measure

OPTIONS = EngineOptions(dtype="float32", threads=1, max_model_len=512, cache_bytes=1 << 24)
CHATS = [
    Example("x", (user("One two three four five six"), assistant("Seven eight"))),
    Example("x", (user("And now"), assistant("nine", thinking="after eight")), effort="high"),
    Example("x", (user("a"), assistant("b"), user("c"), assistant("d"))),
]


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nano") / "source"
    make_tiny(directory, "nano", seed=5)
    return directory


def test_the_loss_is_the_mean_over_what_the_assistant_says(nano: Path) -> None:
    model = Glm(GlmConfig.from_file(nano), dtype=torch.float32)
    load_weights(model, nano)
    tokenizer = Tokenizer.from_dir(nano)
    losses: list[float] = []
    for example in CHATS:
        one = encode(example, tokenizer, ChatTemplate.builtin())
        with torch.no_grad():
            hidden_TH = model(single_sequence(one.ids), PagedCache(model.config, 4, 64, model.dtype))
            log_p_TV = model.logits(hidden_TH).double().log_softmax(-1)
        losses += [-float(log_p_TV[i - 1, one.ids[i]]) for i in range(1, len(one.ids)) if one.trained[i]]
    found = measure(nano, CHATS, options=OPTIONS)
    assert (found.chats, found.tokens) == (3, len(losses))
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_progress_ends_at_the_number_of_chats(nano: Path) -> None:
    calls: list[tuple[int, int]] = []
    measure(nano, CHATS, options=OPTIONS, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (3, 3)


def test_a_chat_that_does_not_fit_is_refused(nano: Path) -> None:
    long = Example("x", (user("word " * 600), assistant("b")))
    with pytest.raises(FreeholdError):
        measure(nano, [long], options=OPTIONS)
