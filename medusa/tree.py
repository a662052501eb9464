"""Trees of candidate continuations. Knows ranks and shapes; knows no token ids, no text, no model.

    N nodes, L depth of the deepest node, P leaf paths
A path (r1, …, rk) names the node at depth k whose token is the r_k-th best of head k, below (r1, …, r_{k−1}).
Node 0 is the root, the token that the backbone itself already chose. Everything else follows from the paths.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

Path = tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """A prefix-closed set of paths, parents before children. Make one with `from_paths`, which sorts them, or `grown`."""

    paths: tuple[Path, ...]

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]]) -> Tree:
        """Tree of these paths; the root () is implied. ValueError for a path without its prefix or a negative rank."""
        known = {()} | {tuple(int(rank) for rank in path) for path in paths}
        for path in known:
            if any(rank < 0 for rank in path):
                raise ValueError(f"tree path {list(path)} has a negative rank; ranks count from 0")
            if path and path[:-1] not in known:
                raise ValueError(
                    f"tree path {list(path)} has no parent {list(path[:-1])}; a tree must be prefix-closed"
                )
        return cls(tuple(sorted(known, key=lambda path: (len(path), path))))

    @classmethod
    def grown(cls, paths: Iterable[Sequence[int]]) -> Tree:
        """Tree whose nodes keep the order of these paths: `first(n)` is what it was when it had n nodes.

        ValueError as in `from_paths`, and for a path that stands before its parent.
        """
        order = tuple(dict.fromkeys([(), *(tuple(int(rank) for rank in path) for path in paths)]))
        place = {path: node for node, path in enumerate(order)}
        assert cls.from_paths(order)
        for path in order[1:]:
            if place[path[:-1]] > place[path]:
                raise ValueError(
                    f"tree path {list(path)} stands before its parent {list(path[:-1])}; a tree grows downwards"
                )
        return cls(order)

    @classmethod
    def root_only(cls) -> Tree:
        """The tree of one node: plain decoding."""
        return cls.from_paths([])

    @classmethod
    def chain(cls, depth: int) -> Tree:
        """Each head's top guess alone: `depth` nodes below the root."""
        return cls.from_paths([(0,) * k for k in range(1, depth + 1)])

    @classmethod
    def full(cls, branching: Sequence[int]) -> Tree:
        """The Cartesian product of the heads' top `branching[k]` guesses, the paper's first tree."""
        level: list[Path] = [()]
        paths: list[Path] = []
        for width in branching:
            level = [(*path, rank) for path in level for rank in range(width)]
            paths += level
        return cls.from_paths(paths)

    def first(self, num_nodes: int) -> Tree:
        """The tree of the first `num_nodes` nodes: parents stand before children, so any such cut is a tree."""
        if not 1 <= num_nodes <= self.num_nodes:
            raise ValueError(f"num_nodes must lie in [1, {self.num_nodes}], the nodes of this tree, got {num_nodes}")
        return Tree(self.paths[:num_nodes])

    def __str__(self) -> str:
        return f"tree of {self.num_nodes}"

    @property
    def num_nodes(self) -> int:
        """N, the root included."""
        return len(self.paths)

    @cached_property
    def depth(self) -> int:
        """L, how many heads the tree needs."""
        return max(len(path) for path in self.paths)

    @cached_property
    def width(self) -> int:
        """How many of a head's best tokens the tree needs: its largest rank plus one (0 for the root alone)."""
        return max((rank + 1 for path in self.paths for rank in path), default=0)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of each node [N]."""
        return tuple(len(path) for path in self.paths)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Index of each node's parent [N]; −1 for the root."""
        index = {path: node for node, path in enumerate(self.paths)}
        return tuple(index[path[:-1]] if path else -1 for path in self.paths)

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Nodes without children [P]."""
        inner = set(self.parents)
        return tuple(node for node in range(self.num_nodes) if node not in inner)

    @cached_property
    def node_paths(self) -> Tensor:
        """Nodes from the root to each node [N, L+1]; a slot past a node's own depth is −1: no node, never accepted."""
        table = torch.full((self.num_nodes, self.depth + 1), -1)
        for node in range(self.num_nodes):
            walk = node
            for slot in range(self.depths[node], -1, -1):
                table[node, slot] = walk
                walk = self.parents[walk]
        return table

    @cached_property
    def ancestor_mask(self) -> Tensor:
        """[N,N] bool: may node i see node j? True for its ancestors and itself, and for nothing else."""
        mask = torch.zeros(self.num_nodes, self.num_nodes, dtype=torch.bool)
        for node in range(self.num_nodes):
            path = self.node_paths[node]
            mask[node, path[path >= 0]] = True
        return mask

    def check_fits(self, *, num_heads: int, vocab_size: int) -> None:
        """ValueError for a tree deeper than the heads or wider than the `vocab_size` tokens that a head guesses among."""
        if self.depth > num_heads:
            raise ValueError(
                f"the tree is {self.depth} deep but there are {num_heads} Medusa heads; use a tree of depth {num_heads} or less"
            )
        if self.width > vocab_size:
            raise ValueError(
                f"the tree takes a head's {self.width} best tokens but a head guesses among {vocab_size}; use smaller ranks"
            )

    def on(self, device: torch.device) -> DeviceTree:
        """The tree's tables as tensors on a device."""
        return DeviceTree(
            depths=torch.tensor(self.depths, device=device),
            parents=torch.tensor(self.parents, device=device),
            ranks=torch.tensor([path[-1] if path else 0 for path in self.paths], device=device),
            node_paths=self.node_paths.to(device),
            ancestor_mask=self.ancestor_mask.to(device),
            depth=self.depth,
            width=self.width,
            levels=tuple(level.on(device) for level in self.levels),
        )

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """What is filled from each depth, from the root down."""
        return tuple(self._level(depth) for depth in range(self.depth))

    def _level(self, depth: int) -> Level:
        children = [node for node in range(self.num_nodes) if self.depths[node] == depth + 1]
        inner = sorted({self.parents[node] for node in children})
        ranks = [self.paths[node][-1] for node in children]
        return Level(
            paths=self.node_paths[inner, : depth + 1],
            children=torch.tensor(children),
            parents=torch.tensor([inner.index(self.parents[node]) for node in children]),
            ranks=torch.tensor(ranks),
            width=max(ranks) + 1,
        )


@dataclass(frozen=True, kw_only=True)
class Level:
    """The F nodes of one depth that have children, and those C children: what is filled from it, and how.

    `paths` [F,depth+1] are the nodes from the root to each; `children` [C] are nodes, `parents` [C] their places among the
    F, `ranks` [C] and `width` as of a tree.
    """

    paths: Tensor
    children: Tensor
    parents: Tensor
    ranks: Tensor
    width: int

    def on(self, device: torch.device) -> Level:
        tables = {name: getattr(self, name).to(device) for name in ("paths", "children", "parents", "ranks")}
        return Level(**tables, width=self.width)


@dataclass(frozen=True, kw_only=True)
class DeviceTree:
    """A tree's tables on a device, as the decoder reads them. Shapes as in `Tree`; `levels` from the root down."""

    depths: Tensor
    parents: Tensor
    ranks: Tensor
    node_paths: Tensor
    ancestor_mask: Tensor
    depth: int
    width: int
    levels: tuple[Level, ...]

    @property
    def num_nodes(self) -> int:
        return self.depths.shape[0]

    def rows(self, batch: int) -> RowTrees:
        """This tree for each of `batch` sequences: views, nothing is copied."""
        return RowTrees(
            depths=self.depths.expand(batch, -1),
            parents=self.parents.expand(batch, -1),
            node_paths=self.node_paths.expand(batch, -1, -1),
            ancestor_mask=self.ancestor_mask.expand(batch, -1, -1),
            depth=self.depth,
        )


@dataclass(frozen=True, kw_only=True)
class RowTrees:
    """A tree of N nodes for each sequence, its own or all the same one. Parents stand before children.

    depths [B,N], parents [B,N] (−1 for the root), node_paths [B,N,L+1] (−1 past a node's own depth), ancestor_mask [B,N,N].
    """

    depths: Tensor
    parents: Tensor
    node_paths: Tensor
    ancestor_mask: Tensor
    depth: int

    @classmethod
    def linked(cls, *, depths: Tensor, parents: Tensor, depth: int) -> RowTrees:
        """The trees that these parents [B,N] make, whose nodes lie at `depths` [B,N], at most `depth`."""
        nodes = torch.arange(depths.shape[1], device=depths.device)
        above = F.pad(parents, (0, 1), value=-1)  # the last column: what stands above no node
        line = [nodes.expand_as(parents)]
        for _ in range(depth):
            line.append(above.gather(1, line[-1] % above.shape[1]))
        up = torch.stack(line, dim=-1)  # [B,N,L+1]: the node, its parent, …, −1 above the root
        slot = depths[..., None] - torch.arange(depth + 1, device=depths.device)
        return cls(
            depths=depths,
            parents=parents,
            node_paths=torch.where(slot >= 0, up.gather(2, slot.clamp_min(0)), -1),
            ancestor_mask=(up[..., None] == nodes).any(dim=2),
            depth=depth,
        )

    @property
    def num_nodes(self) -> int:
        return self.depths.shape[1]

    def depth_of(self, node: Tensor) -> Tensor:
        """node [B] → its depth [B]."""
        return self.depths.gather(1, node[:, None]).squeeze(1)

    def children_of(self, row: int) -> list[list[int]]:
        """The nodes right below each node of a row's tree [N], on the host: grammars walk it there."""
        children: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for node, parent in enumerate(self.parents[row].tolist()):
            if parent >= 0:
                children[parent].append(node)
        return children

    def path_to(self, node: Tensor) -> Tensor:
        """node [B] → the nodes from the root to it [B,L+1]."""
        return self.node_paths[torch.arange(len(node), device=node.device), node]
