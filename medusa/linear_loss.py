"""Losses of a linear readout, chunk by chunk: logits for all positions never exist at once. Knows tensors alone.

P positions, C of a chunk, J tokens of a sparse target, V vocabulary, D hidden
A readout is a sum of products z = Σ_i x_i · W_iᵀ: one for an lm_head, two where a low-rank adapter lies beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from medusa.heads import LogitTransform

CHUNK_SIZE = 256
Terms = Sequence[tuple[Tensor, Tensor]]


class Objective(Protocol):
    """What logits are compared with."""

    def measure(self, rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [C,V] of some rows, which may be overwritten → the rows' summed loss, its gradient by the logits."""


@dataclass(frozen=True, kw_only=True)
class SparseTarget:
    """Cross-entropy (nats) against distributions over few tokens: `tokens` [P,J] with `shares` [P,J] of the mass.

    A hard label is one token with the whole share; a row whose shares are 0 counts for nothing.
    """

    tokens: Tensor
    shares: Tensor

    def measure(self, rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        tokens, shares = self.tokens[rows], self.shares[rows].to(logits.dtype)
        mass = shares.sum(dim=1)
        log_z = torch.logsumexp(logits, dim=1)
        loss = (mass * log_z).sum() - (shares * logits.gather(1, tokens)).sum()
        grad = logits.sub_(log_z.unsqueeze(1)).exp_().mul_(mass.unsqueeze(1))
        return loss, grad.scatter_add_(1, tokens, -shares)


@dataclass(frozen=True, kw_only=True)
class TeacherTarget:
    """KL(teacher ‖ p) in nats, the teacher read from `hidden` [P,D] through its own `weight` [V,D], without gradient."""

    hidden: Tensor
    weight: Tensor
    transform: LogitTransform

    def measure(self, rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        wanted = self.transform(F.linear(self.hidden[rows], self.weight)).to(logits.dtype).log_softmax(dim=1)
        log_p = logits.sub_(torch.logsumexp(logits, dim=1, keepdim=True))
        teacher = wanted.exp()
        loss = (teacher * wanted.sub_(log_p)).sum()
        return loss, log_p.exp_().sub_(teacher)


class _LinearLoss(torch.autograd.Function):
    """The gradients are made on the way forward, while a chunk's logits exist, so no product is computed twice."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, objective: Objective, transform: LogitTransform, chunk_size: int, *tensors: Tensor
    ) -> Tensor:
        half = len(tensors) // 2
        features, weights = tensors[:half], tensors[half:]
        grads = [
            torch.zeros_like(t) if need else None for t, need in zip(tensors, ctx.needs_input_grad[3:], strict=True)
        ]
        accumulate = torch.promote_types(features[0].dtype, torch.float32)
        total = torch.zeros((), dtype=accumulate, device=features[0].device)
        for start in range(0, features[0].shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            raw = F.linear(features[0][rows], weights[0])
            for x, weight in zip(features[1:], weights[1:], strict=True):
                raw += F.linear(x[rows], weight)
            logits = transform(raw).to(accumulate)
            slope = transform.slope(logits)
            loss, grad = objective.measure(rows, logits)
            total += loss
            if any(g is not None for g in grads):
                if isinstance(slope, Tensor) or slope != 1.0:
                    grad.mul_(slope)
                grad = grad.to(features[0].dtype)
                for i, (x, weight) in enumerate(zip(features, weights, strict=True)):
                    by_features, by_weight = grads[i], grads[half + i]
                    if by_features is not None:
                        by_features[rows] = grad @ weight
                    if by_weight is not None:
                        by_weight.addmm_(grad.t(), x[rows])
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        scaled = [None if g is None else g * grad_output.to(g.dtype) for g in ctx.saved_tensors]
        return None, None, None, *scaled


def linear_loss(
    terms: Terms,
    objective: Objective,
    *,
    transform: LogitTransform = LogitTransform(),
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Sum over rows of `objective` of transform(Σ x_i · W_iᵀ), for `terms` of features [P,D_i] and weights [V,D_i].

    Peak memory is a few times `chunk_size · V` logits, whatever P.
    """
    features, weights = zip(*terms, strict=True)
    return _LinearLoss.apply(objective, transform, chunk_size, *features, *weights)  # type: ignore[no-untyped-call,no-any-return]
