"""A tree for each context: the likeliest nodes of a large static one. Knows log-probabilities; knows no model and no text.

    B sequences, S nodes of the superset, N nodes kept, K heads, R ranks, L depth

A node's score is the sum of its heads' log-probabilities along its path, so it never exceeds its parent's: with ties
given to the shallower node the best N are prefix-closed by themselves. N is fixed, and so is every shape. A static tree
is the case in which N = S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medusa.tree import DeviceTree, Path, RowTrees, Tree
from medusa.tree_search import grow_paths

SUPERSET_NODES = 257  # 256 paths and the root


@dataclass(frozen=True, kw_only=True)
class DynamicTree:
    """The best `num_nodes` nodes of `superset` (in growth order), chosen anew for each sequence and step.

    `temperatures` [K] calibrate the heads: log-probabilities are those of their logits divided by them. Without, 1.
    """

    superset: Tree
    num_nodes: int
    temperatures: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_nodes <= self.superset.num_nodes:
            raise ValueError(
                f"a dynamic tree must keep 1 to {self.superset.num_nodes} nodes of its superset, got {self.num_nodes}"
            )
        if self.temperatures is not None and not all(value > 0 for value in self.temperatures):
            raise ValueError(f"head temperatures must lie above 0, got {list(self.temperatures)}")

    def check_fits(self, *, num_heads: int, vocab_size: int) -> None:
        """ValueError as of `Tree`; and for another number of temperatures than heads."""
        self.superset.check_fits(num_heads=num_heads, vocab_size=vocab_size)
        if self.temperatures is not None and len(self.temperatures) != num_heads:
            raise ValueError(f"{len(self.temperatures)} head temperatures were given for {num_heads} heads")

    def first(self, num_nodes: int) -> DynamicTree:
        """The same choice with fewer nodes: the first of those kept, since they stand in the order of their scores."""
        return replace(self, num_nodes=num_nodes)

    def __str__(self) -> str:
        return f"dynamic tree of {self.num_nodes}"

    @property
    def paths(self) -> tuple[Path, ...]:
        """The static tree of this size: what a dynamic one is expected to be worth at least."""
        return self.superset.first(self.num_nodes).paths

    def on(self, device: torch.device) -> DeviceTree | DeviceDynamicTree:
        """Its tables on a device; of one node there is nothing to choose."""
        if self.num_nodes == 1:
            return Tree.root_only().on(device)
        order = sorted(range(self.superset.num_nodes), key=lambda node: (self.superset.depths[node], node))
        given = self.temperatures
        return DeviceDynamicTree(
            superset=self.superset.on(device),
            num_nodes=self.num_nodes,
            order=torch.tensor(order, device=device),
            temperatures=None if given is None else torch.tensor(given[: self.superset.depth], device=device),
        )


@dataclass(frozen=True, kw_only=True)
class DeviceDynamicTree:
    """`order` [S] lists the superset's nodes, shallower ones first."""

    superset: DeviceTree
    num_nodes: int
    order: Tensor
    temperatures: Tensor | None

    @property
    def depth(self) -> int:
        return self.superset.depth

    @property
    def width(self) -> int:
        return self.superset.width


def node_scores(tree: DeviceTree, log_probs: Tensor) -> Tensor:
    """The ranked log-probabilities [B,K,R] of the heads → scores [B,S] of the nodes; the root's is 0."""
    own = log_probs[:, tree.depths[1:] - 1, tree.ranks[1:]]
    scores = torch.zeros(log_probs.shape[0], tree.num_nodes, dtype=log_probs.dtype, device=log_probs.device)
    parents = tree.parents[1:]
    for depth in range(1, tree.depth + 1):
        scores[:, 1:] = torch.where(tree.depths[1:] == depth, scores[:, parents] + own, scores[:, 1:])
    return scores


def best_nodes(tree: DeviceDynamicTree, scores: Tensor) -> Tensor:
    """scores [B,S] → the N nodes with the highest [B,N], best first; of equals the shallower, then the lower.

    Where scores never rise along a path, parents stand before their children, and each beginning is prefix-closed.
    """
    ranked = scores[:, tree.order].sort(dim=1, descending=True, stable=True).indices
    return tree.order[ranked[:, : tree.num_nodes]]


def rows_of(tree: DeviceTree, kept: Tensor) -> RowTrees:
    """The trees that the kept nodes [B,N] of a superset make; they must be prefix-closed and parents before children."""
    place = torch.full((kept.shape[0], tree.num_nodes + 1), -1, device=kept.device)
    place.scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))

    def renumber(nodes: Tensor) -> Tensor:
        """Nodes of the superset [B,…], −1 for none, as places among the kept: the last column of `place` is −1."""
        return place.gather(1, nodes.flatten(1) % place.shape[1]).view_as(nodes)

    return RowTrees(
        depths=tree.depths[kept],
        parents=renumber(tree.parents[kept]),
        node_paths=renumber(tree.node_paths[kept]),
        ancestor_mask=tree.ancestor_mask[kept[:, :, None], kept[:, None, :]],
        depth=tree.depth,
    )


def dynamic_candidates(
    tree: DeviceDynamicTree, root: Tensor, best: Tensor, log_probs: Tensor
) -> tuple[Tensor, RowTrees]:
    """root [B], the heads' ranked tokens [B,K,R] and their log-probabilities → tokens [B,N] and each row's tree of them."""
    superset = tree.superset
    kept = best_nodes(tree, node_scores(superset, log_probs))
    below = kept[:, 1:]
    batch = torch.arange(len(root), device=root.device)[:, None]
    tokens = torch.cat([root[:, None], best[batch, superset.depths[below] - 1, superset.ranks[below]]], dim=1)
    return tokens, rows_of(superset, kept)


def superset_tree(accuracy: Sequence[Sequence[float]] | None, paths: Sequence[Path]) -> Tree:
    """What a dynamic tree chooses from: the best large tree by the heads' measured `accuracy` [K][R], or these paths."""
    if accuracy is None:
        return Tree.grown(paths)
    return Tree.grown(grow_paths(torch.tensor(accuracy, dtype=torch.float64), SUPERSET_NODES))
