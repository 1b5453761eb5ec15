"""A model with an adapter holds what its merged checkpoint would be loaded as, and shares the rest with its base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from freehold.engine.loading import EngineOptions, load_model
from freehold.errors import CheckpointError, ConfigError
from freehold.headers import CheckpointIndex
from freehold.model.adapted import adapt
from freehold.model.adapters import Adapter, read_adapter
from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inputs import single_sequence
from freehold.model.packing import Quantize
from freehold.model.quantize import quantize_checkpoint
from freehold.model.tiny import make_tiny
from tests.adapting import ATTENTION, EVERYTHING, held_by, write_adapter, write_merged
from tests.native_cases import needs_native

FP32 = EngineOptions(dtype="float32", threads=1)
NATIVE = EngineOptions(threads=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, an adapter on some of every kind of matrix, and the two merged."""
    made = tmp_path_factory.mktemp("made")
    make_tiny(made / "base", "nano", seed=3)
    write_adapter(made / "adapter", made / "base", EVERYTHING, seed=1, rank=4)
    write_merged(made / "merged", made / "base", made / "adapter")
    return made


def load(directory: Path, options: EngineOptions) -> Glm:
    return load_model(directory, GlmConfig.from_file(directory), options)


def adapted(model: Glm, base: Path, adapter: Path) -> tuple[Glm, int]:
    return adapt(model, CheckpointIndex.open(base), read_adapter(adapter, model.config))


def logits(model: Glm) -> torch.Tensor:
    """Of a prompt longer than index_topk."""
    inputs = single_sequence(list(range(3, 40)))
    with torch.inference_mode():
        return model.logits(model(inputs, PagedCache(model.config, 1, 64, model.dtype))).clone()


@pytest.mark.parametrize(
    "options",
    [
        FP32,
        pytest.param(NATIVE, marks=needs_native),
        replace(NATIVE, ops="reference"),
        replace(FP32, quantize="int8"),
        *(pytest.param(replace(NATIVE, quantize=kind), marks=needs_native) for kind in ("int8", "int4", "fp8")),
    ],
)
def test_it_holds_what_the_merged_checkpoint_is_loaded_as(made: Path, options: EngineOptions) -> None:
    base = load(made / "base", options)
    before, answered = {name: tensor.clone() for name, tensor in held_by(base).items()}, logits(base)
    model, num_bytes = adapted(base, made / "base", made / "adapter")
    merged, held, shared = held_by(load(made / "merged", options)), held_by(model), held_by(base)
    assert held.keys() == merged.keys() == shared.keys()
    own = 0
    for name, tensor in held.items():
        assert torch.equal(tensor, merged[name]), name
        assert torch.equal(shared[name], before[name]), f"{name} of the base was written to"
        if tensor.data_ptr() == shared[name].data_ptr():
            assert torch.equal(tensor, before[name])
        else:
            own += tensor.nbytes
    assert num_bytes == own
    assert held["embed_tokens"] is shared["embed_tokens"]
    assert held["layers.0.input_layernorm.weight"] is shared["layers.0.input_layernorm.weight"]
    assert torch.equal(logits(base), answered)
    assert not torch.equal(logits(model), answered)


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("options", [pytest.param(NATIVE, marks=needs_native), FP32])
def test_of_a_quantised_checkpoint_only_what_changes_is_quantised_again(
    made: Path, tmp_path: Path, scheme: Quantize, options: EngineOptions
) -> None:
    quantize_checkpoint(made / "base", tmp_path / "q", scheme)
    write_adapter(tmp_path / "a", made / "base", ("q_b_proj", "experts.3.down_proj"), seed=2)
    base = load(tmp_path / "q", options)
    model, _ = adapted(base, tmp_path / "q", tmp_path / "a")
    held, shared = held_by(model), held_by(base)
    changed = {name for name in held if not torch.equal(held[name], shared[name])}
    stems = {name.removesuffix(".codes").removesuffix(".scales").removesuffix(".weight") for name in changed}
    assert {stem.rpartition(".")[2] for stem in stems} == {"q_b_proj", "down_proj"}
    assert len(stems) == 9 + 6  # every layer's, and every stack of experts
    # What was quantised again is as near to the merged weights as quantised weights are.
    exact = held_by(adapted(load(made / "base", FP32), made / "base", tmp_path / "a")[0])
    plain = held_by(load(made / "base", FP32))
    place = model.layers[4].self_attn.q_b_proj.weight
    found = place.dequantize(dtype=torch.float32) if not isinstance(place, torch.Tensor) else place
    name = "layers.4.self_attn.q_b_proj.weight"
    error, change = (found - exact[name]).norm(), (exact[name] - plain[name]).norm()
    assert error < change * (0.6 if scheme == "int4" else 0.15)


@needs_native
def test_paged_experts_are_refused_and_the_rest_is_not(made: Path, tmp_path: Path) -> None:
    options = replace(NATIVE, expert_bytes=500_000, expert_dir=tmp_path)
    base = load(made / "base", options)
    try:
        with pytest.raises(ConfigError, match=r"routed experts, which stay on disk with --expert-memory"):
            adapted(base, made / "base", made / "adapter")
        attention = write_adapter(tmp_path / "attention", made / "base", ATTENTION)
        model, _ = adapted(base, made / "base", attention)
        assert not torch.equal(logits(model), logits(base))
        assert model.pager is base.pager
    finally:
        assert base.pager is not None
        base.pager.close()


def test_a_matrix_that_the_model_lacks_is_refused(made: Path) -> None:
    base = load(made / "base", FP32)
    stray = Adapter(Path("stray"), 1, 1.0, {"model.layers.9.mlp.up_proj.weight": (torch.ones(1, 64), torch.ones(8, 1))})
    with pytest.raises(CheckpointError, match=r"stray: changes 'model.layers.9.mlp.up_proj.weight'"):
        adapt(base, CheckpointIndex.open(made / "base"), stray)
