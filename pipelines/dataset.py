"""Answers to training positions: label masks, splits, hidden states, and the order of batches. Knows tensors, no Ray.

    S tokens of a row, P positions, K heads, D hidden, L lanes
Rows are cut into L lanes whatever the number of workers, and each step takes the same number of positions from each
lane. So a run is one function of data and seed, on one worker or on several, fresh or resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa.backbone import Backbone
from medusa.losses import IGNORE, head_targets
from pipelines.prompts import share_of
from pipelines.records import Answer

_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What the heads learn from: `hidden` [P,D] and `targets` [P,K] (−100: none). Every position has head 1's target."""

    hidden: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return self.hidden.shape[0]


def labels_of(row: Answer) -> list[int]:
    """[S] of a row: the token where the backbone wrote it (the end of sequence too), −100 on the prompt."""
    return [IGNORE] * len(row.prompt_ids) + row.response_ids


def split_rows(rows: Sequence[Answer], holdout_share: float) -> tuple[list[Answer], list[Answer]]:
    """(rows to learn from, rows held out). All turns of a prompt fall on the same side, on every run.

    A share above 0 holds out one prompt at least, so that small data are measured too.
    """
    places = {row.prompt_id: share_of(row.prompt_id, "holdout") for row in rows}
    chosen = {prompt_id for prompt_id, place in places.items() if place < holdout_share}
    if holdout_share > 0 and places:
        chosen.add(min(places, key=lambda prompt_id: places[prompt_id]))
    learn = [row for row in rows if row.prompt_id not in chosen]
    return learn, [row for row in rows if row.prompt_id in chosen]


def lane_rows(rows: Sequence[Answer], lane: int, num_lanes: int) -> list[Answer]:
    """The rows of one lane; the lanes' sizes differ by one at most."""
    return list(rows[lane::num_lanes])


@torch.inference_mode()
def positions_of(backbone: Backbone, rows: Sequence[Answer], num_heads: int) -> Positions:
    """Hidden states and targets of every position at which some head has a target; each row's are computed once.

    Rows of like length share a forward, padded on the right, which a causal model does not see.
    """
    hidden: list[Tensor] = []
    targets: list[Tensor] = []
    for batch in _batches(sorted(rows, key=lambda row: (len(row.prompt_ids) + len(row.response_ids), row.id))):
        longest = max(len(row.prompt_ids) + len(row.response_ids) for row in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long, device=backbone.device)
        labels = torch.full_like(ids, IGNORE)
        for i, row in enumerate(batch):
            tokens = row.prompt_ids + row.response_ids
            ids[i, : len(tokens)] = torch.tensor(tokens)
            labels[i, : len(tokens)] = torch.tensor(labels_of(row))
        wanted = head_targets(labels, num_heads)
        kept = wanted[..., 0] != IGNORE
        hidden.append(backbone.hidden_states(ids)[kept])
        targets.append(wanted[kept])
    if not hidden:
        empty = torch.empty(0, backbone.hidden_size, dtype=backbone.dtype, device=backbone.device)
        return Positions(hidden=empty, targets=torch.empty(0, num_heads, dtype=torch.long, device=backbone.device))
    return Positions(hidden=torch.cat(hidden).clone(), targets=torch.cat(targets).clone())


def batch_indices(num_positions: int, batch_size: int, step: int, *, seed: int) -> Tensor:
    """Positions [batch_size] of one step of a lane: a fresh permutation for each epoch, cut into steps without remainder.

    A pure function of its arguments, so a resumed run sees what the first would have seen.
    """
    wanted = range(step * batch_size, (step + 1) * batch_size)
    first, last = wanted.start // num_positions, (wanted.stop - 1) // num_positions
    order = torch.cat([_permutation(num_positions, epoch, seed) for epoch in range(first, last + 1)])
    start = wanted.start - first * num_positions
    return order[start : start + batch_size]


def _permutation(size: int, epoch: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(size, generator=generator)


def _batches(rows: Sequence[Answer]) -> list[list[Answer]]:
    """Neighbours together while the padded batch stays within the token budget; a long row stands alone."""
    batches: list[list[Answer]] = []
    for row in rows:
        length = len(row.prompt_ids) + len(row.response_ids)
        if batches and length * (len(batches[-1]) + 1) <= _TOKENS_AT_ONCE:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
