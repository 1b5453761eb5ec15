"""Cross-entropy in blocks: value and gradients of the plain one."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from freehold.train import head_loss as module
from freehold.train.head_loss import head_loss


def plain(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    losses = F.cross_entropy(F.linear(hidden, weight), target, reduction="none")
    return (losses * share).sum() / share.sum()


def inputs(rows: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return (
        torch.randn(rows, 8, dtype=torch.float64, requires_grad=True),
        torch.randn(50, 8, dtype=torch.float64, requires_grad=True),
        torch.randint(0, 50, (rows,)),
        torch.rand(rows, dtype=torch.float64) * (torch.arange(rows) % 3 > 0),
    )


def test_value_and_gradients_over_several_blocks(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(module, "_BLOCK", 7)
    hidden, weight, target, share = inputs(40)
    expected = plain(hidden, weight, target, share)
    wanted = torch.autograd.grad(expected * 3, (hidden, weight))
    found = head_loss(hidden, weight, target, share)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found * 3, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_rows_of_no_weight_alone_are_no_loss() -> None:
    hidden, weight, target, share = inputs(5)
    found = head_loss(hidden, weight, target, share * 0)
    assert float(found.detach()) == 0.0
    assert not torch.autograd.grad(found, hidden)[0].any()


def test_half_is_near() -> None:
    hidden, weight, target, share = (t.detach().float() if t.is_floating_point() else t for t in inputs(40))
    exact = head_loss(hidden, weight, target, share)
    assert abs(float(head_loss(hidden, weight, target, share, half=True) - exact)) < 0.03 * float(exact)
