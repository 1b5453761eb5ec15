"""What a model predicts of held-out examples, token by token, through the engine: losses in nats."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from _bigram import Bigram
from _tiny_tasks import SEED, together

from freehold import LLM
from freehold.model.chat.template import ChatTemplate
from freehold.model.tokenizer import Tokenizer
from freehold.train.data.example import Encoded, encode
from freehold.train.data.mixture import MIXTURE, drawn
from freehold.types import SamplingParams

LONGEST = 1280  # tokens of a document
DOCUMENTS = 600  # held out; as many for every model that is compared
SPARSE = "beyond index_topk"
PARTS = ("all tokens", "what the assistant writes", SPARSE)
"""Every token but the first; those that training calls the assistant's; those whose context the indexer must choose."""
WITHIN = "within index_topk"


@dataclass(frozen=True)
class Losses:
    """Sums by document, for each of PARTS: [documents] of losses, and of tokens."""

    sums: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]

    def of(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """(sums, tokens) of one of PARTS, or of the other tokens than those of SPARSE: WITHIN."""
        if part == WITHIN:
            return self.sums[PARTS[0]] - self.sums[SPARSE], self.tokens[PARTS[0]] - self.tokens[SPARSE]
        return self.sums[part], self.tokens[part]

    def as_dict(self) -> dict[str, Any]:
        return {
            part: {
                "sums": [round(float(value), 4) for value in self.sums[part]],
                "tokens": [int(value) for value in self.tokens[part]],
            }
            for part in self.sums
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Losses:
        return cls(
            {part: np.array(each["sums"]) for part, each in raw.items()},
            {part: np.array(each["tokens"]) for part, each in raw.items()},
        )


def held_out_documents(tokenizer: Tokenizer, count: int, seed: int = SEED) -> list[Encoded]:
    """The first test examples of the training mixture, as tokens; longer ones than training has are left out."""
    template, found, index = ChatTemplate.builtin(), list[Encoded](), 0
    while len(found) < count:
        document = encode(drawn(MIXTURE, "test", seed, index), tokenizer, template)
        index += 1
        if len(document.ids) <= LONGEST:
            found.append(document)
    return found


def digest(documents: Sequence[Encoded]) -> str:
    """Tells whether two measurements were of the same tokens."""
    found = hashlib.sha256()
    for document in documents:
        found.update(np.asarray(document.ids, np.int32).tobytes() + b"/")
    return found.hexdigest()[:16]


def model_losses(llm: LLM, documents: Sequence[Encoded], topk: int) -> Losses:
    """Of the checkpoint. topk: where the part SPARSE begins, the same for all models that are compared."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)

    def one(document: Encoded) -> np.ndarray:
        scored = llm.generate(document.ids, params)[0].prompt_scored
        assert scored is not None
        return np.array([-token.logprobs.logprob for token in scored[1:] if token is not None])

    return _summed(documents, together(one, documents, "held-out losses"), topk)


def bigram_losses(bigram: Bigram, documents: Sequence[Encoded], topk: int) -> Losses:
    return _summed(documents, [bigram.losses(np.asarray(document.ids)) for document in documents], topk)


def _summed(documents: Sequence[Encoded], losses: Sequence[np.ndarray], topk: int) -> Losses:
    sums: dict[str, list[float]] = {part: [] for part in PARTS}
    tokens: dict[str, list[int]] = {part: [] for part in PARTS}
    for document, loss in zip(documents, losses, strict=True):
        if len(loss) != len(document.ids) - 1 or not np.isfinite(loss).all():
            raise ValueError("a held-out document was not scored in full")
        trained = np.array(document.trained[1:])
        # Position p is predicted by the row before it, which sees p tokens.
        far = np.arange(1, len(document.ids)) > topk
        for part, mask in zip(PARTS, (np.ones(len(loss), bool), trained, far), strict=True):
            sums[part].append(float(loss[mask].sum()))
            tokens[part].append(int(mask.sum()))
    return Losses({p: np.array(v) for p, v in sums.items()}, {p: np.array(v) for p, v in tokens.items()})
