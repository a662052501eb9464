"""Candidate tokens of a tree from the heads' logits. Knows ranks and token ids; knows no model and no cache.

B sequences, N nodes, F nodes of a level that are gone on from, K heads, V vocabulary, R ranks
"""

from __future__ import annotations

import torch
from torch import Tensor

from medusa.tree import DeviceTree, Level
from medusa.triton_support import has_triton


def ranked_places(logits: Tensor, num_ranks: int) -> Tensor:
    """logits [...,V] → where the `num_ranks` best stand [...,R], best first; of equal logits the first comes first.

    On a CPU float32 is looked at first, where no tie among the best means that there is nothing to order. On a GPU two
    Triton kernels do what `ranked_by_keys` does.
    """
    if logits.device.type == "cuda" and has_triton():
        from medusa import ranks_triton

        return ranks_triton.ranked_places(logits, num_ranks)
    if logits.device.type == "cpu" and logits.dtype == torch.float32 and num_ranks < logits.shape[-1]:
        best = logits.topk(num_ranks + 1, dim=-1)
        if (best.values[..., 1:] < best.values[..., :-1]).all():  # a NaN is not less either
            return best.indices[..., :-1]
    return ranked_by_keys(logits, num_ranks)


def ranked_by_keys(logits: Tensor, num_ranks: int) -> Tensor:
    """As `ranked_places`, on any device and for any number of ranks.

    `topk` orders ties as it likes, so value and place are ranked as one integer: a low-precision logit ties often.
    """
    bits = logits.to(torch.float32).contiguous().view(torch.int32).to(torch.int64)
    ordered = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    places = torch.arange(logits.shape[-1], device=logits.device)
    keys = torch.topk(ordered * 2**31 - places, num_ranks, dim=-1).values
    return -keys & (2**31 - 1)


def ranked_tokens(logits: Tensor, num_ranks: int, vocabulary: Tensor | None = None) -> Tensor:
    """logits [...,V] → ids of the `num_ranks` best tokens [...,R], best first; of equal logits the lowest id comes first.

    Where the logits are those of a `vocabulary` [V] of ascending ids, those ids come back.
    """
    places = ranked_places(logits, num_ranks)
    return places if vocabulary is None else vocabulary[places]


def static_candidates(tree: DeviceTree, root: Tensor, best: Tensor | None) -> Tensor:
    """root [B] and the heads' ranked tokens [B,K,R] → tokens [B,N]: node (r1,…,rk) carries the r_k-th best of head k.

    The one-node tree needs no heads: its `best` is None.
    """
    if tree.num_nodes == 1 or best is None:
        return root[:, None]
    return torch.cat([root[:, None], best[:, tree.depths[1:] - 1, tree.ranks[1:]]], dim=1)


def fill_children(tokens: Tensor, level: Level, logits: Tensor, vocabulary: Tensor | None = None) -> None:
    """Write the children of a level into tokens [B,N]: each is its parent's token of its rank, from logits [B,F,V].

    Tokens are ranked and named as in `ranked_tokens`.
    """
    best = ranked_tokens(logits, level.width, vocabulary)
    tokens[:, level.children] = best[:, level.parents, level.ranks]
