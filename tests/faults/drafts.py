"""Wrong ways to run an MTP layer. Each leaves the tokens right, since drafts are verified, and costs only acceptance.

A fault is put into a `ModelRunner` that drafts; what it returns undoes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from freehold.engine.drafts import Drafter
from freehold.engine.runner import ModelRunner
from freehold.model.inputs import ForwardInput, Span

Undo = Callable[[], None]
Fault = Callable[[ModelRunner], Undo]


def recycle_before_the_norm(runner: ModelRunner) -> Undo:
    """The next draft step starts from what lies before `shared_head.norm`.

    After that norm a state is w · z / rms(z), and the layer norms its input again: dividing by w is all of the fault.
    """
    model = runner.model
    assert model.mtp is not None
    right, weight_H = model.draft_mtp, model.mtp.shared_head.norm.weight

    def draft_mtp(hidden_NH: Tensor, *rest: Any) -> Tensor:
        return right(hidden_NH / weight_H, *rest)

    return _replace(model, "draft_mtp", draft_mtp)


def swapped_input(runner: ModelRunner) -> Undo:
    """eh_proj reads the hidden state first and the embedding second."""
    model = runner.model
    assert model.mtp is not None
    right = model.mtp.input

    def enter(ops: Any, embedding_TH: Tensor, hidden_TH: Tensor) -> Tensor:
        embedding = ops.rms_norm(embedding_TH, right.enorm.weight, right.eps)
        hidden = ops.rms_norm(hidden_TH, right.hnorm.weight, right.eps)
        z_TH: Tensor = ops.linear(torch.cat((hidden, embedding), dim=-1), right.eh_proj.weight)
        return z_TH

    return _replace(model.mtp, "enter", enter)


class OwnEntries(Drafter):
    """Gives draft rows entries of their own, in the places that the next verification overwrites."""

    def extend_draft(self, chains: Any, depth: int, hidden_NH: Tensor) -> Any:
        """What extending the layer over the drafts just given returns, or None where the cache has no place."""
        size = self.cache.block_size
        spans, slots = [], []
        for n, chain in enumerate(chains):
            position, base = chain.position + depth, self.coverage.base_of(chain.seq.request_id)
            if position >= len(chain.seq.block_ids) * size:
                return None
            spans.append(Span(n, 1, position - base, chain.span.table_B[base // size :]))
            slots.append(chain.seq.block_ids[position // size] * size + position % size)
        positions_N = torch.tensor([chain.position + depth for chain in chains])
        token_ids_N = torch.tensor([chain.drafts[-1].token_id for chain in chains])
        inputs = ForwardInput(token_ids_N, positions_N, torch.tensor(slots), tuple(spans), size)
        return self.model.extend_mtp(hidden_NH, inputs, self.cache), inputs.slots_T


class _SeedLate(OwnEntries):
    """The selection that draft steps share is made by the first of them, not by the last verified row."""

    def _next(self, chains: Any, depth: int, hidden_NH: Tensor, selection_NK: Tensor) -> Tensor:
        if depth == 0:
            self._late: dict[str, Tensor] = {}
            if (made := self.extend_draft(chains, depth, hidden_NH)) is not None:
                extended, _ = made
                rows = zip(chains, extended.selection_NK, strict=True)
                self._late = {chain.seq.request_id: row_K for chain, row_K in rows}
                return extended.hidden_TH  # type: ignore[no-any-return]
        if self._late:
            selection_NK = torch.stack([self._late[chain.seq.request_id] for chain in chains])
        return super()._next(chains, depth, hidden_NH, selection_NK)


class _AttendsToDrafts(OwnEntries):
    """Draft rows attend to the shared selection, and to their own entries and those of the drafts before."""

    def _next(self, chains: Any, depth: int, hidden_NH: Tensor, selection_NK: Tensor) -> Tensor:
        if depth == 0:
            self._drafted: dict[str, list[int]] = {}
        if (made := self.extend_draft(chains, depth, hidden_NH)) is not None:
            for chain, slot in zip(chains, made[1].tolist(), strict=True):
                self._drafted.setdefault(chain.seq.request_id, []).append(slot)
            own = [self._drafted[chain.seq.request_id] for chain in chains]
            selection_NK = torch.cat((selection_NK, torch.tensor(own)), dim=1)
        return super()._next(chains, depth, hidden_NH, selection_NK)


class _NoSharing(OwnEntries):
    """Each draft step makes a selection and an entry of its own, though the model shares the first."""

    def _next(self, chains: Any, depth: int, hidden_NH: Tensor, selection_NK: Tensor) -> Tensor:
        if (made := self.extend_draft(chains, depth, hidden_NH)) is not None:
            return made[0].hidden_TH  # type: ignore[no-any-return]
        return super()._next(chains, depth, hidden_NH, selection_NK)


def _drafter(kind: type[Drafter]) -> Fault:
    def put(runner: ModelRunner) -> Undo:
        right = runner.drafter
        assert right is not None
        runner.drafter = kind(right.model, right.cache, right.sampler, right.policy)
        return lambda: setattr(runner, "drafter", right)

    return put


def _replace(owner: Any, name: str, wrong: Any) -> Undo:
    setattr(owner, name, wrong)
    return lambda: delattr(owner, name)


DRAFT_FAULTS: dict[str, Fault] = {
    "recycled before the norm": recycle_before_the_norm,
    "seed one step late": _drafter(_SeedLate),
    "swapped concat": swapped_input,
    "attends to drafts": _drafter(_AttendsToDrafts),
    "no sharing at all": _drafter(_NoSharing),
}
