"""The MTP layer written a second time, from the formulas, dense and without a cache: what ours is compared with.

`transformers` has no MTP. Nothing here comes from the engine: it reads a checkpoint's tensors by their published names
and works on one whole sequence at a time, in fp32, with attention as a masked softmax over all positions.
Shapes: P positions, H hidden, N heads, J index heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class PlainMtp:
    """config: the JSON of config.json. tensors: the checkpoint's. latent_eps: of the two norms of latents."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], latent_eps: float) -> None:
        self.c, self.latent_eps = config, latent_eps
        self.prefix = f"model.layers.{config['num_hidden_layers']}."
        self.all = {name: tensor.float() for name, tensor in tensors.items()}
        self.keys: Tensor | None = None  # [P, N, qk], of the positions that the target has made
        self.values: Tensor | None = None
        self.chosen: Tensor | None = None  # [P] of the last of them: what it attends to

    def w(self, name: str) -> Tensor:
        return self.all[f"{self.prefix}{name}.weight"]

    def norm(self, x: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + (eps or self.c["rms_norm_eps"])).sqrt()

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Pairs (2j, 2j+1) of the last dim as complex numbers, turned by position · theta^(-2j/dims)."""
        dims = x.shape[-1]
        speed = self.c["rope_parameters"]["rope_theta"] ** (-torch.arange(0, dims, 2).double() / dims)
        turn = torch.polar(torch.ones(1).double(), positions[:, None].double() * speed)
        turn = turn.view(len(positions), *[1] * (x.dim() - 2), -1)
        pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(-2).float()

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query latent, queries, keys and values of normed inputs."""
        heads, nope, rank = self.c["num_attention_heads"], self.c["qk_nope_head_dim"], self.c["kv_lora_rank"]
        latent = self.norm(x @ self.w("self_attn.q_a_proj").T, self.w("self_attn.q_a_layernorm"), self.latent_eps)
        query = (latent @ self.w("self_attn.q_b_proj").T).view(len(x), heads, -1)
        query = torch.cat((query[..., :nope], self.rotate(query[..., nope:], positions)), -1)
        compressed = x @ self.w("self_attn.kv_a_proj_with_mqa").T
        content = self.norm(compressed[:, :rank], self.w("self_attn.kv_a_layernorm"), self.latent_eps)
        expanded = (content @ self.w("self_attn.kv_b_proj").T).view(len(x), heads, -1)
        roped = self.rotate(compressed[:, rank:], positions)[:, None].expand(-1, heads, -1)
        return latent, query, torch.cat((expanded[..., :nope], roped), -1), expanded[..., nope:]

    def select(self, x: Tensor, latent: Tensor, positions: Tensor) -> Tensor:
        """[P, P] booleans: row p may attend to these positions."""
        heads, rope = self.c["index_n_heads"], self.c["qk_rope_head_dim"]
        query = (latent @ self.w("self_attn.indexer.wq_b").T).view(len(x), heads, -1)
        key = torch.nn.functional.layer_norm(
            x @ self.w("self_attn.indexer.wk").T,
            (query.shape[-1],),
            self.w("self_attn.indexer.k_norm"),
            self.all[f"{self.prefix}self_attn.indexer.k_norm.bias"],
            1e-6,
        )
        query, key = (torch.cat((self.rotate(t[..., :rope], positions), t[..., rope:]), -1) for t in (query, key))
        weights = (x @ self.w("self_attn.indexer.weights_proj").T) * heads**-0.5
        scores = torch.einsum("pj,pjs->ps", weights, (query @ key.T * query.shape[-1] ** -0.5).relu())
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        for p in range(len(x)):
            best = scores[p, : p + 1].sort(descending=True, stable=True).indices[: self.c["index_topk"]]
            allowed[p, best] = True
        return allowed

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
        scores = torch.einsum("pnd,snd->pns", query, keys) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~allowed[:, None], float("-inf")).softmax(-1)
        return torch.einsum("pns,snv->pnv", weights, values).flatten(1) @ self.w("self_attn.o_proj").T

    def moe(self, x: Tensor) -> Tensor:
        def swiglu(name: str, rows: Tensor) -> Tensor:
            gate, up = (rows @ self.w(f"mlp.{name}.{half}_proj").T for half in ("gate", "up"))
            return (gate * gate.sigmoid() * up) @ self.w(f"mlp.{name}.down_proj").T

        scores = (x @ self.w("mlp.gate").T).sigmoid()
        bias = self.all[f"{self.prefix}mlp.gate.e_score_correction_bias"]
        out = swiglu("shared_experts", x)
        for p in range(len(x)):
            chosen = (scores[p] + bias).topk(self.c["num_experts_per_tok"]).indices
            share = scores[p, chosen] / scores[p, chosen].sum() * self.c["routed_scaling_factor"]
            for expert, weight in zip(chosen.tolist(), share, strict=True):
                out[p] += weight * swiglu(f"experts.{expert}", x[p])
        return out

    def enter(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        embedded = self.norm(self.all["model.embed_tokens.weight"][tokens], self.w("enorm"))
        return torch.cat((embedded, self.norm(hidden, self.w("hnorm"))), -1) @ self.w("eh_proj").T

    def finish(self, z: Tensor, attended: Tensor) -> Tensor:
        z = z + attended
        z = z + self.moe(self.norm(z, self.w("post_attention_layernorm")))
        return self.norm(z, self.w("shared_head.norm"))

    def extend(self, hidden_PH: Tensor, following_P: Tensor) -> Tensor:
        """States [P, H] of a whole sequence from position 0, given the target's hidden states after its last norm."""
        positions = torch.arange(len(hidden_PH))
        z = self.enter(hidden_PH, following_P)
        x = self.norm(z, self.w("input_layernorm"))
        latent, query, self.keys, self.values = self.project(x, positions)
        allowed = self.select(x, latent, positions)
        self.chosen = allowed[-1]
        return self.finish(z, self.attend(query, self.keys, self.values, allowed))

    def draft(self, state_H: Tensor, token: int, position: int) -> Tensor:
        """The state [H] a draft step later: it sees what the last extended position saw, and nothing newer."""
        assert self.keys is not None
        assert self.values is not None
        assert self.chosen is not None
        z = self.enter(state_H[None], torch.tensor([token]))
        x = self.norm(z, self.w("input_layernorm"))
        _, query, _, _ = self.project(x, torch.tensor([position]))
        return self.finish(z, self.attend(query, self.keys, self.values, self.chosen[None]))[0]
