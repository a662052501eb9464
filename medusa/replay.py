"""Greedy decoding replayed over answers that are known: what a tree would have accepted, without decoding again.

    P positions, K heads, R ranks
A tree never changes a greedy answer. So the answer, and the ranks at which the heads guessed its tokens, say what each
step of any tree accepts: one forward an answer serves every tree. A hydra head's rank is the one after the answer's own
path, and no other path is ever accepted. Knows ranks and trees; knows no request, no cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from medusa.backbone import Backbone
from medusa.heads import MedusaHeads
from medusa.losses import IGNORE, head_targets, true_path
from medusa.tree import Path, Tree
from medusa.tree_search import MAX_RANKS

MISSED = -1  # the token is not among the ranks looked at, or the answer has no such token


@torch.inference_mode()
def guessed_ranks(
    backbone: Backbone,
    heads: MedusaHeads,
    sequences: Iterable[tuple[Sequence[int], Sequence[int]]],
    *,
    num_ranks: int = MAX_RANKS,
    rows: int = 64,
) -> Iterator[Tensor]:
    """(prompt ids, answer ids) pairs → for each, ranks [P,K], P = answer tokens − 1: see `ranks_of`.

    Row p is where answer token p becomes the root of a step. `rows` bounds memory.
    """
    ranks = min(num_ranks, heads.num_choices)
    reader = backbone.lm_head_for(heads.vocabulary)
    for prompt, answer in sequences:
        labels = torch.tensor([IGNORE] * len(prompt) + list(answer))
        own = slice(len(prompt) - 1, len(prompt) + len(answer) - 2)
        ids = torch.tensor([[*prompt, *answer]], device=backbone.device)
        hidden = backbone.hidden_states(ids)[0, own].to(next(heads.parameters()).dtype)
        targets = head_targets(labels, heads.num_heads)[own]
        path = true_path(ids[0], heads.num_heads)[own]
        found = [
            ranks_of(heads.guesses(part, reader, num_ranks=ranks, path=after).cpu(), wanted)
            for part, after, wanted in zip(hidden.split(rows), path.split(rows), targets.split(rows), strict=True)
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
    position = steps = 0
    table = ranks.tolist()
    while position < len(table):
        position += 1 + _accepted(table[position], known)
        steps += 1
    return steps


def _accepted(ranks: Sequence[int], known: set[Path]) -> int:
    """Length of the longest path of the tree that says what the answer says."""
    length = 0
    while length < len(ranks) and ranks[length] != MISSED and tuple(ranks[: length + 1]) in known:
        length += 1
    return length
