"""Medusa heads: residual blocks over the backbone's last hidden state. Knows tensors; knows nothing of trees or text.

B sequences, P positions, K heads, V vocabulary, D hidden, R ranks
p_k = softmax(W2_k · (h + SiLU(W1_k · h + b_k)))                                            arXiv 2401.10774 §2.1.1
With kind hydra W1_k reads [h; e_0; …; e_{k−1}], the embeddings of the root and of the tokens below it on the path that
head k goes on from, so it needs the path (hydra.py).                                       arXiv 2402.05109 §3
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
from medusa.linear import Linear


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
    """What heads see of a backbone: its lm_head, over all tokens or some, and its embeddings."""

    @property
    def transform(self) -> LogitTransform: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def embed(self, ids: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class PartialLmHead:
    """A backbone's lm_head over some of its tokens; `embed` knows all of them."""

    project: Callable[[Tensor], Tensor]
    transform: LogitTransform
    embed: Callable[[Tensor], Tensor]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [...,D] → logits of those tokens."""
        return self.transform(self.project(hidden))


class ResidualBlock(nn.Module):
    """`h + SiLU(W1 [h; beside] + b)`, the identity plus a bump that starts at zero; `num_read` vectors lie beside h."""

    def __init__(self, hidden_size: int, num_read: int = 0, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, (1 + num_read) * hidden_size, **factory))
        self.bias = nn.Parameter(torch.zeros(hidden_size, **factory))
        self.packed: Linear | None = None

    def forward(self, hidden: Tensor, beside: Tensor | None = None) -> Tensor:
        seen = hidden if beside is None else torch.cat([hidden, beside.flatten(-2)], dim=-1)
        if self.packed is None or self.training:
            return hidden + F.silu(F.linear(seen, self.weight, self.bias))
        return hidden + F.silu(self.packed(seen) + self.bias)


class MedusaHead(nn.Module):
    """One head: its residual blocks, the first of which reads the path, and, where the heads own theirs, its lm_head."""

    def __init__(self, config: HeadsConfig, head: int, hidden_size: int, vocab_size: int, **factory: Any) -> None:
        super().__init__()
        self.num_read = config.num_read(head)
        widths = [self.num_read] + [0] * (config.num_layers - 1)
        self.blocks = nn.ModuleList([ResidualBlock(hidden_size, width, **factory) for width in widths])
        self.lm_head: nn.Linear | None = None
        if config.lm_heads == "own":
            self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False, **factory)

    def forward(self, hidden: Tensor, path: Tensor | None = None) -> Tensor:
        """hidden [...,D] and the path's embeddings [...,≥ num_read,D] (None where none is read) → features [...,D]."""
        if self.num_read and path is None:
            raise ValueError("hydra heads read the tokens of the path; give `path`, the root first")
        beside = None if path is None else path[..., : self.num_read, :]
        for block in self.blocks:
            hidden = block(hidden, beside)
            beside = None
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
        the backbone itself always scores all. The losses of `losses.py` look at whatever lm_head they are given.
        """
        super().__init__()
        if vocabulary is not None and config.lm_heads != "shared":
            raise ValueError("a vocabulary of frequent tokens goes with shared lm_heads; own lm_heads score all tokens")
        self.vocabulary: Tensor | None
        self.register_buffer("vocabulary", None if vocabulary is None else vocabulary.to(device), persistent=False)
        self._stacked: list[tuple[Tensor, Tensor]] = []  # of each depth, all heads' weights [K,D,D] and biases [K,1,D]
        self.config = config
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.heads = nn.ModuleList(
            [
                MedusaHead(config, k, hidden_size, vocab_size, dtype=dtype, device=device)
                for k in range(config.num_heads)
            ]
        )
        if lm_head_weight is not None:
            with torch.no_grad():
                for head in self.heads:
                    if head.lm_head is not None:
                        head.lm_head.weight.copy_(lm_head_weight)  # type: ignore[union-attr,operator]

    @property
    def num_heads(self) -> int:
        return self.config.num_heads

    def pack(self, prepare: Callable[[Tensor], Linear]) -> None:
        """Let `prepare` (weight → product) lay the blocks' weights out for decoding, which sees nothing learned later."""
        for head in self.heads:
            for block in head.blocks:  # type: ignore[union-attr]
                block.packed = prepare(block.weight)  # type: ignore[operator,union-attr]

    def stack(self) -> None:
        """Lay the blocks of one depth side by side, for decoding: one product for all heads where launches are what costs.

        Nothing is kept twice, the heads' parameters become views. Hydra heads read different paths and stay as they are.
        """
        if self.config.kind != "medusa":
            return
        stacked = []
        for blocks in zip(*(head.blocks for head in self.heads), strict=True):  # type: ignore[arg-type]
            weight, bias = (
                torch.stack([getattr(block, name).detach() for block in blocks]) for name in ("weight", "bias")
            )
            for block, own_weight, own_bias in zip(blocks, weight, bias, strict=True):
                block.weight.data, block.bias.data = own_weight, own_bias
            stacked.append((weight, bias[:, None]))
        self._stacked = stacked

    def _apply(self, *args: Any, **kwargs: Any) -> MedusaHeads:
        """Moved or cast, the heads are stacked no more: the views would be of what they were."""
        self._stacked = []
        return super()._apply(*args, **kwargs)

    def path_embeddings(self, path: Tensor | None, embed: Callable[[Tensor], Tensor]) -> Tensor | None:
        """path [...,J] token ids, the root first → what the heads read of them [...,J,D]; None for heads that read none.

        Of unit mean square, since what a backbone scales its embeddings by is its own affair, and without gradient: heads
        take embeddings as they find them.
        """
        if self.config.kind == "medusa" or path is None:
            return None
        embedded = embed(path).detach()
        return F.rms_norm(embedded, embedded.shape[-1:]).to(next(self.parameters()).dtype)

    def features(self, hidden: Tensor, num_heads: int | None = None, *, path: Tensor | None = None) -> Tensor:
        """hidden [...,D] → what the lm_heads of the first `num_heads` (default all) heads read [...,K,D].

        `path` [...,K,D] are the `path_embeddings` of the path that the heads go on from, each from as much as it reads.
        """
        if self._stacked and not self.training:
            flat = hidden.reshape(1, -1, self.hidden_size)
            for weight, bias in self._stacked:
                weight, bias = weight[:num_heads], bias[:num_heads]
                flat = flat.expand(len(weight), -1, -1)
                flat = flat + F.silu(torch.baddbmm(bias, flat, weight.mT))
            return flat.transpose(0, 1).reshape(*hidden.shape[:-1], -1, self.hidden_size)
        return torch.stack([head(hidden, path) for head in self.heads[:num_heads]], dim=-2)

    def logits(
        self, hidden: Tensor, lm_head: LmHead, num_heads: int | None = None, *, path: Tensor | None = None
    ) -> Tensor:
        """hidden [...,D] → logits [...,K,V] of the first `num_heads` heads, through the backbone's soft-cap or scale.

        `path` [...,K] are the token ids that hydra heads read, the root first.
        """
        features = self.features(hidden, num_heads, path=self.path_embeddings(path, lm_head.embed))
        if self.config.lm_heads == "shared":
            return lm_head.logits(features)
        return torch.stack([self.read(k, x, lm_head) for k, x in enumerate(features.unbind(-2))], dim=-2)

    def logits_of(self, head: int, hidden: Tensor, lm_head: LmHead, *, path: Tensor | None = None) -> Tensor:
        """As `logits`, of head 0 … K−1 alone: [...,V]. `path` need not be longer than what it reads."""
        features = self.heads[head](hidden, self.path_embeddings(path, lm_head.embed))
        return self.read(head, features, lm_head)

    def read(self, head: int, features: Tensor, lm_head: LmHead) -> Tensor:
        """features [...,D] of a head → its logits [...,V], by the lm_head that is its own or the backbone's."""
        own = self.heads[head].lm_head
        return lm_head.logits(features) if own is None else lm_head.transform(F.linear(features, own.weight))  # type: ignore[arg-type,union-attr]

    @property
    def num_choices(self) -> int:
        """How many tokens a head guesses among."""
        return self.vocab_size if self.vocabulary is None else len(self.vocabulary)

    def guesses(
        self,
        hidden: Tensor,
        lm_head: LmHead,
        *,
        num_ranks: int,
        num_heads: int | None = None,
        path: Tensor | None = None,
    ) -> Tensor:
        """hidden [...,D] → the heads' best tokens [...,K,R], best first; `lm_head` scores `vocabulary` or, if None, all.

        Hydra heads guess what follows `path` [...,K], token ids.
        """
        return ranked_tokens(self.logits(hidden, lm_head, num_heads, path=path), num_ranks, self.vocabulary)

    def weighed_tokens(
        self, logits: Tensor, num_ranks: int, temperatures: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Heads' logits [...,V] → their best tokens [...,R] and what the heads think of each, log-probabilities [...,R].

        `temperatures` divide the logits first; the order of the tokens does not change with them.
        """
        places = ranked_places(logits, num_ranks)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperatures is not None:
            wide = wide / temperatures.to(wide.dtype)
        log_probs = (wide.gather(-1, places) - wide.logsumexp(dim=-1, keepdim=True)).clamp_max(0)
        return places if self.vocabulary is None else self.vocabulary[places], log_probs

    def forward(self, hidden: Tensor, path: Tensor | None = None) -> Tensor:
        return self.features(hidden, path=path)
