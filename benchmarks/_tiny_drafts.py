"""Drafting by a trained MTP layer: k, with and without sharing the selection and the cache entries, greedy.

Training shares both between draft steps (`index_share_for_mtp_iteration`). The other ways are the wrong ones of
`tests/faults/drafts.py`: an index of its own for each draft step, entries of its own, or both.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _common import ROOT
from _drafting import Counting, Drafting
from _tiny_tasks import MAX_TOKENS
from torch import Tensor

from freehold.engine.engine import Engine
from freehold.engine.request import Request
from freehold.engine.runner import ModelRunner
from freehold.model.chat.template import ChatTemplate
from freehold.model.tokenizer import Tokenizer
from freehold.train.data.example import Example
from freehold.types import SamplingParams

sys.path.append(str(ROOT))
from tests.faults.drafts import DRAFT_FAULTS, Fault, OwnEntries, Undo


class _OwnIndex(OwnEntries):
    """Each draft step makes a selection of its own, among the entries that the target made."""

    def _next(self, chains: Any, depth: int, hidden_NH: Tensor, selection_NK: Tensor) -> Tensor:
        if depth == 0:
            self._drafted: dict[str, list[int]] = {}
        if (made := self.extend_draft(chains, depth, hidden_NH)) is not None:
            extended, slots = made
            for chain, slot in zip(chains, slots.tolist(), strict=True):
                self._drafted.setdefault(chain.seq.request_id, []).append(slot)
            rows = [
                torch.where(torch.isin(row_K, torch.tensor(self._drafted[chain.seq.request_id])), -1, row_K)
                for row_K, chain in zip(extended.selection_NK, chains, strict=True)
            ]
            own_NK = torch.stack(rows)
            selection_NK = own_NK.gather(1, (own_NK < 0).sort(dim=1, stable=True).indices)  # what is empty comes last
        return super()._next(chains, depth, hidden_NH, selection_NK)


def _own_index(runner: ModelRunner) -> Undo:
    right = runner.drafter
    assert right is not None
    runner.drafter = _OwnIndex(right.model, right.cache, right.sampler, right.policy)
    return lambda: setattr(runner, "drafter", right)


DRAFTS = (1, 3, 5)
SHARING: dict[str, Fault | None] = {
    "index and entries shared": None,
    "index shared, own entries": DRAFT_FAULTS["attends to drafts"],
    "own index, entries shared": _own_index,
    "nothing shared": DRAFT_FAULTS["no sharing at all"],
}


@dataclass(frozen=True)
class Row:
    """One way to draft. length: tokens a step that verified drafts; changed: answers unlike those without drafts."""

    sharing: str
    drafts: int
    length: float
    by_position: list[float]
    steps: int
    tokens_per_s: float
    changed: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(directory: Path, prompts: Sequence[Sequence[int]], threads: int | None = None) -> tuple[list[Row], int]:
    """Every way on the same prompts, one at a time; the rows, and how many tokens were generated without drafts."""
    drafting = Drafting.load(directory, most=max(DRAFTS), threads=threads)
    without, seconds = _answers(drafting.fixed(0), prompts)
    tokens = sum(map(len, without))
    rows = [Row("no drafts", 0, 1.0, [], 0, tokens / seconds, 0)]
    for name, fault in SHARING.items():
        for drafts in DRAFTS:
            if fault is not None and drafts == 1:
                continue  # the first draft comes from the last verified row in any case
            counting = Counting(drafts)
            engine = drafting.engine(counting, drafts)
            undo = fault(_runner(engine)) if fault is not None else None
            answers, seconds = _answers(engine, prompts)
            if undo is not None:
                undo()
            changed = sum(a != b for a, b in zip(answers, without, strict=True))
            rows.append(
                Row(name, drafts, counting.length, counting.by_position, counting.steps, tokens / seconds, changed)
            )
    drafting.base.close()
    return rows, tokens


def _runner(engine: Engine) -> ModelRunner:
    assert isinstance(engine.runner, ModelRunner)
    return engine.runner


def _answers(engine: Engine, prompts: Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], float]:
    """Greedy answers up to their end, one request at a time, and the seconds of all steps behind the prompts."""
    found, seconds = [], 0.0
    for number, prompt in enumerate(prompts):
        name = f"draft-{id(engine)}-{number}"
        engine.add(Request(name, tuple(prompt), SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)))
        tokens: list[int] = []
        while engine.has_work:
            start, decoding = time.perf_counter(), bool(tokens)
            for chunk in engine.step():
                if chunk.error is not None:
                    raise chunk.error
                tokens += chunk.token_ids
            if decoding:
                seconds += time.perf_counter() - start
        found.append(tuple(tokens))
    return found, seconds


def prompts_of(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[tuple[int, ...]]:
    """The rendered prompts of examples, as a server would make them."""
    template = ChatTemplate.builtin()
    return [
        template.render(example.prompt, example.tools, effort=example.effort).encode(tokenizer) for example in examples
    ]


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'drafting':28}{'k':>3}{'tokens a step':>16}{'accepted by place':>32}{'tokens/s':>10}"]
    for row in rows:
        places = " ".join(f"{share:.2f}" for share in row.by_position)
        lines.append(f"{row.sharing:28}{row.drafts:>3}{row.length:>16.2f}{places:>32}{row.tokens_per_s:>10.0f}")
    return "\n".join(lines)
