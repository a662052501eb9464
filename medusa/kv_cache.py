"""Keys and values of a batch of sequences, one slot each. Knows positions; knows no tokens and no tree.

    Y layers, R slots, S physical positions, H key/value heads, E head size, B rows in use, N new positions
All layers share one tensor [Y·2, R, H, S, E], so compaction and moves are one operation for the whole model. What one
head attends to lies in one piece: with many sequences in a batch, reading it is what a step spends its time on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class KVCache:
    """Slots of fixed size. Transformers calls `update` in every layer; everything else is the decoder's.

    Write offsets are not part of transformers' call, so they live here: `begin` sets them for the coming forward.
    A slot is zeroed when allocated and again when reused: a masked position may hold anything finite, but NaN times a
    zero attention weight is NaN.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        fused: bool = False,
    ) -> None:
        """`fused`: compaction is a Triton kernel."""
        self.num_slots = num_slots
        self.capacity = capacity
        self.store = torch.zeros(
            num_layers * 2, num_slots, num_kv_heads, capacity, head_dim, dtype=dtype, device=device
        )
        self._flat = self.store.view(num_layers * 2, num_slots * num_kv_heads * capacity, head_dim)
        self._heads = torch.arange(num_kv_heads, device=device) * capacity
        self._rows = slice(0, 0)
        self._length = 0
        self.offsets = torch.zeros(0, dtype=torch.long, device=device)
        self._num_new = 0
        self._targets: Tensor | None = None  # where `update` writes, found by the first one of a forward
        self._used = [0] * num_slots
        self._fused = fused

    def begin(self, *, first_slot: int, offsets: Tensor, num_new: int, length: int) -> None:
        """The coming forward writes `num_new` positions behind `offsets` [B] in slots first_slot…first_slot+B−1.

        Attention then sees the first `length` positions of those slots. The caller keeps offsets + num_new ≤ length.
        """
        batch = offsets.shape[0]
        assert first_slot + batch <= self.num_slots and length <= self.capacity, "the engine admits what fits"
        self.offsets = offsets
        self._num_new = num_new
        self._targets = None
        self._rows = slice(first_slot, first_slot + batch)
        self._length = length
        self.mark_used(first_slot, batch, length)

    def mark_used(self, first_slot: int, num_rows: int, length: int) -> None:
        """Positions below `length` of these slots may have been written: by a forward that was replayed, not begun."""
        for slot in range(first_slot, first_slot + num_rows):
            if self._used[slot] < length:
                self._used[slot] = length

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Transformers' contract: key, value [B,H,N,E] in, all that attention may see [B,H,length,E] out (views)."""
        if self._targets is None:
            new_places = torch.arange(self._num_new, device=self.offsets.device)
            self._targets = (self._base(self._rows.start, self.offsets)[..., None] + new_places).flatten()
        for plane, new in ((2 * layer, key), (2 * layer + 1, value)):
            self._flat[plane].index_copy_(0, self._targets, new.reshape(-1, new.shape[-1]))
        return self.seen(layer)

    def seen(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B,H,length,E] that the forward's attention may see in this layer: views into the cache, so who
        writes new ones there behind `offsets` needs no `update`."""
        seen = self.store[2 * layer : 2 * layer + 2, self._rows, :, : self._length]
        return seen[0], seen[1]

    def get_seq_length(self, layer: int = 0) -> int:
        """Transformers asks only when no positions are given; the decoder always gives them."""
        return 0

    def compact(self, *, first_slot: int, offsets: Tensor, kept: Tensor) -> None:
        """Keep the accepted path: position offsets+kept[:,j] moves to offsets+j, for every layer.

        kept [B,L+1] names tree nodes in path order; a negative entry keeps its place as it is. Sources and targets
        overlap, so everything is read before anything is written.
        """
        if self._fused:
            from medusa import step_triton  # Triton is where CUDA builds of torch are

            step_triton.compact(self.store[:, first_slot:], offsets, kept)
            return
        base = self._base(first_slot, offsets)[..., None]
        place = torch.arange(kept.shape[1], device=offsets.device).expand_as(kept)
        source = (base + torch.where(kept >= 0, kept, place)[:, None]).flatten()
        target = (base + place[:, None]).flatten()
        self._flat.index_copy_(1, target, self._flat.index_select(1, source))

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a sequence of `length` positions into another slot."""
        self.free(target)
        self.store[:, target, :, :length] = self.store[:, source, :, :length]
        self._used[target] = length

    def read(self, slot: int, start: int, stop: int) -> Tensor:
        """A copy of positions start…stop−1 of a slot [Y·2,H,stop−start,E]."""
        return self.store[:, slot, :, start:stop].clone()

    def write(self, slot: int, pieces: Sequence[Tensor]) -> int:
        """Fill a free slot from its beginning with pieces [Y·2,H,·,E], as `read` gives them; how many positions that was."""
        assert self._used[slot] == 0, "the slot is free"
        length = 0
        for piece in pieces:
            self.store[:, slot, :, length : length + piece.shape[2]] = piece
            length += piece.shape[2]
        self._used[slot] = length
        return length

    def free(self, slot: int) -> None:
        """Zero a slot for its next user."""
        self.store[:, slot, :, : self._used[slot]] = 0
        self._used[slot] = 0

    def _base(self, first_slot: int, offsets: Tensor) -> Tensor:
        """[B,H]: where the position behind offsets [B] lies in the flat store, for each head."""
        slots = torch.arange(first_slot, first_slot + offsets.shape[0], device=offsets.device)
        return (slots * (len(self._heads) * self.capacity) + offsets)[:, None] + self._heads
