"""Losses of Medusa training. Pure functions of tensors; knows no optimiser, no worker, no file.

P label positions, S sequence, K heads, V vocabulary, D hidden
MEDUSA-1: L = Σ_k decay^k · CE(p_k(t), y[t+k+1])                                            arXiv 2401.10774 §2.2.1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medusa.heads import LogitTransform, MedusaHeads

IGNORE = -100
HEAD_DECAY = 0.8


@dataclass(frozen=True, kw_only=True)
class HeadsLoss:
    """`loss` is differentiable; `per_head` [K] is each head's mean cross-entropy in nats; `counts` [K] its targets."""

    loss: Tensor
    per_head: Tensor
    counts: Tensor


def head_targets(labels: Tensor, num_heads: int) -> Tensor:
    """labels [...,S] (token, or −100 where it is no label) → targets [...,S,K]: head k at t wants labels[t+k+1].

    A target exists only where the backbone's own target labels[t+1] does: heads never learn from prompt positions.
    """
    length = labels.shape[-1]
    padded = F.pad(labels, (0, num_heads + 1), value=IGNORE)
    own = padded[..., 1 : length + 1]
    targets = torch.stack([padded[..., k + 1 : length + k + 1] for k in range(1, num_heads + 1)], dim=-1)
    return targets.masked_fill(own.unsqueeze(-1) == IGNORE, IGNORE)


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ CE(transform(x·Wᵀ), y) without ever holding more than `chunk_size` rows of logits.

    The gradients are made on the way forward, while a chunk's logits exist, so the product is never computed twice.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, features: Tensor, weight: Tensor, targets: Tensor, transform: LogitTransform, chunk_size: int
    ) -> Tensor:
        need_features, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_features = torch.zeros_like(features) if need_features else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        accumulate = torch.float64 if features.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=accumulate, device=features.device)
        for start in range(0, features.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            wanted = targets[rows]
            real = wanted != IGNORE
            index = wanted.clamp_min(0).unsqueeze(1)
            logits = transform(F.linear(features[rows], weight)).to(accumulate)
            log_z = torch.logsumexp(logits, dim=-1)
            total += ((log_z - logits.gather(1, index).squeeze(1)) * real).sum()
            if not (need_features or need_weight):
                continue
            slope = transform.slope(logits)
            grad = logits.sub_(log_z.unsqueeze(1)).exp_()
            grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=accumulate))
            grad.mul_(slope).mul_(real.unsqueeze(1))
            grad = grad.to(features.dtype)
            if grad_features is not None:
                grad_features[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), features[rows])
        ctx.save_for_backward(grad_features, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        grad_features, grad_weight = ctx.saved_tensors
        scaled = [None if g is None else g * grad_output.to(g.dtype) for g in (grad_features, grad_weight)]
        return scaled[0], scaled[1], None, None, None


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    transform: LogitTransform = LogitTransform(),
    chunk_size: int = 256,
) -> Tensor:
    """Sum of the cross-entropies (nats) of `features` [P,D] through `weight` [V,D] against `targets` [P]; −100 is skipped.

    Peak memory is `chunk_size · V` logits, whatever P.
    """
    return _LinearCrossEntropy.apply(features, weight, targets, transform, chunk_size)  # type: ignore[no-untyped-call]


def medusa1_loss(
    heads: MedusaHeads,
    hidden: Tensor,
    targets: Tensor,
    lm_head_weight: Tensor,
    *,
    transform: LogitTransform = LogitTransform(),
    decay: float = HEAD_DECAY,
    denominator: float | None = None,
    chunk_size: int = 256,
) -> HeadsLoss:
    """The heads' loss over hidden [P,D] and targets [P,K], the backbone frozen.

    The sum is divided by `denominator`, the number of label positions over *all* workers; without it, by those here
    (positions with a target for the first head).
    """
    if targets.shape != (hidden.shape[0], heads.num_heads):
        raise ValueError(f"targets must be [{hidden.shape[0]}, {heads.num_heads}], got {list(targets.shape)}")
    features = heads.features(hidden)
    counts = (targets != IGNORE).sum(dim=0)
    sums = []
    for k, head in enumerate(heads.heads):
        weight = lm_head_weight if head.lm_head is None else head.lm_head.weight  # type: ignore[union-attr]
        sums.append(
            linear_cross_entropy(features[:, k], weight, targets[:, k], transform=transform, chunk_size=chunk_size)  # type: ignore[arg-type]
        )
    summed = torch.stack(sums)
    powers = torch.tensor([decay**k for k in range(1, heads.num_heads + 1)], dtype=summed.dtype, device=summed.device)
    divisor = float(denominator) if denominator is not None else max(float(counts[0]), 1.0)
    return HeadsLoss(
        loss=(powers * summed).sum() / divisor,
        per_head=(summed / counts.clamp_min(1)).detach(),
        counts=counts,
    )
