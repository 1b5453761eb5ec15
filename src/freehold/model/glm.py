"""The GLM-5.2 architecture: embedding, decoder layers, final norm and head, and the MTP layer.

Read `mla.py`, `indexer.py` and `moe.py` for the three parts of a layer; `ops/` for the maths; `names.py` for how the
published checkpoint names everything. Source: `transformers` 5.23 `glm_moe_dsa` (no MTP), vLLM 0.32, SGLang 0.5.23.

Shape suffixes: T rows, R selected rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.decoder import DecoderLayer
from freehold.model.destinations import Destination, held_weights
from freehold.model.inputs import ForwardInput
from freehold.model.layers import Linear, Norm, Rope
from freehold.model.mla import Plan
from freehold.model.mtp import Extended, MtpFew, MtpLayer
from freehold.model.ops.interface import Ops
from freehold.model.ops.reference import ReferenceOps
from freehold.model.pager import ExpertPager

RunFew = Callable[[Tensor, ForwardInput, tuple[Tensor, Tensor], PagedCache], Tensor | None]


class Glm(nn.Module):
    """The whole model. Parameters are uninitialised until `weights.load_weights` fills them."""

    def __init__(
        self,
        config: GlmConfig,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
        ops: Ops | None = None,
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.ops: Ops = ops if ops is not None else ReferenceOps()
        self.rope = Rope(config)
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device))
        self.layers = nn.ModuleList(
            DecoderLayer(config, full=kind == "full", sparse=mlp == "sparse", dtype=dtype, device=device)
            for kind, mlp in zip(config.indexer_types, config.mlp_layer_types, strict=True)
        )
        self.norm = Norm(config.hidden_size, dtype=dtype, device=device)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype, device=device)
        self.mtp = MtpLayer(config, dtype=dtype, device=device) if config.has_mtp else None
        self.run_few: RunFew | None = None
        """All layers at once, for steps of few rows; None from it, or no such thing, runs them one by one."""
        self.mtp_few: MtpFew | None = None
        """The MTP layer in one call, likewise."""
        self.pager: ExpertPager | None = None
        """Of the routed experts, where they are not all in memory."""

    def forward(self, inputs: ForwardInput, cache: PagedCache) -> Tensor:
        """Hidden states after the final norm, [T, H]. Writes the rows' latents and index keys to `cache`."""
        rope = self.rope.tables(inputs.positions_T)
        hidden_TH = F.embedding(inputs.token_ids_T, self.embed_tokens)
        if self.run_few is not None and (few_TH := self.run_few(hidden_TH, inputs, rope, cache)) is not None:
            return self.ops.rms_norm(few_TH, self.norm.weight, self.config.rms_norm_eps)
        plan = Plan.of(inputs, self.config.index_topk, expand=self.ops.expands)
        slots_RK: Tensor | None = None
        for i, layer in enumerate(self.layers):
            hidden_TH, slots_RK = layer(
                self.ops, hidden_TH, inputs, plan, rope, cache.latent[i], cache.index[i], slots_RK
            )
        return self.ops.rms_norm(hidden_TH, self.norm.weight, self.config.rms_norm_eps)

    def extend_mtp(self, hidden_TH: Tensor, inputs: ForwardInput, cache: PagedCache) -> Extended:
        """Runs the MTP layer over rows that the target has computed; writes their latents and index keys.

        hidden_TH: the target's hidden states after the final norm, at positions inputs.positions_T.
        inputs.token_ids_T: the token *after* each position. A span may begin where the MTP layer's cache begins rather
        than the sequence: then its start and its table count from there, and positions_T stay absolute.
        Needs a model with an MTP layer.
        """
        assert self.mtp is not None
        layer, rope = self.config.num_hidden_layers, self.rope.tables(inputs.positions_T)
        z_TH = self.mtp.enter(self.ops, F.embedding(inputs.token_ids_T, self.embed_tokens), hidden_TH)
        if self.mtp_few is not None and (few := self.mtp_few.extend(z_TH, inputs, rope, cache)) is not None:
            return Extended(self.mtp.leave(self.ops, few.hidden_TH), few.selection_NK)
        keys_SD = cache.index[layer]
        assert keys_SD is not None
        return self.mtp.extend(self.ops, z_TH, inputs, rope, cache.latent[layer], keys_SD)

    def draft_mtp(
        self, hidden_NH: Tensor, token_ids_N: Tensor, positions_N: Tensor, selection_NK: Tensor, cache: PagedCache
    ) -> Tensor:
        """One more draft step for N sequences, [N, H]: the state that `logits` turns into the draft after the next.

        hidden_NH: what `extend_mtp` (its last rows) or the step before returned. token_ids_N: the draft made from it.
        positions_N: one more than that state's. selection_NK: from `extend_mtp`, of each sequence's last verified row;
        the step attends to these entries, made by the target, and to no draft, and writes nothing.
        """
        assert self.mtp is not None
        rope = self.rope.tables(positions_N)
        z_NH = self.mtp.enter(self.ops, F.embedding(token_ids_N, self.embed_tokens), hidden_NH)
        if self.mtp_few is not None and (few := self.mtp_few.draft(z_NH, rope, selection_NK, cache)) is not None:
            return self.mtp.leave(self.ops, few)
        return self.mtp.draft(self.ops, z_NH, rope, cache.latent[self.config.num_hidden_layers], selection_NK)

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """[R, V] in the model's dtype, for hidden states after the final norm."""
        return self.ops.linear(hidden_RH, self.lm_head.weight)

    def checkpoint_tensors(self) -> dict[str, Destination]:
        """Published tensor name → the parameter, or the part of a stacked or packed one, that holds it.

        Works on `meta`.
        """
        tensors: dict[str, Destination] = {
            "model.embed_tokens.weight": self.embed_tokens,
            "model.norm.weight": self.norm.weight,
        }
        tensors |= dict(held_weights(self.lm_head, "lm_head"))
        layers = [*self.layers, *([self.mtp] if self.mtp is not None else [])]
        for i, layer in enumerate(layers):
            for name, held in held_weights(layer, f"model.layers.{i}"):
                tensors[name.replace(".input.", ".")] = held
        return tensors
