"""How far heads believe themselves: a temperature for each that makes its probabilities true. Knows heads and tokens.

    P positions, K heads, V tokens that heads guess among
Of the temperatures T in a fixed grid the one wins under which softmax(logits / T) gives the tokens that came the largest
likelihood (Guo et al., arXiv 1706.04599). Ranks, and so static trees, do not change with it; dynamic trees compare heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from medusa.backbone import Backbone
from medusa.heads import MedusaHeads
from medusa.losses import IGNORE, head_targets, true_path

TEMPERATURES = tuple(round(2 ** (step / 8), 4) for step in range(-12, 17))  # 0.35 … 4


def surprise(logits: Tensor, targets: Tensor, temperatures: Sequence[float]) -> Tensor:
    """logits [P,K,V], targets [P,K] (places among V; negative: none) → summed −log p in nats, [K] for each T, [T,K]."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    real = targets >= 0
    chosen = wide.gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
    return torch.stack(
        [((wide / t).logsumexp(dim=-1) - chosen / t).where(real, torch.zeros(())).sum(dim=0) for t in temperatures]
    )


@torch.inference_mode()
def fit_temperatures(
    backbone: Backbone,
    heads: MedusaHeads,
    sequences: Iterable[tuple[Sequence[int], Sequence[int]]],
    *,
    rows: int = 64,
) -> tuple[float, ...]:
    """A temperature for each head, on (prompt ids, answer ids) pairs, the answers being the backbone's own greedy ones.

    Tokens outside the heads' vocabulary say nothing of their confidence. `rows` bounds memory.
    """
    reader = backbone.lm_head_for(heads.vocabulary)
    total = torch.zeros(len(TEMPERATURES), heads.num_heads, dtype=torch.float64)
    for prompt, answer in sequences:
        ids = torch.tensor([[*prompt, *answer]], device=backbone.device)
        labels = ids[0].clone()
        labels[: len(prompt)] = IGNORE
        targets = _places(head_targets(labels, heads.num_heads), heads.vocabulary)
        hidden = backbone.hidden_states(ids)[0].to(next(heads.parameters()).dtype)
        path = true_path(ids[0], heads.num_heads)
        for part in (targets >= 0).any(dim=-1).nonzero().squeeze(1).split(rows):
            logits = heads.logits(hidden[part], reader, path=path[part])
            total += surprise(logits, targets[part], TEMPERATURES).cpu()
    return tuple(TEMPERATURES[best] for best in total.argmin(dim=0).tolist())


def _places(targets: Tensor, vocabulary: Tensor | None) -> Tensor:
    """Token ids [P,K] → their places in the vocabulary, −1 where they are not in it or there is no target."""
    if vocabulary is None:
        return targets.clamp_min(-1)
    place = torch.searchsorted(vocabulary, targets.contiguous()).clamp_max(len(vocabulary) - 1)
    return torch.where(vocabulary[place] == targets, place, -1)
