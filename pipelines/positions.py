"""MEDUSA-1's positions: the backbone's hidden states with the heads' targets, lane by lane. Knows a backbone; no Ray.

    P positions, K heads, D hidden, R ranks of soft labels, S tokens of a pack
The order of batches is the same whether hidden states are kept or computed again, so the quota changes how fast a run
is and not what it learns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa.backbone import Backbone
from medusa.losses import IGNORE, true_path
from pipelines.dataset import BLOCK, Order, Pack, collate, length_of, num_positions, pack_rows
from pipelines.records import Answer

_TOKENS_AT_ONCE = 2048
_LOGIT_ROWS = 256
_SHARE_TYPE = torch.float16


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What the heads learn from: `hidden` [P,D], `targets` [P,K] (−100: none), the `path` [P,K] of tokens that the answer
    goes on with, which hydra heads read, and, where asked for, the backbone's best tokens at each target [P,K,R] with
    their shares. Every position has the first head's target."""

    hidden: Tensor
    targets: Tensor
    path: Tensor
    soft_tokens: Tensor
    soft_shares: Tensor

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def at(self, rows: Tensor | slice) -> Positions:
        return Positions(**{name: value[rows] for name, value in vars(self).items()})

    def to(self, device: torch.device | str) -> Positions:
        return Positions(**{name: value.to(device) for name, value in vars(self).items()})

    @staticmethod
    def joined(parts: Sequence[Positions]) -> Positions:
        return Positions(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})


@dataclass(frozen=True, kw_only=True)
class PositionsReader:
    """Runs the backbone over packs. `ranks` 0 leaves soft labels out."""

    backbone: Backbone
    num_heads: int
    ranks: int = 0

    @property
    def bytes_per_position(self) -> int:
        soft = self.num_heads * self.ranks * (torch.int32.itemsize + _SHARE_TYPE.itemsize)
        tokens = 2 * self.num_heads * torch.int32.itemsize
        return self.backbone.hidden_size * self.backbone.dtype.itemsize + soft + tokens

    def read(self, packs: Sequence[Pack]) -> Iterator[Positions]:
        """The positions of each pack, in order; packs share a forward while it stays small."""
        at_once: list[Pack] = []
        longest = 0
        for pack in packs:
            longest = max(longest, sum(map(length_of, pack)))
            if at_once and longest * (len(at_once) + 1) > _TOKENS_AT_ONCE:
                yield from self._forward(at_once)
                at_once, longest = [], sum(map(length_of, pack))
            at_once.append(pack)
        if at_once:
            yield from self._forward(at_once)

    def read_all(self, rows: Sequence[Answer], capacity: int) -> Positions:
        """The positions of all rows at once, in memory."""
        parts = list(self.read(pack_rows(rows, capacity)))
        return Positions.joined(parts) if parts else self.empty()

    @torch.no_grad()
    def _forward(self, packs: Sequence[Pack]) -> list[Positions]:
        batch = collate(packs, self.num_heads, self.backbone.device)
        hidden = self.backbone.hidden_states(batch.ids, batch.documents)
        found = []
        for b in range(len(packs)):
            kept = batch.targets[b, :, 0] != IGNORE
            tokens, shares = self._soft(hidden[b], batch.targets[b], kept)
            found.append(
                Positions(
                    hidden=hidden[b, kept].clone(),
                    targets=batch.targets[b, kept].to(torch.int32),
                    path=true_path(batch.ids[b], self.num_heads)[kept].to(torch.int32),
                    soft_tokens=tokens,
                    soft_shares=shares,
                )
            )
        return found

    def _soft(self, hidden: Tensor, targets: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [S,D] → the backbone's best tokens and shares [P,K,R] where the heads' targets stand.

        The backbone itself predicts the token of target t + k + 1 at t + k.
        """
        places = kept.nonzero()[:, 0, None] + torch.arange(1, self.num_heads + 1, device=kept.device)
        real = targets[kept] != IGNORE
        if not self.ranks:
            empty = torch.empty((*real.shape, 0), device=hidden.device)
            return empty.to(torch.int32), empty.to(_SHARE_TYPE)
        wanted = places[real].unique()
        logits = [
            self.backbone.logits(rows).float().topk(self.ranks, dim=-1) for rows in hidden[wanted].split(_LOGIT_ROWS)
        ]
        tokens = torch.zeros(len(hidden), self.ranks, dtype=torch.int32, device=hidden.device)
        shares = torch.zeros(len(hidden), self.ranks, device=hidden.device)
        if logits:
            tokens[wanted] = torch.cat([best.indices for best in logits]).to(torch.int32)
            shares[wanted] = torch.cat([best.values for best in logits]).softmax(dim=-1)
        inside = places.clamp_max(len(hidden) - 1)
        return tokens[inside], (shares[inside] * real.unsqueeze(-1)).to(_SHARE_TYPE)

    def empty(self) -> Positions:
        """No positions: types and shapes alone."""
        backbone, soft = self.backbone, (0, self.num_heads, self.ranks)
        return Positions(
            hidden=torch.empty(0, backbone.hidden_size, dtype=backbone.dtype, device=backbone.device),
            targets=torch.empty(0, self.num_heads, dtype=torch.int32, device=backbone.device),
            path=torch.empty(0, self.num_heads, dtype=torch.int32, device=backbone.device),
            soft_tokens=torch.empty(soft, dtype=torch.int32, device=backbone.device),
            soft_shares=torch.empty(soft, dtype=_SHARE_TYPE, device=backbone.device),
        )


class Lane:
    """One lane's positions in the order of training: all of them `kept`, or each pack computed when a step needs it."""

    def __init__(self, reader: PositionsReader, packs: Sequence[Pack], *, seed: int, kept: Positions | None = None):
        self.reader, self.packs, self.kept = reader, packs, kept
        self.order = Order(sizes=[sum(map(num_positions, pack)) for pack in packs], seed=seed)
        self._recent: OrderedDict[int, Positions] = OrderedDict()

    def __len__(self) -> int:
        return len(self.order)

    def batch(self, step: int, batch_size: int) -> Positions:
        """What the lane brings to a step, on the backbone's device."""
        items = self.order.batch(step, batch_size)
        return (self._computed(items) if self.kept is None else self.kept.at(items)).to(self.reader.backbone.device)

    def _computed(self, items: Tensor) -> Positions:
        packs = self.order.pack_of(items)
        needed = packs.unique().tolist()
        missing = [pack for pack in needed if pack not in self._recent]
        for pack, positions in zip(missing, self.reader.read([self.packs[pack] for pack in missing]), strict=True):
            self._recent[pack] = positions
        for pack in needed:
            self._recent.move_to_end(pack)
        while len(self._recent) > BLOCK + len(needed):
            self._recent.popitem(last=False)
        joined = Positions.joined([self._recent[pack] for pack in needed])
        starts = torch.tensor([0, *(len(self._recent[pack]) for pack in needed)]).cumsum(0)
        place = torch.searchsorted(torch.tensor(needed), packs)
        return joined.at((starts[place] + items - self.order.offsets[packs]).to(joined.hidden.device))
