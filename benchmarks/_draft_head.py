"""The MTP layer of the draft model: the target's layer that follows a song, fed one token further on.

`eh_proj` puts the blocks where that layer expects them: the next token's code (from its embedding) as T, the hidden
state's T as P ("the token before") and its F as F and G. Attention then finds where that token stood in this stanza,
and its entry holds the token that came after. What the layer hands on, after `shared_head.norm`, is *not* what the
target's final norm gives, in the ways that a head trained with shared selection and entries is free to choose:

    another basis   every dimension of the layer has a sign and a scale of its own, and one is very large, as in real
                    models; `shared_head.norm` undoes that, so recycling what lies before it is senseless
    no block E      it tells the indexer which stanza is sung; only target-made hidden states have it, so a selection
                    that is seeded by a draft row misses the stanza
    T is outweighed by the token just drafted; a draft row's own entry would match its query, so attending to drafts
                    repeats tokens

These are choices, made so that running the layer wrongly shows; how much it costs says nothing of another model.
"""

from __future__ import annotations

import numpy as np
from _draft_target import CODE, CONST, NOISE, Array, E, F, G, Layer, P, T, Tensors, Y, follow, name_part

from freehold.model.config import GlmConfig

_ASKED = (T, F, E, G)  # what queries are made of: the first two of attention, the others of the indexer
_LARGE, _LARGE_SIZE = NOISE.start, 30.0  # the dimension that is very large, and how large
_AHEAD = 2.0  # of the drafted token's code, beside the code that was read, in what is handed on as T
_ROUGH = 0.03  # random parts of eh_proj: they make some drafts wrong
_SWITCH = 2.0  # of a new name's code, beside that of the stanza it ends


def warm_start(tensors: Tensors, config: GlmConfig, seed: int = 0) -> None:
    """Overwrite the MTP layer's tensors, but for its experts, which stay random and quiet."""
    generator = np.random.default_rng(seed)
    hidden, prefix = config.hidden_size, f"model.layers.{config.num_hidden_layers}."
    basis = np.exp(generator.normal(0, 0.5, hidden)) * generator.choice([-1.0, 1.0], hidden)
    frequencies = config.rope_theta ** (-np.arange(0, config.qk_rope_head_dim, 2) / config.qk_rope_head_dim)
    final = tensors["model.norm.weight"]
    _join(tensors, prefix, basis, final, generator)
    layer = Layer(tensors, config, config.num_hidden_layers, frequencies)
    _follow(layer)
    _stanza_index(layer)
    tensors[prefix + "self_attn.o_proj.weight"] *= basis[:, None]
    for name in tensors:
        if name.startswith(prefix + "mlp.") and name.endswith("down_proj.weight"):
            tensors[name] *= 0.05 * basis[:, None]
    size = np.sqrt((10 * CODE + 9 + _LARGE_SIZE**2) / hidden)  # about its root mean square, basis apart
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        tensors[prefix + name] = (size / basis).astype(np.float32)
    handed_on = size * final / basis
    handed_on[E] *= 0.02
    handed_on[_LARGE] *= 0.02
    tensors[prefix + "shared_head.norm.weight"] = handed_on.astype(np.float32)


def _join(tensors: Tensors, prefix: str, basis: Array, final: Array, generator: np.random.Generator) -> None:
    """enorm, hnorm and eh_proj."""
    hidden = basis.shape[0]
    tensors[prefix + "enorm.weight"][:] = np.sqrt((CODE + 9) / hidden)  # the embedding as it was
    tensors[prefix + "hnorm.weight"] = np.float32(np.sqrt(np.mean(final**2))) / final  # what the final norm got
    both = generator.normal(0, _ROUGH, (hidden, 2 * hidden)).astype(np.float32)
    word, state = both[:, :hidden], both[:, hidden:]
    for into, part, taken in ((T, word, T), (P, state, T), (F, state, F), (G, state, F), (E, state, E)):
        part[into, taken] += np.eye(CODE)
    word[F, T] += _SWITCH * name_part()
    state[CONST, CONST] += 1
    word[_LARGE, CONST] += _LARGE_SIZE / 3
    state[:, _LARGE] = generator.normal(0, 0.5, hidden)
    tensors[prefix + "eh_proj.weight"] = (both * basis[:, None]).astype(np.float32)


def _follow(layer: Layer) -> None:
    word, stanza, _, _ = layer.read("q_a_proj.weight", *_ASKED)
    scale = follow(layer, word, stanza)
    layer.write(0, Y, scale)
    layer.write(0, T, _AHEAD * scale)


def _stanza_index(layer: Layer) -> None:
    """Entries of the same stanza (their E is the query's) and of the next one (their E is the query's G)."""
    rows = np.arange(layer.rope, layer.rope + CODE)
    key = layer.parts["indexer.wk.weight"]
    key[rows, E] = np.eye(CODE)
    query = layer.parts["indexer.wq_b.weight"].reshape(layer.config.index_n_heads, layer.config.index_head_dim, -1)
    for head, asked in enumerate((E, G)):
        first = _ASKED.index(asked) * CODE
        query[head][rows, first : first + CODE] = np.eye(CODE)
    layer.parts["indexer.weights_proj.weight"][:2, CONST] = 1
