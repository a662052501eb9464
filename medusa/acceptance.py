"""Which path of a verified tree is accepted: greedy, typical, rejection. Pure functions; knows no model and no cache.

    B sequences, N nodes, L depth, V vocabulary

Greedy and rejection acceptance are one walk: at the current node the backbone chooses a token (its argmax, or a keyed
draw from its distribution); a child that carries it is accepted and the walk goes on there; otherwise the token becomes
the next root. Since the proposal is deterministic, the output is that of choosing token after token without any tree.
Typical acceptance (arXiv 2401.10774 §2.3.1) judges each node by its probability instead, and takes the longest path.
A row limited to n nodes accepts none but the tree's first n, as if the tree ended there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medusa.native.walk import accepted_path, can_walk
from medusa.sampling import TYPICAL, SamplingRows, draw, filter_logits
from medusa.tree import RowTrees


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """For each sequence: the accepted node [B], how many nodes below the root were accepted [B], and the next root [B].

    `path` [B,L+1] holds the accepted nodes from the root on, −1 past the last.
    """

    node: Tensor
    num_accepted: Tensor
    next_root: Tensor
    path: Tensor

    @classmethod
    def at(cls, tree: RowTrees, node: Tensor, next_root: Tensor) -> Acceptance:
        """What follows from where a walk ended [B] and the token [B] that it ended with."""
        return cls(node=node, num_accepted=tree.depth_of(node), next_root=next_root, path=tree.path_to(node))


def accept(
    tree: RowTrees,
    tokens: Tensor,
    logits: Tensor,
    rows: SamplingRows,
    root_position: Tensor,
    *,
    early_exit: bool = False,
    fused: bool = False,
) -> Acceptance:
    """tokens [B,N] (the root first), logits [B,N,V] of the verified nodes, position [B] of the root in its sequence.

    Where rows ask for penalties, biases or a grammar, their logits are edited in place first. `early_exit` looks at the
    data on the way, and so only at nodes that are reached: worth it on a CPU, where our kernels do it where they can; a
    synchronisation elsewhere. `fused`: a greedy walk by Triton kernels.
    """
    for edit in rows.edits:
        edit.apply(logits, tokens, tree)
    if early_exit and can_walk(logits):
        node, next_root = accepted_path(logits, tokens, tree.parents, rows, root_position)
        return Acceptance.at(tree, node, next_root)
    if not rows.any_typical:
        return walk(tree, tokens, logits, rows, root_position, early_exit=early_exit, fused=fused)
    typical = accept_typical(tree, tokens, logits, rows, root_position)
    if not rows.any_walk:
        return typical
    walked = walk(tree, tokens, logits, rows, root_position, early_exit=early_exit, fused=fused)
    is_typical = rows.scheme == TYPICAL
    node, next_root = (
        torch.where(is_typical, mine, theirs)
        for mine, theirs in ((typical.node, walked.node), (typical.next_root, walked.next_root))
    )
    return Acceptance.at(tree, node, next_root)


def walk(
    tree: RowTrees,
    tokens: Tensor,
    logits: Tensor,
    rows: SamplingRows,
    root_position: Tensor,
    *,
    early_exit: bool = False,
    fused: bool = False,
) -> Acceptance:
    """Greedy and rejection acceptance. The backbone chooses only along the path walked; but where nobody looks at the data
    and choosing is a matter of logits alone, at all nodes at once."""
    if not early_exit and not rows.any_noise:
        return _walk_at_once(tree, tokens, logits, rows, fused=fused)
    node = torch.zeros_like(root_position)
    moving = torch.ones_like(node, dtype=torch.bool)
    next_root = torch.zeros_like(node)
    for depth in range(tree.depth + 1):
        chosen = draw(logits, rows, root_position + depth + 1, node)
        next_root = torch.where(moving, chosen, next_root)
        if depth == tree.depth:
            break
        match = (tree.parents == node[:, None]) & (tokens == chosen[:, None])
        if rows.any_limit:
            match &= _within(rows, tree)
        moving = moving & match.any(dim=-1)
        if early_exit and not moving.any():
            break
        node = torch.where(moving, match.to(torch.int8).argmax(dim=-1), node)
    return Acceptance.at(tree, node, next_root)


def _walk_at_once(
    tree: RowTrees, tokens: Tensor, logits: Tensor, rows: SamplingRows, *, fused: bool = False
) -> Acceptance:
    """The greedy walk without its steps: a node is reached when it and all above it carry what their parents choose."""
    if fused:
        from medusa import step_triton  # Triton is where CUDA builds of torch are

        return step_triton.walk(tree, tokens, logits, rows.max_nodes if rows.any_limit else None)
    chosen = logits.argmax(dim=-1)
    agrees = tokens == chosen.gather(1, tree.parents.clamp_min(0))
    agrees[:, 0] = True
    if rows.any_limit:
        agrees &= _within(rows, tree)
    reached = (agrees[:, None, :] | ~tree.ancestor_mask).all(dim=-1)
    node = torch.where(reached, tree.depths, -1).argmax(dim=-1)
    return Acceptance.at(tree, node, chosen.gather(1, node[:, None]).squeeze(1))


def accept_typical(
    tree: RowTrees, tokens: Tensor, logits: Tensor, rows: SamplingRows, root_position: Tensor
) -> Acceptance:
    """Accept x below its parent when p(x) > min(ε, δ·exp(−H)), p and H the backbone's at the parent and temperature.

    A token outside the request's top-k or top-p is not accepted either. The longest accepted path wins, between equals
    the one with the larger sum of log p, then the lower node.
    """
    batch, num_nodes = tokens.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    parents = tree.parents[:, 1:]
    log_probs = torch.log_softmax(logits.to(wide) / rows.temperature.to(wide)[:, None, None], dim=-1)
    entropy = -(log_probs.exp() * log_probs.clamp_min(torch.finfo(wide).min)).sum(dim=-1)
    threshold = torch.minimum(rows.epsilon[:, None], rows.delta[:, None] * torch.exp(-entropy))
    rows_of_batch = torch.arange(batch, device=tokens.device)[:, None]
    log_p = log_probs[rows_of_batch, parents, tokens[:, 1:]]
    good = log_p.exp() > threshold.gather(1, parents)
    if rows.any_filter:
        good &= _inside_filters(log_probs, parents, tokens[:, 1:], rows)
    if rows.any_limit:
        good &= _within(rows, tree)[:, 1:]

    accepted = torch.ones(batch, num_nodes, dtype=torch.bool, device=tokens.device)
    score = torch.zeros(batch, num_nodes, dtype=wide, device=tokens.device)
    for depth in range(1, tree.depth + 1):
        here = tree.depths[:, 1:] == depth
        accepted[:, 1:] = torch.where(here, accepted.gather(1, parents) & good, accepted[:, 1:])
        score[:, 1:] = torch.where(here, score.gather(1, parents) + log_p, score[:, 1:])
    reach = torch.where(accepted, tree.depths, -1)
    longest = reach == reach.max(dim=-1, keepdim=True).values
    node = score.masked_fill(~longest, float("-inf")).argmax(dim=-1)
    next_root = draw(logits, rows, root_position + tree.depth_of(node) + 1, node)
    return Acceptance.at(tree, node, next_root)


def _inside_filters(log_probs: Tensor, parents: Tensor, tokens: Tensor, rows: SamplingRows) -> Tensor:
    """Are those tokens [B,M] inside their rows' top-k and then top-p at their parents [B,M] of log_probs [B,N,V]? → [B,M] bool.

    Without sorting a vocabulary for each: what matters of a token is how many are better, and their mass; but where a row
    cuts twice, the mass that the first cut leaves.
    """
    batch = torch.arange(len(parents), device=parents.device)[:, None]
    at_parent = log_probs[batch, parents]
    if rows.any_two_filters:
        top_k, top_p = (x.repeat_interleave(parents.shape[1]) for x in (rows.top_k, rows.top_p))
        kept = filter_logits(at_parent.flatten(0, 1), top_k, top_p).isfinite().view_as(at_parent)
        return kept.gather(2, tokens[..., None]).squeeze(2)
    own = at_parent.gather(2, tokens[..., None])
    ids = torch.arange(log_probs.shape[-1], device=tokens.device)
    better = (at_parent > own) | ((at_parent == own) & (ids < tokens[..., None]))
    rank = better.sum(dim=-1)
    mass = at_parent.exp().masked_fill_(~better, 0).sum(dim=-1)
    top_k, top_p = rows.top_k[:, None], rows.top_p[:, None]
    return ((top_k == 0) | (rank < top_k)) & ((top_p == 1) | (mass < top_p) | (rank == 0))


def _within(rows: SamplingRows, tree: RowTrees) -> Tensor:
    """[B,N] bool: may this row accept this node?"""
    return torch.arange(tree.num_nodes, device=rows.max_nodes.device) < rows.max_nodes[:, None]
