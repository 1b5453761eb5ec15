"""The models that are trained beside freehold-tiny to compare it with: their configs, and how large they are.

index-share    freehold-tiny's own config
every-layer    the same with an indexer on every layer
dense          no experts and no indexer: attention over everything, every MLP dense, as wide as makes the weights
               that one token uses as many as freehold-tiny's
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from freehold.model.config import GlmConfig
from freehold.model.names import tensor_specs

SHARING = ("index-share", "every-layer")  # what differs in nothing but whether layers share indexers
ARMS = (*SHARING, "dense")


def arm_config(arm: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of an arm, from that of freehold-tiny. Raises ValueError for another name."""
    layers = int(base["num_hidden_layers"])
    own_pattern = {"index_topk_freq": None, "index_skip_topk_offset": None, "index_topk_pattern": None}
    if arm == "index-share":
        return dict(base)
    if arm == "every-layer":
        return {**base, **own_pattern, "indexer_types": ["full"] * layers}
    if arm == "dense":
        dense = {
            **base,
            **own_pattern,
            "indexer_types": ["full"] + ["shared"] * (layers - 1),  # the first must have one; it is never asked
            "index_topk": base["max_position_embeddings"],
            "first_k_dense_replace": layers,
            "mlp_layer_types": ["dense"] * layers,
        }
        return {**dense, "intermediate_size": _equal_width(base, dense)}
    raise ValueError(f"there is no arm {arm!r}; there are {', '.join(ARMS)}")


def active_parameters(raw: Mapping[str, Any], *, attends_to_all: bool = False) -> int:
    """Weights that predicting one token uses: all but the embedding, the MTP layer and the experts not chosen.

    attends_to_all: indexers are not used either.
    """
    config = GlmConfig.from_dict(raw)
    total = 0.0
    for spec in tensor_specs(config):
        if spec.part == "embed" or spec.layer == config.num_hidden_layers:
            continue
        if spec.part == "indexer" and attends_to_all:
            continue
        chosen = config.num_experts_per_tok / config.n_routed_experts if spec.part == "routed_expert" else 1.0
        total += spec.size * chosen
    return round(total)


def _equal_width(base: Mapping[str, Any], dense: Mapping[str, Any]) -> int:
    """The width of dense MLPs that makes the active sizes equal, as near as whole numbers come."""
    wanted = active_parameters(base)
    at = {width: active_parameters({**dense, "intermediate_size": width}, attends_to_all=True) for width in (1, 2)}
    return max(1, round(1 + (wanted - at[1]) / (at[2] - at[1])))
