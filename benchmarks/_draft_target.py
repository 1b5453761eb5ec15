"""The target of the draft model: a GLM whose weights are set so that it continues songs, beside random ones.

How it is built (core sizes; every block is CODE wide, codes are +1 or -1 and orthogonal or opposite):

    embedding   block T: the token's code; one dimension that is constant, one that marks names; a few random ones
    layer 0     one head attends to the nearest name and copies its code: block F, "which stanza"
    layer 1     two heads attend to the token before and copy its T and F: blocks P and G
    layer 2     one head attends to the nearest name and copies its G: block E, "which stanza came before"; its indexer
                looks for positions whose P and G are the query's T and F, and serves the next layer
    layer 3     (shares layer 2's selection) one head attends to those positions and copies their T: block Y, the token
                that followed this word in this stanza. The output head reads Y alone
    the others  random layers, and random MLPs and experts everywhere, quiet: they disturb the blocks a little

So the prediction hangs on the indexer, on its sharing and on attention far back, and the engine knows nothing of it.
What the final norm gives (and an MTP layer sees) holds all blocks, each dimension at its own scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from _draft_language import NAMES, WORDS, token_ids
from numpy.typing import NDArray

from freehold.model.config import GlmConfig
from freehold.model.names import tensor_specs
from freehold.model.random_tensors import RandomTensors
from freehold.model.sizes import size_config

Array = NDArray[np.float32]
Tensors = dict[str, Array]

CODE = 24
T, F, P, G, E, Y = (slice(CODE * i, CODE * (i + 1)) for i in range(6))
_NAME_CODES = 8  # dimensions that the codes of names span; those of words span the others
CONST, NAME, NOISE = 6 * CODE, 6 * CODE + 1, slice(6 * CODE + 2, 160)
_CONST, _NAME = 3.0, 3.0  # sizes of the two marks, beside codes of size 1
_QUIET = 0.05  # how much of its usual size a random layer adds
_LOGIT = 14.0  # of the token that follows; the other songs' tokens are near 0, tokens of no song below -_LOGIT / 2
_FAST = (2, 3, 4, 5)  # rotary pairs whose angles tell near from far within a few hundred tokens
_NEXT = (0, 1, 2, 3)  # those that tell one token from the next

_LAYERS = 10
CORE: dict[str, int] = {
    "hidden_size": 160,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "qk_head_dim": 96,
    "v_head_dim": 64,
    "head_dim": 64,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_topk": 64,
    "n_routed_experts": 32,
}


def core_config() -> dict[str, Any]:
    """config.json of the core: what `nano` has where nothing depends on it."""
    return size_config("nano") | CORE | layer_kinds(_LAYERS)


def layer_kinds(layers: int) -> dict[str, Any]:
    """The part of config.json that depends on the number of layers, by GLM-5.2's rules."""
    return {
        "num_hidden_layers": layers,
        "indexer_types": ["full" if max(i - 2, 0) % 4 == 0 else "shared" for i in range(layers)],
        "mlp_layer_types": ["dense" if i < 3 else "sparse" for i in range(layers)],
    }


def codes(vocabulary: int, generator: np.random.Generator) -> Array:
    """[vocabulary, CODE] of +1 and -1: orthogonal or opposite for the tokens of songs, random for the others."""
    found = generator.choice(np.float32([-1, 1]), (vocabulary, CODE))
    rows = _hadamard()
    names, words = rows[:_NAME_CODES], rows[_NAME_CODES:]
    found[token_ids(NAMES + WORDS)] = np.concatenate((names, -names, words, -words))
    return found


def name_part() -> Array:
    """[CODE, CODE]: keeps the code of a name, and takes that of a word to 0."""
    names = _hadamard()[:_NAME_CODES]
    return names.T @ names / CODE


def _hadamard() -> Array:
    """Paley's Hadamard matrix of order 24: orthogonal rows of +1 and -1."""
    prime = CODE - 1
    squares = {i * i % prime for i in range(1, prime)}
    skew = np.zeros((CODE, CODE), np.float32)
    skew[0, 1:], skew[1:, 0] = 1, -1
    for i in range(prime):
        for j in range(prime):
            if i != j:
                skew[i + 1, j + 1] = 1 if (i - j) % prime in squares else -1
    return skew + np.eye(CODE, dtype=np.float32)


def build_target(raw: dict[str, Any], seed: int = 0) -> Tensors:
    """All tensors of the checkpoint by name, fp32; those of the MTP layer are random."""
    config = GlmConfig.from_dict(raw)
    random = RandomTensors(config, seed)
    tensors: Tensors = {}
    for spec in tensor_specs(config):
        values = np.concatenate(list(random.values(spec, spec.size))).reshape(spec.shape)
        if spec.layer is not None and spec.layer < config.num_hidden_layers:
            quiet = spec.name.endswith(("o_proj.weight", "down_proj.weight"))
            values = values * np.float32(_QUIET) if quiet else values
        tensors[spec.name] = values
    _ends(tensors, codes(config.vocab_size, np.random.default_rng(seed)), np.random.default_rng(seed + 1))
    frequencies = config.rope_theta ** (-np.arange(0, config.qk_rope_head_dim, 2) / config.qk_rope_head_dim)
    layers = [Layer(tensors, config, i, frequencies) for i in range(4)]
    _nearest_name(layers[0], copied=T, into=F)
    _token_before(layers[1])
    _nearest_name(layers[2], copied=G, into=E)
    _match_index(layers[2])
    _follow(layers[3])
    return tensors


def _ends(tensors: Tensors, code: Array, generator: np.random.Generator) -> None:
    """Embedding, final norm and output head."""
    embed, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    norm = np.exp(generator.normal(0, 0.5, embed.shape[1])).astype(np.float32)
    tensors["model.norm.weight"] = norm
    embed[:, : NOISE.start] = 0
    embed[:, NOISE] *= 0.3
    embed[:, T] = code
    embed[:, CONST] = _CONST
    embed[token_ids(NAMES), NAME] = _NAME
    head[:] = 0
    head[:, CONST] = -_LOGIT / 2 / _CONST / norm[CONST]
    songs = token_ids(NAMES + WORDS)
    head[songs] = 0
    head[songs, Y] = code[songs] * (_LOGIT / CODE / norm[Y])


class Layer:
    """The attention of one layer, cleared, with a few writers. Inputs are the normed hidden states (norm weights 1)."""

    def __init__(self, tensors: Tensors, config: GlmConfig, layer: int, frequencies: Array) -> None:
        self.config, self.frequencies = config, frequencies
        prefix = f"model.layers.{layer}."
        self.parts = {
            name.removeprefix(prefix + "self_attn."): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix + "self_attn.")
        }
        for name, tensor in self.parts.items():
            tensor[:] = 1 if name.endswith("norm.weight") else 0
        tensors[prefix + "input_layernorm.weight"][:] = 1
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.rank = config.kv_lora_rank

    def read(self, name: str, *blocks: slice | int) -> list[slice]:
        """Rows of a compressing projection that take these parts of the hidden state; where each now lies."""
        weight, row, found = self.parts[name], 0, []
        for block in blocks:
            part = slice(block, block + 1) if isinstance(block, int) else block
            size = part.stop - part.start
            weight[row : row + size, part] = np.eye(size)
            found.append(slice(row, row + size))
            row += size
        return found

    def query(self, head: int) -> Array:
        """Rows of q_b for one head: [nope + rope, q_lora_rank]."""
        return self.parts["q_b_proj.weight"].reshape(self.config.num_attention_heads, -1, self.config.q_lora_rank)[head]

    def up(self, head: int) -> tuple[Array, Array]:
        """Rows of kv_b for one head: W_UK [nope, rank] and W_UV [value, rank]."""
        both = self.parts["kv_b_proj.weight"].reshape(self.config.num_attention_heads, -1, self.rank)[head]
        return both[: self.nope], both[self.nope :]

    def write(self, head: int, into: slice, scale: float) -> None:
        """The head's first values go to this part of the hidden state."""
        first = head * self.config.v_head_dim
        size = into.stop - into.start
        self.parts["o_proj.weight"][into, first : first + size] = np.eye(size) * scale

    def towards(self, rows: Array, column: int, pairs: tuple[int, ...], size: float, ahead: int = 0) -> None:
        """Rotary rows that turn a constant into a vector whose angle peaks `ahead` tokens back."""
        for pair in pairs:
            angle = -ahead * self.frequencies[pair]
            rows[2 * pair, column], rows[2 * pair + 1, column] = size * np.cos(angle), size * np.sin(angle)


def _nearest_name(layer: Layer, copied: slice, into: slice) -> None:
    """Head 0 attends to the nearest token that is marked as a name, and copies a block of it."""
    (constant,) = layer.read("q_a_proj.weight", CONST)  # after its norm sqrt(q_lora_rank), 9.8
    value, mark = layer.read("kv_a_proj_with_mqa.weight", copied, NAME)
    query, (up_key, up_value) = layer.query(0), layer.up(0)
    query[0, constant] = 10
    up_key[0, mark] = 3
    layer.towards(query[layer.nope :], constant.start, _FAST, 1.5)
    layer.towards(layer.parts["kv_a_proj_with_mqa.weight"][layer.rank :], CONST, _FAST, 4.0)
    up_value[:CODE, value] = np.eye(CODE)
    # A name's latents: a code and the mark.
    layer.write(0, into, float(np.sqrt((CODE + _NAME**2) / layer.rank)))
    index = layer.parts
    index["indexer.wk.weight"][[2 * pair for pair in _FAST], NAME] = 3
    index["indexer.wk.weight"][layer.rope :, CONST] = np.resize([0.3, -0.3], layer.config.index_head_dim - layer.rope)
    index_query = index["indexer.wq_b.weight"][: layer.config.index_head_dim]
    layer.towards(index_query, constant.start, _FAST, 1.0)
    index["indexer.weights_proj.weight"][0, CONST] = 1


def _token_before(layer: Layer) -> None:
    """Heads 0 and 1 attend to the token before, and copy its T and F."""
    (constant,) = layer.read("q_a_proj.weight", CONST)
    blocks = layer.read("kv_a_proj_with_mqa.weight", T, F)
    layer.towards(layer.parts["kv_a_proj_with_mqa.weight"][layer.rank :], CONST, _NEXT, 5.0)
    for head, (block, into) in enumerate(zip(blocks, (P, G), strict=True)):
        layer.towards(layer.query(head)[layer.nope :], constant.start, _NEXT, 3.0, ahead=1)
        layer.up(head)[1][:CODE, block] = np.eye(CODE)
        layer.write(head, into, float(np.sqrt(2 * CODE / layer.rank)))
    index = layer.parts
    layer.towards(index["indexer.wk.weight"], CONST, _NEXT, 1.0)
    layer.towards(index["indexer.wq_b.weight"], constant.start, _NEXT, 1.0, ahead=1)
    index["indexer.weights_proj.weight"][0, CONST] = 1


def _match_index(layer: Layer) -> None:
    """The indexer of layer 2: P against the query's T, G against its F, and the nearest name for the head of layer 2.

    Codes lie in dimensions that are not rotated, and in the slowest rotary pairs, whose angles hardly change.
    """
    width, rope = layer.config.index_head_dim, layer.rope
    first, second = layer.read("q_a_proj.weight", CONST, T, F)[1:]
    for_p = np.arange(rope, rope + CODE)
    for_g = np.concatenate((np.arange(16, 32), np.arange(rope + CODE, width)))
    key = layer.parts["indexer.wk.weight"]
    key[:] = 0
    key[for_p, P], key[for_g, G] = np.eye(CODE), np.eye(CODE)
    key[[2 * pair for pair in _FAST], NAME] = 1
    query = layer.parts["indexer.wq_b.weight"].reshape(layer.config.index_n_heads, width, -1)
    query[1][for_p, first], query[2][for_g, second] = np.eye(CODE), np.eye(CODE)
    layer.parts["indexer.weights_proj.weight"][:3, CONST] = (1, 1, 1)


def _follow(layer: Layer) -> None:
    word, stanza = layer.read("q_a_proj.weight", T, F)
    layer.write(0, Y, follow(layer, word, stanza))


def follow(layer: Layer, word: slice, stanza: slice) -> float:
    """Head 0 attends to where this word stood in this stanza before, one token on, and copies the token there.

    word, stanza: what the query asks with. Returns the scale to write the copy with.
    """
    value, before, stanza_before = layer.read("kv_a_proj_with_mqa.weight", T, P, G)
    query, (up_key, up_value) = layer.query(0), layer.up(0)
    for part, (asked, held) in enumerate(((word, before), (stanza, stanza_before))):
        rows = slice(part * CODE, (part + 1) * CODE)
        query[rows, asked], up_key[rows, held] = np.eye(CODE) * 3, np.eye(CODE) * 2
    up_value[:CODE, value] = np.eye(CODE)
    return float(np.sqrt(3 * CODE / layer.rank))
