"""The parts of `benchmarks/` that a comparison with llama.cpp rests on, without llama.cpp."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from _engine import Ours, prompt_of
from _llamacpp import Install, Peer, PeerFailed, find
from _llamacpp_state import grow
from _needs import decode_bytes, prefill_operations

from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.sizes import size_config
from freehold.model.tiny import make_tiny


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nano")
    make_tiny(directory, size="nano", seed=0)
    return directory


def saved_state(cells: int, widths: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """As llama.cpp writes it: for each cache the widths of its layers' rows; layer i holds numbers around i."""
    random = np.random.default_rng(0)
    parts = [np.array([0xAF143CD8, 0], np.uint32)]
    for layers in widths:
        meta = np.stack([np.arange(cells), np.ones(cells), np.zeros(cells)], 1).astype(np.int32)
        parts += [np.array([1, cells], np.uint32), meta, np.array([0, len(layers)], np.uint32)]
        for i, width in enumerate(layers):
            rows = random.normal(i, 0.1, (cells, width)).astype(np.float16)
            parts += [np.array([1], np.int32), np.array([2 * width], np.uint64), rows]
    return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])


def test_a_grown_state_is_that_of_more_cells_with_the_same_statistics() -> None:
    widths = ((8, 8, 8), (4,))
    grown, real = grow(saved_state(100, widths), 1000, seed=3), saved_state(1000, widths)
    assert len(grown) == len(real)
    start = 8 + 8 + 12 * 1000 + 8  # up to the first layer
    np.testing.assert_array_equal(grown[:start], real[:start])
    last = grown[-1000 * 4 * 2 - 12 - 8 - 12000 - 8 - 1000 * 8 * 2 :][: 1000 * 8 * 2].view(np.float16)  # of 3 layers
    assert last.astype(np.float32).mean() == pytest.approx(2, abs=0.05)
    assert last.astype(np.float32).std() == pytest.approx(0.1, rel=0.2)
    assert len(np.unique(last.reshape(1000, 8), axis=0)) == 1000  # no two cells alike, so no ties


@pytest.mark.parametrize(
    "broken",
    [
        lambda state: state[:-1],
        lambda state: np.concatenate([state, state[8:]]),
        lambda state: np.concatenate([state[:8], [2], state[9:]]),  # two streams
        lambda state: np.concatenate([state[:16], [7], state[17:]]),  # the first cell's position
    ],
)
def test_a_state_of_another_layout_is_an_error(broken: Callable[[np.ndarray], np.ndarray]) -> None:
    with pytest.raises(ValueError, match=r"layout|cells"):
        grow(broken(saved_state(100, ((8,), (4,)))).astype(np.uint8), 1000, seed=3)


def test_a_filled_cache_is_taken_for_computed_and_read(nano: Path) -> None:
    ours = Ours(nano, "bf16", threads=1, cache_tokens=4096, sequences=2)
    prompt = ours.fill(2000, seed=1)
    hits = ours.engine.stats().prefix_hits
    assert len(ours.decode([prompt], 5)) == 5
    assert ours.engine.stats().prefix_hits - hits == 1984  # 31 full blocks before the last token
    ours.engine.check_integrity()
    assert ours.prefill(300, seed=2, chunk=128) > 0
    with pytest.raises(RuntimeError, match="0 of 31 blocks"):
        ours.expect_cached(prompt)  # the other engine wrote over them
    ours.close()


def test_bytes_and_operations_are_those_of_the_architecture(nano: Path) -> None:
    config = GlmConfig.from_file(nano)
    topk = config.index_topk
    model = Glm(config, device="meta")
    # What `prefill_operations` counts from the configuration is what the parameters of the model say.
    chosen = config.num_experts_per_tok / config.n_routed_experts
    matrices = sum(
        parameter.numel() * (chosen if ".experts." in name else 1)
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
        and not name.startswith(("embed_tokens", "mtp.", "lm_head"))
        and not name.endswith((".wq_b.weight", ".weights_proj.weight"))
    )
    head = config.hidden_size * config.vocab_size
    pairs = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * topk * (topk + 1) // 2
    assert prefill_operations(config, topk) == 2 * (topk * matrices + head + config.num_hidden_layers * pairs)
    with pytest.raises(ValueError, match="index_topk"):
        prefill_operations(config, topk + 1)
    shallow, deep = decode_bytes(model, topk), decode_bytes(model, 1000)
    norms = shallow - 2 * (matrices + head + config.num_hidden_layers * topk * config.latent_dim)
    assert 0 < norms < 0.02 * shallow  # norms and router biases
    queries = config.index_n_heads * (config.q_lora_rank * config.index_head_dim + config.hidden_size)
    assert deep - shallow == 2 * len(config.full_layers) * (queries + 1000 * config.index_head_dim)


def test_bytes_of_weights_that_are_attributes_count() -> None:
    config = GlmConfig.from_dict(size_config("nano"))
    model = Glm(config, device="meta")
    before = decode_bytes(model, 1)
    model.layers[0].self_attn.packed = torch.empty(1000, dtype=torch.uint8)
    assert decode_bytes(model, 1) - before == 1000


def test_prompts_have_no_special_tokens(nano: Path) -> None:
    config = GlmConfig.from_file(nano)
    prompt = prompt_of(5000, 1, config.vocab_size)
    assert max(prompt) < min(config.eos_token_ids)
    assert prompt != prompt_of(5000, 2, config.vocab_size)
    assert torch.get_default_dtype() is torch.float32


def test_a_peer_that_ends_or_hangs_is_an_error_and_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(tmp_path) is None
    no_library = Install(tmp_path, tmp_path)
    with Peer(no_library, timeout=60) as peer, pytest.raises(PeerFailed, match="ended with 1"):
        peer.ask("load", path="x")
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    with Peer(no_library, timeout=0.2) as peer:
        with pytest.raises(PeerFailed, match=r"more than 0\.2 s for 'load'"):
            peer.ask("load", path="x")
        assert peer._process.wait(timeout=10) < 0
