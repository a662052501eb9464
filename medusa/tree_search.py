"""From how often the heads are right to the best tree. Knows hit counts and step times; knows no request.

    K heads, R ranks, N nodes
The worth of a path is the product of its ranks' accuracies; the worth of a tree, the sum over its nodes: the expected
number of accepted nodes when heads err independently.                                        arXiv 2401.10774 §2.3.3
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa.backbone import Backbone
from medusa.heads import MedusaHeads
from medusa.losses import IGNORE, head_targets, true_path
from medusa.tree import Path

MAX_RANKS = 16


@dataclass(frozen=True, kw_only=True)
class HitTable:
    """`hits` [K,R]: how often the r-th guess of head k was the token; `counts` [K]: positions at which head k had a target."""

    hits: Tensor
    counts: Tensor

    @property
    def accuracy(self) -> Tensor:
        """[K,R] float64; each head by its own count, since later heads have fewer targets."""
        return self.hits.double() / self.counts.double().clamp_min(1)[:, None]

    def __add__(self, other: HitTable) -> HitTable:
        return HitTable(hits=self.hits + other.hits, counts=self.counts + other.counts)


def count_hits(guesses: Tensor, targets: Tensor) -> HitTable:
    """The heads' ranked guesses [P,K,R] and targets [P,K] (−100: none) → hits by rank."""
    real = targets != IGNORE
    hits = (guesses == targets[..., None]) & real[..., None]
    return HitTable(hits=hits.sum(dim=0), counts=real.sum(dim=0))


@torch.inference_mode()
def measure_hits(
    backbone: Backbone,
    heads: MedusaHeads,
    sequences: Iterable[tuple[Sequence[int], Sequence[int]]],
    *,
    num_ranks: int = MAX_RANKS,
    rows: int = 64,
) -> HitTable:
    """Hits on (prompt ids, answer ids) pairs, the answers being the backbone's own greedy ones. `rows` bounds memory.

    Hydra heads are given the answer's own path: what a tree grows by is how often a head is right after a right path.
    """
    ranks = min(num_ranks, heads.num_choices)
    reader = backbone.lm_head_for(heads.vocabulary)
    total = HitTable(hits=torch.zeros(heads.num_heads, ranks).long(), counts=torch.zeros(heads.num_heads).long())
    for prompt, answer in sequences:
        ids = torch.tensor([[*prompt, *answer]], device=backbone.device)
        labels = ids[0].clone()
        labels[: len(prompt)] = IGNORE
        targets, path = head_targets(labels, heads.num_heads), true_path(ids[0], heads.num_heads)
        hidden = backbone.hidden_states(ids)[0].to(next(heads.parameters()).dtype)
        wanted = (targets[:, 0] != IGNORE).nonzero().squeeze(1)
        for part in wanted.split(rows):
            guesses = heads.guesses(hidden[part], reader, num_ranks=ranks, path=path[part])
            table = count_hits(guesses, targets[part])
            total = total + HitTable(hits=table.hits.cpu(), counts=table.counts.cpu())
    return total


def grow_paths(accuracy: Tensor, num_nodes: int) -> list[Path]:
    """The best `num_nodes − 1` paths below the root, in the order in which a greedy search takes them.

    The order is nested: its first n − 1 paths are the best tree of n nodes. A path's worth never exceeds its parent's
    or its elder sibling's, so next siblings and first children are the only candidates. Fewer come back when paths run out.
    """
    table = accuracy.tolist()
    num_heads, num_ranks = len(table), len(table[0]) if table else 0
    ranked = [sorted(range(num_ranks), key=lambda r, row=row: -row[r]) for row in table]  # type: ignore[misc]
    grown: list[Path] = []
    frontier: list[tuple[float, int, Path, tuple[int, ...]]] = []

    def offer(parent_worth: float, parent: Path, places: tuple[int, ...]) -> None:
        depth = len(parent)
        if depth < num_heads and places[-1] < num_ranks:
            rank = ranked[depth][places[-1]]
            worth = parent_worth * table[depth][rank]
            if worth > 0:
                heapq.heappush(frontier, (-worth, depth + 1, (*parent, rank), places))

    offer(1.0, (), (0,))
    while frontier and len(grown) < num_nodes - 1:
        worth, depth, path, places = heapq.heappop(frontier)
        grown.append(path)
        own = table[depth - 1][path[-1]]
        offer(-worth / own, path[:-1], (*places[:-1], places[-1] + 1))
        offer(-worth, path, (*places, 0))
    return grown


def expected_tokens(accuracy: Tensor, paths: Iterable[Path]) -> float:
    """Tokens that a step is expected to emit: the next root, and each path with the probability of its acceptance."""
    table = accuracy.tolist()
    total = 1.0
    for path in paths:
        worth = 1.0
        for depth, rank in enumerate(path):
            worth *= table[depth][rank]
        total += worth
    return total


def best_size(expected: Mapping[int, float], step_s: Mapping[int, float]) -> int:
    """The number of nodes with the most expected tokens per second; the smaller of equals."""
    return max(sorted(step_s), key=lambda nodes: expected[nodes] / step_s[nodes])
