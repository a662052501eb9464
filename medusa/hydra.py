"""Sequential heads over a tree: each node's children are guessed from that node's own path. Knows tokens; knows no cache.

    B sequences, N tree nodes, F nodes of a level that have children, D hidden, V vocabulary, R ranks

A plain head's guesses are the same below every node of a depth. A hydra head reads the tokens on the way to the node too
(arXiv 2402.05109), so the tree is filled level by level, and the lm_head runs over the nodes that have children alone.
"""

from __future__ import annotations

from torch import Tensor

from medusa.candidates import ranked_tokens
from medusa.dynamic_tree import DynamicTree
from medusa.heads import LmHead, MedusaHeads
from medusa.tree import DeviceTree, Tree


def check_tree(heads: MedusaHeads, tree: Tree | DynamicTree) -> None:
    """ValueError for a tree that these heads cannot fill: too deep, too wide, or dynamic where they are hydra heads."""
    tree.check_fits(num_heads=heads.num_heads, vocab_size=heads.num_choices)
    if isinstance(tree, DynamicTree) and heads.config.kind == "hydra":
        raise ValueError(
            f"a {tree} is chosen from what all heads say of all nodes, and hydra heads speak of one path at a time; "
            "use a static tree, such as a number of nodes"
        )


def sequential_candidates(
    heads: MedusaHeads, tree: DeviceTree, root: Tensor, hidden: Tensor, lm_head: LmHead
) -> Tensor:
    """root [B] and hidden [B,D] → tokens [B,N]: node (r1,…,rk) carries the r_k-th best of head k after its parent's path.

    One product of the lm_head for each level; every shape follows from the tree.
    """
    tokens = root[:, None].repeat(1, tree.num_nodes)
    for head, level in enumerate(tree.levels):
        path = tokens[:, level.paths]  # [B,F,head+1]
        here = hidden[:, None].expand(-1, path.shape[1], -1)
        best = ranked_tokens(heads.logits_of(head, here, lm_head, path=path), level.width, heads.vocabulary)
        tokens[:, level.children] = best[:, level.parents, level.ranks]
    return tokens
