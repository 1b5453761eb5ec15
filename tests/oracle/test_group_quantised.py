"""An int8 or int4 checkpoint must be the BF16 one that its groups dequantise to: bit for bit, token for token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from freehold import LLM, SamplingParams
from freehold.model.quantize import Scheme, quantize_checkpoint
from freehold.model.sizes import size_config
from freehold.model.tiny import write_random_checkpoint
from tests.oracle.test_fp8 import greedy, load, nearest_bf16


def dequantised(directory: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """The plain checkpoint, by the definition of the format in float64, with another library's reader and writer."""
    stored: dict[str, torch.Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        stored |= load_file(shard)
    weights = {}
    for name, tensor in stored.items():
        owner, _, suffix = name.rpartition("_")
        if suffix == "packed":
            rows, columns = stored[owner + "_shape"].tolist()
            words = tensor.numpy().view(np.uint32).astype(np.uint64)
            bits = 32 * words.shape[1] // columns
            shifts = np.arange(32 // bits, dtype=np.uint64) * np.uint64(bits)
            codes = ((words[:, :, None] >> shifts) & np.uint64(2**bits - 1)).reshape(rows, columns).astype(np.int64)
            scale = stored[owner + "_scale"].double()
            spread = scale.repeat_interleave(columns // scale.shape[1], 1)
            exact = torch.from_numpy(codes - 2 ** (bits - 1)).double() * spread
            weights[owner] = nearest_bf16(exact) if dtype == torch.bfloat16 else exact.float()  # which is exact
        elif not name.endswith((".weight_scale", ".weight_shape")):
            weights[name] = tensor
    out.mkdir()
    save_file(weights, out / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return weights


# Inner sizes that are not whole groups stay bf16: a checkpoint of both kinds of matrices.
MIXED = {"q_lora_rank": 72, "moe_intermediate_size": 40, "hidden_size": 192}


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("sizes", [{}, MIXED], ids=["nano", "mixed"])
def test_groups_are_their_dequantised_bf16_checkpoint(scheme: Scheme, sizes: dict[str, int], tmp_path: Path) -> None:
    write_random_checkpoint(size_config("nano") | sizes, tmp_path / "source", seed=2)
    quantize_checkpoint(tmp_path / "source", tmp_path / "groups", scheme, max_shard_bytes=500_000)
    expected = dequantised(tmp_path / "groups", tmp_path / "bf16")
    groups, bf16, source = load(tmp_path / "groups"), load(tmp_path / "bf16"), load(tmp_path / "source")
    originals, changed = source.checkpoint_tensors(), 0
    for name, tensor in groups.checkpoint_tensors().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
        changed += not torch.equal(tensor, originals[name])
    assert changed > 100
    prompt = torch.randint(0, 448, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    assert greedy(groups, prompt, 60) == greedy(bf16, prompt, 60)


def test_the_engine_answers_as_from_the_dequantised_checkpoint(tmp_path: Path) -> None:
    """Through everything that serving goes through, in fp32. (In bf16 the kernels keep codes, which are more exact than
    weights rounded to bf16.)"""
    dtype = "float32"
    write_random_checkpoint(size_config("nano"), tmp_path / "source", seed=4, dtype=dtype)
    quantize_checkpoint(tmp_path / "source", tmp_path / "int8", "int8")
    assert len(dequantised(tmp_path / "int8", tmp_path / "plain", getattr(torch, dtype))) == 440
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "plain" / name).write_bytes((tmp_path / "source" / name).read_bytes())
    texts = []
    for name in ("int8", "plain"):
        with LLM(tmp_path / name, max_model_len=256, cache_bytes=1 << 22) as llm:
            params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
            texts.append([answer.text for answer in llm.generate(["To be, or not", "A" * 50], params)])
    assert texts[0] == texts[1]
