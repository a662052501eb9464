"""A tree for each context: the likeliest nodes of a large one. Knows log-probabilities; knows no model and no text.

    B sequences, S nodes to choose from, N nodes kept, K heads, R ranks, L depth

A node's score is the sum of its heads' log-probabilities along its path, so it never exceeds its parent's: with ties
given to the shallower node the best N are prefix-closed by themselves. N is fixed, and so is every shape. Plain heads
choose from a static superset, and a static tree is the case in which N = S. Hydra heads, which must see a path before
they go on from it, search for their S nodes from the root down (hydra.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from medusa.tree import DeviceTree, Path, RowTrees, Tree
from medusa.tree_search import grow_paths

SUPERSET_NODES = 257  # 256 paths and the root
BEAM_NODES = 2  # hydra heads expand as many nodes as the static tree of so many times the nodes kept


@dataclass(frozen=True, kw_only=True)
class DynamicTree:
    """The best `num_nodes` nodes of `superset` (in growth order), chosen anew for each sequence and step.

    `temperatures` [K] calibrate the heads: log-probabilities are those of their logits divided by them. Without, 1.
    `searched` is how many nodes hydra heads search for, of which the best `num_nodes` are kept: as many, without.
    """

    superset: Tree
    num_nodes: int
    temperatures: tuple[float, ...] | None = None
    searched: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_nodes <= self.superset.num_nodes:
            raise ValueError(
                f"a dynamic tree of these heads has 1 to {self.superset.num_nodes} nodes, got {self.num_nodes}"
            )
        if self.temperatures is not None and not all(value > 0 for value in self.temperatures):
            raise ValueError(f"head temperatures must lie above 0, got {list(self.temperatures)}")

    def check_fits(self, *, num_heads: int, vocab_size: int) -> None:
        """ValueError as of `Tree`; and for another number of temperatures than heads."""
        self.superset.check_fits(num_heads=num_heads, vocab_size=vocab_size)
        if self.temperatures is not None and len(self.temperatures) != num_heads:
            raise ValueError(f"{len(self.temperatures)} head temperatures were given for {num_heads} heads")

    def first(self, num_nodes: int) -> DynamicTree:
        """The same choice with fewer nodes: the first of those kept, since they stand in the order of their scores. So the
        search stays that of the whole tree."""
        return replace(self, num_nodes=num_nodes, searched=self.searched or self.num_nodes)

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
            beams=self.beams,
        )

    @cached_property
    def beams(self) -> tuple[Beam, ...]:
        """How hydra heads search, for each depth that they reach."""
        wide = self.superset.first(min(BEAM_NODES * (self.searched or self.num_nodes), self.superset.num_nodes))
        return tuple(Beam(len(level.paths), level.width) for level in wide.levels)


class Beam(NamedTuple):
    """Of one depth: how many nodes a head is asked about, the likeliest, and how many children each of them gets."""

    num_parents: int
    ranks: int


@dataclass(frozen=True, kw_only=True)
class DeviceDynamicTree:
    """`order` [S] lists the superset's nodes, shallower ones first; `beams` as of a dynamic tree."""

    superset: DeviceTree
    num_nodes: int
    order: Tensor
    temperatures: Tensor | None
    beams: tuple[Beam, ...]

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


def highest(scores: Tensor, count: int) -> Tensor:
    """scores [B,S] → where the `count` highest stand [B,count], best first; of equals the first comes first."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def best_nodes(tree: DeviceDynamicTree, scores: Tensor) -> Tensor:
    """scores [B,S] → the N nodes with the highest [B,N], best first; of equals the shallower, then the lower.

    Where scores never rise along a path, parents stand before their children, and each beginning is prefix-closed.
    """
    return tree.order[highest(scores[:, tree.order], tree.num_nodes)]


def kept_rows(kept: Tensor, *, depths: Tensor, parents: Tensor, depth: int) -> RowTrees:
    """The trees that the kept nodes [B,N] make of S nodes with `depths` and `parents` [B,S], −1 for the root's.

    The kept must be prefix-closed, parents before children.
    """
    place = torch.full((len(kept), parents.shape[1] + 1), -1, device=kept.device)  # the last column: of no node
    place.scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
    above = parents.gather(1, kept) % place.shape[1]
    return RowTrees.linked(depths=depths.gather(1, kept), parents=place.gather(1, above), depth=depth)


def dynamic_candidates(
    tree: DeviceDynamicTree, root: Tensor, best: Tensor, log_probs: Tensor
) -> tuple[Tensor, RowTrees]:
    """root [B], the heads' ranked tokens [B,K,R] and their log-probabilities → tokens [B,N] and each row's tree of them."""
    superset = tree.superset
    kept = best_nodes(tree, node_scores(superset, log_probs))
    below = kept[:, 1:]
    batch = torch.arange(len(root), device=root.device)[:, None]
    tokens = torch.cat([root[:, None], best[batch, superset.depths[below] - 1, superset.ranks[below]]], dim=1)
    rows = superset.rows(len(root))
    return tokens, kept_rows(kept, depths=rows.depths, parents=rows.parents, depth=superset.depth)


def superset_tree(accuracy: Sequence[Sequence[float]] | None, paths: Sequence[Path]) -> Tree:
    """What a dynamic tree chooses from: the best large tree by the heads' measured `accuracy` [K][R], or these paths."""
    if accuracy is None:
        return Tree.grown(paths)
    return Tree.grown(grow_paths(torch.tensor(accuracy, dtype=torch.float64), SUPERSET_NODES))
