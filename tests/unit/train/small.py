"""A model, a tokenizer and a corpus so small that training them takes seconds."""

from __future__ import annotations

from functools import cache
from typing import Any

from freehold.model.chat.template import ChatTemplate
from freehold.model.tokenizer import Tokenizer
from freehold.train.corpus import Corpus, corpus_of
from freehold.train.data.example import pieces
from freehold.train.data.mixture import drawn
from freehold.train.objective import Objective
from freehold.train.optim import Optim
from freehold.train.recipe import Stage
from freehold.train.shape import tiny_config
from freehold.train.tokenizer import train_tokenizer

MIXTURE = {"retrieval": 1.0, "text": 1.0}
VOCABULARY = 640


def small_config(**changes: Any) -> dict[str, Any]:
    return tiny_config(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, moe_intermediate_size=16, q_lora_rank=32,
        kv_lora_rank=32, n_routed_experts=8, num_experts_per_tok=2, index_topk=32, **changes,
    )  # fmt: skip


@cache
def small_tokenizer() -> Tokenizer:
    examples = [drawn(MIXTURE, "train", 0, index) for index in range(60)]
    template = ChatTemplate.builtin()
    return train_tokenizer((text for example in examples for text in pieces(example, template)), VOCABULARY)


@cache
def small_corpus(seed: int = 0) -> Corpus:
    examples = (drawn(MIXTURE, "train", seed, index) for index in range(100_000))
    return corpus_of(examples, small_tokenizer(), ChatTemplate.builtin(), tokens=3000, longest=256)


def small_stage(name: str = "pretrain", objective: Objective | None = None, **changes: Any) -> Stage:
    settings = {"tokens": 3000, "optim": Optim(lr=5e-3), "lengths": (128, 256), "batch_tokens": 512, **changes}
    return Stage(name, objective=objective or Objective(mtp_share=0.5), **settings)
