"""The optimiser: Muon against a singular value decomposition, AdamW against torch's, state by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from freehold.errors import CheckpointError, InvalidRequest
from freehold.train.optim import Optim, Optimiser, is_hidden_matrix, orthogonalise


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 24, 40), (3, 40, 24), (1, 16, 16)])
def test_orthogonalise_moves_singular_values_near_one_and_keeps_the_vectors(shape: tuple[int, int, int]) -> None:
    matrices = rand(*shape)
    made = orthogonalise(matrices, 5)
    singular = torch.linalg.svdvals(made)
    assert singular.min() > 0.3
    assert singular.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    along = (u.transpose(1, 2) @ made @ v.transpose(1, 2)).diagonal(dim1=1, dim2=2)
    rest = u.transpose(1, 2) @ made @ v.transpose(1, 2) - torch.diag_embed(along)
    assert rest.abs().max() < 1e-4
    assert along.min() > 0.3


def test_orthogonalise_ignores_the_size_of_a_matrix_and_keeps_zeros() -> None:
    matrices = rand(2, 8, 12)
    torch.testing.assert_close(orthogonalise(matrices * 1e-12, 5), orthogonalise(matrices, 5))
    assert orthogonalise(torch.zeros(1, 8, 12), 5).abs().max() == 0


def test_a_batch_of_matrices_is_stepped_as_each_alone() -> None:
    stacked = nn.Parameter(rand(4, 12, 8))
    stacked.grad = rand(4, 12, 8, seed=1)
    alone = {f"m{i}": nn.Parameter(stacked[i].detach().clone()) for i in range(4)}
    for i, parameter in enumerate(alone.values()):
        parameter.grad = stacked.grad[i].clone()
    Optimiser([("experts.down_proj", stacked)], Optim()).step()
    Optimiser(alone.items(), Optim()).step()
    torch.testing.assert_close(stacked.detach(), torch.stack([p.detach() for p in alone.values()]))


def test_gate_and_up_halves_are_two_matrices() -> None:
    joint = nn.Parameter(torch.zeros(2, 6, 5))
    joint.grad = rand(2, 6, 5)
    halves = [nn.Parameter(torch.zeros(2, 3, 5)) for _ in range(2)]
    for half, grad in zip(halves, joint.grad.split(3, dim=1), strict=True):
        half.grad = grad.clone()
    Optimiser([("experts.gate_up_proj", joint)], Optim()).step()
    Optimiser([("a", halves[0]), ("b", halves[1])], Optim()).step()
    torch.testing.assert_close(joint.detach(), torch.cat([p.detach() for p in halves], dim=1))


def test_adamw_is_torchs() -> None:
    settings = Optim(kind="adamw", lr=0.01, decay=0.1)
    own, theirs = nn.Parameter(rand(5, 7)), nn.Parameter(rand(5, 7))
    optimiser = Optimiser([("weight", own)], settings)
    peer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(5):
        own.grad, theirs.grad = rand(5, 7, seed=step + 1), rand(5, 7, seed=step + 1)
        optimiser.step()
        peer.step()
    torch.testing.assert_close(own, theirs)


def test_vectors_do_not_decay_and_parameters_without_gradient_stay() -> None:
    vector, idle = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, 4))
    vector.grad = torch.zeros(4)
    Optimiser([("norm.weight", vector), ("idle", idle)], Optim(decay=0.5)).step()
    assert vector.tolist() == [1.0] * 4
    assert bool((idle == 1).all())


@pytest.mark.parametrize(
    ("name", "shape", "hidden"),
    [
        ("layers.0.self_attn.q_a_proj.weight", (4, 4), True),
        ("layers.3.mlp.experts.gate_up_proj", (2, 4, 4), True),
        ("layers.3.mlp.gate_proj.weight", (4, 4), True),
        ("layers.3.mlp.gate.weight", (4, 4), False),
        ("layers.0.self_attn.indexer.weights_proj.weight", (4, 4), False),
        ("embed_tokens", (4, 4), False),
        ("lm_head.weight", (4, 4), False),
        ("norm.weight", (4,), False),
    ],
)
def test_which_parameters_are_matrices_of_hidden_layers(name: str, shape: tuple[int, ...], hidden: bool) -> None:
    assert is_hidden_matrix(name, torch.empty(shape)) is hidden


def test_clipping_scales_all_gradients_together() -> None:
    one, two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    one.grad, two.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert Optimiser([("a", one), ("b", two)], Optim(clip=1)).clip() == pytest.approx(5)
    assert [float(one.grad), float(two.grad)] == pytest.approx([0.6, 0.8])


def test_clipping_reports_gradients_that_are_not_finite() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([float("nan")])
    assert not torch.isfinite(torch.tensor(Optimiser([("a", parameter)], Optim()).clip()))


def run(optimiser: Optimiser, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for i, parameter in enumerate(parameters.values()):
            parameter.grad = rand(*parameter.shape, seed=100 * step + i)
        optimiser.step()


def test_state_continues_exactly_and_refuses_another_models() -> None:
    def made() -> dict[str, nn.Parameter]:
        return {"hidden": nn.Parameter(rand(6, 4)), "norm.weight": nn.Parameter(rand(4))}

    whole, first, second = made(), made(), made()
    run(Optimiser(whole.items(), Optim()), whole, range(4))
    before = Optimiser(first.items(), Optim())
    run(before, first, range(2))
    for name, parameter in second.items():
        parameter.data.copy_(first[name].data)
    after = Optimiser(second.items(), Optim())
    after.load_state({name: tensor.clone() for name, tensor in before.state().items()})
    run(after, second, range(2, 4))
    for name, parameter in whole.items():
        assert torch.equal(parameter, second[name])
    with pytest.raises(CheckpointError, match="hidden"):
        Optimiser([("norm.weight", second["norm.weight"])], Optim()).load_state(before.state())
    with pytest.raises(CheckpointError, match="square"):
        Optimiser(second.items(), Optim(kind="adamw")).load_state(before.state())


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="lr"):
        Optim(lr=0)
    with pytest.raises(InvalidRequest, match="clip"):
        Optim(clip=-1)
