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
from freehold.model.destinations import Destination, held_weights
from freehold.model.index_keys import IndexKeys
from freehold.model.inputs import ForwardInput
from freehold.model.layers import MLP, Linear, Norm, Rope
from freehold.model.mla import LatentAttention, Plan
from freehold.model.moe import MoE
from freehold.model.mtp import MtpInput, SharedHead
from freehold.model.ops.interface import Ops
from freehold.model.ops.reference import ReferenceOps
from freehold.model.pager import ExpertPager

RunFew = Callable[[Tensor, ForwardInput, tuple[Tensor, Tensor], PagedCache], Tensor | None]


class DecoderLayer(nn.Module):
    """Pre-norm residual layer: h += attention(norm(h)); h += mlp(norm(h))."""

    def __init__(self, config: GlmConfig, *, full: bool, sparse: bool, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_layernorm = Norm(config.hidden_size, dtype=dtype, device=device)
        self.self_attn = LatentAttention(config, full=full, dtype=dtype, device=device)
        self.post_attention_layernorm = Norm(config.hidden_size, dtype=dtype, device=device)
        self.mlp: MoE | MLP
        if sparse:
            self.mlp = MoE(config, dtype=dtype, device=device)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, dtype=dtype, device=device)

    def forward(
        self,
        ops: Ops,
        hidden_TH: Tensor,
        inputs: ForwardInput,
        plan: Plan,
        rope: tuple[Tensor, Tensor],
        latent_SL: Tensor,
        keys_SD: IndexKeys | None,
        slots_RK: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        x_TH = ops.rms_norm(hidden_TH, self.input_layernorm.weight, self.eps)
        attended, slots_RK = self.self_attn(ops, x_TH, inputs, plan, *rope, latent_SL, keys_SD, slots_RK)
        hidden_TH = hidden_TH + attended
        x_TH = ops.rms_norm(hidden_TH, self.post_attention_layernorm.weight, self.eps)
        return hidden_TH + self.mlp(ops, x_TH), slots_RK


class MtpLayer(DecoderLayer):
    """Checkpoint layer `num_hidden_layers`: a full sparse decoder layer with its own input and head norm."""

    def __init__(self, config: GlmConfig, *, dtype: torch.dtype, device: str) -> None:
        super().__init__(config, full=True, sparse=True, dtype=dtype, device=device)
        self.input = MtpInput(config, dtype=dtype, device=device)
        self.shared_head = SharedHead(config, dtype=dtype, device=device)


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
        self.pager: ExpertPager | None = None
        """Of the routed experts, where they are not all in memory."""

    def forward(self, inputs: ForwardInput, cache: PagedCache) -> Tensor:
        """Hidden states after the final norm, [T, H]. Writes the rows' latents and index keys to `cache`."""
        rope = self.rope.tables(inputs.positions_T)
        hidden_TH = F.embedding(inputs.token_ids_T, self.embed_tokens)
        if self.run_few is not None and (few_TH := self.run_few(hidden_TH, inputs, rope, cache)) is not None:
            return self.ops.rms_norm(few_TH, self.norm.weight, self.config.rms_norm_eps)
        plan = Plan.of(inputs, self.config.index_topk)
        slots_RK: Tensor | None = None
        for i, layer in enumerate(self.layers):
            hidden_TH, slots_RK = layer(
                self.ops, hidden_TH, inputs, plan, rope, cache.latent[i], cache.index[i], slots_RK
            )
        return self.ops.rms_norm(hidden_TH, self.norm.weight, self.config.rms_norm_eps)

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
