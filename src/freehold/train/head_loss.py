"""Cross-entropy through the output head without ever holding all logits: in blocks of rows, gradients on the way.

The logits of a batch are far larger than anything else in a small model (rows · vocabulary), and are read and written
many times by the plain way. Source: the idea is that of Wijmans et al. 2024, "Cut Your Losses".

Shape suffixes: R rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 1024  # rows


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RH: Tensor, weight_VH: Tensor, target_R: Tensor, share_R: Tensor, half: bool
    ) -> Tensor:
        dtype = torch.bfloat16 if half else hidden_RH.dtype
        sums = torch.promote_types(hidden_RH.dtype, torch.float32)
        weight = weight_VH.to(dtype)
        wanted = hidden_RH.requires_grad or weight_VH.requires_grad
        hidden_grad, weight_grad = torch.empty_like(hidden_RH), torch.zeros_like(weight_VH)
        total = torch.zeros((), dtype=torch.float64)
        for first in range(0, hidden_RH.shape[0], _BLOCK):
            part = slice(first, first + _BLOCK)
            hidden, target, share = hidden_RH[part].to(dtype), target_R[part, None], share_R[part]
            logits = F.linear(hidden, weight).to(sums)
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += (share.double() * (log_sum - logits.gather(1, target))[:, 0].double()).sum()
            if wanted:  # d loss / d logits = softmax - one-hot
                grad = logits.sub_(log_sum).exp_()
                grad.scatter_add_(1, target, torch.full_like(log_sum, -1.0))
                grad = grad.mul_(share[:, None]).to(dtype)
                hidden_grad[part] = grad @ weight
                weight_grad += (grad.T @ hidden).to(weight_grad.dtype)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total.to(sums)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * gradients[0], weight_grad * gradients[0], None, None, None


def head_loss(
    hidden_RH: Tensor, weight_VH: Tensor, target_R: Tensor, weight_R: Tensor, *, half: bool = False
) -> Tensor:
    """Σ weight · (-log softmax(hidden · Wᵀ)[target]) / Σ weight: a scalar with gradients to hidden and W.

    Rows of weight 0 are left out; 0.0 if all are. half: products in bf16, sums and softmax in fp32.
    """
    kept_R = weight_R.nonzero()[:, 0]
    if not kept_R.numel():
        return hidden_RH.sum() * 0.0
    share_R = weight_R[kept_R] / weight_R.sum()
    loss: Tensor = _HeadLoss.apply(hidden_RH[kept_R], weight_VH, target_R[kept_R], share_R, half)  # type: ignore[no-untyped-call]
    return loss
