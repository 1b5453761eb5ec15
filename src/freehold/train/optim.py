"""The optimiser: Muon for the matrices of hidden layers, AdamW for everything else (or for everything).

Muon orthogonalises the momentum of a matrix (every singular value near 1) by some Newton-Schulz steps, so that rare
directions move as much as common ones. All matrices of one shape, of all layers and all experts, go through it in one
batch of products: a stack [E, O, I] of experts is E matrices, and the stacked gate and up halves are two matrices.
Embedding, head, router, the indexer's head weights, norms and biases are not such matrices.

An update of Muon is scaled to the root mean square that AdamW's has, so that one learning rate means the same for both.

Source: Jordan et al. 2024 (Muon: the polynomial), Liu et al. 2025, "Muon is scalable for LLM training" (decoupled
decay, RMS matching); Loshchilov & Hutter 2019 (AdamW).
Shape suffixes: B matrices of one shape, E experts, O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from freehold.errors import CheckpointError, InvalidRequest

Kind: TypeAlias = Literal["muon", "adamw"]
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, with the steepest slope at 0 that stays near 1
_RMS = 0.2  # of an AdamW update, about
_NOT_HIDDEN = ("embed_tokens", "lm_head.weight", "mlp.gate.weight", "weights_proj.weight")
_HALVES = "gate_up_proj"


@dataclass(frozen=True, slots=True)
class Optim:
    """lr: the peak rate; matrix_lr: that of Muon's matrices, if another. decay: decoupled weight decay, not of
    vectors. clip: the norm of all gradients together that is not exceeded; 0 is no limit."""

    kind: Kind = "muon"
    lr: float = 3e-3
    matrix_lr: float | None = None
    decay: float = 0.1
    clip: float = 1.0
    momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    newton_schulz: int = 5

    def __post_init__(self) -> None:
        for name in ("lr", "matrix_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise InvalidRequest(f"{name} = {value!r} must be above 0 and below 1", param=name)
        for name in ("decay", "clip"):
            if getattr(self, name) < 0:
                raise InvalidRequest(f"{name} = {getattr(self, name)!r} must not be negative", param=name)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes a parameter: a matrix, or a stack of matrices, of a hidden layer."""
    return parameter.ndim >= 2 and not name.endswith(_NOT_HIDDEN)


def orthogonalise(matrices_BOI: Tensor, steps: int) -> Tensor:
    """Matrices [B, O, I] with singular values moved near 1 (about 0.7 to 1.2 after 5 steps); signs and vectors stay.

    A matrix of zeros stays so.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices_BOI.shape[1] > matrices_BOI.shape[2]
    x = matrices_BOI.transpose(1, 2) if tall else matrices_BOI
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-20)  # the norm bounds the largest singular value
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


class Optimiser:
    """Steps a model's named parameters. `step` reads `.grad` and leaves it; a parameter without one is left alone.

    All state is tensors by name (`state`, `load_state`), so that a run resumes exactly.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], settings: Optim) -> None:
        self.settings = settings
        self.parameters = dict(parameters)
        self.steps = 0
        muon = settings.kind == "muon"
        self._matrices = [name for name, p in self.parameters.items() if muon and is_hidden_matrix(name, p)]
        hidden = set(self._matrices)
        self._others = [name for name in self.parameters if name not in hidden]
        self._momentum = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self._square = {name: torch.zeros_like(self.parameters[name]) for name in self._others}

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def clip(self) -> float:
        """Scale the gradients down to `settings.clip` together. Returns their norm before; it may be inf or nan."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        if self.settings.clip:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.settings.clip, norm)
        return float(norm)

    @torch.no_grad()
    def step(self, factor: float = 1.0) -> None:
        """Update every parameter that has a gradient, at `factor` of the peak rates."""
        self.steps += 1
        lr = self.settings.lr * factor
        matrix_lr = lr if self.settings.matrix_lr is None else self.settings.matrix_lr * factor
        by_shape: dict[tuple[int, int], list[str]] = {}
        for name in self._matrices:
            if self.parameters[name].grad is not None:
                by_shape.setdefault(_matrix_shape(name, self.parameters[name]), []).append(name)
        for (rows, columns), names in by_shape.items():
            self._step_muon(names, rows, columns, matrix_lr)
        self._step_adamw([name for name in self._others if self.parameters[name].grad is not None], lr)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on, besides the parameters. The tensors are not copies."""
        held = {f"momentum.{name}": tensor for name, tensor in self._momentum.items()}
        held |= {f"square.{name}": tensor for name, tensor in self._square.items()}
        return held | {"steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave. Raises CheckpointError if it is of other parameters or of another kind."""
        own = self.state()
        if own.keys() != state.keys():
            name = min(own.keys() ^ state.keys())
            raise CheckpointError(f"optimiser state: {name} is in {'the run' if name in own else 'the file'} only")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise CheckpointError(
                    f"optimiser state: {name} is {list(state[name].shape)}, expected {list(tensor.shape)}"
                )
            tensor.copy_(state[name])
        self.steps = int(state["steps"])

    def _step_muon(self, names: list[str], rows: int, columns: int, lr: float) -> None:
        settings = self.settings
        directions = []
        for name in names:
            grad, momentum = self.parameters[name].grad, self._momentum[name]
            assert grad is not None
            momentum.lerp_(grad, 1 - settings.momentum)
            directions.append(grad.lerp(momentum, settings.momentum).view(-1, rows, columns))  # Nesterov
        update_BOI = orthogonalise(torch.cat(directions), settings.newton_schulz)
        scale = -lr * _RMS * max(rows, columns) ** 0.5
        for name, update in zip(names, torch.split(update_BOI, [len(d) for d in directions]), strict=True):
            parameter = self.parameters[name]
            parameter.mul_(1 - lr * settings.decay)
            parameter.add_(update.reshape(parameter.shape), alpha=scale)

    def _step_adamw(self, names: list[str], lr: float) -> None:
        if not names:
            return
        settings = self.settings
        parameters: list[Tensor] = [self.parameters[name] for name in names]
        grads = [p.grad for p in parameters if p.grad is not None]
        momentum, square = [self._momentum[name] for name in names], [self._square[name] for name in names]
        torch._foreach_lerp_(momentum, grads, 1 - settings.beta1)
        torch._foreach_mul_(square, settings.beta2)
        torch._foreach_addcmul_(square, grads, grads, 1 - settings.beta2)
        if decaying := [p for p in parameters if p.ndim >= 2]:
            torch._foreach_mul_(decaying, 1 - lr * settings.decay)
        root = torch._foreach_sqrt(square)
        torch._foreach_div_(root, (1 - settings.beta2**self.steps) ** 0.5)
        torch._foreach_add_(root, settings.eps)
        torch._foreach_addcdiv_(parameters, momentum, root, -lr / (1 - settings.beta1**self.steps))


def _matrix_shape(name: str, parameter: Tensor) -> tuple[int, int]:
    rows, columns = parameter.shape[-2:]
    return (rows // 2 if name.endswith(_HALVES) else rows), columns
