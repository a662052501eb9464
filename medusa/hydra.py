"""Sequential heads over a tree: each node's children are guessed from that node's own path. Knows tokens; knows no cache.

    B sequences, N tree nodes, F nodes of a level that are gone on from, D hidden, V vocabulary, R ranks, L depth

A plain head's guesses are the same below every node of a depth. A hydra head reads the tokens on the way to the node too
(arXiv 2402.05109), so the tree is filled level by level, and the lm_head runs over the nodes that have children alone. A
dynamic tree is searched for in the same way: of each level the likeliest nodes go on (as in EAGLE-2, arXiv 2406.16858).
"""

from __future__ import annotations

import torch
from torch import Tensor

from medusa.candidates import fill_children
from medusa.dynamic_tree import DeviceDynamicTree, highest, kept_rows
from medusa.heads import LmHead, MedusaHeads
from medusa.tree import DeviceTree, RowTrees


def sequential_candidates(
    heads: MedusaHeads, tree: DeviceTree, root: Tensor, hidden: Tensor, lm_head: LmHead
) -> Tensor:
    """root [B] and hidden [B,D] → tokens [B,N]: node (r1,…,rk) carries the r_k-th best of head k after its parent's path.

    One product of the lm_head for each level; every shape follows from the tree.
    """
    tokens = root[:, None].expand(-1, tree.num_nodes).clone()
    for head, level in enumerate(tree.levels):
        path = tokens[:, level.paths]  # [B,F,head+1]
        here = hidden[:, None].expand(-1, path.shape[1], -1)
        fill_children(tokens, level, heads.logits_of(head, here, lm_head, path=path), heads.vocabulary)
    return tokens


def searched_candidates(
    heads: MedusaHeads, tree: DeviceDynamicTree, root: Tensor, hidden: Tensor, lm_head: LmHead
) -> tuple[Tensor, RowTrees]:
    """root [B] and hidden [B,D] → tokens [B,N] and each row's tree of them: the N likeliest of all nodes that a beam saw.

    At each depth the F likeliest nodes (`tree.beams`) get R children, and these their scores: a child's never exceeds its
    parent's, so what is kept is prefix-closed. Every shape follows from the beams.
    """
    batch = torch.arange(len(root), device=root.device)[:, None]
    paths, scores = root[:, None, None], root.new_zeros(len(root), 1, dtype=torch.float32)  # [B,F,head+1], [B,F]
    nodes = torch.zeros_like(root)[:, None]  # [B,F]: which of all nodes those are
    seen = [(root[:, None], scores, nodes - 1, nodes)]  # of each level: tokens, scores, parents, depths
    num_seen = 1
    for head, (num_parents, ranks) in enumerate(tree.beams):
        going_on = highest(scores, num_parents)
        paths, scores, nodes = paths[batch, going_on], scores[batch, going_on], nodes[batch, going_on]
        here = hidden[:, None].expand(-1, num_parents, -1)
        heat = None if tree.temperatures is None else tree.temperatures[head]
        guesses, log_probs = heads.weighed_tokens(heads.logits_of(head, here, lm_head, path=paths), ranks, heat)
        paths = torch.cat([paths[:, :, None].expand(-1, -1, ranks, -1), guesses[..., None]], dim=-1).flatten(1, 2)
        scores = (scores[..., None] + log_probs).flatten(1)
        parents = nodes.repeat_interleave(ranks, dim=1)
        nodes = torch.arange(num_seen, num_seen + num_parents * ranks, device=root.device).expand_as(parents)
        seen.append((paths[..., -1], scores, parents, torch.full_like(parents, head + 1)))
        num_seen += num_parents * ranks
    tokens, scores, parents, depths = (torch.cat(levels, dim=1) for levels in zip(*seen, strict=True))
    kept = highest(scores, tree.num_nodes)
    return tokens.gather(1, kept), kept_rows(kept, depths=depths, parents=parents, depth=len(tree.beams))
