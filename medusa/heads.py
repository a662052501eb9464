"""Medusa heads: residual blocks over the backbone's last hidden state. Knows tensors; knows nothing of trees or text.

B sequences, P positions, K heads, V vocabulary, D hidden
p_k = softmax(W2_k · (h + SiLU(W1_k · h + b_k)))                                            arXiv 2401.10774 §2.1.1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medusa.candidates import ranked_places, ranked_tokens
from medusa.config import HeadsConfig


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """What a backbone does to its lm_head's output before the softmax: `softcap · tanh(scale · z / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def slope(self, transformed: Tensor) -> Tensor | float:
        """Derivative by the raw logits, from the transformed ones."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - (transformed / self.softcap).square())


class LmHead(Protocol):
    """What heads read their features with: a backbone, or its lm_head over some tokens only."""

    @property
    def transform(self) -> LogitTransform: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class PartialLmHead:
    """A backbone's lm_head over some of its tokens."""

    project: Callable[[Tensor], Tensor]
    transform: LogitTransform

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [...,D] → logits of those tokens."""
        return self.transform(self.project(hidden))


class ResidualBlock(nn.Module):
    """`h + SiLU(W1 h + b)`, the identity plus a bump that starts at zero."""

    def __init__(self, hidden_size: int, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, hidden_size, **factory))
        self.bias = nn.Parameter(torch.zeros(hidden_size, **factory))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + F.silu(F.linear(hidden, self.weight, self.bias))


class MedusaHead(nn.Module):
    """One head: its residual blocks and, where the heads own theirs, its lm_head."""

    def __init__(self, config: HeadsConfig, hidden_size: int, vocab_size: int, **factory: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ResidualBlock(hidden_size, **factory) for _ in range(config.num_layers)])
        self.lm_head: nn.Linear | None = None
        if config.lm_heads == "own":
            self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False, **factory)

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class MedusaHeads(nn.Module):
    """K heads. A fresh set is exactly the backbone's own head K times over: blocks at zero, lm_heads a copy."""

    def __init__(
        self,
        config: HeadsConfig,
        *,
        hidden_size: int,
        vocab_size: int,
        lm_head_weight: Tensor | None = None,
        vocabulary: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """`lm_head_weight` [V,D] starts the heads' own lm_heads; without it they start at random.

        `vocabulary` (ascending ids) names the tokens that heads guess among when they share the backbone's lm_head;
        the backbone itself always scores all. Training looks at the whole vocabulary either way.
        """
        super().__init__()
        if vocabulary is not None and config.lm_heads != "shared":
            raise ValueError("a vocabulary of frequent tokens goes with shared lm_heads; own lm_heads score all tokens")
        self.vocabulary: Tensor | None
        self.register_buffer("vocabulary", None if vocabulary is None else vocabulary.to(device), persistent=False)
        self.config = config
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.heads = nn.ModuleList(
            [MedusaHead(config, hidden_size, vocab_size, dtype=dtype, device=device) for _ in range(config.num_heads)]
        )
        if lm_head_weight is not None:
            with torch.no_grad():
                for head in self.heads:
                    if head.lm_head is not None:
                        head.lm_head.weight.copy_(lm_head_weight)  # type: ignore[union-attr,operator]

    @property
    def num_heads(self) -> int:
        return self.config.num_heads

    def features(self, hidden: Tensor, num_heads: int | None = None) -> Tensor:
        """hidden [...,D] → what the lm_heads of the first `num_heads` (default all) heads read [...,K,D]."""
        return torch.stack([head(hidden) for head in self.heads[:num_heads]], dim=-2)

    def logits(self, hidden: Tensor, lm_head: LmHead, num_heads: int | None = None) -> Tensor:
        """hidden [...,D] → logits [...,K,V] of the first `num_heads` heads, through the backbone's soft-cap or scale."""
        features = self.features(hidden, num_heads)
        if self.config.lm_heads == "shared":
            return lm_head.logits(features)
        own = [F.linear(x, head.lm_head.weight) for x, head in zip(features.unbind(-2), self.heads, strict=False)]  # type: ignore[union-attr,arg-type]
        return lm_head.transform(torch.stack(own, dim=-2))

    @property
    def num_choices(self) -> int:
        """How many tokens a head guesses among."""
        return self.vocab_size if self.vocabulary is None else len(self.vocabulary)

    def guesses(self, hidden: Tensor, lm_head: LmHead, *, num_ranks: int, num_heads: int | None = None) -> Tensor:
        """hidden [...,D] → the heads' best tokens [...,K,R], best first; `lm_head` scores `vocabulary` or, if None, all."""
        return ranked_tokens(self.logits(hidden, lm_head, num_heads), num_ranks, self.vocabulary)

    def weighed_guesses(
        self,
        hidden: Tensor,
        lm_head: LmHead,
        *,
        num_ranks: int,
        num_heads: int | None = None,
        temperatures: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `guesses`, with what the heads think of each: tokens [...,K,R] and their log-probabilities [...,K,R].

        `temperatures` [K] divide the heads' logits first; the order of the guesses does not change with them.
        """
        logits = self.logits(hidden, lm_head, num_heads)
        places = ranked_places(logits, num_ranks)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperatures is not None:
            wide = wide / temperatures.to(wide.dtype)[:, None]
        log_probs = wide.gather(-1, places) - wide.logsumexp(dim=-1, keepdim=True)
        return places if self.vocabulary is None else self.vocabulary[places], log_probs.clamp_max(0)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.features(hidden)
