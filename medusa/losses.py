"""Losses of Medusa training. Pure functions of tensors; knows no optimiser, no worker, no file.

P label positions, S sequence, K heads, R ranks of soft labels, V vocabulary, D hidden
MEDUSA-1: L = Σ_k decay^k · CE(p_k(t), y[t+k+1])                                            arXiv 2401.10774 §2.2.1
MEDUSA-2: L = L_LM + λ0 · Σ_k decay^k · CE_k, L_LM = KL(p_original ‖ p) or next-token CE          §2.2.2, §2.3.2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medusa.heads import LogitTransform, MedusaHeads
from medusa.linear_loss import CHUNK_SIZE, Objective, SparseTarget, linear_loss

IGNORE = -100
HEAD_DECAY = 0.8

# What turns features [P,D] and what they are compared with into a summed loss: an lm_head, in chunks.
Reader = Callable[[Tensor, Objective], Tensor]


@dataclass(frozen=True, kw_only=True)
class HeadsLoss:
    """`loss` is differentiable; `sums` [K] are the heads' summed cross-entropies in nats, `counts` [K] their targets."""

    loss: Tensor
    sums: Tensor
    counts: Tensor

    @property
    def per_head(self) -> Tensor:
        """[K] mean cross-entropy."""
        return self.sums / self.counts.clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class SoftLabels:
    """The backbone's own best tokens [P,K,R] where each head's target stands, their shares [P,K,R] (summing to 1), and
    how much they weigh against the token itself."""

    tokens: Tensor
    shares: Tensor
    weight: float


def next_tokens(labels: Tensor) -> Tensor:
    """labels [...,S] → what the backbone's own head wants at each position: labels[t+1], −100 where there is none."""
    return F.pad(labels, (0, 1), value=IGNORE)[..., 1:]


def head_targets(labels: Tensor, num_heads: int) -> Tensor:
    """labels [...,S] (token, or −100 where it is no label) → targets [...,S,K]: head k at t wants labels[t+k+1].

    A target exists only where the backbone's own target labels[t+1] does: heads never learn from prompt positions.
    """
    length = labels.shape[-1]
    padded = F.pad(labels, (0, num_heads + 1), value=IGNORE)
    own = padded[..., 1 : length + 1]
    targets = torch.stack([padded[..., k + 1 : length + k + 1] for k in range(1, num_heads + 1)], dim=-1)
    return targets.masked_fill(own.unsqueeze(-1) == IGNORE, IGNORE)


def true_path(ids: Tensor, num_heads: int) -> Tensor:
    """ids [...,S] → [...,S,K], the tokens that come after each position, 0 past the end: the root and what follows it on
    the right path. Head k, whose target is the token after the first k of them, reads those k if it is a hydra head."""
    length = ids.shape[-1]
    padded = F.pad(ids, (0, num_heads))
    return torch.stack([padded[..., k : length + k] for k in range(1, num_heads + 1)], dim=-1)


def hard_target(targets: Tensor) -> SparseTarget:
    """targets [P], −100 for none."""
    return SparseTarget(tokens=targets.clamp_min(0).unsqueeze(1), shares=(targets != IGNORE).unsqueeze(1))


def soft_target(targets: Tensor, soft: SoftLabels, head: int) -> SparseTarget:
    """targets [P] of one head, mixed with the backbone's distribution there: (1 − weight) · label + weight · soft."""
    hard = hard_target(targets)
    real = hard.shares.to(soft.shares.dtype)
    return SparseTarget(
        tokens=torch.cat([hard.tokens, soft.tokens[:, head].long()], dim=1),
        shares=torch.cat([(1 - soft.weight) * real, soft.weight * real * soft.shares[:, head]], dim=1),
    )


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    transform: LogitTransform = LogitTransform(),
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Sum of the cross-entropies (nats) of `features` [P,D] through `weight` [V,D] against `targets` [P]; −100 is skipped."""
    return linear_loss([(features, weight)], hard_target(targets), transform=transform, chunk_size=chunk_size)


def heads_loss(
    features: Tensor,
    targets: Tensor,
    readers: Sequence[Reader],
    *,
    decay: float = HEAD_DECAY,
    denominator: float | None = None,
    soft: SoftLabels | None = None,
) -> HeadsLoss:
    """The heads' loss over features [P,K,D] and targets [P,K], head k read by `readers[k]`.

    The sum is divided by `denominator`, the number of label positions over *all* workers; without it, by those here
    (positions with a target for the first head).
    """
    num_heads = len(readers)
    if targets.shape != (features.shape[0], num_heads):
        raise ValueError(f"targets must be [{features.shape[0]}, {num_heads}], got {list(targets.shape)}")
    counts = (targets != IGNORE).sum(dim=0)
    wanted = [
        hard_target(targets[:, k]) if soft is None else soft_target(targets[:, k], soft, k) for k in range(num_heads)
    ]
    summed = torch.stack([read(features[:, k], wanted[k]) for k, read in enumerate(readers)])
    powers = torch.tensor([decay**k for k in range(1, num_heads + 1)], dtype=summed.dtype, device=summed.device)
    divisor = float(denominator) if denominator is not None else max(float(counts[0]), 1.0)
    return HeadsLoss(loss=(powers * summed).sum() / divisor, sums=summed.detach(), counts=counts)


def medusa1_loss(
    heads: MedusaHeads,
    hidden: Tensor,
    targets: Tensor,
    lm_head_weight: Tensor,
    *,
    transform: LogitTransform = LogitTransform(),
    decay: float = HEAD_DECAY,
    denominator: float | None = None,
    soft: SoftLabels | None = None,
    chunk_size: int = CHUNK_SIZE,
    path: Tensor | None = None,
) -> HeadsLoss:
    """`heads_loss` over hidden [P,D], the heads reading `lm_head_weight` or their own, the backbone frozen.

    `path` [P,K,D] are the heads' `path_embeddings` of the `true_path`, where they read it.
    """

    def reader(weight: Tensor) -> Reader:
        return lambda x, objective: linear_loss([(x, weight)], objective, transform=transform, chunk_size=chunk_size)

    own = [None if head.lm_head is None else head.lm_head.weight for head in heads.heads]  # type: ignore[union-attr]
    readers = [reader(lm_head_weight if weight is None else weight) for weight in own]  # type: ignore[arg-type]
    features = heads.features(hidden, path=path)
    return heads_loss(features, targets, readers, decay=decay, denominator=denominator, soft=soft)
