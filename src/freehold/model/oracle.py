"""The oracle: `transformers`' GlmMoeDsa on the same checkpoint, and a layer-by-layer comparison with it.

`transformers` loads the checkpoint with its own reader, so names, layout and maths are all checked at once. Two known
differences are handled in the open: its latent norms use eps 1e-6 (parse our config with `latent_norm_eps=1e-6`), and
its indexer's `topk` breaks ties arbitrarily (`stable_selection` replaces that one call by a stable descending sort).
`transformers` is a development dependency; nothing in the engine imports this module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freehold.errors import MissingExtra
from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inputs import single_sequence
from freehold.model.weights import load_weights

TRANSFORMERS_LATENT_EPS = 1e-6


def load_oracle(directory: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """`transformers`' model of a checkpoint directory, eager attention, in evaluation mode."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise MissingExtra("comparing with transformers needs it: pip install 'transformers>=5.23'") from None
    verbosity = logging.get_verbosity()
    logging.set_verbosity(40)  # errors only: it reports the MTP layer, which it does not have, as unexpected
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    finally:
        logging.set_verbosity(verbosity)
    return model.eval()


def load_ours(directory: str | Path, dtype: torch.dtype = torch.float32, *, oracle_eps: bool = True) -> Glm:
    """Our model of a checkpoint directory, by default with the oracle's latent-norm eps."""
    config = GlmConfig.from_file(directory, latent_norm_eps=TRANSFORMERS_LATENT_EPS if oracle_eps else None)
    model = Glm(config, dtype=dtype).requires_grad_(False).eval()
    load_weights(model, directory)
    return model


@contextlib.contextmanager
def stable_selection() -> Iterator[None]:
    """Within it, the oracle's indexer picks the lowest index first among equal scores, as Freehold does."""
    from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as module

    forward, topk = module.GlmMoeDsaIndexer.forward, torch.Tensor.topk

    def stable_topk(scores: Tensor, k: int, dim: int = -1, **_: Any) -> Any:
        values, indices = torch.sort(scores, dim=dim, descending=True, stable=True)
        return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        setattr(torch.Tensor, "topk", stable_topk)  # noqa: B010 - a method, for the length of one call
        try:
            return forward(self, *args, **kwargs)
        finally:
            setattr(torch.Tensor, "topk", topk)  # noqa: B010

    setattr(module.GlmMoeDsaIndexer, "forward", patched)  # noqa: B010
    try:
        yield
    finally:
        setattr(module.GlmMoeDsaIndexer, "forward", forward)  # noqa: B010


@dataclass(frozen=True, slots=True)
class Difference:
    """One compared point. `error` is the largest absolute difference, relative to the oracle's largest value there;
    for a selection it is the share of chosen positions that differ. `first_row` is the first row above tolerance."""

    point: str
    error: float
    first_row: int | None

    @property
    def differs(self) -> bool:
        return self.first_row is not None


def compare_layers(
    ours: Glm, oracle: nn.Module, token_ids: Sequence[int], *, tolerance: float = 1e-4
) -> list[Difference]:
    """Run one prompt through both and compare, in order of computation: each layer's selection (full layers),
    attention output, MLP output and residual stream, then the logits. Give it more than index_topk tokens: at or
    below that, every position is selected and a wrong indexer cannot be seen.
    """
    length, topk = len(token_ids), ours.config.index_topk
    mine, theirs = _record(ours.layers), _record(oracle.model.layers)  # type: ignore[union-attr,arg-type]
    cache = PagedCache(ours.config, num_blocks=(length + 63) // 64, block_size=64, dtype=ours.dtype)
    with torch.inference_mode(), mine as my_points, theirs as their_points:
        my_logits = ours.logits(ours(single_sequence(token_ids), cache))
        their_logits = oracle(torch.tensor([list(token_ids)])).logits[0]
    found: list[Difference] = []
    for i, kind in enumerate(ours.config.indexer_types):
        if kind == "full" and length > topk:
            selected = _compare_selection(i, my_points[i]["selection"], their_points[i]["selection"], topk)
            found.append(selected)
        found += [
            _compare(f"layers.{i}.{part}", my_points[i][part], their_points[i][part], tolerance)
            for part in ("attention", "mlp", "residual")
        ]
    found.append(_compare("logits", my_logits, their_logits, tolerance))
    return found


@contextlib.contextmanager
def _record(layers: nn.ModuleList) -> Iterator[list[dict[str, Tensor]]]:
    """Forward hooks that keep each layer's attention, selection, MLP and residual outputs (both models' modules
    return (output, …, selection) from attention and (residual, selection) from a layer)."""
    points: list[dict[str, Tensor]] = [{} for _ in layers]
    handles = []
    for i, layer in enumerate(layers):

        def attention(_: nn.Module, __: Any, output: Any, i: int = i) -> None:
            points[i]["attention"] = output[0]
            points[i]["selection"] = output[-1]

        def mlp(_: nn.Module, __: Any, output: Any, i: int = i) -> None:
            points[i]["mlp"] = output

        def residual(_: nn.Module, __: Any, output: Any, i: int = i) -> None:
            points[i]["residual"] = output[0]

        parts: Any = layer
        handles.append(parts.self_attn.register_forward_hook(attention))
        handles.append(parts.mlp.register_forward_hook(mlp))
        handles.append(parts.register_forward_hook(residual))
    try:
        yield points
    finally:
        for handle in handles:
            handle.remove()


def _compare(point: str, mine: Tensor, theirs: Tensor, tolerance: float) -> Difference:
    theirs = theirs.reshape(mine.shape).float()
    scale = theirs.abs().max().clamp(min=1e-6)
    errors_T = ((mine.float() - theirs).abs() / scale).flatten(1).amax(-1)
    bad = (~(errors_T <= tolerance)).nonzero()  # NaN differs too
    return Difference(point, float(errors_T.max()), int(bad[0]) if len(bad) else None)


def _compare_selection(layer: int, slots_RK: Tensor, positions_1TK: Tensor, topk: int) -> Difference:
    """Our rows are those past the first topk; with blocks in order a slot is a position."""
    theirs = positions_1TK[0, topk:].long().sort(-1).values
    mine = slots_RK[-theirs.shape[0] :].sort(-1).values
    missing = [(~torch.isin(row, other)).float().mean() for row, other in zip(mine, theirs, strict=True)]
    shares = torch.stack(missing)
    bad = (shares > 0).nonzero()
    return Difference(f"layers.{layer}.selection", float(shares.mean()), int(bad[0]) + topk if len(bad) else None)
