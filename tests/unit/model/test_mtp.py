"""The MTP layer's input against its plain formula, and that the checkpoint's tensors land in it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from freehold.model.config import GlmConfig
from freehold.model.mtp import MtpInput
from freehold.model.ops.reference import ReferenceOps
from freehold.model.oracle import load_ours
from freehold.model.sizes import size_config
from freehold.model.tiny import write_random_checkpoint

CONFIG = GlmConfig.from_dict(size_config("nano"))


def random_input() -> MtpInput:
    module = MtpInput(CONFIG, dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)
    return module


def rows(seed: int) -> Tensor:
    return torch.randn(5, CONFIG.hidden_size, generator=torch.Generator().manual_seed(seed))


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + CONFIG.rms_norm_eps).sqrt() * weight


def test_the_input_is_the_projection_of_both_normed_and_the_embedding_comes_first() -> None:
    module, e, h = random_input(), rows(1), rows(2)
    enorm, hnorm, projection = module.enorm.weight, module.hnorm.weight, module.eh_proj.weight
    with torch.inference_mode():
        found = module(ReferenceOps(), e, h)
        expected = torch.cat((normed(e, enorm), normed(h, hnorm)), -1) @ projection.T
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        order = torch.cat((normed(h, hnorm), normed(e, enorm)), -1) @ projection.T
        norms = torch.cat((normed(e, hnorm), normed(h, enorm)), -1) @ projection.T
        arguments = module(ReferenceOps(), h, e)
    for wrong in (order, norms, arguments):
        assert not torch.allclose(found, wrong, rtol=1e-2, atol=1e-2)


def test_the_checkpoints_tensors_land_in_the_layer(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_random_checkpoint(size_config("nano"), tmp_path, seed=3, dtype="float32")
    stored = load_file(tmp_path / "model.safetensors")
    mtp = load_ours(str(tmp_path)).mtp
    assert mtp is not None
    prefix = f"model.layers.{CONFIG.num_hidden_layers}."
    landed = {
        "enorm.weight": mtp.input.enorm.weight,
        "hnorm.weight": mtp.input.hnorm.weight,
        "eh_proj.weight": mtp.input.eh_proj.weight,
        "shared_head.norm.weight": mtp.shared_head.norm.weight,
    }
    for name, parameter in landed.items():
        assert torch.equal(parameter.data, stored[prefix + name]), name
    assert not torch.equal(stored[prefix + "enorm.weight"], stored[prefix + "hnorm.weight"])
