"""Answers to training rows: label masks, splits, packing, and the order of batches. Knows ids and tensors; no model, no Ray.

    B packed rows, S tokens of a row, K heads, L lanes
Rows are cut into L lanes whatever the number of workers, and each step takes as much from each lane. So a run is one
function of data and seed, on one worker or on several, fresh or resumed.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from medusa.losses import IGNORE, head_targets, next_tokens
from pipelines.prompts import share_of
from pipelines.records import Answer

PADDING = -1  # the document that fills a row up
BLOCK = 64  # packs among whose positions a batch is drawn; so many are in memory where hidden states are not kept

Pack = tuple[Answer, ...]


def labels_of(row: Answer) -> list[int]:
    """[S] of a row: the token where the backbone wrote it (the end of sequence too), −100 on the prompt."""
    return [IGNORE] * len(row.prompt_ids) + row.response_ids


def length_of(row: Answer) -> int:
    return len(row.prompt_ids) + len(row.response_ids)


def num_positions(row: Answer) -> int:
    """Positions of a row at which the first head has a target: they predict two answer tokens."""
    return max(0, min(len(row.response_ids) - 1, length_of(row) - 2))


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


def pack_rows(rows: Sequence[Answer], capacity: int) -> list[Pack]:
    """Rows put together, `capacity` tokens at most in a pack, each where it leaves least room; a longer row stands alone."""
    packs: list[list[Answer]] = []
    room: list[tuple[int, int]] = []  # (tokens that still fit, pack), ascending
    for row in sorted(rows, key=lambda row: (-length_of(row), row.id)):
        place = bisect.bisect_left(room, (length_of(row), -1))
        if place < len(room):
            space, index = room.pop(place)
        else:
            space, index = capacity, len(packs)
            packs.append([])
        packs[index].append(row)
        if space > length_of(row):
            bisect.insort(room, (space - length_of(row), index))
    return [tuple(pack) for pack in packs]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Packs as tensors: `ids`, `documents` and `own` [B,S], `targets` [B,S,K]; −100 where there is no label.

    Labels never reach from one document into the next.
    """

    ids: Tensor
    documents: Tensor
    own: Tensor
    targets: Tensor


def collate(packs: Sequence[Pack], num_heads: int, device: torch.device | str = "cpu") -> Packed:
    """Packs filled up on the right to the longest of them."""
    longest = max(sum(map(length_of, pack)) for pack in packs)
    shape = (len(packs), longest)
    ids = torch.zeros(shape, dtype=torch.long)
    documents = torch.full(shape, PADDING)
    own = torch.full(shape, IGNORE)
    targets = torch.full((*shape, num_heads), IGNORE)
    for b, pack in enumerate(packs):
        start = 0
        for number, row in enumerate(pack):
            here = slice(start, start := start + length_of(row))
            labels = torch.tensor(labels_of(row), dtype=torch.long)
            ids[b, here] = torch.tensor(row.prompt_ids + row.response_ids, dtype=torch.long)
            documents[b, here] = number
            own[b, here] = next_tokens(labels)
            targets[b, here] = head_targets(labels, num_heads)
    return Packed(ids=ids.to(device), documents=documents.to(device), own=own.to(device), targets=targets.to(device))


@dataclass(kw_only=True)
class Order:
    """Which items of packs (`sizes` of them in each) a step takes: all once an epoch, in a fresh order each.

    Packs are shuffled, then the items among each `BLOCK` packs that follow one another, so that a step needs few packs.
    A pure function of sizes, seed and step: a resumed run sees what the first would have seen.
    """

    sizes: Sequence[int]
    seed: int
    _epochs: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.offsets = torch.tensor([0, *self.sizes]).cumsum(0)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def batch(self, step: int, batch_size: int) -> Tensor:
        """Items [batch_size] of step 0, 1, …; epochs are cut into steps without remainder."""
        first, last = step * batch_size // len(self), ((step + 1) * batch_size - 1) // len(self)
        order = torch.cat([self._epoch(epoch) for epoch in range(first, last + 1)])
        start = step * batch_size - first * len(self)
        return order[start : start + batch_size]

    def pack_of(self, items: Tensor) -> Tensor:
        return torch.searchsorted(self.offsets, items, right=True) - 1

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            for old in [known for known in self._epochs if known < epoch - 1]:
                del self._epochs[old]
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            packs = torch.randperm(len(self.sizes), generator=generator)
            blocks = [
                torch.cat([torch.arange(int(self.offsets[p]), int(self.offsets[p + 1])) for p in block])
                for block in packs.split(BLOCK)
            ]
            mixed = [block[torch.randperm(len(block), generator=generator)] for block in blocks]
            self._epochs[epoch] = torch.cat(mixed)
        return self._epochs[epoch]
