"""Greedy decoding replayed over answers that are known: what a tree would have accepted, without decoding again.

    P positions, K heads, R ranks, N tree nodes
A tree never changes a greedy answer. So the answer, and the ranks at which the heads guessed its tokens, say what each
step of any tree accepts: one forward an answer serves every tree. A hydra head's rank is the one after the answer's own
path, and no other path is ever accepted. A tree that is chosen for each context has to be proposed at every position.
Knows ranks and trees; knows no request, no cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medusa.backbone import Backbone
from medusa.dynamic_tree import DynamicTree
from medusa.heads import MedusaHeads
from medusa.losses import IGNORE, head_targets, true_path
from medusa.proposals import Proposer
from medusa.tree import Path, RowTrees, Tree
from medusa.tree_search import MAX_RANKS

MISSED = -1  # the token is not among the ranks looked at, or the answer has no such token
Pair = tuple[Sequence[int], Sequence[int]]  # prompt ids, answer ids


@dataclass(frozen=True, kw_only=True)
class _Positions:
    """An answer's tokens but the last, each as the root of a step: hidden states before it [P,D], what the heads should
    say after it [P,K] (−100: nothing), and the path [P,K] that they should go on from, the root first."""

    hidden: Tensor
    targets: Tensor
    path: Tensor


def _positions(backbone: Backbone, heads: MedusaHeads, pair: Pair, rows: int) -> Iterator[_Positions]:
    """`rows` at a time."""
    prompt, answer = pair
    own = slice(len(prompt) - 1, len(prompt) + len(answer) - 2)
    labels = torch.tensor([IGNORE] * len(prompt) + list(answer))
    ids = torch.tensor([[*prompt, *answer]], device=backbone.device)
    hidden = backbone.hidden_states(ids)[0, own].to(next(heads.parameters()).dtype)
    targets = head_targets(labels, heads.num_heads)[own]
    path = true_path(ids[0], heads.num_heads)[own]
    for parts in zip(hidden.split(rows), targets.split(rows), path.split(rows), strict=True):
        yield _Positions(hidden=parts[0], targets=parts[1], path=parts[2])


@torch.inference_mode()
def guessed_ranks(
    backbone: Backbone,
    heads: MedusaHeads,
    sequences: Iterable[Pair],
    *,
    num_ranks: int = MAX_RANKS,
    rows: int = 64,
) -> Iterator[Tensor]:
    """(prompt ids, answer ids) pairs → for each, ranks [P,K], P = answer tokens − 1: see `ranks_of`.

    Row p is where answer token p becomes the root of a step. `rows` bounds memory.
    """
    ranks = min(num_ranks, heads.num_choices)
    reader = backbone.lm_head_for(heads.vocabulary)
    for pair in sequences:
        found = [
            ranks_of(heads.guesses(part.hidden, reader, num_ranks=ranks, path=part.path).cpu(), part.targets)
            for part in _positions(backbone, heads, pair, rows)
        ]
        yield torch.cat(found) if found else torch.empty(0, heads.num_heads, dtype=torch.long)


def ranks_of(guesses: Tensor, targets: Tensor) -> Tensor:
    """The heads' best tokens [P,K,R], best first, and their targets [P,K] → rank of each target [P,K], or MISSED."""
    hit = (guesses == targets[..., None]) & (targets != IGNORE)[..., None]
    return torch.where(hit.any(dim=-1), hit.int().argmax(dim=-1), MISSED)


def num_steps(ranks: Tensor, tree: Tree) -> int:
    """Verify steps that an answer of P + 1 tokens takes; `ranks` [P,K] are those of its positions.

    The first token comes from prefill; a step emits the path that it accepts and the next root.
    """
    known = set(tree.paths)
    return steps_through([_accepted(row, known) for row in ranks.tolist()])


@torch.inference_mode()
def accepted_lengths(
    backbone: Backbone,
    heads: MedusaHeads,
    trees: Sequence[Tree | DynamicTree],
    sequences: Iterable[Pair],
    *,
    rows: int = 64,
) -> Iterator[list[list[int]]]:
    """(prompt ids, answer ids) pairs → for each, of each tree how many nodes [P] a step accepts whose root is answer token p.

    For trees of any kind, which are proposed at each position as decoding would. `rows` bounds memory.
    """
    for tree in trees:
        tree.check_fits(num_heads=heads.num_heads, vocab_size=heads.num_choices)
    propose, shapes = Proposer(heads, backbone), [tree.on(backbone.device) for tree in trees]
    for pair in sequences:
        found: list[list[int]] = [[] for _ in trees]
        for part in _positions(backbone, heads, pair, rows):
            for lengths, shape in zip(found, shapes, strict=True):
                if shape.depth == 0:
                    lengths += [0] * len(part.hidden)
                    continue
                tokens, proposed = propose(shape, part.path[:, 0], part.hidden)
                lengths += _num_right(tokens, proposed, part.targets.to(tokens.device)).tolist()
        yield found


def _num_right(tokens: Tensor, trees: RowTrees, targets: Tensor) -> Tensor:
    """Candidates [P,N] and what came after the root [P,K] → the depth of the deepest node [P] that stands on a right path."""
    wanted = torch.cat([tokens[:, :1], targets], dim=1).gather(1, trees.depths)
    right = F.pad(tokens == wanted, (0, 1), value=True)  # the last column: no node, wrong about nothing
    paths = trees.node_paths.flatten(1) % right.shape[1]
    along = right.gather(1, paths).view_as(trees.node_paths).all(dim=2)
    return torch.where(along, trees.depths, 0).amax(dim=1)


def steps_through(accepted: Sequence[int]) -> int:
    """Verify steps of an answer whose positions [P] accept so many nodes each."""
    position = steps = 0
    while position < len(accepted):
        position += 1 + accepted[position]
        steps += 1
    return steps


def _accepted(ranks: Sequence[int], known: set[Path]) -> int:
    """Length of the longest path of the tree that says what the answer says."""
    length = 0
    while length < len(ranks) and ranks[length] != MISSED and tuple(ranks[: length + 1]) in known:
        length += 1
    return length
